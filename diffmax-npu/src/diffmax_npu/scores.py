"""The scores of one block of attention: products, cap, what is added, what is hidden, what dropout keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    @property
    def e(self) -> float | Tensor:
        """e; where heads differ (1, H_kv, H / H_kv, 1, 1)."""
        return self._per_head(self.call.e) if isinstance(self.call.e, Tensor) else self.call.e

    def e_of(self, block: Block) -> float | Tensor:
        """The block's e, to broadcast against its scores."""
        e = self.e
        return block.of_scores(e) if isinstance(e, Tensor) else e

    def capped(self, block: Block) -> Tensor:
        """Scaled and capped products, in float32: (batch, key heads, query heads, queries, keys) of the block."""
        call, query = self.call, block.of_queries(self.query).to(torch.float32) * self.call.scale
        key = block.of_keys(self.key).to(torch.float32)
        scores = torch.matmul(query.flatten(2, 3), key.mT).view(*query.shape[:4], key.shape[2])
        return scores if call.softcap == 0 else scores.div_(call.softcap).tanh_().mul_(call.softcap)

    def complete(self, block: Block, capped: Tensor) -> Tensor:
        """The capped scores, which are given up, with what is added and -inf where nothing is seen; the sink's come last."""
        call = self.call
        if call.bias is not None:
            capped = capped.add_(block.of_scores(self.grouped(call.bias)))
        behind = self._behind(block) if self._looks_at_places(block) else None
        if call.alibi is not None and behind is not None:
            capped = capped.sub_(block.of_scores(self._per_head(call.alibi)) * behind.abs())
        hidden = self._hidden(block, behind)
        if hidden is not None:
            capped = capped.masked_fill_(hidden, -torch.inf)
        if call.sink is None:
            return capped
        return torch.cat([capped, self.sink(block).expand(*capped.shape[:4], 1)], 4)

    def sink(self, block: Block) -> Tensor:
        """The block's sinks, to broadcast against its scores."""
        if self.call.sink is None:
            raise ValueError("the call has no sink")
        return block.of_scores(self._per_head(self.call.sink))

    def passed(self, block: Block) -> Tensor | None:
        """What dropout multiplies the block's weights by: 0 or 1 / (1 - dropout_p). None: nothing is dropped."""
        call = self.call
        if call.seed is None or call.dropout_p == 0:
            return None
        batch, kv_heads, group = self.query.shape[:3]
        head = torch.arange(batch * kv_heads * group, device=call.seed.device).view(batch, kv_heads, group, 1, 1)
        seed = call.seed & 0xFFFFFFFF
        word, *_ = philox(
            (self._places(block.keys), self._places(block.rows).unsqueeze(1), block.of_scores(head), 0), (seed[0], seed[1])
        )
        return torch.ge(torch.as_tensor(word), threshold(call.dropout_p)).to(torch.float32) / (1 - call.dropout_p)

    def grouped(self, t: Tensor) -> Tensor:
        """(B, H, L, S), of which axes may have size 1, by key heads."""
        return by_groups(t, self.key.shape[1])

    def _per_head(self, t: Tensor) -> Tensor:
        """(H,) or (B, H), to broadcast against the scores."""
        return t.reshape(-1, *self.query.shape[1:3], 1, 1)

    def _places(self, part: slice) -> Tensor:
        return torch.arange(part.start, part.stop, device=self.query.device)

    def _behind(self, block: Block) -> Tensor:
        """How far each key lies behind the place at which each query stands."""
        if self.lengths is not None:
            shift: int | Tensor = self.lengths[1] - self.lengths[0]
        else:
            shift = self.key.shape[2] - self.query.shape[3]
        shift = shift if self.call.lower_right else 0
        distance = self._places(block.keys) - self._places(block.rows).unsqueeze(1)
        return distance - (block.of_scores(shift) if isinstance(shift, Tensor) else shift)

    def _looks_at_places(self, block: Block) -> bool:
        return self.call.alibi is not None or self.call.left >= 0 or self.call.right >= 0

    def _hidden(self, block: Block, behind: Tensor | None) -> Tensor | None:
        call = self.call
        hidden = []
        if call.mask is not None:
            hidden.append(~block.of_scores(self.grouped(call.mask)))
        if behind is not None and call.left >= 0:
            hidden.append(behind < -call.left)
        if behind is not None and call.right >= 0:
            hidden.append(behind > call.right)
        if self.lengths is not None:
            length, many = (block.of_scores(t) for t in self.lengths)
            hidden.append(self._places(block.rows).unsqueeze(1) >= length)
            hidden.append(self._places(block.keys) >= many)
        together = None
        for some in hidden:
            together = some if together is None else together | some
        return together
