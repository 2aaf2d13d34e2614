"""The launcher of power attention. A vendor's distribution creates one `PowerOperator`.

Positions are cut into chunks. What the keys of a chunk add to the state is computed for all chunks at once (`update`), and so
are the states between them (`scan`) and the results (`output`). States live in memory for a segment of chunks: as many as
`SCRATCH` has room for. The backward walks over the segments twice: with the states, for the gradients of queries (`dq`), and
from the last with the states' gradients, for those of keys and values (`dkv`). Without a state there are only pairs.

Nothing waits for the device, and no two programs add to one number: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmax.kernels.triton.attention.call import rows_of_entries
from diffmax.kernels.triton.common.launch import COMPILER_OPTIONS, Launch, Plans, on_device, padded, signature
from diffmax.kernels.triton.power import settings
from diffmax.kernels.triton.power.call import VALUES, Decays, Names, Sizes, columns, segments, strided, tables
from diffmax.kernels.triton.power.dkv import power_bwd_dkv_kernel
from diffmax.kernels.triton.power.dq import power_bwd_dq_kernel
from diffmax.kernels.triton.power.means import power_bwd_means_kernel
from diffmax.kernels.triton.power.output import power_out_kernel
from diffmax.kernels.triton.power.scan import power_scan_kernel
from diffmax.kernels.triton.power.update import power_update_kernel
from diffmax.operators.power.symmetric import expanded_dim
from diffmax.plugin import PowerCall, PowerGradients, PowerResults, PowerSaved, PowerWanted
from diffmax.reference import power as reference

SCRATCH = 1 << 26  # numbers of float32 for states
SCAN = 1024  # numbers of a state for a program of the scan
WARM = 1 << 17  # warmup passes by states of more monomials
Tensors = dict[str, Tensor]


class Step(NamedTuple):
    """The launches for a segment of chunks, and how many chunks it has."""

    chunks: int
    update: Launch | None
    scan: Launch | None
    reads: Launch | None


class ForwardPlan(NamedTuple):
    """Steps from the first segment on. `slots`: states in memory for a head, 0: none."""

    steps: tuple[Step, ...]
    slots: int


class BackwardPlan(NamedTuple):
    """The launches of a backward: means, states with dQ, the states' gradients with dK and dV from the last segment on."""

    means: Launch | None
    queries: ForwardPlan
    keys: ForwardPlan


