"""`diffmax.warmup`: have the chosen backend compile its kernels now rather than at the first call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffmax._dispatch import choose, describe, import_function, selected


def warmup(
    lengths: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    alphas: Sequence[float | None] = (0.9,),
    *,
    backward: bool = True,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> dict[str, int]:
    """Compile what later calls need, so that none of them stops for it, and so that they can be captured into a CUDA graph.

    Kernels are compiled for ranges of lengths, and for ranges of alpha, not for each: one length and one alpha of those to come
    are enough where they are alike. What is compiled stays in the compiler's cache on disk, for later processes too.

    Args:
        lengths: Of the rows to come.
        dtypes: Of the scores.
        alphas: Floats; None for alpha as a tensor. 1/2, 2/3, 3/4, 4/5 and 9/10 have kernels of their own.
        backward: Whether the backward will be needed too.
        device: Where the calls will run.
        backend: A name from `diffmax.backends()`. None: the one that calls without a name would go to.
    Returns:
        For each backend that serves one of the dtypes, how many cases it prepared: 0 if it compiles nothing at run time.
    Raises:
        ValueError: A length is below 1, or an alpha outside (0, 1).
        NoBackendError: No backend, or not the named one, takes such calls.
    Example:
        >>> import diffmax
        >>> diffmax.warmup([1024, 4096], backend="reference")
        {'reference': 0}
    """
    short = [length for length in lengths if length < 1]
    if short:
        raise ValueError(f"warmup: lengths must be at least 1, got {short[0]}")
    outside = [alpha for alpha in alphas if alpha is not None and not 0 < alpha < 1]
    if outside:
        raise ValueError(f"warmup: alphas must lie between 0 and 1, or be None for a tensor, got {outside[0]}")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    prepared: dict[str, int] = {}
    for dtype in dtypes:
        for alpha in alphas:
            features = frozenset({"tensor_alpha"} if alpha is None else set())
            spec = describe("bisect", place.type, dtype, features)
            chosen = choose(spec, selected(backend))
            prepared.setdefault(chosen.name, 0)
            if chosen.warmup is not None:
                compile_ahead = import_function(chosen.warmup)
                for length in lengths:
                    compile_ahead(place, dtype, length, None if alpha is None else 1 - alpha, backward)
                    prepared[chosen.name] += 1
    return prepared
