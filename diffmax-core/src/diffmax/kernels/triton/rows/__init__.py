"""The row operator in Triton: `launch.RowOperator` launches it."""
