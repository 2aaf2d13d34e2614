"""What a backend's distribution uses: `Backend`, the hooks, and the version of this interface. docs/backends.md tells how.

A plugin is an object in the entry-point group `diffmax.backends`. It implements the hook `diffmax_backends`, which returns
descriptions: names, dtypes, and kernels as "module:function", imported at the first call that needs them. Making the
descriptions must import no kernel and touch no device.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pluggy
import torch
from torch import Tensor

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "FEATURES",
    "OPERATORS",
    "OPERATOR_FEATURES",
    "SHARED_KERNELS_VERSION",
    "TILE",
    "AttentionCall",
    "AttentionGradients",
    "AttentionResults",
    "Backend",
    "CallSpec",
    "HookSpecs",
    "KVCacheCall",
    "KVCacheResults",
    "Kernel",
    "PowerCall",
    "PowerGradients",
    "PowerResults",
    "PowerSaved",
    "PowerWanted",
    "Saved",
    "ThresholdCall",
    "ThresholdGradients",
    "ThresholdResults",
    "ThresholdSaved",
    "ThresholdWanted",
    "Wanted",
    "hookimpl",
]

API_VERSION = (1, 6)
"""Interface version. A larger minor adds; a larger major changes the hooks, the fields or the kernels' signatures."""

SHARED_KERNELS_VERSION = 2
"""Version of what `diffmax.kernels` offers to backends that build on core's shared kernels."""

ENTRY_POINT_GROUP = "diffmax.backends"

FEATURES: dict[str, str] = {
    "tensor_alpha": "alpha as a tensor: per row, per head",
    "alpha_gradient": "the backward gives the gradient for alpha",
    "deterministic": "the same input gives the same bits",
}
"""What a call may need beyond an operator, a device type and a dtype. A backend must claim it to be chosen for such a call.
Operators add theirs."""

OPERATOR_FEATURES: dict[str, frozenset[str]] = {}
"""What a call of each operator may need of `FEATURES`, and so what its kernel can claim. Operators enter themselves."""


def __getattr__(name: str) -> tuple[str, ...]:
    if name == "OPERATORS":
        return tuple(OPERATOR_FEATURES)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What a backend can provide kernels for, with the signatures of `diffmax.reference`.
OPERATORS: tuple[str, ...]


def describe_operator(name: str, features: frozenset[str], described: Mapping[str, str]) -> None:
    """Enter an operator that backends can provide, and the features that it describes: for core itself."""
    OPERATOR_FEATURES.pop(name, None)  # in the order of the last call
    OPERATOR_FEATURES[name] = features
    FEATURES.update(described)


TILE = 64
"""Queries and keys of one tile of attention: what a bit of `live` stands for, see `diffmax.reference.attention`."""

hookspec = pluggy.HookspecMarker("diffmax")
hookimpl = pluggy.HookimplMarker("diffmax")


