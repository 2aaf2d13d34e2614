"""The public functions under arguments that nobody chose: each call is right against the oracle, or an error of ours.

A few examples in every run, 10 000 in `make nightly`. An example may hold faults: without one, a refusal is a failure too.
"""

import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffmax
from diffmax import DiffmaxBisectModule, ExpMap, HillMap, TanhMap
from diffmax.compat import adasplash, entmax
from diffmax.errors import NoBackendError

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.bool, torch.complex64, torch.uint8)


SUBJECTS = {}


def subject(share):
    """Of every hundred examples so many go to this function."""

    def add(function):
        SUBJECTS[function.__name__] = share, function
        return function

    return add


class Case:
    """A call that is drawn: a function, its arguments, and what is wrong with them."""

    def __init__(self, draw):
        self.draw, self.faults = draw, []

    def integer(self, least, most):
        return self.draw(st.integers(least, most))

    def real(self, least, most):
        return self.draw(st.floats(least, most))

    def one_of(self, *choices):
        return choices[self.integer(0, len(choices) - 1)]

    def often(self, usual, *others):
        """Mostly the first."""
        return usual if self.integer(0, 3) else self.one_of(*others)

    def fault(self, name, right, *wrong):
        """Now and then something wrong, which is noted."""
        if self.integer(0, 39):
            return right
        self.faults.append(name)
        return self.one_of(*wrong)

    def size(self, most=6):
        return self.integer(0, most) if self.integer(0, 9) else self.one_of(33, 70)

    def tensor(self, name, shape, dtype, kinds=("normal",), requires_grad=False):
        """Of a dtype, in some layout, of some kind of numbers."""
        wanted = self.fault(f"{name}'s dtype", dtype, *OTHERS)
        kind, seed = self.one_of(*kinds), self.integer(0, 2**20)
        generator = torch.Generator().manual_seed(seed)
        given_shape = self.fault(f"{name}'s shape", tuple(shape), (*shape, 2), tuple(shape)[:-1], (3, *tuple(shape)[1:]))
        t = torch.randn(given_shape, generator=generator, dtype=torch.float64)
        if kind == "large":
            t = t * 20
        elif kind == "huge":
            t = t * (1e4 if wanted == torch.float16 else 1e30)
        elif kind == "tied":
            t = t.round()
        elif kind in ("-inf", "inf", "nan") and t.numel():
            t = torch.where(torch.rand(t.shape, generator=generator) < 0.3, float(kind), t)
        elif kind == "nothing":
            t = torch.full_like(t, -torch.inf)
        t = t.nan_to_num(0, 1, -1).to(wanted) if wanted in (torch.int64, torch.bool, torch.uint8) else t.to(wanted)
        layout = self.often("contiguous", "transposed", "strided", "expanded")
        if layout == "transposed" and t.ndim >= 2:
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "strided" and t.ndim:
            t = torch.stack([t, t], -1)[..., 0]
        elif layout == "expanded" and t.ndim and t.shape[0]:
            t = t[:1].expand(t.shape)
        if requires_grad and t.is_floating_point():
            t = t.detach().requires_grad_()
        return t

    def spoilt(self, arguments, options):
        """Now and then one of the tensors is something else."""
        given = dict(enumerate(arguments)) | options
        places = [place for place, value in given.items() if isinstance(value, torch.Tensor)]
        if self.integer(0, 24) or not places:
            return arguments, options
        place = self.one_of(*places)
        t = given[place].detach()
        given[place] = self.one_of(
            *(None, 0.5, [[0.5]], "scores", (t, t), t.to("meta"), torch.nn.Parameter(t, requires_grad=False)),
            *(() if t.dtype == torch.bfloat16 else (t.numpy(),)),
            *((t.to_sparse(), torch.nested.as_nested_tensor([t, t], layout=torch.jagged)) if t.ndim else ()),
        )
        self.faults.append(f"{place} is {type(given[place]).__name__}")
        return tuple(given[i] for i in range(len(arguments))), {name: given[name] for name in options}

    def alpha(self, shapes, low=0.0, high=1.0, requires_grad=False):
        """A number in the range, or a tensor of one of the shapes, whose ends count as well."""
        near = (low + 1e-6, low + 0.1, low + 0.4999999, low + 0.5, low + 2 / 3, low + 0.75, low + 0.9, high - 1e-6)
        number = self.real(low + 1e-3, high - 1e-3) if self.one_of(False, True) else self.one_of(*near)
        if self.one_of(False, True) and shapes:
            shape = self.one_of(*shapes)
            t = torch.full(shape, number, dtype=self.one_of(torch.float32, torch.float64))
            if t.numel():
                t.view(-1)[0] = self.often(number, low, high)
            if requires_grad:
                t.requires_grad_()
            wrong = (t + 2, t - 2, t * torch.nan, t.new_full((3, 5, 7), 0.5), (t > 0), (t > 0).long())
            return self.fault("alpha", t, *wrong)
        return self.fault("alpha", number, -0.5, 7.5, float("nan"), "0.5", None, True, [0.5])


