"""Which backend runs a call: the order of choice, reasons, partial backends, threads, compilation, accelerators."""

import re
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch

import diffmax
from diffmax import diffmax_bisect, reference
from diffmax.errors import BackendError, NoBackendError
from diffmax.machine import dispatch
from diffmax.machine.dispatch import choose, describe, judge, registry
from diffmax.plugin import FEATURES, OPERATOR_FEATURES, Backend, Kernel
from diffmax.reference import attention, decoding, power, threshold
from diffmax.testing.attention import checks as attention_checks
from diffmax.testing.decoding import checks as decoding_checks
from diffmax.testing.power import checks as power_checks
from diffmax.testing.threshold import checks as threshold_checks

ROOT = Path(__file__).parents[1]

BOTH = {"bisect": "fake_kernels:forward", "bisect_backward": "fake_kernels:backward"}


@pytest.fixture
def calls(monkeypatch):
    """Kernels that note their calls, as a module that descriptions can name."""
    seen = []
    module = types.ModuleType("fake_kernels")
    module.forward = lambda *args: seen.append("forward") or reference.bisect(*args)
    module.backward = lambda *args: seen.append("backward") or reference.bisect_backward(*args)
    module.no_halves = lambda spec: ["no halves today"] if spec.dtype == torch.float16 else []
    module.broken_check = lambda spec: 1 / 0
    module.bare_reason = lambda spec: "not today"
    monkeypatch.setitem(sys.modules, "fake_kernels", module)
    return seen


@pytest.fixture
def register(calls):
    added = []

    def add(name, **fields):
        defaults = {"device_types": ("cpu",), "dtypes": (torch.float16, torch.float32), "kernels": BOTH}
        diffmax.register_backend(Backend(**{"name": name, "features": frozenset(FEATURES), **defaults, **fields}))
        added.append(name)

    yield add
    for name in added:
        diffmax.unregister_backend(name)


@pytest.fixture
def settings(monkeypatch):
    def change(**fields):
        monkeypatch.setattr(registry, "settings", registry.settings._replace(**fields))
        registry.kernels.clear()

    yield change
    monkeypatch.undo()
    registry.kernels.clear()


X = torch.randn(3, 4)


def test_the_largest_priority_wins_then_the_name(register, calls):
    register("low", priority=10)
    diffmax_bisect(X, 0.5)
    assert not calls
    register("high", priority=90)
    diffmax_bisect(X, 0.5)
    assert calls == ["forward"]
    assert choose(describe("bisect", "cpu", torch.float32)).name == "high"
    register("higher", priority=90)
    assert choose(describe("bisect", "cpu", torch.float32)).name == "high"


def test_argument_before_context_before_environment_before_priority(register, settings):
    for name in ("one", "two", "three"):
        register(name, priority=10)

    def chosen(backend=None):
        return diffmax.explain("diffmax_bisect", X, 0.5, backend=backend)

    assert (chosen().chosen, chosen().calls[0][-1]) == ("numba", "priority")
    settings(backend=("one",))
    assert (chosen().chosen, chosen().calls[0][-1]) == ("one", "DIFFMAX_BACKEND")
    with diffmax.use_backend("two"):
        assert (chosen().chosen, chosen().calls[0][-1]) == ("two", "use_backend")
        assert (chosen("three").chosen, chosen("three").calls[0][-1]) == ("three", "the backend argument")
        with diffmax.use_backend("three"):
            assert chosen().chosen == "three"
        assert chosen().chosen == "two"
    assert chosen().chosen == "one"


def test_the_environment_may_list_several(settings):
    settings(backend=("reference", "cpu"))
    assert choose(describe("bisect", "cpu", torch.float32)).name == "reference"


