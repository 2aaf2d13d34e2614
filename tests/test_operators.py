"""What operators say of themselves: schemas, specs, the rules of attention's scores; docs/operators.md is made from them."""

import dataclasses
import importlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import diffmax
from diffmax import plugin
from diffmax.cli.main import main
from diffmax.kernels.claims import cpu_kernels
from diffmax.machine.dispatch import import_function
from diffmax.operators.attention import scores as rules
from diffmax.operators.attention.operator import BACKWARD, FORWARD
from diffmax.operators.common import spec as specs
from diffmax.operators.common.schema import Schema
from diffmax.operators.common.spec import SPECS, Function, KernelSpec, OperatorSpec, Question
from diffmax.operators.decoding.operator import SCHEMA
from diffmax.plugin import AttentionCall, Backend, KVCacheCall, Saved, Wanted
from diffmax.reference import attention as reference
from diffmax.reference.decoding import CacheRegion

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"


def schemas():
    """docs/operators.md's lists, as they should be."""
    parts = []
    for spec in SPECS.values():
        lines = [schema.text for schema in spec.schemas]
        parts.append("\n".join([f"### {spec.name}", "", "```text", *lines, "```"]))
    return "\n\n".join(parts)


def features():
    rows = ["| rule | fields | features |", "|---|---|---|"]
    for rule in rules.RULES:
        fields = ", ".join(f"`{name}`" for name in rule.fields) or "of the tensors"
        named = ", ".join(f"`{name}`" for name in rule.described) or "none"
        rows.append(f"| {type(rule).__name__} | {fields} | {named} |")
    return "\n".join(rows)


def test_the_page_shows_every_schema_and_every_rule_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert schemas() in page, f"docs/operators.md must hold\n{schemas()}"
    assert features() in page, f"docs/operators.md must hold\n{features()}"


def test_torch_knows_the_operators_by_these_schemas():
    for schema in (schema for spec in SPECS.values() for schema in spec.schemas):
        known = str(getattr(torch.ops.diffmax, schema.name).default._schema)
        assert torch._C.parse_schema(f"diffmax::{schema.text}") == torch._C.parse_schema(known)


def everything(call):
    """A call of which every field differs from its default."""
    given = {"e": torch.rand(2), "scale": 0.5}
    for field in dataclasses.fields(call):
        if field.name not in given:
            given[field.name] = {"int": 3, "float": 0.5, "bool": True}.get(str(field.type), torch.rand(3))
    return call(**given)


@pytest.mark.parametrize(("schema", "call", "count"), [(FORWARD, AttentionCall, 3), (SCHEMA, KVCacheCall, 3)])
def test_a_call_survives_the_way_to_flat_arguments_and_back(schema, call, count):
    tensors = tuple(torch.rand(2) for _ in range(count))
    flags = (True, False) if schema is FORWARD else (True,)
    for given in (
        everything(call),
        call(scale=1.0, e=0.25, **({} if call is AttentionCall else {"cache_seqlens": tensors[0]})),
    ):
        flat = schema.flatten(*tensors, *flags, given, "cpu")
        again = schema.rebuild(flat)
        assert again[:-2] == (*tensors, *flags)
        assert again.backend == "cpu"
        for field in dataclasses.fields(call):
            assert getattr(again.call, field.name) is getattr(given, field.name), field.name
        assert schema.rebuild(schema.flatten(*tensors, *flags, given)).backend == ""  # torch leaves defaults out


def test_a_schema_says_what_its_bundles_hold():
    class Bundle(NamedTuple):
        left: Tensor
        right: bool = False

    class Arguments(NamedTuple):
        x: Tensor
        pair: Bundle
        size: int = 3
        name: str = ""

    class Results(NamedTuple):
        y: Tensor

    Arguments.__annotations__.update(x=Tensor, pair=Bundle, size=int, name=str)
    schema = Schema("probe", Arguments, Results, prefixes={"pair": "of_", "results": "grad_"}, mutated=("of_left",))
    assert schema.text == (
        'probe(Tensor x, Tensor(a!) of_left, bool of_right=False, int size=3, str name="") -> (Tensor grad_y)'
    )
    x = torch.rand(2)
    assert schema.rebuild((x, x)) == Arguments(x, Bundle(x, False))