@dataclass(frozen=True)
class CallSpec:
    """The properties of a call that dispatch may depend on: no tensors, no lengths.

    Attributes:
        operator: "bisect", "bisect_backward", ...
        device_type: torch's device type.
        runtime: The runtime of that device: "cpu", "cuda", "hip" (both have device type "cuda"), "cann", or the type itself.
        dtype: Dtype of the scores.
        features: Those of `FEATURES` that the call needs.
        head_dim, value_dim: For attention, the sizes of a query and of a value; else 0.
    """

    operator: str
    device_type: str
    runtime: str
    dtype: torch.dtype
    features: frozenset[str] = frozenset()
    head_dim: int = 0
    value_dim: int = 0

    def __str__(self) -> str:
        size = f", head size {self.head_dim}" if self.head_dim else ""
        size += f" and {self.value_dim}" if self.value_dim != self.head_dim else ""
        needs = f", needs {', '.join(sorted(self.features))}" if self.features else ""
        where = self.device_type if self.runtime == self.device_type else f"{self.device_type} ({self.runtime})"
        return f"{self.operator} of {str(self.dtype).removeprefix('torch.')} on {where}{size}{needs}"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """The arguments of an attention kernel in addition to query, key and value.

    A later version adds fields with defaults, each with a feature: a kernel that does not claim the feature never gets
    the field, and needs no change. The operators' schemas are made from these fields, in this order.

    Attributes:
        scale: The scores are scale * (query . key).
        e: 1 - alpha: a float in (0, 1], or, for a backend that claims "tensor_alpha", a tensor (H,) in the accumulation dtype
            on the query's device. Heads whose entry lies outside [0, 1] are NaN.
        mask: Boolean, (B, H, L, S) with any of them 1; True marks what is visible.
        lower_right: Query i of L has position i + S - L; else position i.
        left, right: Number of keys visible before and after the position of the query; -1: unlimited. Causal: right = 0.
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), the sequence starts and the end of packed sequences. Then B = 1, and L and
            S above are the lengths of a single sequence.
        max_seqlen_q, max_seqlen_k: No packed sequence is longer.
        bias: Added to the scores: (B, H, L, S) with any of them 1, any strides, in query's dtype or float32;
            -inf hides. Not with packed sequences.
        alibi: Slopes (H,) or (B, H), (H,) for packed sequences, in the accumulation dtype: subtracts slope * abs(i' - j)
            from the score of key j, where i' is the position of query i.
        softcap: c > 0 makes c * tanh(score / c) of the scores, before anything is added to them; 0: off.
        sink: (H,), in the accumulation dtype: an extra score for each row, not scaled, capped or masked, whose weight
            is discarded. m is the largest score, including the sink; `live` and `support` count keys alone.
        dropout_p: The share of weights that are dropped after normalization; the others are divided by 1 - dropout_p. 0: off.
        seed: int64 (2,), on query's device: determines the keep mask, see `diffmax.reference.attention.kept`.
    """

    scale: float
    e: float | Tensor
    mask: Tensor | None = None
    lower_right: bool = False
    left: int = -1
    right: int = -1
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    bias: Tensor | None = None
    alibi: Tensor | None = None
    softcap: float = 0.0
    sink: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class KVCacheCall:
    """What a kernel of "attention_kvcache" computes, besides its queries and the two caches.

    Attributes:
        scale, e, softcap, sink: As of attention; e and sink, in the accumulation dtype, have an entry per query head.
        cache_seqlens: int32 (B,), how many tokens each sequence has in the cache before the call.
        k, v: New tokens (B, L_new, H_kv, D) and (B, L_new, H_kv, D_v), of the caches' dtype, or None: the kernel writes them
            after the existing ones and attends to all. Tokens beyond the end of the cache are neither written nor visible.
        cache_batch_idx: int32 (B,), the cache's row that holds each sequence; None: sequence b has row b.
        block_table: int32 (B, pages), each sequence's pages in order, for a cache in pages. Entries after the end of a
            sequence may be anything.
        low, high: The elementwise minimum and maximum of the keys of each page: (num_blocks, H_kv, D) for a cache in pages,
            else (B_cache, ceil(S / page_size), H_kv, D), of the cache's dtype; None: unknown. The kernel keeps them up to date
            as it appends. The bounds of a page whose first token is new are reset. Pages in use have valid bounds.
        codes: uint8 (num_blocks, H_kv, ceil(D / 2), page_size), or (B_cache, pages, ...) as low: the keys of each page in 4
            bits, as `diffmax.reference.decoding.rounded` makes them; or None. They come with low and high, and the kernel keeps
            them up to date too: where a page's bounds move, all of its keys are rounded again.
        page_size: Tokens of a page; where the cache is not in pages, of a page of the bounds.
        left, right: Number of keys visible before and after the position of the query; -1: unlimited. The last
            query has the position of the last key.
        alibi: (B or 1, H), in the accumulation dtype: slope * abs(distance) is subtracted after the softcap; or None.
        leftpad: int32 (B,), where each sequence starts: what lies before in its row or pages is not seen, and may be anything;
            `cache_seqlens` counts it. None: at 0.
    """

    scale: float
    e: float | Tensor
    cache_seqlens: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    page_size: int = TILE
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    alibi: Tensor | None = None
    sink: Tensor | None = None
    leftpad: Tensor | None = None
    codes: Tensor | None = None


class Saved(NamedTuple):
    """What attention's forward leaves for its backward, in this form for every backend. See `diffmax.reference.attention`.

    Attributes:
        m, delta: (B, H, L), the per-query statistics: tau = m - (1 - delta) / e.
        u: U of Eq. 5, like the result.
        live: int32, the tiles that hold a weight; (0,) where the forward did not know.
    """

    m: Tensor
    delta: Tensor
    u: Tensor
    live: Tensor


class Wanted(NamedTuple):
    """Which gradients attention's backward is asked for, besides those for query, key and value: for e, the bias, the sink."""

    e: bool = False
    bias: bool = False
    sink: bool = False


