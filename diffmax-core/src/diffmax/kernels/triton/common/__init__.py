"""Shared by the Triton kernels of all operators: arithmetic, layouts, tuning tables."""