def moved(value, change):
    """The arguments with every floating tensor changed."""
    if isinstance(value, dict):
        return {name: moved(part, change) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, change) for part in value)
    return change(value) if isinstance(value, torch.Tensor) else value


def wide(t):
    """The same numbers in float64."""
    return t.detach().double() if t.is_floating_point() else t


def fresh(t):
    """A leaf of its own, with the same strides."""
    if t.is_meta or t.is_nested or t.layout != torch.strided:
        return t
    twin = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if 0 not in t.stride() else None
    twin = t.detach().clone() if twin is None else twin.copy_(t.detach())
    return twin.requires_grad_(t.requires_grad)


def is_ours(error, names):
    kinds = (ValueError, TypeError, NotImplementedError, NoBackendError)
    start = re.match(r"[\w. ]+(?=: )", str(error))
    return isinstance(error, kinds) and (isinstance(error, NoBackendError) or (start is not None and start.group() in names))


def refused_or(case, names, function, *arguments):
    """The result, or None where the call was refused as it should be."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001  # which ones may come is the question
        refusal = error
    assert is_ours(refusal, names), f"not an error of ours: {type(refusal).__name__}: {refusal}"
    assert case.faults, f"a call without a fault was refused: {refusal}"
    return None


def run(function, arguments, options, seed):
    """The floating results of a call."""
    torch.manual_seed(seed)
    result = function(*arguments, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    return [t for part in results for t in (list(part) if isinstance(part, tuple) else [part])]


def check(case, names, function, *arguments, **options):
    """Right, or refused by us; `names` are what our messages may begin with."""
    seed = 5
    arguments, options = case.spoilt(arguments, options)
    here = moved((arguments, options), fresh)
    got = refused_or(case, names, run, function, *here, seed)
    if got is None:
        return None
    with diffmax.use_backend("reference"):
        try:
            same, exact = (
                run(function, *moved((arguments, options), fresh), seed),
                run(function, *moved((arguments, options), wide), seed),
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise AssertionError(f"the oracle refuses what was computed: {error}") from error
    for ours, theirs, truth in zip(got, same, exact, strict=True):
        compare(ours, theirs, truth)
    return got


def compare(ours, same, truth, factor=32):
    """As far from float64 as the reference in that dtype is, times a factor, and some units in the last place."""
    assert ours.is_nested or ours.shape == truth.shape
    if not ours.is_floating_point() or ours.is_meta or ours.is_nested:
        return  # supports, which change by one where a score lies at the threshold
    ours, same, dtype = ours.detach(), same.detach(), ours.dtype
    bad = ~truth.isfinite() | ~same.isfinite()
    assert torch.equal(ours[bad].isfinite(), same[bad].isfinite()), "NaN or inf elsewhere than in the reference"
    assert ours[~bad].isfinite().all(), "NaN or inf where the reference has none"
    if (~bad).any():
        ours, same, truth = (t[~bad].double() for t in (ours, same, truth))
        eps, size = torch.finfo(dtype).eps, truth.abs().amax().clamp_min(1)
        allowed = factor * ((same - truth).abs().max() + eps * size)
        if dtype == torch.float64:  # the truth is no better: allow what float32 would err by, in these units
            allowed = 1e-9 * size
        assert (ours - truth).abs().max() <= allowed, f"off by {(ours - truth).abs().max():.2e}, allowed {allowed:.2e}"


def check_gradients(function, arguments, options, got, seed=5):
    """They are finite where the reference's are, and as near to float64."""
    leaves = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves or not got or not got[0].requires_grad or got[0].numel() == 0 or not got[0].isfinite().all():
        return
    grad = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(change, backend):
        here, named = moved((arguments, options), change)
        places = [t for t in (*here, *named.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
        with diffmax.use_backend(backend) if backend else nullcontext():
            out = run(function, here, named, seed)[0]
        return torch.autograd.grad(out, places, grad.to(out.dtype), allow_unused=True)

    same = gradients(fresh, "reference")
    truth = gradients(lambda t: wide(t).requires_grad_(t.requires_grad), "reference")
    for ours, theirs, exact in zip(gradients(fresh, ""), same, truth, strict=True):
        if ours is not None:
            assert theirs is not None
            assert ours.shape == exact.shape
            assert torch.equal(ours.isfinite(), theirs.isfinite()), "a gradient is NaN or inf elsewhere than in the reference"
            if exact.isfinite().all() and theirs.isfinite().all() and exact.numel() and ours.dtype != torch.float64:
                compare(ours, theirs, exact, factor=64)


# --- rows ---

SCORES = ("normal", "large", "tied", "huge", "-inf", "nothing", "nan", "inf")


def scores_of(case, requires_grad=False):
    shape = tuple(case.size() for _ in range(case.integer(0, 4)))
    x = case.tensor("X", shape, case.one_of(*FLOATS), SCORES, requires_grad)
    ndim = max(x.ndim, 1)
    dim = case.fault("dim", case.integer(-ndim, ndim - 1), ndim, -ndim - 1, 1.0, None, True)
    return x, dim


def per_row(x, dim):
    """Shapes of an alpha that broadcast against x without its axis dim."""
    if not isinstance(dim, int) or isinstance(dim, bool) or not x.ndim or not -x.ndim <= dim < x.ndim:
        return [()]
    full = tuple(1 if axis == dim % x.ndim else size for axis, size in enumerate(x.shape))
    return [(), full, (full[0],) + (1,) * (len(full) - 1), full[1:]]


def rows_options(case):
    return {
        "n_iter": case.fault("n_iter", case.often(50, 60, 200), 0, -3, 50.0, None, True),
        "ensure_sum_one": case.often(True, False),
    }


def sound(alpha):
    """Whether gradients are smooth enough to be compared."""
    return isinstance(alpha, float) and alpha >= 0.5


@subject(20)
def rows(case):
    x, dim = scores_of(case, requires_grad=case.one_of(False, True))
    alpha = case.alpha(per_row(x, dim), requires_grad=case.one_of(False, True))
    options = {"dim": dim, **rows_options(case)}
    got = check(case, {"diffmax_bisect"}, diffmax.diffmax_bisect, x, alpha, **options)
    if got is not None and not case.faults and sound(alpha):
        check_gradients(diffmax.diffmax_bisect, (x, alpha), options, got)
    if got is not None and x.ndim and not case.faults and x.dtype in (torch.float32, torch.float64):
        whole = x.isfinite().all(dim, keepdim=True) & (x.shape[dim] > 0)
        sums = torch.where(whole, got[0].detach().sum(dim, keepdim=True), 1.0)
        assert options["ensure_sum_one"] is False or (sums - 1).abs().le(1e-4).all(), "a row does not sum to 1"


@subject(5)
def the_module_of_rows(case):
    x, dim = scores_of(case)
    alpha_map = case.often(None, *(kind(c=case.one_of(0.3, 1.0)) for kind in (HillMap, TanhMap, ExpMap)))
    shapes = per_row(x, dim)
    alpha = case.alpha(shapes) if alpha_map is None else case.often(0.8, torch.full(case.one_of(*shapes), 0.85), lambda: 0.7)
    if alpha_map is not None and callable(alpha):
        case.faults.append("a function with a map")
    alpha = (
        torch.nn.Parameter(alpha)
        if case.one_of(0, 1) and isinstance(alpha, torch.Tensor) and alpha.is_floating_point()
        else alpha
    )

    def call(X):
        module = DiffmaxBisectModule(alpha, dim, **options, alpha_map=alpha_map)
        return module.to(torch.float64)(X) if getattr(X, "dtype", None) == torch.float64 else module(X)

    options = rows_options(case)
    check(case, {"DiffmaxBisectModule", "diffmax_bisect"}, call, x)


# --- losses ---


def target_of(case, x, dim):
    classes = x.shape[dim] if x.ndim else 0
    shape = tuple(size for axis, size in enumerate(x.shape) if axis != dim)
    if not classes:
        if shape == () or 0 not in shape:
            case.faults.append("no class to name")
        return torch.zeros(shape, dtype=torch.int64)
    if case.one_of(0, 1):
        y = torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.01
        y = y / y.sum(dim, keepdim=True)
        return case.fault(
            "target",
            y.to(torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32),
            y.bool(),
            y[..., :-1],
            None,
        )
    index = torch.randint(classes, shape, generator=torch.Generator().manual_seed(4))
    if index.numel() and case.one_of(0, 1):
        index.view(-1)[0] = -100
    return case.fault("target", index, index + classes, index - 200, index.float(), index.unsqueeze(0), [0])


@subject(10)
def losses(case):
    shape = case.one_of((5,), (3, 5), (1, 1), (4, 5, 2), (2, 3, 2, 2), (0, 5), (3, 40), (5, 0), ())
    x = case.tensor("X", shape, case.one_of(*FLOATS), ("normal", "large", "tied", "-inf", "nothing"))
    if x.ndim == 0:
        case.faults.append("no classes")
    dim = 0 if x.ndim <= 1 else 1
    target = target_of(case, x, dim)
    weight = case.often(None, case.tensor("weight", (x.shape[dim],), torch.float32) if x.ndim else None)
    reduction = case.fault("reduction", case.one_of("mean", "sum", "none"), "avg", None, 1)
    alpha = case.alpha([()])
    if case.one_of(0, 1):
        options = {"weight": weight, "reduction": reduction, "ignore_index": -100}
        check(case, {"diffmax_loss", "DiffmaxLoss"}, diffmax.diffmax_loss, x, target, alpha, **options)
        return
    which = case.one_of("sparsemax_loss", "entmax15_loss", "entmax_bisect_loss", "sparsemax_bisect_loss")
    order = (case.alpha([()], 1.0, 2.0),) if which == "entmax_bisect_loss" else ()
    check(case, {which}, getattr(entmax, which), x, target, *order)


# --- attention ---


def heads_of(case):
    kv_heads = case.one_of(1, 1, 2, 3)
    groups = case.one_of(1, 1, 2)
    return kv_heads * groups, kv_heads


def window_of(case):
    sizes = (-1, -1), (0, 0), (1, 2), (2, -1), (-1, 3), (100, 100)
    return case.fault("window_size", case.often(None, *sizes), (1,), (-2, 0), 3, (1.5, 0), ("a", 1))


def on_scores(case, heads, batch, dtype, slopes_per_batch=True):
    """Options that attention and its relatives share."""
    options = {}
    if case.one_of(0, 0, 1):
        shape = case.one_of((heads,), (batch, heads)) if slopes_per_batch else (heads,)
        options["alibi_slopes"] = case.tensor("alibi_slopes", shape, torch.float32)
    if case.one_of(0, 0, 1):
        options["softcap"] = case.fault("softcap", case.one_of(0.0, 1.5, 30.0), -1.0, float("nan"), "1", None)
    if case.one_of(0, 0, 1):
        options["sink"] = case.tensor("sink", (heads,), case.one_of(torch.float32, dtype))
    return options


def mask_of(case, batch, heads, length, keys, dtype):
    shape = case.one_of((length, keys), (batch, heads, length, keys), (batch, 1, 1, keys), (1, 1, length, keys), (keys,))
    generator = torch.Generator().manual_seed(case.integer(0, 99))
    seen = torch.rand(shape, generator=generator) < case.one_of(0.0, 0.5, 0.9)
    bias = (
        torch.randn(shape, generator=generator)
        .masked_fill(~seen, -torch.inf)
        .to(dtype if dtype.is_floating_point else torch.float32)
    )
    mask = case.one_of(None, None, seen, bias, bias.float() if dtype != torch.float64 else bias)
    return case.fault(
        "attn_mask",
        mask,
        seen.long(),
        seen.unsqueeze(0).unsqueeze(0).expand(2, 1, *seen.shape)[..., :-1],
        "causal",
        torch.ones(3, 5, 7, 2, dtype=torch.bool),
    )


def lists_of(case, options):
    """Now and then the weights too; faults are what they do not come with."""
    kind = case.fault("return_weights", case.often(None, "sparse"), "dense", True)
    if kind is not None:
        case.faults += [n for n, given in (("stats", options["return_stats"]), ("dropout", options["dropout_p"])) if given]
    return {"return_weights": kind}


def whole(function):
    """The function, with its lists of weights as a tensor, the sink's apart."""

    def call(*arguments, **options):
        result = function(*arguments, **options)
        if not isinstance(result, tuple) or not isinstance(result[1], diffmax.SparseWeights):
            return result
        out, weights = result
        return (out, weights.to_dense()) if weights.sink is None else (out, weights.to_dense(), weights.sink)

    return call


QK = ("normal", "large", "tied")
ATTENTION = {"diffmax.attention"}


def attention_tensors(case, requires_grad):
    batch, length, keys = case.one_of(1, 2, 0), case.size(), case.size()
    (heads, kv_heads), d = heads_of(case), case.one_of(1, 4, 8, 17)
    d_v, dtype = case.often(d, 1, 5), case.one_of(*FLOATS)
    q = case.tensor("query", (batch, heads, length, d), dtype, QK, requires_grad)
    k = case.tensor("key", (batch, kv_heads, keys, d), dtype, QK, requires_grad)
    v = case.tensor("value", (batch, kv_heads, keys, d_v), dtype, requires_grad=requires_grad)
    return (batch, heads, kv_heads, length, keys, dtype), (q, k, v)


@subject(25)
def attention(case):
    (batch, heads, kv_heads, length, keys, dtype), tensors = attention_tensors(case, case.one_of(False, True))
    options = {
        "attn_mask": mask_of(case, batch, heads, length, keys, dtype),
        "dropout_p": case.fault("dropout_p", case.often(0.0, 0.1, 0.5, 0.99), -0.1, 1.5, float("nan"), "0", None),
        "is_causal": case.one_of(False, True),
        "scale": case.fault("scale", case.often(None, 0.5, 1, 0.0, -1.0), float("nan"), "1", float("inf")),
        "enable_gqa": heads != kv_heads or case.one_of(False, True),
        "alpha": case.alpha([(), (heads,)], requires_grad=case.one_of(False, True)),
        "window_size": window_of(case),
        "causal_alignment": case.fault("causal_alignment", case.one_of("upper_left", "lower_right"), "lower", None),
        "return_stats": case.often(False, True),
        **on_scores(case, heads, batch, dtype),
    }
    got = check(case, ATTENTION, whole(diffmax.attention), *tensors, **options, **lists_of(case, options))
    if got is not None and not case.faults and sound(options["alpha"]):
        check_gradients(diffmax.attention, tensors, options, got)


def ends_of(case, name, lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    wrong = (ends.float(), ends + 1, ends.flip(0) - 1, ends[:, None], ends[:0], [0, 3])
    return case.fault(name, ends, *wrong)


@subject(10)
def packed_attention(case):
    many, dtype, (heads, kv_heads), d = case.one_of(1, 2, 3), case.one_of(*FLOATS), heads_of(case), case.one_of(1, 4, 9)
    lengths, keys = ([case.size() for _ in range(many)] for _ in range(2))
    q = case.tensor("query", (sum(lengths), heads, d), dtype, QK)
    k = case.tensor("key", (sum(keys), kv_heads, d), dtype, QK)
    v = case.tensor("value", (sum(keys), kv_heads, d), dtype)
    options = {
        "dropout_p": case.often(0.0, 0.3),
        "is_causal": case.one_of(False, True),
        "enable_gqa": heads != kv_heads,
        "alpha": case.alpha([(), (heads,)]),
        "window_size": window_of(case),
        "return_stats": case.often(False, True),
        **on_scores(case, heads, 1, dtype, slopes_per_batch=False),
    }
    longest = [case.fault("max_seqlen", max(of), -1, 1.5, None) for of in (lengths, keys)]
    ends = ends_of(case, "cu_seqlens_q", lengths), ends_of(case, "cu_seqlens_k", keys)
    more = lists_of(case, options)
    check(case, {"diffmax.attention_varlen"}, whole(diffmax.attention_varlen), q, k, v, *ends, *longest, **options, **more)


@subject(10)
def decoding(case):
    batch, dtype, (heads, kv_heads), d = case.one_of(1, 2), case.one_of(*FLOATS), heads_of(case), case.one_of(1, 4, 9)
    room, length = case.one_of(1, 5, 16, 40), case.one_of(1, 1, 2, 3)
    new = case.one_of(None, None, 1, 2)
    if new is not None and new > room:
        new = 1
    paged = case.one_of(False, True)
    pages = 3 if paged else 1
    rows = batch * pages if paged else batch
    q = case.tensor("q", (batch, length, heads, d), dtype, QK)
    if q.is_floating_point() and case.fault("gradient", False, True):
        q.requires_grad_()
    caches = [case.tensor(name, (rows, room, kv_heads, d), dtype, QK) for name in ("k_cache", "v_cache")]
    if new is not None:  # which are written to
        caches = [cache.contiguous() for cache in caches]
    added = [None if new is None else case.tensor(name, (batch, new, kv_heads, d), dtype) for name in ("k", "v")]
    most = room * pages - (new or 0)
    lengths = torch.tensor([case.integer(0, most) for _ in range(batch)], dtype=torch.int32)
    table = torch.arange(rows, dtype=torch.int32).view(batch, pages) if paged else None
    usual = case.one_of(lengths, int(lengths[0])) if new is not None or case.one_of(0, 1) else None
    options = {
        "cache_seqlens": case.fault("cache_seqlens", usual, lengths + 1000, lengths - 1000, lengths.float(), 1.5, -1),
        "block_table": case.fault("block_table", table, torch.full((batch, 2), 99, dtype=torch.int32), torch.zeros(3), "table"),
        "softmax_scale": case.often(None, 0.3),
        "causal": case.one_of(False, True),
        "window_size": case.fault("window_size", case.often((-1, -1), (2, 0), (3, 1)), (1,), 3, (-5, 0), None),
        "alpha": case.alpha([(), (heads,)]),
        "return_stats": case.often(False, True),
        **on_scores(case, heads, batch, dtype),
    }
    check(
        case,
        {"diffmax.attention_with_kvcache"},
        partial(on_copies, diffmax.attention_with_kvcache),
        q,
        *caches,
        *added,
        **options,
    )


def on_copies(function, *arguments, **options):
    """With caches of its own: they are written to. Pages that are read differ in number between kernels."""
    result = function(*moved(arguments, lambda t: t.clone()), **options)
    return (result[0], result[1].tau) if isinstance(result, tuple) else result


# --- what is called by other packages' names ---


@subject(10)
def entmax_names(case):
    x, dim = scores_of(case)
    which = case.one_of("sparsemax", "entmax15", "entmax_bisect", "sparsemax_bisect", "EntmaxBisect", "Sparsemax", "Entmax15")
    bisects = which in ("entmax_bisect", "EntmaxBisect")
    order = (case.alpha(per_row(x, dim), 1.0, 2.0),) if bisects else ()
    if which[0].islower():
        check(case, {which}, getattr(entmax, which), x, *order, dim=dim)
        return

    def call(X, *alpha):
        return getattr(entmax, which)(*alpha, dim=dim)(X)

    names = {"EntmaxBisect": "entmax_bisect", "Sparsemax": "sparsemax", "Entmax15": "entmax15"}
    check(case, {which, names[which]}, call, x, *order)


@subject(5)
def adasplash_names(case):
    (batch, heads, _, length, keys, _), tensors = attention_tensors(case, False)
    which = case.one_of(
        "adasplash",
        "adasplash_no_block_mask",
        "adasplash_v1",
        "triton_entmax",
        "triton_entmax15",
        "triton_sparsemax",
    )
    if which.startswith("triton"):
        x = case.tensor("x", (3, case.size()), case.one_of(*FLOATS), ("normal", "large", "tied"))
        check(case, {which, "triton_entmax"}, getattr(adasplash, which), x)
        return
    alpha = case.alpha([(), (heads,)], 1.0, 2.0)
    if (isinstance(alpha, float) and alpha <= 1) or (isinstance(alpha, torch.Tensor) and (alpha <= 1).any()):
        case.faults.append("alpha' is softmax's")
    options = {"is_causal": case.one_of(False, True)}
    if case.one_of(0, 1):
        most = min(length, keys)
        varlen = torch.tensor([case.integer(0, most) for _ in range(batch)], dtype=torch.int64)
        options["varlen"] = case.fault("varlen", varlen, varlen.float(), varlen + 1000, varlen[None], [1])
    names = {which, "adasplash", "diffmax.attention"}
    check(case, names, getattr(adasplash, which), *tensors, alpha, **options)


# --- maps ---


@subject(5)
def maps(case):
    kind = case.one_of(HillMap, TanhMap, ExpMap)
    c = case.fault("c", case.real(0.05, 1.0), 0.0, -1.0, 1.5, float("nan"), "1", None)
    beta0 = case.fault("beta0", case.real(1e-3, 1e3), 0.0, -1.0, float("inf"), float("nan"), "1", None)
    names = {kind.__name__}
    made = refused_or(case, names, kind, c, beta0)
    if made is None:
        return
    alpha = case.fault("alpha", 1 - c * case.real(1e-3, 0.999), 1.5, -1.0, float("nan"), "1", None)
    as_tensor = case.one_of(False, True) and isinstance(alpha, float)
    given_alpha = torch.tensor([alpha, alpha], dtype=torch.float64) if as_tensor else alpha
    beta = refused_or(case, names, made.inverse, given_alpha)
    if beta is None:
        return
    assert (torch.as_tensor(beta) >= 0).all()
    again = torch.as_tensor(made(beta), dtype=torch.float64)
    assert (again - given_alpha).abs().max() < 1e-6, f"{given_alpha} came back as {again}"


# --- all of them ---


@pytest.mark.parametrize("name", SUBJECTS)
def test_right_or_refused(name):
    share, function = SUBJECTS[name]

    @settings(
        max_examples=max(1, settings.default.max_examples * share // 100),
        derandomize=settings.default.max_examples <= 100,  # the same ones in each ordinary run
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def examples(data):
        function(Case(data.draw))

    examples()


# --- the device "meta" ---


@pytest.mark.parametrize("dtype", [*FLOATS[1:], *OTHERS])
def test_on_the_device_meta_shapes_are_the_same(dtype):
    def shape(call, device):
        try:
            return tuple(call(device).shape)
        except (ValueError, TypeError) as error:
            return str(error)

    def tensor(device, *sizes):
        return torch.zeros(sizes, dtype=dtype, device=device)

    for call in (
        lambda device: diffmax.diffmax_bisect(tensor(device, 3, 5), 0.5),
        lambda device: diffmax.attention(*(tensor(device, 1, 2, 5, 4) for _ in range(3)), is_causal=True),
        lambda device: diffmax.diffmax_loss(tensor(device, 3, 5), torch.zeros(3, dtype=torch.int64, device=device)),
        lambda device: diffmax.attention_with_kvcache(*(tensor(device, 2, 5, 2, 4) for _ in range(3))),
        lambda device: entmax.entmax15(tensor(device, 3, 5)),
        lambda device: adasplash.adasplash(*(tensor(device, 1, 2, 5, 4) for _ in range(3))),
    ):
        assert shape(call, "meta") == shape(call, "cpu")