class AttentionResults(NamedTuple):
    """What a kernel of "attention" returns. See `diffmax.reference.attention.attention`."""

    out: Tensor
    m: Tensor
    delta: Tensor
    u: Tensor
    live: Tensor
    support: Tensor

    @property
    def saved(self) -> Saved:
        """What it leaves for the backward."""
        return Saved(self.m, self.delta, self.u, self.live)


class AttentionGradients(NamedTuple):
    """What a kernel of "attention_backward" returns; (0,) for what was not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    e: Tensor
    bias: Tensor
    sink: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PowerCall:
    """The arguments of a kernel of "power_attention" in addition to query, key and value. Symbols: `diffmax.reference.power`.

    Attributes:
        degree: p, an even number from 2.
        scale: The scores are scale * (query . key). It cancels in the result, and not in the sum of the weights.
        chunk: Tokens of a chunk; 0: the kernel chooses, the quadratic form where that is cheaper. It changes rounding alone.
        final: Whether the state after the last key is wanted.
        log_gates: (B, H_kv, S), in the accumulation dtype, finite: the state is multiplied by exp(log_gates[j]) before key j is
            added; None: no decay.
        sums, norm: The state before the first key, in the accumulation dtype: (B, H_kv, P, D_v) and (B, H_kv, P), with
            P = C(D + p - 1, p), in the order of `diffmax.operators.power.symmetric.indices`; both or neither.
    """

    degree: int
    scale: float
    chunk: int = 0
    final: bool = False
    log_gates: Tensor | None = None
    sums: Tensor | None = None
    norm: Tensor | None = None


class PowerSaved(NamedTuple):
    """What the forward leaves for the backward, in the accumulation dtype.

    Attributes:
        out: Its result, before it was rounded to the dtype of the values.
        total: (B, H, L), the sum of each query's weights.
    """

    out: Tensor
    total: Tensor


class PowerWanted(NamedTuple):
    """Which gradients are wanted besides those for query, key and value: for the gates, for the state before the first key."""

    log_gates: bool = False
    state: bool = False


class PowerResults(NamedTuple):
    """What a kernel of "power_attention" returns. See `diffmax.reference.power`."""

    out: Tensor
    total: Tensor
    sums: Tensor
    norm: Tensor
    exact: Tensor

    @property
    def saved(self) -> PowerSaved:
        """What it leaves for the backward."""
        return PowerSaved(self.exact if self.exact.ndim == 4 else self.out, self.total)


class PowerGradients(NamedTuple):
    """What a kernel of "power_attention_backward" returns; (0,) for what was not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_gates: Tensor
    sums: Tensor
    norm: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdCall:
    """The arguments of a kernel of "threshold_attention" besides query, key and value. Symbols: `diffmax.reference.threshold`.

    Attributes:
        scale: The scores are scale * (query . key), and the bias.
        theta: (B or 1, H, L), in the accumulation dtype: what is subtracted before the rectifier.
        weights: What it is subtracted from: "scores", or their "softmax" or "diffmax" over the visible keys.
        power: p, positive.
        e: 1 - alpha of "diffmax": a float in (0, 1], or, for a backend that claims "tensor_alpha", a tensor (H,) in the
            accumulation dtype, whose bad entries give NaN; else 0.
        bias: (H, W), in the accumulation dtype: bias[h, r] is added to the score of the key r before the query, 0 <= r < W.
        mask: Boolean, (B, H, L, S) with any of them 1; True marks what is visible. Not with packed sequences.
        left, right: How many keys a query sees before and after its position; -1: all. Query i of L has the position i + S - L.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: As of attention. Then B = 1, and L and S above are the lengths
            of a single sequence, but theta has an entry for each query.
    """

    scale: float
    theta: Tensor
    weights: str = "scores"
    power: float = 1.0
    e: float | Tensor = 0.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    left: int = -1
    right: int = 0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


class ThresholdSaved(NamedTuple):
    """What the forward leaves for the backward.

    Attributes:
        statistic: (B, H, L), in the accumulation dtype: the log-sum-exp of a query's visible scores for "softmax", tau for
            "diffmax", -inf where nothing is visible; (0,) for "scores".
    """

    statistic: Tensor


class ThresholdWanted(NamedTuple):
    """Which gradients are wanted besides those for query, key and value: for theta, for the bias, for e."""

    theta: bool = False
    bias: bool = False
    e: bool = False


class ThresholdResults(NamedTuple):
    """What a kernel of "threshold_attention" returns. See `diffmax.reference.threshold`."""

    out: Tensor
    mass: Tensor
    statistic: Tensor

    @property
    def saved(self) -> ThresholdSaved:
        """What it leaves for the backward."""
        return ThresholdSaved(self.statistic)


