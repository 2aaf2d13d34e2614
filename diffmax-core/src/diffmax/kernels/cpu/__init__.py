"""Kernels for CPUs in plain PyTorch."""
