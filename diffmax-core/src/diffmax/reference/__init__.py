"""Every operator in plain PyTorch: the definition of the results, and the fallback backend.

This module has the row operator; `attention`, `decoding` and `dropout` are separate modules.
"""

from diffmax.reference.rows import bisect, bisect_backward, bisect_jvp, retraced

__all__ = ["bisect", "bisect_backward", "bisect_jvp", "retraced"]
