"""Every operator in plain PyTorch: what the numbers are, and the backend of the last resort.

Here are the row operator's; `attention`, `decoding` and `dropout` are modules of their own.
"""

from diffmax.reference.rows import bisect, bisect_backward, bisect_jvp, retraced

__all__ = ["bisect", "bisect_backward", "bisect_jvp", "retraced"]
