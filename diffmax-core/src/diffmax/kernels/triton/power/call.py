"""What power attention's launchers derive from a call: sizes, tables of monomials, columns of tokens, decays, strides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.call import aligned, strides
from diffmax.kernels.triton.common.launch import padded
from diffmax.operators.power.cost import chosen_chunk
from diffmax.operators.power.symmetric import expanded_dim, indices, multiplicities
from diffmax.plugin import PowerCall
from diffmax.reference.power import cumulated

Names = dict[str, Any]
TABLE = 128  # tables are filled up to a multiple of it, as of every tile of monomials
ROW = 16  # and states of a head likewise
VALUES = 128  # entries of a value that a program of the update has


@dataclass(frozen=True)
class Sizes:
    """Of a call. Without keys, queries have the positions 0, 1, ... and one chunk.

    Attributes:
        batch, heads, kv_heads, length, size, values, degree: As in the call.
        many: Number of positions.
        chunk, chunks: Positions of a chunk, and how many there are.
        first: The first chunk that has a query.
        pairs: Whether there are keys.
        initial: Whether there is a state before the first key.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    many: int
    size: int
    values: int
    degree: int
    chunk: int
    chunks: int
    first: int
    pairs: bool
    initial: bool

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, call: PowerCall) -> Sizes:
        """From the arguments of the kernel contract."""
        batch, heads, length, size = query.shape
        kv_heads, values, pairs = key.shape[1], value.shape[3], key.shape[2] > 0
        many = key.shape[2] if pairs else length
        chunk = call.chunk or chosen_chunk(length, many, size, values, call.degree, heads / max(kv_heads, 1))
        chunk = min(chunk, many) if pairs else many
        chunk = max(chunk, 1)
        chunks = max(1, -(-many // chunk))
        first = min((many - length) // chunk, chunks - 1)
        initial = call.sums is not None
        return cls(batch, heads, kv_heads, length, many, size, values, call.degree, chunk, chunks, first, pairs, initial)

    @property
    def kv(self) -> int:
        """Heads of keys in all batch entries."""
        return self.batch * self.kv_heads

    @property
    def group(self) -> int:
        """Query heads for one head of keys."""
        return self.heads // self.kv_heads

    @property
    def entries(self) -> int:
        """P."""
        return expanded_dim(self.size, self.degree)

    @property
    def slot(self) -> int:
        """Numbers of a state in memory: sums, then norm, then nothing up to a multiple of 16."""
        return -(-self.entries * (self.values + 1) // ROW) * ROW

    def constants(self) -> Names:
        """Compile-time arguments of every kernel that knows states."""
        count = -(-self.entries // TABLE) * TABLE
        return {
            "HEAD_DIM": self.size, "VALUE_DIM": self.values, "DEGREE": self.degree,
            "ENTRIES": self.entries, "COUNT": count, "SLOT": self.slot,
        }  # fmt: skip

    def tiles(self) -> Names:
        """Padded head sizes."""
        return {"BLOCK_D": padded(self.size), "BLOCK_V": padded(self.values)}


@lru_cache(maxsize=32)
def tables(size: int, degree: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Variables (p, COUNT), uint8, and coefficients (COUNT,), float32, 0 behind the last monomial."""
    which, c = indices(size, degree), multiplicities(size, degree)
    missing = -which.shape[1] % TABLE
    variables = torch.nn.functional.pad(which.to(torch.uint8), (0, missing)).contiguous()
    return variables.to(device), torch.nn.functional.pad(c.float(), (0, missing)).to(device)


def columns(t: Tensor, scale: float, sizes: Sizes, first: int, tokens: int) -> Tensor:
    """(B * H, chunks from `first` on, D, row) float32 from (B, H, n, D) at the last n positions; 0 where there is no token."""
    batch, heads, many, size = t.shape
    chunks = sizes.chunks - first
    lead = sizes.many - many - first * sizes.chunk
    x = t.float() * scale if scale != 1.0 else t.float()
    behind = chunks * sizes.chunk - lead - many
    if lead or behind:
        x = torch.nn.functional.pad(x, (0, 0, lead, behind))
    x = x.reshape(batch * heads, chunks, sizes.chunk, size).transpose(2, 3)
    missing = -sizes.chunk % tokens
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


@dataclass(frozen=True)
class Decays:
    """Of the gates, float32. G is counted from the start of a position's chunk.

    Attributes:
        g: (B * H_kv, 2, positions): G as a sum of two numbers.
        since, until: (B * H_kv, positions), from the chunk's start to a position, and from it to the chunk's end.
        whole: (B * H_kv, chunks), of a chunk.
    """

    g: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor

    @classmethod
    def of(cls, log_gates: Tensor, sizes: Sizes) -> Decays:
        """From (B, H_kv, S)."""
        g = cumulated(log_gates).reshape(sizes.kv, sizes.many)
        missing = sizes.chunks * sizes.chunk - sizes.many
        if missing:  # the last G again, so that each chunk ends with its end
            g = torch.cat([g, g[:, -1:].expand(-1, missing)], 1)
        by_chunk = g.view(sizes.kv, sizes.chunks, sizes.chunk)
        ends = by_chunk[:, :, -1]
        starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
        within = (by_chunk - starts.unsqueeze(2)).reshape(g.shape)[:, : sizes.many]
        until = (ends.unsqueeze(2) - by_chunk).reshape(g.shape)[:, : sizes.many]
        high = within.float()
        parts = torch.stack([high, (within - high).float()], 1)
        return cls(parts, within.exp().float(), until.exp().float().contiguous(), (ends - starts).exp().float())


def strided(**tensors: Tensor) -> Names:
    """Strides of tensors by the kernels' letters for them, and whether all are aligned."""
    found: Names = {"ALIGNED": all(aligned(t) for t in tensors.values())}
    for letter, t in tensors.items():
        found |= strides(letter, t)
    return found


def segments(sizes: Sizes, numbers: int) -> list[tuple[int, int]]:
    """Chunks from .. to whose states, and one more, take at most so many numbers in memory at once; at least one chunk."""
    at_once = max(1, numbers // max(1, sizes.kv * sizes.slot) - 1)
    even = -(-sizes.chunks // -(-sizes.chunks // at_once))
    return [(a, min(a + even, sizes.chunks)) for a in range(0, sizes.chunks, even)]


def product(*numbers: int) -> int:
    """Of a grid."""
    return math.prod(numbers)
