"""The alpha of a module with heads: fixed, a parameter, or learned through a map."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmax.maps import AlphaMap
from diffmax.nn._checkpoint import AlphaFromSoftmax
from diffmax.operators.common.checks import one_minus_alpha
from diffmax.operators.common.numerics import accumulation_dtype


class HeadAlpha(AlphaFromSoftmax):
    """A module whose alpha is a float, a tensor with one entry per head, or computed from the parameter `log_beta`."""

    alpha: float | Tensor
    log_beta: nn.Parameter
    alpha_map: AlphaMap | None

    def _set_alpha(
        self,
        alpha: float | Tensor,
        alpha_map: AlphaMap | None,
        heads: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        name = type(self).__name__
        self.alpha_map = alpha_map
        if alpha_map is not None and not isinstance(alpha_map, AlphaMap):
            raise TypeError(f"{name}: alpha_map must be a HillMap, TanhMap or ExpMap, got {alpha_map!r}")
        check_alpha_of_heads(name, alpha, heads, alpha_map is None)
        if alpha_map is None:
            if isinstance(alpha, Tensor) and not isinstance(alpha, nn.Parameter):
                alpha = alpha.to(device)
            self._store("alpha", alpha)
        elif isinstance(alpha, Tensor):
            start = alpha_map.inverse(alpha.detach().double()).log().float()
            self._store_learned("log_beta", start, start.expand(heads).clone().to(device=device, dtype=dtype))
        else:
            first = math.log(alpha_map.inverse(float(alpha)))
            self._store_learned(
                "log_beta", torch.tensor(first, device="cpu"), torch.full((heads,), first, device=device, dtype=dtype)
            )

    @property
    def current_alpha(self) -> float | Tensor:
        """The alpha of the next call: a float, or a tensor through which the learned parameter gets its gradient."""
        if self.alpha_map is None:
            return self.alpha
        return 1 - self.alpha_map.one_minus_alpha_of_log(self.log_beta)

    def _alpha_for(self, q: Tensor) -> float | Tensor:
        if self.alpha_map is None:
            return self.alpha
        # never in half precision, because the digits of 1 - alpha matter
        dtype = torch.promote_types(self.log_beta.dtype, accumulation_dtype(q.dtype))
        return 1 - self.alpha_map.one_minus_alpha_of_log(self.log_beta.to(dtype))


def check_alpha_of_heads(name: str, alpha: float | Tensor, heads: int, values: bool = True) -> None:
    """Refuse what is no alpha, and a tensor that has not one for each head; `values`: of a tensor those too."""
    if not isinstance(alpha, Tensor):
        one_minus_alpha(name, torch.empty(1), alpha, 0)
        return
    if alpha.shape not in ((), (heads,)):
        raise ValueError(
            f"{name}: a tensor alpha must have shape () or ({heads},), got {tuple(alpha.shape)}\n"
            f"the module has {heads} query heads"
        )
    if values:
        one_minus_alpha(name, alpha, alpha, alpha.ndim)  # beside itself, every alpha has its place


def shown_weights(module: HeadAlpha) -> str:
    """For repr: whether a module's weights are those of softmax or of diffmax, and which alpha these have."""
    how = f"weights={module.weights!r}"
    if module.weights == "softmax":
        return how
    return f"{how}, alpha={module.alpha}" if module.alpha_map is None else f"{how}, alpha_map={module.alpha_map}"