def test_what_a_spec_names_is_there():
    for spec in SPECS.values():
        for name, kernel in spec.kernels.items():
            assert callable(import_function(f"diffmax.reference.{spec.name}:{name}"))
            assert plugin.OPERATOR_FEATURES[name] == kernel.features
            for package in ("cpu", "numba"):
                if name in cpu_kernels(f"diffmax.kernels.{package}", compiled=package == "numba"):
                    assert callable(import_function(f"diffmax.kernels.{package}.{spec.name}:{name}"))
        if spec.selftest:
            assert {check.operator for check in import_function(spec.selftest)} == {*spec.kernels}
        if spec.kit:
            module, _, name = spec.kit.partition(":")
            assert {*getattr(importlib.import_module(module), name).operators} == {*spec.kernels}
        assert {schema.name for schema in spec.schemas} == {*spec.flops}
        for name in {*spec.functions} - {*spec.kernels}:
            assert hasattr(diffmax, name)


@pytest.fixture
def _as_it_was():
    """The tables that operators enter themselves into, restored."""
    tables = (specs.SPECS, plugin.FEATURES, plugin.OPERATOR_FEATURES)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.usefixtures("_as_it_was")
def test_an_operator_that_registers_itself_needs_no_other_list():
    """What knows operators knows a new one: features, descriptions of backends, `explain`, the command line, `warmup`."""
    asked = []

    def asks(x: Tensor, backend: str | None = None) -> Question:
        return Question("halve", x.device.type, x.dtype, backend=backend, features=frozenset({"exact"}))

    def prepares(needed):
        asked.append(needed)
        return ()

    specs.register(
        OperatorSpec(
            name="halving",
            rank=5,
            kernels={"halve": KernelSpec(frozenset({"exact"}))},
            functions={"halve": Function("halve", asks)},
            described={"exact": "a result without rounding"},
            prepares=prepares,
        )
    )
    assert plugin.OPERATORS == (
        "bisect", "bisect_backward", "halve", "attention", "attention_backward", "attention_kvcache",
        "power_attention", "power_attention_backward", "threshold_attention", "threshold_attention_backward",
    )  # fmt: skip
    assert plugin.FEATURES["exact"] == "a result without rounding"
    backend = Backend(name="half", device_types=("cpu",), kernels={"halve": "a:b"}, dtypes=(torch.float32,), priority=99,
                      features=frozenset({"exact", "causal"}))  # fmt: skip
    assert backend.provided["halve"].features == {"exact"}
    diffmax.register_backend(backend)
    try:
        explained = diffmax.explain("halve", torch.zeros(3))
        assert [chosen for _, chosen, _, _ in explained.calls] == ["half"]
        assert main(["explain", "--operator", "halve"]) == 0
    finally:
        diffmax.unregister_backend("half")
    diffmax.warmup(backend="reference")
    assert asked[0].head_dims == [(64, 64)]


# --- the rules of the scores ---


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def one_of_each():
    """A call of attention that every rule acts on but the cache's, and its products."""
    call = AttentionCall(
        scale=0.5, e=0.5, softcap=2.0, bias=randn(1, 3, 5, 7), alibi=torch.rand(3).double(), left=3, right=2, lower_right=True,
        mask=torch.rand(2, 1, 5, 7) > 0.3, sink=randn(3),
    )  # fmt: skip
    query, key = randn(2, 3, 5, 4), randn(2, 3, 7, 4)
    return call, query, key


def test_the_rules_are_what_one_would_write_down():
    call, query, key = one_of_each()
    region = reference.Whole.of(query, key, call)
    got, slope = rules.apply_with_slope(reference.products(query, key, call.scale), call, region)
    raw = query @ key.mT * 0.5
    distance = torch.arange(7) - (torch.arange(5).unsqueeze(1) + 2)
    wanted = 2 * torch.tanh(raw / 2) + call.bias - call.alibi.view(3, 1, 1) * distance.abs()
    wanted = wanted.masked_fill((distance > 2) | (distance < -3) | ~call.mask, -torch.inf)
    wanted = torch.cat([wanted, call.sink.view(1, 3, 1, 1).expand(2, 3, 5, 1)], 3)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    assert torch.allclose(got, wanted, atol=1e-14)
    assert torch.allclose(slope, 1 - torch.tanh(raw / 2) ** 2, atol=1e-14)


def test_a_rule_s_slope_is_its_derivative():
    call, query, key = one_of_each()
    region = reference.Whole.of(query, key, call)
    for rule in rules.RULES:
        if not rule.features(call):
            continue
        before = reference.products(query, key, call.scale).requires_grad_()
        after = rule.apply(before, call, region)
        seen = after[..., :7].isfinite()
        (derivative,) = torch.autograd.grad(after[..., :7][seen].sum(), before)
        slope = rule.slope(after.detach(), call)
        expected = torch.ones_like(before) if slope is None else slope
        assert torch.allclose(derivative, torch.where(seen, expected, 0.0), atol=1e-13), type(rule).__name__


