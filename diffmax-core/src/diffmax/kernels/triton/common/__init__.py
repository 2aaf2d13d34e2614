"""What the Triton kernels of every operator share: arithmetic, layouts, tuning tables."""
