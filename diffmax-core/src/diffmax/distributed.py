"""Rows and sequences that are sharded over the ranks of a process group. See docs/distributed.md."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from diffmax.operators.attention import context_parallel
from diffmax.operators.common import messages
from diffmax.operators.common.autocast import autocast
from diffmax.operators.common.checks import OR_FUNCTION, check_flag, check_scores, one_minus_alpha
from diffmax.operators.decoding import sharded as sharded_cache
from diffmax.operators.decoding.api import Options, PageBounds, build_call
from diffmax.operators.loss.api import reduce_losses
from diffmax.operators.loss.checks import check_reduction, check_target_of_part, check_weight
from diffmax.operators.loss.of_shards import loss_of_parts
from diffmax.operators.rows import sharded  # noqa: F401 - defines the operator
from diffmax.operators.rows.api import Alpha

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from diffmax.nn import DiffmaxAttention

__all__ = [
    "attention_context_parallel",
    "attention_varlen_context_parallel",
    "attention_with_kvcache_sharded",
    "diffmax_bisect_sharded",
    "diffmax_loss_sharded",
    "shard_heads",
]


def diffmax_bisect_sharded(
    X: Tensor,
    alpha: Alpha = 0.9,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """`diffmax_bisect` for rows that are sharded over the ranks of a process group along `dim`, without gathering them.

    The result on each rank is its shard of `diffmax_bisect(torch.cat(all X, dim), alpha, dim)`: for vocabulary-parallel logits,
    or attention scores for sharded keys. All ranks of the group must make the call, and the backward pass.

    Args:
        X: This rank's shard of the scores. Shards may differ in length along `dim`, 0 included, but not in other sizes.
        alpha: As for `diffmax_bisect`, with the same value on every rank. The gradient of a tensor is already summed over all
            shards, the same on every rank: do not all-reduce it again.
        dim: The sharded axis, along which the whole row sums to one.
        n_iter, ensure_sum_one: As for `diffmax_bisect`.
        group: A process group, or a one-dimensional DeviceMesh. None: the default group.
    Returns:
        Tensor of X's shape, dtype and device. A row that is fully masked on all ranks is all 0; a row with NaN or +inf on any
        rank is all NaN on every rank.
    Raises:
        RuntimeError: torch.distributed is not initialised; or a message failed or timed out: it says which rank is silent.
        TypeError: As for `diffmax_bisect`; or X is a DTensor, or group has the wrong type.
        ValueError: As for `diffmax_bisect`; or X is a scalar, this rank is not in the group, or the calls of the ranks differ
            in anything but the length along `dim`: then every rank raises, and says which rank has what.
        NotImplementedError: Forward-mode differentiation or a torch.func transform.
    Communication: For R rows and n ranks, forward sends 40 + n integers, which check that the calls agree, then R maxima, then
        in every iteration of Newton's method (Eq. 2) two numbers per row, S and S_1, and one for the stopping decision. Typical
        scores take 3 to 12 such messages (docs/distributed.md has a table); Eq. 9 bounds their number. Backward sends two
        numbers per row, the sums of Eq. 3, and the gradient of alpha if it is learned. Gathering would send whole rows.
    Numerics: Computes in float32, for float64 in float64, with the arithmetic of `diffmax.reference`. Second derivatives are
        exact, and communicate too. Under torch.compile the call is one operator. The host reads the stopping decision, so a
        CUDA graph cannot capture the call.
    Source: docs/theory.md, docs/distributed.md. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from diffmax.distributed import diffmax_bisect_sharded
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> diffmax_bisect_sharded(torch.tensor([3.0, 2.0, 1.0, 0.0]), alpha=0.5)
        tensor([0.8307, 0.1693, 0.0000, 0.0000])
        >>> dist.destroy_process_group()
    """
    name = "diffmax_bisect_sharded"
    if not torch.compiler.is_compiling():
        messages.refuse_transforms(name)  # also checked here: otherwise vmap would call the operator once per sample
    action = "call torch.distributed.init_process_group first; diffmax_bisect needs no group"
    group_name = str(_group_of(name, group, action).group_name)
    with contextlib.nullcontext() if torch.compiler.is_compiling() else messages.refusals(name, group_name, X):
        dim = check_scores(name, X, dim, n_iter)
        _check_part(name, X, "give the DTensor to diffmax_bisect, which gathers rows")
        e, e_tensor = one_minus_alpha(name, X, alpha() if callable(alpha) else alpha, dim, OR_FUNCTION)
    p: Tensor = torch.ops.diffmax.bisect_sharded(X, e, e_tensor, dim, n_iter, bool(ensure_sum_one), group_name)[0]
    return p


def diffmax_loss_sharded(
    X: Tensor,
    target: Tensor,
    alpha: Alpha = 0.9,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    n_iter: int = 50,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """`diffmax_loss` for scores whose classes are sharded over the ranks of a process group, without gathering them.

    The result on every rank is `diffmax_loss(torch.cat(all X, class dimension), target, alpha)`: for the vocabulary-parallel
    logits of a language model. All ranks of the group must make the call. A DTensor that is sharded over classes goes to
    `diffmax_loss` as it is, which then does the same.

    Args:
        X: This rank's classes: (c,), (N, c) or (N, c, d1, ...). The numbers of classes may differ between ranks, and be 0. The
            ranks' classes follow each other in the order of the ranks.
        target: Class indices of X's shape without the class dimension, which count the classes of all ranks and are the same on
            every rank; or probabilities of X's shape, whose classes on all ranks together sum to 1.
        alpha: As for `diffmax_loss`, with the same value on every rank. The gradient of a tensor is already summed over all
            classes, the same on every rank: do not all-reduce it again.
        weight: One weight per class of this rank, (c,), or None on all ranks.
        ignore_index, reduction, n_iter: As for `diffmax_loss`.
        group: A process group, or a one-dimensional DeviceMesh. None: the default group.
    Returns:
        As `diffmax_loss`, the same on every rank. X's gradient is p - y of this rank's classes, times that of the result.
    Raises:
        RuntimeError: torch.distributed is not initialised; or a message failed or timed out: it says which rank is silent.
        TypeError, ValueError: As of `diffmax_loss`; or X is a DTensor, a group without this rank, or calls of the ranks that
            differ in more than the number of classes: then every rank raises, and says which rank has what.
        NotImplementedError: Forward-mode differentiation or a torch.func transform.
    Communication: For R rows and n ranks, forward sends 40 + n integers, R maxima, 2 R + 1 numbers in each iteration, as
        `diffmax_bisect_sharded` does, then 4 R sums for class indices, 5 R with weights; 2 R or 3 R for probabilities.
        Backward sends nothing, or one number per alpha if it is learned. The logits stay where they are.
    Memory: Works on blocks of 2**24 scores of the longest part; each block sends its own messages. X and four numbers per row
        are saved for backward, which recomputes the weights. Double backward holds the weights, and sends messages.
    Numerics: Computes in float32, for float64 in float64, with the arithmetic of `diffmax.reference`. Under torch.compile the
        call is one operator. The host reads the stopping decision, so a CUDA graph cannot capture the call.
    Source: docs/theory.md, section 12, docs/distributed.md. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from diffmax.distributed import diffmax_loss_sharded
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [5.0, 2.0, 1.0, 0.0]])
        >>> diffmax_loss_sharded(logits, torch.tensor([0, 0]), alpha=0.5, reduction="none")
        tensor([0.0617, 0.0000])
        >>> dist.destroy_process_group()
    """
    name = "diffmax_loss_sharded"
    if not torch.compiler.is_compiling():
        messages.refuse_transforms(name)
    action = "call torch.distributed.init_process_group first; diffmax_loss needs no group"
    group_name = str(_group_of(name, group, action).group_name)
    with contextlib.nullcontext() if torch.compiler.is_compiling() else messages.refusals(name, group_name, X):
        check_reduction(name, reduction)
        dim = check_scores(name, X, 0 if isinstance(X, Tensor) and X.ndim == 1 else 1, n_iter)
        _check_part(name, X, "give the DTensor to diffmax_loss")
        check_target_of_part(name, X, target, dim, ignore_index)
        check_weight(name, X, weight, dim)
        e, e_tensor = one_minus_alpha(name, X, alpha() if callable(alpha) else alpha, dim, OR_FUNCTION)
    losses, share = loss_of_parts(X, target, e, e_tensor, dim, weight, ignore_index, n_iter, group_name)
    return reduce_losses(losses, share, reduction, X)


def _check_part(name: str, X: Tensor, otherwise: str) -> None:
    messages.check_here(name, "X", X, f" and group=X.device_mesh, or {otherwise}")
    if X.ndim == 0:
        raise ValueError(f"{name}: X must have a dimension to be sharded along, got a scalar")


def attention_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    method: Literal["auto", "ulysses", "all_gather", "live_blocks"] = "ulysses",
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention` over a sequence that is sharded over the ranks of a process group.

    The result on each rank is that of its queries in `attention` of the whole sequence. All ranks of the group must make the
    call, and the backward pass.

    Args:
        query: (B, H, l, D): this rank's tokens; l may differ between ranks, and be 0, in the contiguous layout.
        key, value: (B, H_kv, l, D) and (B, H_kv, l, D_v), of the same tokens.
        group: A process group, or a one-dimensional DeviceMesh. None: the default group.
        method: "ulysses" exchanges heads for tokens: each rank computes H / ranks heads of the whole sequence, so both H and
            H_kv must be multiples of the number of ranks. "all_gather" gathers keys and values, for any number of heads; a
            window or ALiBi then needs is_causal. "live_blocks" is as "all_gather", but blocks of 32 keys that certainly have no
            weight for a rank's queries are not sent to it; it takes neither. "auto" is that of the first two that sends less.
        layout: Which tokens a rank has, of n ranks. "contiguous": those after the lower ranks'. "zigzag": of 2 n runs of l / 2
            tokens, run `rank`, then run 2 n - 1 - rank: so every rank has the same work in causal attention by "all_gather".
        is_causal, scale, enable_gqa, window_size, alibi_slopes, softcap, backend: As for `attention`, of the whole sequence.
        alpha, sink: As for `attention`, with the same values and all H heads on every rank. Their gradients are already summed
            over the ranks: do not all-reduce them again.
    Returns:
        (B, H, l, D_v), in query's dtype.
    Raises:
        RuntimeError: torch.distributed is not initialised; or a message failed or timed out: it says which rank is silent.
        TypeError, ValueError: As of `attention`; or a head or token count that does not fit, a DTensor, a group without this
            rank, or calls of the ranks that differ in more than tokens: then every rank raises, and says which rank has what.
        NotImplementedError: Forward-mode differentiation or a torch.func transform.
    Communication: One message of 40 + n integers, which checks that the calls agree. Then, forward and backward alike,
        "ulysses" sends two all-to-alls (Eq. 41), "all_gather" one all-gather, whose backward is one reduce-scatter (Eq. 42);
        "live_blocks" an all-gather of bounds, an all-to-all of requests, and one of what is live, whose backward is another
        (Eq. 49). Gradients for alpha and the sink are one all-reduce each.
    Memory: "ulysses" holds H / ranks heads of the whole sequence, as much as the shards. "all_gather" holds the keys and values
        of the whole sequence, until backward; "live_blocks" the live ones of them.
    Numerics: Those of `attention`. "all_gather" sums the gradients for key and value over the ranks in float32, for float64
        in float64. Second derivatives are right, and send messages too.
    Source: docs/distributed.md; "ulysses" is arXiv:2309.14509. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from diffmax.distributed import attention_context_parallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> tokens = torch.randn(1, 4, 10, 16)
        >>> attention_context_parallel(tokens, tokens, tokens, is_causal=True, alpha=0.5).shape
        torch.Size([1, 4, 10, 16])
        >>> dist.destroy_process_group()
    """
    options = context_parallel.Options(
        *(method, layout, is_causal, scale, enable_gqa, alpha, window_size, alibi_slopes, softcap, sink, backend)
    )
    return _context_parallel(query, key, value, options, group)


