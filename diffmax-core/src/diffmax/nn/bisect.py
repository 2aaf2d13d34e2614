"""The row operator as a module."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from diffmax.maps import AlphaMap
from diffmax.nn._checkpoint import AlphaFromSoftmax
from diffmax.operators.common import nested
from diffmax.operators.common.capture import captured, is_captured
from diffmax.operators.common.checks import check_alpha_tensor, check_flag, check_scores, check_settings
from diffmax.operators.common.numerics import accumulation_dtype
from diffmax.operators.rows.api import Alpha, diffmax_bisect, normalize


class DiffmaxBisectModule(AlphaFromSoftmax):
    """`diffmax_bisect` as a module, with an alpha that is fixed, provided by a function, or learned.

    Args:
        alpha: As for `diffmax_bisect`. A tensor becomes a buffer, which keeps its dtype if the module is converted to float16
            or bfloat16; an nn.Parameter becomes a parameter of the module. A checkpoint without an alpha, such as one of a
            softmax model, loads with `strict=True` and leaves alpha unchanged.
        dim, n_iter, ensure_sum_one: As for `diffmax_bisect`.
        alpha_map: A `HillMap`, `TanhMap` or `ExpMap`. With it alpha is learned: the module has one trainable parameter,
            `log_beta`, of alpha's shape (a tensor alpha of shape (H, 1, 1): one per head), and starts at `alpha`. Weight decay
            pulls it to 0, and the learning rate of a model is too small for it: use `diffmax.nn.param_groups`.
    Raises:
        TypeError: An argument has the wrong type, or alpha is a function although an alpha_map is given.
        ValueError: alpha lies outside (0, 1) or the range of alpha_map, or n_iter is less than 1.
    Example:
        >>> import torch
        >>> from diffmax import HillMap
        >>> attend = DiffmaxBisectModule(torch.full((4, 1, 1), 0.85), alpha_map=HillMap(c=0.3))
        >>> attend(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
        >>> attend.log_beta.shape
        torch.Size([4, 1, 1])
    """

    alpha: Alpha
    log_beta: nn.Parameter

    def __init__(
        self,
        alpha: Alpha = 0.9,
        dim: int = -1,
        n_iter: int = 50,
        ensure_sum_one: bool = True,
        alpha_map: AlphaMap | None = None,
    ) -> None:
        super().__init__()
        check_settings("DiffmaxBisectModule", alpha, dim, n_iter)
        check_flag("DiffmaxBisectModule", "ensure_sum_one", ensure_sum_one)
        self.dim, self.n_iter, self.ensure_sum_one, self.alpha_map = dim, n_iter, ensure_sum_one, alpha_map
        if alpha_map is None:
            self._store("alpha", alpha)
            return
        if not isinstance(alpha_map, AlphaMap):
            raise TypeError(f"DiffmaxBisectModule: alpha_map must be a HillMap, TanhMap or ExpMap, got {alpha_map!r}")
        if not isinstance(alpha, (float, Tensor)):
            raise TypeError(
                f"DiffmaxBisectModule: with an alpha_map, alpha must be a float or a tensor to start from, got {alpha!r}"
            )
        if isinstance(alpha, Tensor):
            start = alpha_map.inverse(alpha.detach().double()).log().to(alpha.dtype)
            self._store_learned("log_beta", start, start.clone())
        else:
            first = math.log(alpha_map.inverse(alpha))
            self._store_learned("log_beta", torch.tensor(first, device="cpu"), torch.tensor(first, dtype=torch.float32))

    @property
    def current_alpha(self) -> float | Tensor:
        """The alpha of the next call: a float, or a tensor through which the learned parameter gets its gradient."""
        if self.alpha_map is not None:
            return 1 - self.alpha_map.one_minus_alpha_of_log(self.log_beta)
        return self.alpha() if callable(self.alpha) else self.alpha

    def forward(self, X: Tensor) -> Tensor:
        """Weights for scores X; see `diffmax_bisect`."""
        if is_captured(X):
            return captured(self, X)  # type: ignore[no-any-return]
        if self.alpha_map is None:
            return diffmax_bisect(X, self.alpha, self.dim, self.n_iter, self.ensure_sum_one)
        if isinstance(X, Tensor) and X.is_nested:
            return nested.weights("DiffmaxBisectModule", X, self.dim, partial(self._learned, self.alpha_map))
        return self._learned(self.alpha_map, X, self.dim)

    def _learned(self, alpha_map: AlphaMap, X: Tensor, dim: int) -> Tensor:
        dim = check_scores("DiffmaxBisectModule", X, dim, self.n_iter)
        check_alpha_tensor("DiffmaxBisectModule", X, self.log_beta, dim)
        # from the map, because alpha may round to 1 while 1 - alpha still has all its digits
        acc = accumulation_dtype(X.dtype)
        e = alpha_map.one_minus_alpha_of_log(self.log_beta.to(torch.promote_types(self.log_beta.dtype, acc)))
        return normalize(X, 0.0, e.to(device=X.device, dtype=acc), dim, self.n_iter, self.ensure_sum_one)

    def extra_repr(self) -> str:
        """The settings that repr shows."""
        shown = f"alpha_map={self.alpha_map}" if self.alpha_map is not None else f"alpha={self.alpha}"
        return f"{shown}, dim={self.dim}, n_iter={self.n_iter}, ensure_sum_one={self.ensure_sum_one}"
