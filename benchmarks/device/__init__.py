"""`python -m benchmarks.device`: everything that a device is asked in its first ten minutes; docs/device.md says how to run it.

Without torch: `__main__`, `orchestrate`, `crew`, `processes`, `lines`, `stages`, `cells`, `cells_*`, `kits`, and what makes
reports of the lines. The others run in the processes of workers.
"""