class ThresholdGradients(NamedTuple):
    """What a kernel of "threshold_attention_backward" returns; (0,) for what was not wanted."""

    query: Tensor
    key: Tensor
    value: Tensor
    theta: Tensor
    bias: Tensor
    e: Tensor


class KVCacheResults(NamedTuple):
    """What a kernel of "attention_kvcache" returns. See `diffmax.reference.decoding.attention_kvcache`."""

    out: Tensor
    m: Tensor
    delta: Tensor
    support: Tensor
    pages: Tensor


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel, and what it can do.

    Attributes:
        function: "module:function". Signatures: `diffmax.reference` and its neighbours.
        dtypes: Dtypes of the scores, or of the queries.
        features: Of `OPERATOR_FEATURES[operator]`, those that it has, one by one: a later version of diffmax may add others,
            which this kernel does not have.
        max_head_dim: The largest size of a query, a key or a value in attention; None: any.
        warmup: "module:function" that compiles what calls need, see docs/backends.md; None if nothing is compiled at run time.
    Raises:
        TypeError, ValueError: A field is not as described.
    """

    function: str
    dtypes: Sequence[torch.dtype]
    features: frozenset[str] = frozenset()
    max_head_dim: int | None = None
    warmup: str | None = None

    def __post_init__(self) -> None:
        for target in (self.function, self.warmup):
            _check_target("Kernel", target)
        _check_dtypes(f"Kernel {self.function}", self.dtypes)
        object.__setattr__(self, "features", _checked_features(f"Kernel {self.function}", self.features))
        size = self.max_head_dim
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ValueError(f"Kernel {self.function}: max_head_dim must be a positive int or None, got {size!r}")

    def reasons_against(self, spec: CallSpec) -> list[str]:
        """Why this kernel cannot run the call; empty if it can."""
        reasons = []
        if spec.dtype not in self.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"takes {known}, not {str(spec.dtype).removeprefix('torch.')}")
        reasons.extend(f"lacks {feature} ({FEATURES[feature]})" for feature in sorted(spec.features - self.features))
        largest = max(spec.head_dim, spec.value_dim)
        if self.max_head_dim is not None and largest > self.max_head_dim:
            reasons.append(f"takes heads of at most {self.max_head_dim} entries, not {largest}")
        return reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """Description of a set of kernels for one kind of device.

    Attributes:
        name: Letters, digits, "_" and "-"; what users pass as `backend=`.
        device_types: torch device types that it serves; ("*",) for all.
        kernels: Operator to `Kernel`. It may provide some operators only; the others come from the next backend. A string
            "module:function" stands for a kernel with the backend's dtypes, those of its features that belong to the
            operator, and, for "bisect", its warmup.
        dtypes, features: Of the kernels that are given as strings.
        runtime: "cuda" or "hip" where the device type alone does not tell; None for any.
        priority: Among the backends that can run a call, the largest is chosen; then the name decides. core's CPU kernels have
            50, its plain PyTorch 0.
        automatic: False: opt-in, used only if requested with `backend=`.
        probe: "module:function" of no arguments: None if the backend can run on this machine, else the reason why not. Called
            once, at the first call on its device types or by `diffmax.backends()`. May not raise.
        unsupported: "module:function" of a CallSpec: the list of reasons against it, empty if there are none. May not raise.
        install_hint: What the user can do when the probe says no.
        api_version: The `API_VERSION` it was written for.
        shared_kernels: The `SHARED_KERNELS_VERSION` it was written for, if it uses `diffmax.kernels`.
        warmup: "module:function" of (device, dtype, n, e, backward) that compiles what calls on rows of length n need, with
            e = 1 - alpha a float, or None for alpha as a tensor; None if nothing is compiled at run time. Since 1.1.
        provided: Operator to `Kernel`, without the strings. Made from the fields above. Since 1.3.
    Raises:
        TypeError, ValueError: A field is not as described.
    """

    name: str
    device_types: Sequence[str]
    kernels: Mapping[str, str | Kernel]
    dtypes: Sequence[torch.dtype] = ()
    features: frozenset[str] = frozenset()
    runtime: str | None = None
    priority: int = 50
    automatic: bool = True
    probe: str | None = None
    unsupported: str | None = None
    install_hint: str = ""
    api_version: tuple[int, int] = API_VERSION
    shared_kernels: int | None = None
    warmup: str | None = None
    provided: Mapping[str, Kernel] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        who = f"Backend {self.name}"
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"Backend: name must consist of letters, digits, '_' and '-', got {self.name!r}")
        if not _all_strings(self.device_types):
            raise TypeError(f"{who}: device_types must be a sequence of names, got {self.device_types!r}")
        object.__setattr__(self, "features", _checked_features(who, self.features))
        _check_known(who, "operator", self.kernels, OPERATOR_FEATURES)
        if not self.kernels:
            raise ValueError(f"{who}: kernels must name at least one operator, got {dict(self.kernels)}")
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise TypeError(f"{who}: priority must be an int, got {self.priority!r}")
        if not isinstance(self.automatic, bool):
            raise TypeError(f"{who}: automatic must be True or False, got {self.automatic!r}")
        if self.runtime is not None and not isinstance(self.runtime, str):
            raise TypeError(f"{who}: runtime must be a name or None, got {self.runtime!r}")
        version = self.api_version
        if not (isinstance(version, tuple) and len(version) == 2 and all(isinstance(part, int) for part in version)):
            raise TypeError(f"{who}: api_version must be a pair of ints, got {version!r}")
        for target in (self.probe, self.unsupported, self.warmup):
            _check_target(who, target)
        provided = {operator: self._kernel(operator, given) for operator, given in self.kernels.items()}
        object.__setattr__(self, "provided", provided)

    def _kernel(self, operator: str, given: str | Kernel) -> Kernel:
        belong = OPERATOR_FEATURES[operator]
        if isinstance(given, Kernel):
            foreign = sorted(given.features - belong)
            if foreign:
                raise ValueError(
                    f"Backend {self.name}: {operator} cannot have the feature {foreign[0]!r}, "
                    f"it can have: {', '.join(sorted(belong))}"
                )
            return given
        _check_target(f"Backend {self.name}", given)
        _check_dtypes(f"Backend {self.name}", self.dtypes)
        return Kernel(given, self.dtypes, self.features & belong, warmup=self.warmup if operator == "bisect" else None)

    def reasons_against(self, spec: CallSpec) -> list[str]:
        """Why this description rules the call out; empty if it does not."""
        reasons = []
        kernel = self.provided.get(spec.operator)
        if kernel is None:
            reasons.append(f"does not provide {spec.operator}")
        if "*" not in self.device_types and spec.device_type not in self.device_types:
            reasons.append(f"serves {', '.join(self.device_types)}, not {spec.device_type}")
        if self.runtime is not None and self.runtime != spec.runtime:
            reasons.append(f"needs the {self.runtime} runtime, this is {spec.runtime}")
        return reasons + (kernel.reasons_against(spec) if kernel is not None else [])


def _check_known(who: str, kind: str, given: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{who}: unknown {kind} {unknown[0]!r}, known: {', '.join(known)}")


def _checked_features(who: str, given: Collection[str]) -> frozenset[str]:
    if not _all_strings(given, may_be_empty=True):
        raise TypeError(f"{who}: features must be a set of names, got {given!r}")
    _check_known(who, "feature", given, FEATURES)
    return frozenset(given)


def _check_dtypes(who: str, dtypes: Sequence[torch.dtype]) -> None:
    wrong = [dtype for dtype in dtypes if not isinstance(dtype, torch.dtype)]
    if wrong or not dtypes:
        raise TypeError(f"{who}: dtypes must be torch dtypes, got {list(dtypes)}")
    whole = [dtype for dtype in dtypes if not dtype.is_floating_point]
    if whole:
        raise ValueError(f"{who}: dtypes must be floating-point, which scores are, got {whole[0]}")


def _check_target(who: str, target: object) -> None:
    if target is not None and not (isinstance(target, str) and re.fullmatch(r"[\w.]+:\w+", target)):
        raise ValueError(f"{who}: functions are given as 'module:function', got {target!r}")


def _all_strings(names: object, *, may_be_empty: bool = False) -> bool:
    if isinstance(names, str) or not isinstance(names, Collection):
        return False
    return (may_be_empty or len(names) > 0) and all(isinstance(name, str) for name in names)


class HookSpecs:
    """The hooks that a plugin implements, marked with `hookimpl`."""

    @hookspec
    def diffmax_backends(self) -> Sequence[Backend]:  # type: ignore[empty-body]
        """Describe the plugin's backends. Called once, when diffmax is imported."""

    @hookspec
    def diffmax_env_report(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Versions and settings for `python -m diffmax`, such as {"driver": "570.1"}. Optional."""
