"""diffmax on NVIDIA GPUs. Nothing to import here: diffmax finds it by its entry point."""