class PowerOperator:
    """`power_attention` and `power_attention_backward` for one vendor, with the signatures of `diffmax.reference.power`.

    Args:
        architecture: A function that returns the architecture of a device, such as "sm90" or "gfx942".
        ptx: Whether matrix cores are NVIDIA's.
    Attributes:
        precision: Of float32 products: three tf32 products on NVIDIA's matrix cores; AMD's support float32 (decision 0056).
        rounded: Of products of weights with float16 values.
        scratch: Numbers of float32 for states.
        plans: The launch plans of earlier calls.
    """

    def __init__(self, architecture: Callable[[torch.device], str], *, ptx: bool) -> None:
        self.architecture = architecture
        self.precision = "tf32x3" if ptx else "ieee"
        self.rounded = "tf32" if ptx else "ieee"
        self.scratch = SCRATCH
        self.plans = Plans()

    def blocks(self, query: Tensor, sizes: Sizes) -> settings.Blocks:
        """Settings of the kernels."""
        size = padded(max(sizes.size, sizes.values))
        tokens = min(sizes.chunk, sizes.length or sizes.many)
        return settings.blocks(self.architecture(query.device), query.dtype, size, tokens, sizes.degree)

    def power_attention(self, query: Tensor, key: Tensor, value: Tensor, call: PowerCall, keep: bool) -> PowerResults:
        """Forward kernel; arguments and results as `diffmax.reference.power.power_attention`."""
        if _trivial(query, key, value):
            return reference.power_attention(query, key, value, call, keep)
        query, key, value = (rows_of_entries(t) for t in (query, key, value))
        sizes = Sizes.of(query, key, value, call)
        planned: ForwardPlan = self.plans.get(
            signature(query, key, value, *vars(call).values(), keep, query.device, self.precision, self.scratch),
            lambda: self._forward_plan(query, key, value, call, sizes, keep),
        )
        out = value.new_empty((*query.shape[:3], sizes.values))
        total = query.new_empty(query.shape[:3] if keep else (0,), dtype=torch.float32)
        exact = query.new_empty(out.shape if keep and out.dtype != total.dtype else (0,), dtype=torch.float32)
        with on_device(query.device):
            tensors = self._tensors(query, key, value, call, sizes, planned.slots > 0)
            tensors |= {"out_ptr": out, "exact_ptr": exact, "total_ptr": total}
            final = _walk(planned, tensors, _first_state(call, sizes, planned.slots, query), sizes)
        nothing = total.new_empty(0)
        sums, norm = _split(final, sizes) if call.final and final is not None else (nothing, nothing)
        return PowerResults(out, total, sums, norm, exact)

    def power_attention_backward(
        self,
        grad: Tensor,
        grad_sums: Tensor | None,
        grad_norm: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        saved: PowerSaved,
        call: PowerCall,
        wanted: PowerWanted,
    ) -> PowerGradients:
        """Backward kernel; arguments and results as `diffmax.reference.power.power_attention_backward`."""
        if _trivial(query, key, value):
            return reference.power_attention_backward(
                grad, grad_sums, grad_norm, query, key, value, saved, call, wanted
            )  # fmt: skip
        grad = rows_of_entries(grad.to(value.dtype))
        query, key, value = (rows_of_entries(t) for t in (query, key, value))
        saved = PowerSaved(*(t.contiguous() for t in saved))
        sizes, ends = Sizes.of(query, key, value, call), grad_sums is not None
        planned: BackwardPlan = self.plans.get(
            signature(grad, query, key, value, *vars(call).values(), wanted, ends, query.device, self.precision, self.scratch),
            lambda: self._backward_plan(grad, query, key, value, call, sizes, wanted, ends),
        )
        grad_query, grad_key, grad_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
        weight, inverse, factor = saved.total.new_empty(3, *saved.total.shape).unbind()
        of_queries, of_keys = (saved.total.new_empty(t.shape[:3]) for t in (query, key))
        with on_device(query.device):
            tensors = self._tensors(query, key, value, call, sizes, max(planned.queries.slots, planned.keys.slots) > 0) | {
                "grad_ptr": grad, "out_ptr": saved.out, "total_ptr": saved.total,
                "weight_ptr": weight, "inverse_ptr": inverse, "factor_ptr": factor,
                "grad_q_ptr": grad_query, "grad_k_ptr": grad_key, "grad_v_ptr": grad_value,
                "of_queries": of_queries, "of_keys": of_keys,
            }  # fmt: skip
            if planned.means is not None:
                planned.means(tensors)
            final = _walk(planned.queries, tensors, _first_state(call, sizes, planned.queries.slots, query), sizes)
            last = None
            if grad_sums is not None and grad_norm is not None:
                last = _joined(grad_sums, grad_norm, sizes)
            of_initial = _walk_back(planned.keys, tensors, last, sizes)
        nothing = saved.total.new_empty(0)
        of_gates = of_sums = of_norm = nothing
        if wanted.log_gates and call.log_gates is not None:
            of_g = of_keys.neg()
            if sizes.pairs:
                own = of_queries.view(sizes.batch, sizes.kv_heads, sizes.group, sizes.length).sum(2)
                of_g[:, :, sizes.many - sizes.length :] += own
            if last is not None and final is not None and sizes.pairs:
                given = sizes.entries * (sizes.values + 1)  # behind them, memory is never written
                of_g[:, :, -1] += (last[:, :given] * final[:, :given]).sum(1).view(sizes.batch, sizes.kv_heads)
            of_gates = reference.suffix_sums(of_g).to(of_keys.dtype)
        if wanted.state and of_initial is not None:
            of_sums, of_norm = _split(of_initial, sizes)
        return PowerGradients(grad_query, grad_key, grad_value, of_gates, of_sums, of_norm)

    def warmup(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        value_dim: int,
        e: float | None,
        backward: bool,
        features: frozenset[str],
    ) -> None:
        """Compile the kernels for later calls, by calls on tiny tensors: with chunks, and as the quadratic form.

        Degree 2 is prepared, with "high_degree" degree 4.

        Args:
            device: Device of the calls.
            dtype: Dtype of query, key and value.
            head_dim, value_dim: Head dimensions of queries and of values.
            e: Not used: there is no alpha.
            backward: Whether the calls will be differentiated.
            features: The `diffmax.plugin.FEATURES` of the calls.
        """
        del e
        length, kv_heads, degree = 128, 1 if "gqa" in features else 2, 4 if "high_degree" in features else 2
        shapes = ((2, length, head_dim), (kv_heads, length, head_dim), (kv_heads, length, value_dim))
        query, key, value = (torch.zeros(1, *shape, dtype=dtype, device=device) for shape in shapes)
        gates = torch.zeros(1, kv_heads, length, device=device) if "gates" in features else None
        rows = expanded_dim(head_dim, degree)
        calls = [PowerCall(degree=degree, scale=1.0, chunk=length, log_gates=gates)]
        if rows <= WARM:
            options: dict[str, Any] = {"degree": degree, "scale": 1.0, "chunk": length // 2, "log_gates": gates}
            calls.append(PowerCall(**options))
            if "state" in features:
                state = torch.zeros(1, kv_heads, rows, value_dim + 1, device=device)
                sums, norm = state[..., :-1], state[..., -1]
                calls += [PowerCall(**options, final=True), PowerCall(**options, final=True, sums=sums, norm=norm)]
        for call in calls:
            found = self.power_attention(query, key, value, call, backward)
            if backward:
                of_sums, of_norm = (found.sums, found.norm) if call.final else (None, None)
                wanted = PowerWanted(gates is not None, call.sums is not None)
                given = (query, key, value, found.saved, call, wanted)
                self.power_attention_backward(found.out, of_sums, of_norm, *given)

    def _tensors(self, query: Tensor, key: Tensor, value: Tensor, call: PowerCall, sizes: Sizes, states: bool) -> Tensors:
        """By the names of kernel pointers, and columns as "queries" and "keys"; the queries stand for what no kernel reads."""
        missing = ("g", "since", "until", "decay", "factor", "weight", "state", "variables", "coefficients")
        found = {f"{name}_ptr": query for name in missing} | {"q_ptr": query, "k_ptr": key, "v_ptr": value}
        found |= {"queries": query, "keys": key, "of_queries": query, "of_keys": query}
        if states:
            tokens = self.blocks(query, sizes).output.tokens
            found["variables_ptr"], found["coefficients_ptr"] = tables(sizes.size, sizes.degree, query.device)
            if sizes.length:
                found["queries"] = columns(query, call.scale, sizes, sizes.first, tokens)
            if sizes.pairs:
                found["keys"] = columns(key, 1.0, sizes, 0, tokens)
        if call.log_gates is not None and sizes.pairs:
            decays = Decays.of(call.log_gates, sizes)
            found |= {"g_ptr": decays.g, "since_ptr": decays.since, "until_ptr": decays.until, "decay_ptr": decays.whole}
        return found

    def _forward_plan(
        self, query: Tensor, key: Tensor, value: Tensor, call: PowerCall, sizes: Sizes, keep: bool
    ) -> ForwardPlan:
        make = _Maker(self, query, key, value, call, sizes)
        states = sizes.initial or call.final or (sizes.chunks > 1 and sizes.length > 0)
        # a backward needs a result with the digits of float32: for gates, for the state, and where few weights are not 0
        narrow, wide = query.dtype != torch.float32, keep
        if wide or call.final:
            make.parts = 3
        own = {
            **strided(q=query, k=key, v=value), "KEEP": keep, "EXACT": keep and narrow, "WIDE": wide,
            "SPLIT": (3 if wide else 2) if make.bfloat16 else 0,
        }  # fmt: skip
        return make.forward(states, call.final, lambda *at: make.read(power_out_kernel, make.of.output, own, states, *at))

    def _backward_plan(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: PowerCall,
        sizes: Sizes,
        wanted: PowerWanted,
        ends: bool,
    ) -> BackwardPlan:
        make = _Maker(self, query, key, value, call, sizes)
        if wanted.state or wanted.log_gates:  # in float32
            make.parts = 3
        own = {
            **strided(grad=grad, q=query, k=key, v=value), "PARTS": make.parts, "MOVED": wanted.log_gates and make.gates,
        }  # fmt: skip
        several = sizes.chunks > 1 and sizes.length > 0
        final = ends and wanted.log_gates and sizes.pairs
        states, initial = sizes.initial or final or several, wanted.state and sizes.initial
        queries = make.forward(states, final, lambda *at: make.read(power_bwd_dq_kernel, make.of.dq, own, states, *at))
        return BackwardPlan(make.means(grad), queries, make.backward(grad, own, ends, initial, ends or several or initial))


class _Maker:
    """Makes the launches of a call."""

    def __init__(
        self, operator: PowerOperator, query: Tensor, key: Tensor, value: Tensor, call: PowerCall, sizes: Sizes
    ) -> None:
        self.sizes, self.call, self.value = sizes, call, value
        self.of = operator.blocks(query, sizes)
        self.gates = call.log_gates is not None and sizes.pairs
        self.precision, self.scratch = operator.precision, operator.scratch
        # bfloat16 splits float32 numbers in parts of eight digits, into as many as its results show
        self.parts = 3 if query.dtype == torch.float32 else 2
        self.bfloat16 = query.dtype == torch.bfloat16
        narrow = query.dtype != torch.float32
        self.products = {"PRECISION": self.precision, "ROUNDED": operator.rounded if narrow else self.precision}

    def forward(self, states: bool, final: bool, reads: Callable[[int, int, int, int], Launch | None]) -> ForwardPlan:
        """Steps with states; `final`: up to the one after the last chunk.

        Args:
            states, final: Whether there are states, and whether that after the last chunk is wanted.
            reads: Makes the launch that reads the states of chunks from .. to, of which the first is in a slot, of so many.
        """
        if not states:
            return ForwardPlan((Step(self.sizes.chunks, None, None, reads(0, self.sizes.chunks, 0, 0)),), 0)
        parts = segments(self.sizes, self.scratch)
        slots = parts[0][1] + 1
        steps = []
        for a, b in parts:
            added = b - a - (b == self.sizes.chunks and not final) if self.sizes.pairs else 0
            first = max(a, self.sizes.first)
            steps.append(
                Step(
                    b - a,
                    self.update(self.value, False, a, added, 1, slots) if added else None,
                    self.scan(a, added, slots, False) if added else None,
                    reads(first, b, first - a, slots) if b > first else None,
                )
            )
        return ForwardPlan(tuple(steps), slots)

    def backward(self, grad: Tensor, own: Names, ends: bool, initial: bool, states: bool) -> ForwardPlan:
        """Steps with the states' gradients, from the last segment on."""
        sizes = self.sizes
        if not states:
            return ForwardPlan((Step(sizes.chunks, None, None, self.dkv(own, 0, sizes.chunks, 0, False, False)),), 0)
        parts = segments(sizes, self.scratch)
        slots = parts[0][1] + 1
        steps = []
        for a, b in reversed(parts):
            low = max(a, 0 if initial else 1)  # the gradient for the state before the first key may be of no use
            steps.append(
                Step(
                    b - a,
                    self.update(grad, True, low, b - low, low - a, slots) if b > low else None,
                    self.scan(a, b - a, slots, True),
                    self.dkv(own, a, b, slots, True, ends),
                )
            )
        return ForwardPlan(tuple(steps), slots)

    def update(self, values: Tensor, queries: bool, first: int, chunks: int, slot: int, slots: int) -> Launch:
        sizes, block = self.sizes, self.of.update
        width = min(padded(sizes.values), VALUES)
        length = sizes.length if queries else sizes.many
        tiles = -(-sizes.entries // block.entries) * -(-sizes.values // width)
        arguments = {
            **sizes.constants(), **strided(v=values), "BLOCK_V": width, "kv_heads": sizes.kv_heads,
            "group": sizes.group if queries else 1, "chunks": chunks, "first_chunk": first,
            "x_chunks": sizes.chunks - (sizes.first if queries else 0), "x_first": sizes.first if queries else 0,
            "slots": slots, "first_slot": slot, "length": length, "before": sizes.many - length, "size": sizes.chunk,
            "row": self.row, "FACTOR": queries or self.gates, "QUERIES": queries,
            "PARTS": self.parts, "PRECISION": self.precision,
            **block.arguments(pairs=False),
        }  # fmt: skip
        return Launch(power_update_kernel, (sizes.kv * chunks * tiles,), arguments)

    def scan(self, first: int, steps: int, slots: int, reverse: bool) -> Launch:
        sizes = self.sizes
        arguments = {
            "slots": slots, "steps": steps, "chunks": sizes.chunks, "first_chunk": first, "SLOT": sizes.slot, "BLOCK": SCAN,
            "GATES": self.gates, "REVERSE": reverse, "num_warps": 4, **COMPILER_OPTIONS,
        }  # fmt: skip
        return Launch(power_scan_kernel, (sizes.kv * -(-sizes.slot // SCAN),), arguments)

    def read(
        self, kernel: Any, block: settings.Block, own: Names, states: bool, first: int, end: int, slot: int, slots: int
    ) -> Launch | None:
        """Of `power_out_kernel` or `power_bwd_dq_kernel`, for chunks from first on."""
        sizes = self.sizes
        if not sizes.length:
            return None
        first = max(first, sizes.first)
        count = -(-min(sizes.chunk, sizes.many) // block.tokens)
        arguments = {
            **sizes.constants(), **sizes.tiles(), **own, "heads": sizes.heads, "group": sizes.group, "blocks": count,
            "chunks": end - first, "first_chunk": first, "x_chunks": sizes.chunks - sizes.first, "x_first": sizes.first,
            "slots": slots, "first_slot": slot, "length": sizes.length, "n_keys": sizes.many, "size": sizes.chunk,
            "row": self.row, "scale": self.call.scale, "GATES": self.gates, "PAIRS": sizes.pairs, "STATE": states,
            "FIRST_STATE": sizes.initial, **self.products, **block.arguments(),
        }  # fmt: skip
        return Launch(kernel, (sizes.batch * sizes.heads * (end - first) * count,), arguments)

    def dkv(self, own: Names, first: int, end: int, slots: int, states: bool, ends: bool) -> Launch | None:
        sizes, block = self.sizes, self.of.dkv
        if not sizes.pairs:
            return None
        count = -(-sizes.chunk // block.tokens)
        arguments = {
            **sizes.constants(), **sizes.tiles(), **own, "kv_heads": sizes.kv_heads, "group": sizes.group, "blocks": count,
            "chunks": end - first, "first_chunk": first, "all_chunks": sizes.chunks, "slots": slots, "first_slot": 1,
            "length": sizes.length, "n_keys": sizes.many, "size": sizes.chunk, "row": self.row, "scale": self.call.scale,
            "GATES": self.gates, "STATE": states, "LAST_STATE": ends,
            "SPLIT": 2 if self.bfloat16 else 0,
            **self.products, **block.arguments(),
        }  # fmt: skip
        return Launch(power_bwd_dkv_kernel, (sizes.kv * (end - first) * count,), arguments)

    def means(self, grad: Tensor) -> Launch | None:
        sizes = self.sizes
        if not sizes.length:
            return None
        tokens = self.of.dq.tokens
        count = -(-sizes.length // tokens)
        arguments = {
            **strided(grad=grad), "heads": sizes.heads, "group": sizes.group, "blocks": count, "length": sizes.length,
            "n_keys": sizes.many, "VALUE_DIM": sizes.values, "BLOCK_V": padded(sizes.values), "GATES": self.gates,
            "BLOCK_T": tokens, "num_warps": 4, **COMPILER_OPTIONS,
        }  # fmt: skip
        return Launch(power_bwd_means_kernel, (sizes.batch * sizes.heads * count,), arguments)

    @property
    def row(self) -> int:
        """Entries of a row of columns."""
        tokens = self.of.output.tokens
        return -(-self.sizes.chunk // tokens) * tokens


def _walk(planned: ForwardPlan, tensors: Tensors, state: Tensor | None, sizes: Sizes) -> Tensor | None:
    """Run the steps with the states in `state` (B * H_kv, slots, SLOT); the last slot that was reached."""
    reads = tensors | {"x_ptr": tensors["queries"], "moved_ptr": tensors["of_queries"]}
    adds = tensors | {"x_ptr": tensors["keys"], "factor_ptr": tensors["until_ptr"]}
    if state is not None:
        reads["state_ptr"] = adds["state_ptr"] = state
    for index, step in enumerate(planned.steps):
        if state is not None and index:
            state[:, 0] = state[:, planned.steps[index - 1].chunks]
        for launch, given in ((step.update, adds), (step.scan, adds), (step.reads, reads)):
            if launch is not None:
                launch(given)
    return None if state is None else state[:, planned.steps[-1].chunks if sizes.pairs else 0]


def _walk_back(planned: ForwardPlan, tensors: Tensors, last: Tensor | None, sizes: Sizes) -> Tensor | None:
    """Run the steps with the states' gradients, of which `last` is given; that for the state before the first key."""
    reads = tensors | {"x_ptr": tensors["keys"], "moved_ptr": tensors["of_keys"]}
    adds = tensors | {"x_ptr": tensors["queries"], "v_ptr": tensors["grad_ptr"]}
    state = None
    if planned.slots:
        state = tensors["total_ptr"].new_empty(sizes.kv, planned.slots, sizes.slot)
        state[:, planned.steps[0].chunks] = 0.0 if last is None else last
        reads["state_ptr"] = adds["state_ptr"] = state
    for index, step in enumerate(planned.steps):
        if state is not None and index:
            state[:, step.chunks] = state[:, 0]
        for launch, given in ((step.update, adds), (step.scan, adds), (step.reads, reads)):
            if launch is not None:
                launch(given)
    return None if state is None else state[:, 0]


def _first_state(call: PowerCall, sizes: Sizes, slots: int, like: Tensor) -> Tensor | None:
    """Memory for states, of which the first is given, or 0."""
    if not slots:
        return None
    state = torch.empty(sizes.kv, slots, sizes.slot, dtype=torch.float32, device=like.device)
    given = call.sums is not None and call.norm is not None
    state[:, 0] = _joined(call.sums, call.norm, sizes) if given else 0.0  # type: ignore[arg-type]
    return state


def _joined(sums: Tensor, norm: Tensor, sizes: Sizes) -> Tensor:
    """(B * H_kv, SLOT)."""
    found = sums.new_zeros(sizes.kv, sizes.slot, dtype=torch.float32)
    many = sizes.entries * sizes.values
    found[:, :many] = sums.reshape(sizes.kv, many)
    found[:, many : many + sizes.entries] = norm.reshape(sizes.kv, sizes.entries)
    return found


def _split(state: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The reverse of `_joined`: sums and norm, contiguous copies."""
    rows, many = (sizes.batch, sizes.kv_heads, sizes.entries), sizes.entries * sizes.values
    sums = torch.empty((*rows, sizes.values), dtype=state.dtype, device=state.device)
    norm = torch.empty(rows, dtype=state.dtype, device=state.device)
    sums.view(sizes.kv, many).copy_(state[:, :many])
    norm.view(sizes.kv, sizes.entries).copy_(state[:, many : many + sizes.entries])
    return sums, norm


def _trivial(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is nothing for a kernel: no heads, entries, or tokens."""
    return 0 in (*query.shape[:2], key.shape[1], query.shape[3], value.shape[3], max(query.shape[2], key.shape[2]))
