"""The scores of one block of attention: scaled products, and the region on which core's rules act; what dropout keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffmax.kernels.tools import Region, rules
from diffmax.plugin import AttentionCall
from diffmax.reference.dropout import philox, threshold
from diffmax_npu.blocks import Block, by_groups


@dataclass(frozen=True, eq=False)
class Scores:
    """What the scores of a call are made of; tensors per head are already grouped by key head.

    Attributes:
        query: (B, H_kv, H / H_kv, L, D).
        key: (B, H_kv, S, D).
        call: The rest.
        lengths: Of packed sequences, laid side by side in the batch: how many queries and keys each has, (B, 1, 1, 1, 1).
    """

    query: Tensor
    key: Tensor
    call: AttentionCall
    lengths: tuple[Tensor, Tensor] | None

    def e_of(self, block: Block) -> float | Tensor:
        """The block's e, to broadcast against its scores."""
        e = self.call.e
        return block.of_scores(self.per_head(e)) if isinstance(e, Tensor) else e

    def of(self, block: Block) -> Tensor:
        """The block's scores after every rule, with the sink's column, in float32."""
        return rules.apply(self._products(block), self.call, BlockRegion(self, block))

    def with_slope(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """And their derivative in the products; None: 1."""
        return rules.apply_with_slope(self._products(block), self.call, BlockRegion(self, block))

    def passed(self, block: Block) -> Tensor | None:
        """What dropout multiplies the block's weights by: 0 or 1 / (1 - dropout_p). None: nothing is dropped."""
        call = self.call
        if call.seed is None or call.dropout_p == 0:
            return None
        batch, kv_heads, group = self.query.shape[:3]
        head = torch.arange(batch * kv_heads * group, device=call.seed.device).view(batch, kv_heads, group, 1, 1)
        seed = call.seed & 0xFFFFFFFF
        word, *_ = philox(
            (self.positions(block.keys), self.positions(block.rows).unsqueeze(1), block.of_scores(head), 0), (seed[0], seed[1])
        )
        return torch.ge(torch.as_tensor(word), threshold(call.dropout_p)).to(torch.float32) / (1 - call.dropout_p)

    def per_head(self, t: Tensor) -> Tensor:
        """(H,) or (B, H), to broadcast against the scores."""
        return t.reshape(-1, *self.query.shape[1:3], 1, 1)

    def positions(self, part: slice) -> Tensor:
        """The numbers of a range."""
        return torch.arange(part.start, part.stop, device=self.query.device)

    def _products(self, block: Block) -> Tensor:
        """Scaled, in float32: (batch, key heads, query heads, queries, keys) of the block."""
        query = block.of_queries(self.query).to(torch.float32) * self.call.scale
        key = block.of_keys(self.key).to(torch.float32)
        return torch.matmul(query.flatten(2, 3), key.mT).view(*query.shape[:4], key.shape[2])


@dataclass(frozen=True, eq=False)
class BlockRegion(Region):
    """A block of a call's scores."""

    scores: Scores
    block: Block

    in_place = True

    def queries(self) -> Tensor:
        """(rows, 1), or for packed sequences (batch, 1, 1, rows, 1)."""
        scores, block = self.scores, self.block
        positions = scores.positions(block.rows).unsqueeze(1)
        if not scores.call.lower_right:
            return positions
        if scores.lengths is None:
            return positions + (scores.key.shape[2] - scores.query.shape[3])
        return positions + block.of_scores(scores.lengths[1] - scores.lengths[0])

    def keys(self) -> Tensor:
        """(keys,)."""
        return self.scores.positions(self.block.keys)

    def of_heads(self, t: Tensor) -> Tensor:
        """The block's heads."""
        return self.block.of_scores(self.scores.per_head(t))

    def of_scores(self, t: Tensor) -> Tensor:
        """The block's part of a mask or a bias."""
        return self.block.of_scores(by_groups(t, self.scores.key.shape[1]))

    def padding(self) -> tuple[Tensor, ...]:
        """Queries and keys behind the end of a packed sequence."""
        if self.scores.lengths is None:
            return ()
        length, many = (self.block.of_scores(t) for t in self.scores.lengths)
        return self.scores.positions(self.block.rows).unsqueeze(1) >= length, self.keys() >= many