def test_a_named_backend_never_falls_back(register, settings):
    register("acme", dtypes=(torch.float32,), features=frozenset())
    with pytest.raises(NoBackendError) as caught:
        diffmax_bisect(X.double(), torch.full((len(X), 1), 0.5), backend="acme")
    assert str(caught.value) == (
        "the backend acme cannot run bisect of float64 on cpu, needs tensor_alpha\n"
        "  acme: takes float32, not float64; lacks tensor_alpha (alpha as a tensor: per row, per head)\n"
        "run `python -m diffmax` to see what is installed"
    )
    with diffmax.use_backend("acme"), pytest.raises(NoBackendError, match="takes float32, not float16"):
        diffmax_bisect(X.half(), 0.5)
    settings(backend=("acme",))
    with pytest.raises(NoBackendError, match="takes float32, not float16"):
        diffmax_bisect(X.half(), 0.5)


def test_reasons_of_the_backend_itself(register):
    register("acme", unsupported="fake_kernels:no_halves", priority=90)
    explanation = diffmax.explain("diffmax_bisect", X.half(), 0.5)
    assert explanation.chosen == "numba"
    assert "  acme: no halves today" in repr(explanation).splitlines()
    register("bare", unsupported="fake_kernels:bare_reason", priority=95)
    assert "bare: not today" in str(diffmax.explain("bisect", torch.randn(3)))
    register("broken", unsupported="fake_kernels:broken_check", priority=95)
    assert "  broken: its check of the call raised ZeroDivisionError: division by zero" in repr(
        diffmax.explain("diffmax_bisect", X, 0.5)
    )
    assert diffmax.explain("diffmax_bisect", X, 0.5).chosen == "acme"


def test_a_backend_that_is_not_automatic_waits_to_be_asked(register, calls):
    register("shy", priority=99, automatic=False)
    diffmax_bisect(X, 0.5)
    assert not calls
    diffmax_bisect(X, 0.5, backend="shy")
    assert calls == ["forward"]
    assert "shy: is opt-in: request it with backend=" in repr(diffmax.explain("diffmax_bisect", X, 0.5))


def test_determinism_is_a_need(register):
    register("fast", priority=99, features=frozenset({"tensor_alpha", "alpha_gradient"}))
    assert diffmax.explain("diffmax_bisect", X).chosen == "fast"
    torch.use_deterministic_algorithms(True)
    try:
        assert diffmax.explain("diffmax_bisect", X).chosen == "numba"
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_a_partial_backend_lacks_comes_from_the_next(register, calls):
    register("forward-only", priority=90, kernels={"bisect": "fake_kernels:forward"})
    for backend in (None, "forward-only"):
        x = X.clone().requires_grad_()
        diffmax_bisect(x, 0.5, backend=backend).square().sum().backward()
        expected = X.clone().requires_grad_()
        diffmax_bisect(expected, 0.5, backend="reference").square().sum().backward()
        torch.testing.assert_close(x.grad, expected.grad)
    assert calls == ["forward", "forward"]
    register("backward-only", priority=95, kernels={"bisect_backward": "fake_kernels:backward"})
    diffmax_bisect(X.clone().requires_grad_(), 0.5).sum().backward()
    assert calls == ["forward"] * 3 + ["backward"]
    with pytest.raises(NoBackendError, match="backward-only: does not provide bisect"):
        diffmax_bisect(X, 0.5, backend="backward-only")


def test_composed_operators_use_the_row_operator_of_the_named_backend(register, calls):
    """What diffmax builds from the row operator (the module, unfused attention) runs a vendor's kernel without more ado."""
    register("acme", automatic=False)
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    with diffmax.use_backend("acme"):
        weights = diffmax.DiffmaxBisectModule(0.85, alpha_map=diffmax.HillMap(0.3))(query @ query.mT)
        output, _ = attention_function()(torch.nn.Module(), query, query, query, None, is_causal=True, output_attentions=True)
    assert calls == ["forward", "forward"]
    (weights.square().sum() + output.square().sum()).backward()
    assert calls == ["forward", "forward", "backward", "backward"]


