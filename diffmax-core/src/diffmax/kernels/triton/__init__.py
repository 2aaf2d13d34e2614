"""The row operator in Triton, for every vendor whose compiler takes it: `RowOperator` launches it.

`numerics` is the arithmetic, `rows_*` hold a row in registers, `long_*` stream it in tiles. Only `launch` imports torch, and
nothing here knows a vendor: what differs (tuning tables, the hardware's logarithm) is handed to `RowOperator`.
"""