def attention_varlen_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    method: Literal["auto", "ulysses", "all_gather"] = "ulysses",
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    alpha: float | Tensor = 0.9,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention_varlen` over packed sequences whose tokens are sharded over the ranks of a process group.

    The result on each rank is that of its tokens in `attention_varlen` of all tokens: a sequence may begin on one rank and end
    on another. All ranks of the group must make the call, and the backward pass.

    Args:
        query: (l, H, D): this rank's tokens; l may differ between ranks, and be 0, in the contiguous layout.
        key, value: (l, H_kv, D) and (l, H_kv, D_v), of the same tokens.
        cu_seqlens: int32 (N + 1,), the same on every rank: the starts and the end of the sequences among the tokens of all
            ranks. A sequence may have 0 tokens. It is read on the host.
        layout: As for `attention_context_parallel`, of all tokens, wherever sequences start.
        alibi_slopes: (H,).
        group, method, is_causal, scale, enable_gqa, alpha, window_size, softcap, sink, backend: As for
            `attention_context_parallel`.
    Returns:
        (l, H, D_v), contiguous, in query's dtype.
    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: As `attention_context_parallel`; or cu_seqlens do not ascend
            from 0 to the number of all ranks' tokens.
    Communication: That of `attention_context_parallel`, with B = 1.
    Numerics: Those of `attention_context_parallel`.
    Source: docs/distributed.md. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from diffmax.distributed import attention_varlen_context_parallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> tokens = torch.randn(12, 4, 16)  # sequences of 5 and 7 tokens
        >>> ends = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> attention_varlen_context_parallel(tokens, tokens, tokens, ends, is_causal=True, alpha=0.5).shape
        torch.Size([12, 4, 16])
        >>> dist.destroy_process_group()
    """
    options = context_parallel.Options(
        *(method, layout, is_causal, scale, enable_gqa, alpha, window_size, alibi_slopes, softcap, sink, backend),
        cu_seqlens=() if cu_seqlens is None else cu_seqlens,  # None is of attention_context_parallel
    )
    return _context_parallel(query, key, value, options, group)


def _context_parallel(
    query: Tensor, key: Tensor, value: Tensor, options: context_parallel.Options, group: dist.ProcessGroup | DeviceMesh | None
) -> Tensor:
    messages.refuse_transforms(options.name)
    otherwise = "diffmax.attention" if options.cu_seqlens is None else "diffmax.attention_varlen"
    found = _group_of(options.name, group, f"call torch.distributed.init_process_group first; {otherwise} needs no group")
    ranks = context_parallel.Ranks(found, found.size(), found.rank())
    query, key, value = autocast(query, key, value)
    return context_parallel.attend(query, key, value, options, ranks)


def attention_with_kvcache_sharded(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    owner: int | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alpha: float | Tensor = 0.9,
    sink: Tensor | None = None,
    page_bounds: PageBounds | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_with_kvcache` over a cache of which every rank of a process group holds some tokens of each sequence.

    Every rank gives the same queries, and gets the result for the whole cache. All ranks of the group must make the call.
    Keys and values stay where they are: what is exchanged is a bound of each query's threshold, then the scores above it.

    Args:
        q: (B, L, H, D), the same on every rank.
        k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table, page_bounds: As for `attention_with_kvcache`, of this
            rank's tokens: `cache_seqlens` counts them, and may be 0. The tokens of a sequence follow each other in the order of
            the ranks. Which rank has which matters only to a window, to ALiBi, and to causality among several new tokens.
        k, v: (B, L_new, H_kv, D) and (B, L_new, H_kv, D_v), new tokens, the same on every rank, or None. They are appended to
            the cache of rank `owner`.
        group: A process group, or a one-dimensional DeviceMesh. None: the default group.
        owner: The rank of the group that gets new tokens. None: the last.
        softmax_scale, causal, window_size, softcap, alibi_slopes, alpha, sink: As for `attention_with_kvcache`, with the same
            value on every rank.
        return_softmax_lse: Whether to return tau too, (B, H, L).
    Returns:
        (B, L, H, D_v), contiguous, in q's dtype, the same on every rank; and tau, if requested.
    Raises:
        RuntimeError: torch.distributed is not initialised; or a message failed or timed out: it says which rank is silent.
        TypeError, ValueError: As of `attention_with_kvcache`; or a wrong owner, a group without this rank, or calls of the
            ranks that differ in more than their tokens: then every rank raises, and says which rank has what.
        NotImplementedError: An argument requires a gradient, and gradients are on; or a torch.func transform.
    Communication: Eq. 51 of docs/distributed.md: per query and head a bound, the candidates, which are those scores that exceed
        the largest of the ranks' own thresholds, and the output. If a query has more than 4096 of them, two sums for each of
        3 to 12 iterations instead.
    Numerics: Exact. Computes in float32, for float64 in float64, with the arithmetic of `diffmax.reference`. The host reads
        lengths and counts, so a CUDA graph cannot capture the call.
    Source: docs/distributed.md. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from diffmax.distributed import attention_with_kvcache_sharded
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q, k_cache, v_cache = torch.randn(2, 1, 8, 16), *torch.randn(2, 2, 512, 4, 16).unbind()
        >>> attention_with_kvcache_sharded(q, k_cache, v_cache, cache_seqlens=100, alpha=0.5).shape
        torch.Size([2, 1, 8, 16])
        >>> dist.destroy_process_group()
    """
    name = sharded_cache.NAME
    messages.refuse_transforms(name)
    found = _group_of(name, group, "call torch.distributed.init_process_group first; attention_with_kvcache needs no group")
    with messages.refusals(name, found, q):
        check_flag(name, "return_softmax_lse", return_softmax_lse)
        if owner is not None and (isinstance(owner, bool) or not isinstance(owner, int) or not 0 <= owner < found.size()):
            raise ValueError(f"{name}: owner must be a rank of the group, 0 to {found.size() - 1}, or None, got {owner!r}")
        for what, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
            messages.check_here(name, what, t)
        if (k is None) != (v is None):
            raise ValueError(f"{name}: k and v go together, got {'v' if k is None else 'k'} alone")
        for what, given in (("k", k), ("v", v)):  # on every rank, though one appends them
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name}: {what} must be a tensor, got {type(given).__name__}")
        last = found.size() - 1 if owner is None else owner
        new = (k, v) if last == found.rank() else (None, None)
        options = Options(
            *(cache_seqlens, cache_batch_idx, block_table, softmax_scale, causal, window_size),
            *(softcap, alibi_slopes, alpha, sink, page_bounds, None),
        )
        query, k_cache, v_cache, call = build_call(q, k_cache, v_cache, *new, options, name=name)
        shared = {"alpha": alpha, "sink": sink, "alibi_slopes": alibi_slopes}
        facts = {
            "q's shape": tuple(query.shape),
            "q's dtype": query.dtype,
            "heads and sizes of the cache": (*k_cache.shape[2:], v_cache.shape[3]),
            **{what: t.detach().tolist() if isinstance(t, Tensor) else t for what, t in shared.items()},
            "softmax_scale": call.scale,
            "causal": causal,
            "window_size": window_size,
            "softcap": softcap,
            "owner": last,
            "new tokens": None if k is None or v is None else (tuple(k.shape), tuple(v.shape)),
        }
    messages.agree(name, facts, 0, None, found, query.device)
    out, tau = sharded_cache.attend(query, k_cache, v_cache, call, -1 if k is None or k.shape[1] == 0 else last, found)
    return (out, tau) if return_softmax_lse else out


def shard_heads(module: DiffmaxAttention, mesh: DeviceMesh) -> DiffmaxAttention:
    """Tensor parallelism for `diffmax.nn.DiffmaxAttention`: each rank of a mesh gets some of its heads.

    The plan is in the words of torch's `parallelize_module`: `q_proj`, `k_proj` and `v_proj` are sharded along their outputs,
    `out_proj` along its inputs, and alpha and the sink along the heads. All become DTensors, in place, from the values of the
    mesh's first rank. Then the module takes whole tokens, the same on every rank, and gives whole tokens back.

    Args:
        module: With numbers of heads and of key heads that are multiples of the ranks, without dropout, head gate and length
            scale.
        mesh: A one-dimensional DeviceMesh.
    Returns:
        The module.
    Raises:
        TypeError: The module is not a DiffmaxAttention.
        ValueError: The mesh has more dimensions, the heads do not fit it, or the module has a part that is not sharded.
    Communication: One all-reduce of the output, forward, and one of the gradient of the tokens, backward.
    Source: the plan is that of arXiv:1909.08053. Written for diffmax.
    Example:
        >>> import torch, torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from diffmax.distributed import shard_heads
        >>> from diffmax.nn import DiffmaxAttention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> attend = shard_heads(DiffmaxAttention(16, 4), init_device_mesh("cpu", (1,)))
        >>> attend(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from diffmax.nn import DiffmaxAttention

    name = "shard_heads"
    if not isinstance(module, DiffmaxAttention):
        raise TypeError(f"{name}: module must be a diffmax.nn.DiffmaxAttention, got {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"{name}: mesh must have one dimension, got {mesh.ndim}\nselect one: mesh['its name']")
    heads, kv_heads, ranks = module.num_heads, module.num_kv_heads, mesh.size()
    if heads % ranks or kv_heads % ranks:
        raise ValueError(
            f"{name}: each rank gets the same number of heads, got {heads} query heads and {kv_heads} key heads "
            f"for {ranks} ranks"
        )
    parts = {"head_gate": module.gate, "length_scale": module.length_scale, "dropout": module.dropout}
    if present := [what for what, part in parts.items() if part]:
        raise ValueError(f"{name}: module must be without {' and '.join(present)}, got one with\nthese are not sharded")
    plan = {what: ColwiseParallel(use_local_output=False) for what in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(module, mesh, {**plan, "out_proj": RowwiseParallel()})
    for what, own in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        place = Shard(0) if own.shape == (heads,) else Replicate()
        moved: Tensor = distribute_tensor(own.detach(), mesh, [place])
        setattr(module, what, torch.nn.Parameter(moved, own.requires_grad) if isinstance(own, torch.nn.Parameter) else moved)
    return module


def _group_of(name: str, group: dist.ProcessGroup | DeviceMesh | None, action: str) -> dist.ProcessGroup:
    """The group. What goes on to an operator is its name alone, so that graphs can contain it."""
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: torch.distributed must be initialised, got no process group\n{action}")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name}: group must be a DeviceMesh of one dimension, got {group.ndim}\n"
                "select the one that is sharded over: mesh['its name']"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # new_group returns it to ranks outside the group
            raise ValueError(f"{name}: this rank must be a member of group, got a group without it")
        raise TypeError(f"{name}: group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group