def test_attention_that_no_fused_kernel_serves_has_its_rows_from_the_best_row_kernel(register, calls, settings):
    """As on GPUs that are too old for the fused kernels."""
    settings(backend=("rows", "reference"))
    register("rows", priority=90)
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    out = diffmax.attention(query, query, query, alpha=torch.tensor([0.5, 1.0]), is_causal=True)
    assert calls == ["forward"]
    (grad,) = torch.autograd.grad(out.square().sum(), query)
    out = diffmax.attention(query, query, query, alpha=torch.tensor([0.5, 1.0]), is_causal=True, backend="reference")
    assert calls == ["forward"]
    torch.testing.assert_close(grad, torch.autograd.grad(out.square().sum(), query)[0])


def attention_function():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: unfused attention is left out")
    from diffmax.integrations.transformers import register

    register("diffmax-composed", alpha=0.85)
    return transformers.AttentionInterface()["diffmax-composed"]


def test_a_backward_without_alpha_gradients_is_passed_over_where_alpha_learns(register, calls):
    register("acme", priority=90, features=frozenset({"tensor_alpha"}))
    alpha = torch.tensor(0.5, requires_grad=True)
    diffmax_bisect(X, alpha).square().sum().backward()
    assert alpha.grad is not None
    assert calls == ["forward"]


def test_the_backward_runs_where_the_forward_was_asked_to(register, calls):
    register("acme", automatic=False)
    x = X.clone().requires_grad_()
    with diffmax.use_backend("acme"):
        loss = diffmax_bisect(x, 0.5).square().sum()
    worker = threading.Thread(target=loss.backward)  # another thread, after the block
    worker.start()
    worker.join()
    assert calls == ["forward", "backward"]
    assert x.grad is not None


def test_use_backend_holds_for_its_thread_only(register, calls):
    register("acme", automatic=False)
    with diffmax.use_backend("acme"):
        worker = threading.Thread(target=diffmax_bisect, args=(X, 0.5))
        worker.start()
        worker.join()
    assert not calls


def test_the_choice_holds_under_compile_and_follows_the_context(register, calls):
    torch._dynamo.reset()
    register("acme", automatic=False)
    compiled = torch.compile(lambda x: diffmax_bisect(x, 0.5).square().sum(), fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    compiled(x).backward()
    assert not calls
    with diffmax.use_backend("acme"):
        loss = compiled(x)
    loss.backward()
    assert calls == ["forward", "backward"]
    compiled(x).backward()
    assert calls == ["forward", "backward"]


def test_compiled_code_follows_the_context_in_a_thread_that_never_had_one(register, calls):
    """Review finding: where the selection had never been set, torch.compile guarded on nothing and kept the first choice."""
    torch._dynamo.reset()
    register("acme", automatic=False)

    def work():
        compiled = torch.compile(lambda x: diffmax_bisect(x, 0.5), fullgraph=True, backend="aot_eager")
        compiled(X)
        with diffmax.use_backend("acme"):
            compiled(X)
        compiled(X)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert calls == ["forward"]


def test_a_backend_registered_later_is_seen_by_compiled_code(register, calls):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: diffmax_bisect(x, 0.5), fullgraph=True, backend="aot_eager")
    compiled(X)
    register("acme", priority=99)
    compiled(X)
    assert calls == ["forward"]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        with diffmax.use_backend("reference"):
            return diffmax_bisect(X + index, 0.5)


def test_works_in_dataloader_workers():
    diffmax_bisect(X, 0.5)  # a decision made before the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork of a process with threads
        loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork")
        batches = torch.cat(list(loader))
    torch.testing.assert_close(batches, diffmax_bisect(X, 0.5).expand(4, 3, 4), rtol=0, atol=1e-6)


