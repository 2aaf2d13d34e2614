"""Bytes that a thread of a kernel may spill, by Triton's version, kernel and target: what is known, and why it stays."""

from __future__ import annotations

# (version, kernel, target) to bytes
SPILLS: dict[tuple[str, str, str], int] = {}


def allowed(version: str, kernel: str, target: str) -> int:
    """0 where nothing is listed."""
    return SPILLS.get((".".join(version.split(".")[:2]), kernel, target), 0)
