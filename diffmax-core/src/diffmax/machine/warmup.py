"""`diffmax.warmup`: have the chosen backend compile its kernels now rather than at the first call."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch

from diffmax.machine.dispatch import choose, describe, import_function, selected
from diffmax.operators.common.spec import SPECS, Needed

ROW_LENGTH, HEAD_DIM = 1024, 64  # what a call without lengths and head sizes prepares
_OF_ALPHA = frozenset({"tensor_alpha", "alpha_gradient"})  # said by `alphas` and `backward`


def warmup(
    lengths: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    alphas: Sequence[float | None] = (0.9,),
    *,
    head_dims: Sequence[int | tuple[int, int]] | None = None,
    features: Collection[str] = (),
    decoding: bool = False,
    backward: bool = True,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> dict[str, int]:
    """Compile what later calls need, so that none of them stops for it, and so that they can be captured into a CUDA graph.

    `lengths` prepares `diffmax_bisect`, `head_dims` attention. Neither: rows of 1024 entries, and attention and decoding with
    heads of 64, plain and causal: what an image of a container is built with. Kernels are compiled for ranges of lengths, and
    for ranges of alpha, not for each: one length and one alpha of those to come are enough where they are alike. What is
    compiled stays in the compiler's cache on disk, for later processes too.

    Args:
        lengths: Of the rows to come.
        dtypes: Of the scores, or of query, key and value.
        alphas: Floats; None for alpha as a tensor. 1/2, 2/3, 3/4, 4/5 and 9/10 have kernels of their own.
        head_dims: Sizes of a query and, if it is another, of a value, as a pair.
        features: What the calls of attention use together, of `diffmax.plugin.FEATURES`, such as {"causal", "gqa"}.
        decoding: Whether to prepare `attention_with_kvcache` too.
        backward: Whether the backward will be needed too.
        device: Where the calls will run.
        backend: A name from `diffmax.backends()`. None: the one that calls without a name would go to.
    Returns:
        For each backend that serves one of the dtypes, how many cases it prepared: 0 if it compiles nothing at run time.
    Raises:
        ValueError: A length or a size of heads is below 1, an alpha outside (0, 1), or a feature unknown to attention.
        NoBackendError: No backend, or not the named one, takes such calls.
    Example:
        >>> import diffmax
        >>> diffmax.warmup([1024, 4096], backend="reference")
        {'reference': 0}
    """
    combinations: tuple[Collection[str], ...] = (features,)
    if lengths is None and head_dims is None:
        lengths, head_dims, decoding = (ROW_LENGTH,), (HEAD_DIM,), True
        combinations = (features, {*features, "causal"})
    sizes = [(size, size) if isinstance(size, int) else size for size in head_dims or ()]
    _check(lengths or (), sizes, alphas, features)
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    needed = Needed(lengths or (), sizes, [frozenset(some) for some in combinations], decoding)
    prepared: dict[str, int] = {}
    for dtype, alpha in itertools.product(dtypes, alphas):
        e, name = None if alpha is None else 1 - alpha, selected(backend)
        of_alpha = frozenset({"tensor_alpha"} if alpha is None else ())
        for spec in SPECS.values():
            for operator, asked, head_dims, its_sizes in spec.prepares(needed):
                chosen = choose(describe(operator, place.type, dtype, asked | of_alpha, *head_dims), name)
                learned = frozenset({"alpha_gradient"} if alpha is None and backward else ())
                more = (asked | learned,) if spec.has_heads else ()
                target = chosen.provided[operator].warmup
                _count(prepared, chosen.name, target, place, dtype, *its_sizes, e, backward, *more)
    return prepared


def _count(prepared: dict[str, int], backend: str, target: str | None, *arguments: object) -> None:
    prepared.setdefault(backend, 0)
    if target is not None:
        import_function(target)(*arguments)
        prepared[backend] += 1


def _check(
    lengths: Sequence[int], sizes: Sequence[tuple[int, int]], alphas: Sequence[float | None], features: Collection[str]
) -> None:
    short = [length for length in lengths if length < 1]
    if short:
        raise ValueError(f"warmup: lengths must be at least 1, got {short[0]}")
    small = [size for size in sizes if min(size) < 1]
    if small:
        raise ValueError(f"warmup: head_dims must be at least 1, got {small[0]}")
    outside = [alpha for alpha in alphas if alpha is not None and not 0 < alpha < 1]
    if outside:
        raise ValueError(f"warmup: alphas must lie between 0 and 1, or be None for a tensor, got {outside[0]}")
    with_heads = [kernel.features for spec in SPECS.values() if spec.has_heads for kernel in spec.kernels.values()]
    known = frozenset[str]().union(*with_heads) - _OF_ALPHA
    unknown = sorted({*features} - known)
    if unknown:
        raise ValueError(f"warmup: no such feature of attention: {unknown[0]!r}, known: {', '.join(sorted(known))}")