def test_cuda_and_hip_share_a_device_type_and_are_told_apart_by_runtime(register, monkeypatch):
    register("cuda", device_types=("cuda",), runtime="cuda")
    register("rocm", device_types=("cuda",), runtime="hip")
    assert choose(describe("bisect", "cuda", torch.float32)).name == "cuda"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert choose(describe("bisect", "cuda", torch.float32)).name == "rocm"
    with pytest.raises(NoBackendError, match=r"cuda: needs the cuda runtime, this is hip"):
        choose(describe("bisect", "cuda", torch.float32), "cuda")
    records = {record.backend: record for record in diffmax.backends() if record.operator == "bisect"}
    assert (records["rocm"].status, records["cuda"].status) == ("active", "available")
    assert records["cuda"].reason == "for the cuda runtime, this is hip"


def test_plain_pytorch_on_an_accelerator_is_said_once_with_what_to_install(monkeypatch):
    monkeypatch.setattr(registry, "noticed", set())
    spec = describe("bisect", "cuda", torch.float32)
    said = r"no fused kernel for bisect of float32 on cuda: the reference runs(.|\n)*pip install diffmax-cuda"
    with pytest.warns(RuntimeWarning, match=said):
        assert choose(spec).name == "reference"
    assert choose(spec).name == "reference"  # a second warning would be an error here
    with pytest.warns(RuntimeWarning, match="pip install diffmax-npu"):
        choose(describe("bisect", "npu", torch.float32))


def test_strict_makes_that_an_error(settings):
    settings(strict=True)
    with pytest.raises(NoBackendError, match=r"DIFFMAX_STRICT=1: no fused kernel for bisect of float32 on cuda"):
        choose(describe("bisect", "cuda", torch.float32))
    assert choose(describe("bisect", "cuda", torch.float32), "reference").name == "reference"  # asked for
    assert choose(describe("bisect", "cpu", torch.float32)).name == "numba"


def test_statuses_of_a_table(register, settings):
    register("better", priority=80)
    status = {record.backend: (record.status, record.reason) for record in diffmax.backends() if record.operator == "bisect"}
    assert status["better"] == ("active", "")
    assert status["cpu"] == ("available", "better is preferred")
    settings(backend=("cpu",))
    status = {record.backend: record.status for record in diffmax.backends() if record.operator == "bisect"}
    assert (status["better"], status["cpu"]) == ("available", "active")


def test_tables_have_an_html_form_that_escapes(register):
    register("acme")
    html = diffmax.backends()._repr_html_()
    assert html.startswith("<table><tr><th>backend</th>")
    assert "<td>acme</td>" in html
    assert html.count("<tr>") == 1 + len(diffmax.backends())


def test_explain_covers_forward_and_backward():
    text = repr(diffmax.explain(diffmax_bisect, X.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)))
    assert text.splitlines()[0] == "bisect of float32 on cpu, needs tensor_alpha: numba, by priority"
    assert "bisect_backward of float32 on cpu, needs alpha_gradient, tensor_alpha: numba, by priority" in text
    meta = diffmax.explain("diffmax_bisect", torch.empty(3, device="meta"))
    assert meta.chosen == "reference"
    assert "  cpu: serves cpu, not meta" in repr(meta).splitlines()