class InPlace(reference.Whole):
    in_place = True


def test_in_place_and_out_of_place_are_the_same():
    call, query, key = one_of_each()
    products = reference.products(query, key, call.scale)
    expected = rules.apply(products, call, reference.Whole.of(query, key, call), rules.acting(call, sink=False))
    given = products.clone()
    got = rules.apply(given, call, InPlace.of(query, key, call), rules.acting(call, sink=False))
    assert torch.equal(got, expected)
    assert got.data_ptr() == given.data_ptr()


def test_a_bound_of_a_page_lies_above_its_scores():
    """Every rule's bound, of random pages, against the scores themselves."""
    keys, size, ends = 48, 8, torch.tensor([40])
    for _ in range(20):
        call = KVCacheCall(
            scale=1.0, e=0.5, cache_seqlens=ends.int(), softcap=3.0, alibi=randn(1, 1), left=20, right=0, page_size=size
        )
        raw = randn(1, 1, 3, keys) * 4
        region = CacheRegion(ends, 3, keys)
        scores = rules.apply(raw, call, region)[0, 0]
        first = torch.arange(0, keys, size)
        positions = torch.arange(37, 40).unsqueeze(1)
        pages = rules.Pages(first, first + size - 1, positions, call.alibi, torch.finfo(torch.float64).eps)
        bound = rules.bounds(raw[0, 0].view(3, -1, size).amax(2), call, pages)
        assert (bound.unsqueeze(2) >= scores.view(3, -1, size)).all()
        assert (bound == -torch.inf).any()


def test_every_feature_of_a_rule_reaches_backends_and_every_rule_is_reached():
    known = {name for rule in rules.RULES for name in rule.described}
    assert known <= {*plugin.FEATURES}
    assert known <= SPECS["attention"].kernels["attention"].features | SPECS["decoding"].kernels["attention_kvcache"].features
    call, *_ = one_of_each()
    assert rules.features(call) == {"softcap", "bias", "alibi", "window", "mask", "sink"}
    assert rules.features(AttentionCall(scale=1.0, e=0.5, right=0)) == {"causal"}


# --- kernels of an older interface ---


def backward_of_1_3(grad, query, key, value, m, delta, u, live, call, needs_e, needs_bias=False, needs_sink=False):
    found = reference.attention_backward(
        grad, query, key, value, Saved(m, delta, u, live), call, Wanted(needs_e, needs_bias, needs_sink)
    )
    return tuple(found) if needs_bias or needs_sink else tuple(found[:4])


def test_a_backward_of_interface_1_3_is_called_as_it_was_written():
    """Twelve flat arguments, four gradients or six: what docs/backends.md said before the bundles."""
    kernels = {"attention": "diffmax.reference.attention:attention", "attention_backward": f"{__name__}:backward_of_1_3"}
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(__name__, None))
    module.backward_of_1_3 = backward_of_1_3
    import sys

    known = sys.modules.setdefault(__name__, module)
    assert known.backward_of_1_3
    backend = Backend(name="older", device_types=("cpu",), kernels=kernels, dtypes=(torch.float64,), automatic=False,
                      features=frozenset({"bias", "sink", "tensor_alpha", "alpha_gradient"}), api_version=(1, 3))  # fmt: skip
    diffmax.register_backend(backend)
    try:
        for learned in (False, True):
            leaves = [randn(1, 2, 5, 4).requires_grad_() for _ in range(3)]
            options = {"attn_mask": randn(5, 5).requires_grad_(), "sink": randn(2).requires_grad_()} if learned else {}
            alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
            wanted = (*leaves, alpha, *options.values())
            both = [
                torch.autograd.grad(diffmax.attention(*leaves, alpha=alpha, backend=name, **options).square().sum(), wanted)
                for name in ("older", "reference")
            ]
            for ours, theirs in zip(*both, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-13)
    finally:
        diffmax.unregister_backend("older")


def test_the_backward_s_bundles_are_named_in_its_schema():
    assert BACKWARD.names[:8] == ("grad", "query", "key", "value", "m", "delta", "u", "live")
    assert BACKWARD.names[8:11] == ("needs_e", "needs_bias", "needs_sink")
