"""The scores of one block of attention: scaled products, the region for core's rules, and dropout factors."""

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
    """The inputs of the scores of a call; tensors per head are already grouped by key head.

    Attributes:
        query: (B, H_kv, H / H_kv, L, D).
        key: (B, H_kv, S, D).
        call: All other arguments.
        lengths: For packed sequences in a padded batch: the number of queries and of keys of each, (B, 1, 1, 1, 1).
    """

    query: Tensor
    key: Tensor
    call: AttentionCall
    lengths: tuple[Tensor, Tensor] | None

    def e_of(self, block: Block) -> float | Tensor:
        """The e of the block, in a shape that broadcasts against its scores."""
        e = self.call.e
        return block.of_scores(self.per_head(e)) if isinstance(e, Tensor) else e

    def of(self, block: Block) -> Tensor:
        """The scores of the block after all rules, with the column of the sink, in float32."""
        return rules.apply(self._products(block), self.call, BlockRegion(self, block))

    def with_slope(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """The same scores, and their derivative for the products; None: 1."""
        return rules.apply_with_slope(self._products(block), self.call, BlockRegion(self, block))

    def passed(self, block: Block) -> Tensor | None:
        """Dropout factors of the block's weights: 0 or 1 / (1 - dropout_p). None: no dropout."""
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
        """(H,) or (B, H), in a shape that broadcasts against the scores."""
        return t.reshape(-1, *self.query.shape[1:3], 1, 1)

    def positions(self, part: slice) -> Tensor:
        """The numbers of a range."""
        return torch.arange(part.start, part.stop, device=self.query.device)

    def _products(self, block: Block) -> Tensor:
        """The scaled products of the block in float32: (batch, key heads, query heads, queries, keys)."""
        query = block.of_queries(self.query).to(torch.float32) * self.call.scale
        key = block.of_keys(self.key).to(torch.float32)
        return torch.matmul(query.flatten(2, 3), key.mT).view(*query.shape[:4], key.shape[2])


@dataclass(frozen=True, eq=False)
class BlockRegion(Region):
    """The region of a block of scores."""

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
        """The heads of the block."""
        return self.block.of_scores(self.scores.per_head(t))

    def of_scores(self, t: Tensor) -> Tensor:
        """The part of a mask or a bias for the block."""
        return self.block.of_scores(by_groups(t, self.scores.key.shape[1]))

    def padding(self) -> tuple[Tensor, ...]:
        """The padding of queries and keys, after the end of each packed sequence."""
        if self.scores.lengths is None:
            return ()
        length, many = (self.block.of_scores(t) for t in self.scores.lengths)
        return self.scores.positions(self.block.rows).unsqueeze(1) >= length, self.keys() >= many