GOOD = {"name": "acme", "device_types": ("cpu",), "kernels": BOTH, "dtypes": (torch.float32,)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Backend(**{**GOOD, "name": "a b"}),
            ValueError,
            "name must consist of letters, digits, '_' and '-', got 'a b'",
        ),
        (lambda: Backend(**{**GOOD, "device_types": "cpu"}), TypeError, "device_types must be a sequence of names, got 'cpu'"),
        (lambda: Backend(**{**GOOD, "kernels": {}}), ValueError, "kernels must name at least one operator"),
        (lambda: Backend(**{**GOOD, "kernels": {"bisect": "x"}}), ValueError, "given as 'module:function', got 'x'"),
        (lambda: Backend(**{**GOOD, "probe": "x.y"}), ValueError, "given as 'module:function', got 'x.y'"),
        (
            lambda: Kernel("acme.rows", (torch.float32,)),
            ValueError,
            "functions are given as 'module:function', got 'acme.rows'",
        ),
        (lambda: Kernel("a:b", ("float32",)), TypeError, "Kernel a:b: dtypes must be torch dtypes"),
        (
            lambda: Kernel("a:b", (torch.float32,), frozenset({"casual"})),
            ValueError,
            "Kernel a:b: unknown feature 'casual', known: ",
        ),
        (
            lambda: Kernel("a:b", (torch.float32,), max_head_dim=0),
            ValueError,
            "max_head_dim must be a positive int or None, got 0",
        ),
        (
            lambda: Backend(**{**GOOD, "kernels": {"bisect": Kernel("a:b", (torch.float32,), frozenset({"causal"}))}}),
            ValueError,
            "bisect cannot have the feature 'causal', it can have: deterministic, tensor_alpha",
        ),
        (lambda: Backend(**{**GOOD, "dtypes": ()}), TypeError, "dtypes must be torch dtypes"),
        (lambda: Backend(**{**GOOD, "features": "deterministic"}), TypeError, "features must be a set of names"),
        (
            lambda: Backend(**{**GOOD, "features": {"determinstic"}}),
            ValueError,
            "unknown feature 'determinstic', known: ",
        ),
        (lambda: Backend(**{**GOOD, "kernels": {"bisct": "a:b"}}), ValueError, "unknown operator 'bisct', known: bisect, bis"),
        (lambda: Backend(**{**GOOD, "device_types": [1]}), TypeError, r"device_types must be a sequence of names, got \[1\]"),
        (lambda: Backend(**{**GOOD, "priority": "high"}), TypeError, "priority must be an int, got 'high'"),
        (lambda: Backend(**{**GOOD, "automatic": "no"}), TypeError, "automatic must be True or False, got 'no'"),
        (lambda: Backend(**{**GOOD, "runtime": 3}), TypeError, "runtime must be a name or None, got 3"),
        (lambda: Backend(**{**GOOD, "dtypes": (torch.int32,)}), ValueError, "must be floating-point, .* got torch.int32"),
        (lambda: Backend(**{**GOOD, "api_version": (2,)}), TypeError, r"api_version must be a pair of ints, got \(2,\)"),
        (lambda: diffmax.explain("diffmax_bisect", X, 2.0), ValueError, "explain: alpha must lie strictly between 0 and 1"),
        (lambda: diffmax.register_backend("acme"), TypeError, "expected a diffmax.plugin.Backend, got 'acme'"),
        (lambda: diffmax.register_backend(Backend(**{**GOOD, "name": "cpu"})), ValueError, "'cpu' is taken by diffmax-core"),
        (
            lambda: diffmax.register_backend(Backend(**{**GOOD, "api_version": (2, 0)})),
            ValueError,
            "acme is written for plugin API 2.0",
        ),
        (
            lambda: diffmax.unregister_backend("cpu"),
            ValueError,
            r"no backend 'cpu' was added with register_backend, added: none",
        ),
        (lambda: diffmax.explain("softmax", X), ValueError, "no operator 'softmax', known: diffmax_bisect"),
        (
            lambda: diffmax.use_backend("cupu").__enter__(),
            NoBackendError,
            r"no backend is named 'cupu'\n  loaded: numba, cpu, reference",
        ),
        (
            lambda: diffmax_bisect(X, 0.5, backend="cupu"),
            NoBackendError,
            r"no backend is named 'cupu'\n  loaded: numba, cpu, reference",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registering_again_needs_replace(register, calls):
    register("acme", priority=90)
    with pytest.raises(ValueError, match="'acme' is taken by"):
        diffmax.register_backend(Backend(**GOOD))
    diffmax.register_backend(Backend(**{**GOOD, "priority": 1}), replace=True)
    diffmax_bisect(X, 0.5)
    assert not calls


def test_a_backend_that_is_removed_while_a_decision_is_made_does_not_stay(register, calls, monkeypatch):
    begun, removed = threading.Event(), threading.Event()

    def slow(spec):
        begun.set()
        removed.wait(0.2)
        return []

    monkeypatch.setattr(sys.modules["fake_kernels"], "no_halves", slow)
    diffmax.register_backend(Backend(**{**GOOD, "name": "brief", "priority": 99, "unsupported": "fake_kernels:no_halves"}))
    worker = threading.Thread(target=diffmax_bisect, args=(X, 0.5))
    worker.start()
    begun.wait()
    diffmax.unregister_backend("brief")  # waits until the decision is made, then forgets it
    removed.set()
    worker.join()
    calls.clear()
    diffmax_bisect(X, 0.5)
    assert not calls


def test_a_table_that_is_emptied_between_two_looks_is_no_key_error(monkeypatch):
    """KeyError in a thread that computed rows while another one registered a backend."""

    class Emptied(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    monkeypatch.setattr(registry, "kernels", Emptied())
    for _ in range(2):
        assert dispatch.weights_kernel(X, "reference") is None


def test_who_reads_the_plugins_is_not_disturbed_by_one_that_leaves(calls):
    """A list that shrinks while it is read skips an entry: a backend that is there was not found."""
    diffmax.register_backend(Backend(**{**GOOD, "name": "brief"}))
    seen = registry.plugins
    before = list(seen)
    diffmax.unregister_backend("brief")
    assert seen == before


def test_a_decision_is_made_once(register, monkeypatch):
    diffmax_bisect(X, 0.5)
    monkeypatch.setattr(dispatch, "choose", None)  # a second decision would fail
    diffmax_bisect(X, 0.5)


def test_each_kernel_says_what_it_can_do(register):
    """float64 was claimed for a whole backend, and refused in the middle of a call of its attention."""
    halves, floats = (torch.float16,), (torch.float16, torch.float32)
    register(
        "acme",
        priority=90,
        dtypes=(),
        kernels={
            "bisect": Kernel("fake_kernels:forward", floats, frozenset({"tensor_alpha"})),
            "attention": Kernel("fake_kernels:forward", halves, frozenset({"causal"}), max_head_dim=64),
        },
    )

    def reasons(operator, dtype, *features, size=64):
        sizes = (size, size) if operator == "attention" else ()
        spec = describe(operator, "cpu", dtype, frozenset(features), *sizes)
        return {backend.name: found for backend, found in judge(spec)}["acme"]

    assert reasons("bisect", torch.float32, "tensor_alpha") == reasons("attention", torch.float16, "causal") == []
    assert reasons("attention", torch.float32) == ["takes float16, not float32"]
    assert reasons("attention", torch.float16, "tensor_alpha")[0].startswith("lacks tensor_alpha")
    assert reasons("attention", torch.float16, size=80) == ["takes heads of at most 64 entries, not 80"]
    assert reasons("attention_backward", torch.float16) == ["does not provide attention_backward"]
    x = torch.zeros(1, 1, 2, 80, dtype=torch.float16)
    with pytest.raises(NoBackendError, match="acme: takes heads of at most 64 entries, not 80"):
        diffmax.attention(x, x, x, backend="acme")


def test_a_string_stands_for_a_kernel_with_the_backends_fields():
    """And claims of its features those alone that belong to the operator."""
    backend = Backend(**{**GOOD, "features": frozenset(FEATURES), "warmup": "a:b"})
    rows = backend.provided["bisect"]
    assert (rows.dtypes, rows.features, rows.warmup) == (GOOD["dtypes"], OPERATOR_FEATURES["bisect"], "a:b")


def test_every_feature_belongs_to_an_operator_and_every_claim_of_ours_is_listed_one_by_one():
    """All six backends claimed frozenset(FEATURES), and with it whatever a later version adds."""
    assert frozenset().union(*OPERATOR_FEATURES.values()) == set(FEATURES)
    core = ROOT / "diffmax-core" / "src" / "diffmax"
    for path in [*ROOT.glob("diffmax-*/src/*/_plugin.py"), core / "kernels" / "claims.py", core / "kernels" / "capability.py"]:
        text = path.read_text(encoding="utf-8")
        assert "import FEATURES" not in text
        assert "OPERATOR_FEATURES" not in text
        assert "frozenset(FEATURES)" not in text


def test_what_an_operator_can_claim_is_reached_by_its_kit():
    """Each feature by a case of the kit, or by a test that asks for it by name."""
    by_name = {"tensor_alpha", "alpha_gradient", "deterministic", "varlen", "attention_stats", "kv_cache"}
    cases = {
        "attention": set().union(*(case.features() for case in attention_checks.CASES.values())),
        "attention_kvcache": set().union(*(case.features() for case in decoding_checks.CASES.values())),
        "power_attention": set().union(*(case.features() for case in power_checks.CASES.values())),
        "threshold_attention": set().union(*(case.features() for case in threshold_checks.CASES.values())),
    }
    for operator, features in OPERATOR_FEATURES.items():
        reached = by_name | cases.get(operator.removesuffix("_backward"), set())
        assert features <= reached, (operator, features - reached)


@pytest.mark.parametrize("name", [None, 3, ["cpu"]])
def test_a_backend_is_used_by_its_name(name):
    with (
        pytest.raises(TypeError, match=r"use_backend: name must be a string, as diffmax.backends\(\) lists them, got "),
        diffmax.use_backend(name),
    ):
        pass


def returns(kernel, change):
    """A kernel that returns what `change` makes of a right kernel's results."""
    return lambda *arguments: change(kernel(*arguments))


QKV, CACHE = torch.randn(3, 1, 2, 3, 4).unbind(), torch.zeros(1, 8, 2, 4)


def learned():
    return (t.clone().requires_grad_() for t in QKV)


RIGHT_KERNELS = [  # with a call of them all
    (
        {"bisect": reference.bisect, "bisect_backward": reference.bisect_backward},
        lambda: diffmax_bisect(X.clone().requires_grad_(), 0.5, backend="odd").sum().backward(),
    ),
    (
        {"attention": attention.attention, "attention_backward": attention.attention_backward},
        lambda: diffmax.attention(*learned(), backend="odd").sum().backward(),
    ),
    (
        {"power_attention": power.power_attention, "power_attention_backward": power.power_attention_backward},
        lambda: diffmax.power_attention(*learned(), backend="odd").sum().backward(),
    ),
    (
        {
            "threshold_attention": threshold.threshold_attention,
            "threshold_attention_backward": threshold.threshold_attention_backward,
        },
        lambda: diffmax.threshold_attention(*learned(), torch.zeros(2, 3), backend="odd").sum().backward(),
    ),
    (
        {"attention_kvcache": decoding.attention_kvcache},
        lambda: diffmax.attention_with_kvcache(QKV[0].transpose(1, 2), CACHE, CACHE, backend="odd"),
    ),
]
WRONG_RESULTS = {
    "nothing": (lambda found: None, "got None"),
    "too-few": (lambda found: tuple(found)[:-1], r"got \d results?$"),
    "shape": (lambda found: (found[0][..., :-1], *found[1:]), r"on cpu, got float32 \(.*\) on cpu"),
    "dtype": (lambda found: (found[0].double(), *found[1:]), r"float32 \(.*\) on cpu, got float64 \(.*\) on cpu"),
    "device": (lambda found: (found[0].to("meta"), *found[1:]), r"on cpu, got float32 \(.*\) on meta"),
    "array": (lambda found: (found[0].numpy(), *found[1:]), r"on cpu, got a ndarray"),
}


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
@pytest.mark.parametrize("operator", [operator for kernels, _ in RIGHT_KERNELS for operator in kernels])
def test_what_a_kernel_of_a_plugin_returns_is_looked_at(operator, wrong, register, monkeypatch):
    """A result of a wrong shape or dtype was handed on; None raised a TypeError that did not say whose kernel it was."""
    kernels, call = next((kernels, call) for kernels, call in RIGHT_KERNELS if operator in kernels)
    change, message = WRONG_RESULTS[wrong]
    module = types.SimpleNamespace(**{**kernels, operator: returns(kernels[operator], change)})
    monkeypatch.setitem(sys.modules, "odd_kernels", module)
    register("odd", kernels={name: f"odd_kernels:{name}" for name in kernels}, automatic=False)
    with pytest.raises(BackendError) as caught:
        call()
    said, advice = str(caught.value).split("\n")
    assert said.startswith(f"backend odd: its kernel odd_kernels:{operator} of {operator} must return ")
    assert re.search(message, said), said
    assert advice == "to leave it out, call diffmax.unregister_backend('odd')"
    setattr(module, operator, kernels[operator])
    registry.kernels.clear()
    call()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
@pytest.mark.parametrize("operator", [operator for kernels, _ in RIGHT_KERNELS for operator in kernels])
def test_what_a_kernel_of_a_plugin_raises_says_whose_it_is(operator, register, monkeypatch):
    def raises(*_):
        raise ZeroDivisionError("of the kernel")

    kernels, call = next((kernels, call) for kernels, call in RIGHT_KERNELS if operator in kernels)
    monkeypatch.setitem(sys.modules, "odd_kernels", types.SimpleNamespace(**{**kernels, operator: raises}))
    register("odd", kernels={name: f"odd_kernels:{name}" for name in kernels}, automatic=False)
    with pytest.raises(ZeroDivisionError, match="of the kernel") as caught:
        call()
    (note,) = caught.value.__notes__
    assert note.startswith(f"backend odd: its kernel odd_kernels:{operator} of {operator} raised this\nto leave it out, ")


def test_results_are_looked_at_again_where_a_flag_asks_for_others(register, calls, monkeypatch):
    right = attention.attention
    monkeypatch.setattr(
        sys.modules["fake_kernels"], "attention", lambda *a: right(*a)._replace(u=QKV[0][:0] if a[4] else torch.empty(0)), False
    )
    register("odd", kernels={"attention": "fake_kernels:attention"}, automatic=False)
    diffmax.attention(*QKV, backend="odd")
    with pytest.raises(BackendError, match="with u float32"):
        diffmax.attention(*learned(), backend="odd")


def test_own_kernels_are_called_as_they_are():
    assert dispatch.kernel("bisect", X, "reference") is reference.bisect


def test_a_kernel_that_is_no_function_is_refused(register, calls, monkeypatch):
    monkeypatch.setattr(sys.modules["fake_kernels"], "number", 3, False)
    register("odd", kernels={"bisect": "fake_kernels:number"}, automatic=False)
    with pytest.raises(BackendError, match="backend odd: its kernel fake_kernels:number of bisect must be a function, got 3"):
        diffmax_bisect(X, 0.5, backend="odd")


def test_a_probe_or_check_that_exits_does_not_end_the_program(register, calls, monkeypatch):
    def leaves(*_):
        raise SystemExit(4)

    monkeypatch.setattr(sys.modules["fake_kernels"], "leaves", leaves, False)
    register("prober", priority=99, probe="fake_kernels:leaves")
    register("checker", priority=98, unsupported="fake_kernels:leaves")
    diffmax_bisect(X, 0.5)
    reasons = {backend.name: said for backend, said in judge(describe("bisect", "cpu", torch.float32))}
    assert reasons["prober"] == ["its probe raised SystemExit: 4"]
    assert reasons["checker"] == ["its check of the call raised SystemExit: 4"]
