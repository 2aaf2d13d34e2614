"""What every operator needs: checks of arguments, accumulation dtypes, tracing, nested tensors."""
