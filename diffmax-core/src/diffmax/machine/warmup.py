"""`diffmax.warmup`: compile the kernels of the selected backend before the first call."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from diffmax.errors import NoBackendError
from diffmax.machine.dispatch import choose, describe, import_function, selected
from diffmax.operators.common.checks import is_whole
from diffmax.operators.common.spec import SPECS, Needed

ROW_LENGTH, HEAD_DIM = 1024, 64  # prepared by a call without lengths and head_dims
_OF_ALPHA = frozenset({"tensor_alpha", "alpha_gradient"})  # given by `alphas` and `backward`


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
    """Compile kernels for later calls, so that these do not wait for the compiler and can be captured into a CUDA graph.

    `lengths` prepares `diffmax_bisect`, `head_dims` prepares attention. Without either: rows of 1024 entries, and attention and
    decoding with head dimension 64, plain and causal, for example when a container image is built. Kernels are compiled for
    ranges of lengths and alphas: one representative of similar lengths and alphas is enough. The compiler caches kernels on
    disk, for later processes too.

    Args:
        lengths: Lengths of the rows.
        dtypes: Dtypes of the scores, or of query, key and value.
        alphas: Floats; None for alpha as a tensor. 1/2, 2/3, 3/4, 4/5 and 9/10 have separate kernels.
        head_dims: Head dimensions; a pair if queries and values differ.
        features: The `diffmax.plugin.FEATURES` that calls of attention use together, such as {"causal", "gqa"}. With one of
            "gates", "state" and "high_degree", power attention is prepared too.
        decoding: Whether to prepare `attention_with_kvcache` too.
        backward: Whether to prepare the backward too.
        device: Device of the calls.
        backend: A name from `diffmax.backends()`. None: the backend that runs such calls by default.
    Returns:
        For each backend that runs one of the dtypes, the number of prepared cases: 0 if it compiles nothing at run time.
    Raises:
        ValueError: A sequence is empty, a length or a head dimension is below 1, an alpha is outside (0, 1), or attention has
            no such feature.
        TypeError: What is a sequence above is none, or has an entry of another type.
        NoBackendError: No backend, or not the named one, can run such calls; or torch sees no such device.
    Example:
        >>> import diffmax
        >>> diffmax.warmup([1024, 4096], backend="reference")
        {'reference': 0}
    """
    lengths, dtypes, alphas, head_dims, features = (
        _listed(what, given)
        for what, given in (
            ("lengths", lengths),
            ("dtypes", dtypes),
            ("alphas", alphas),
            ("head_dims", head_dims),
            ("features", features),
        )
    )
    _check_types(lengths, dtypes, alphas)
    combinations: tuple[Collection[str], ...] = (features,)
    if lengths is None and head_dims is None:
        lengths, head_dims, decoding = (ROW_LENGTH,), (HEAD_DIM,), True
        combinations = (features, {*features, "causal"})
    sizes = [_pair(size) for size in head_dims or ()]
    if not lengths and not sizes:
        raise ValueError("warmup: lengths or head_dims must have an entry, got none\nleave both out for what is usual")
    _check(lengths or (), sizes, alphas, features)
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise NoBackendError(
            f"warmup: torch sees no device {str(device)!r} here; kernels are compiled on the machine that runs them"
        )
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    needed = Needed(lengths or (), sizes, [frozenset(some) for some in combinations], decoding)
    prepared: dict[str, int] = {}
    for dtype, alpha in itertools.product(dtypes, alphas):
        e, name = None if alpha is None else 1 - float(alpha), selected(backend)
        of_alpha = frozenset({"tensor_alpha"} if alpha is None else ())
        for spec in SPECS.values():
            for operator, asked, head_dims, its_sizes in spec.prepares(needed):
                chosen = choose(
                    describe(operator, place.type, dtype, asked | of_alpha & spec.kernels[operator].features, *head_dims), name
                )
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


def _listed(what: str, given: Any) -> Any:
    """What is given as a tuple; None stays None."""
    if given is None and what in ("lengths", "head_dims"):
        return None
    if isinstance(given, str) or not isinstance(given, Iterable) or (isinstance(given, torch.Tensor) and given.ndim == 0):
        raise TypeError(f"warmup: {what} must be a sequence, got {given!r}\npass [{given!r}]")
    found = tuple(given)
    if not found and what in ("dtypes", "alphas"):
        raise ValueError(f"warmup: {what} must have an entry, got none\nleave it out for what it is by default")
    return found


def _pair(size: Any) -> tuple[int, int]:
    """The head dimensions of queries and values."""
    pair = (size, size) if is_whole(size) else tuple(size) if isinstance(size, Iterable) else ()
    if len(pair) != 2 or not all(is_whole(number) for number in pair):
        raise TypeError(f"warmup: head_dims must be ints, or pairs of them, got {size!r}")
    return int(pair[0]), int(pair[1])


def _check_types(lengths: Any, dtypes: Any, alphas: Any) -> None:
    wrong = [dtype for dtype in dtypes if not isinstance(dtype, torch.dtype)]
    if wrong:
        raise TypeError(f"warmup: dtypes must be torch dtypes, such as torch.float32, got {wrong[0]!r}")
    wrong = [length for length in lengths or () if not is_whole(length)]
    if wrong:
        raise TypeError(f"warmup: lengths must be ints, got {wrong[0]!r}")
    wrong = [alpha for alpha in alphas if alpha is not None and (isinstance(alpha, bool) or not hasattr(alpha, "__float__"))]
    if wrong:
        raise TypeError(f"warmup: alphas must be floats, or None for alpha as a tensor, got {wrong[0]!r}")


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
