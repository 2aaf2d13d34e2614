"""The former path of `diffmax.reference.dropout`."""

from diffmax.reference.dropout import kept, philox, threshold

__all__ = ["kept", "philox", "threshold"]
