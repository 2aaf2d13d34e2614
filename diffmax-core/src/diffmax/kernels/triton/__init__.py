"""Kernels in Triton, for every vendor whose compiler takes them: one folder for each operator, and what they share in `common`.

Only the `launch` modules import torch, and nothing here knows a vendor: what differs (tuning tables, the hardware's logarithm)
is handed to `RowOperator`, `AttentionOperator` and `Decoder`.
"""
