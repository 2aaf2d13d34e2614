"""DTensors in the operators with heads and in the loss: what is sharded stays so, nothing is sent, and nothing changes."""

import functools
import shutil

import pytest
import torch
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh

import diffmax
from diffmax.operators.common.spec import SPECS
from diffmax.power import expanded_dim
from tests import ranks

NEEDS_RULES = [pytest.mark.skipif(Version("2.5") > Version(torch.__version__), reason="DTensor takes rules since torch 2.5")]
BATCH, HEADS, LENGTH = 4, 6, 70


def on_ranks(*sizes, marks=()):
    """As `ranks.on_ranks`, on plain PyTorch: there is nothing to compile on each rank, and any kernel gets the same parts."""

    def decorate(body):
        with_backend = diffmax.use_backend("cpu")(body)
        test = ranks.on_ranks(*sizes, marks=[*NEEDS_RULES, *marks])(body)
        test.body = with_backend
        return test

    return decorate


def placed(t, axes, letters, mesh):
    """`t`, whose axes have these letters, sharded along a letter in each dimension of the mesh, where it has that axis."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    own = axes[-t.ndim :] if t.ndim else ""
    return distribute_tensor(
        t, mesh, [Shard(own.index(x)) if x in own and t.shape[own.index(x)] > 1 else Replicate() for x in letters]
    )


def check(function, given, letters, learned=(), mesh=None, gathers=False):
    """`function` of named tensors, whole and sharded along `letters`: the same results, and gradients of what is `learned`.

    given: name -> (tensor, its axes). Every result and gradient that has an axis of `letters` must be sharded along it.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if mesh is None else mesh
    whole = {name: t.clone().requires_grad_(name in learned) for name, (t, _) in given.items()}
    own = {name: placed(t, axes, letters, mesh).requires_grad_(name in learned) for name, (t, axes) in given.items()}
    expected = function(**whole)
    with CommDebugMode() as sent:
        results = function(**own)
        if learned:
            results[0].square().sum().backward()
    if learned:
        expected[0].square().sum().backward()
    assert (sent.get_total_counts() > 0) == gathers, dict(sent.get_comm_counts())
    for result, truth in zip(results, expected, strict=True):
        if not gathers and result is results[0]:
            assert all(isinstance(placement, Shard) for placement in result.placements), result.placements
        torch.testing.assert_close(result.full_tensor(), truth, rtol=1e-6, atol=1e-6)
    for name in learned:
        assert own[name].grad is not None, name
        for placement, before in zip(own[name].grad.placements, own[name].placements, strict=True):
            assert gathers or placement == before or (placement.is_partial() and before.is_replicate()), (name, placement)
        truth = whole[name].grad
        assert float(truth.abs().max()) > 0, name
        error = float((own[name].grad.full_tensor() - truth).abs().max() / truth.abs().max())
        assert error <= 3e-6, f"{name}: {error:.3g}"


def heads(kv_heads=HEADS, dtype=torch.float32, batch=BATCH, dim_v=8):
    """Query, key and value."""
    return {
        "query": (torch.randn(batch, HEADS, LENGTH, 16, dtype=dtype), "BHLD"),
        "key": (torch.randn(batch, kv_heads, LENGTH, 16, dtype=dtype), "BHSD"),
        "value": (torch.randn(batch, kv_heads, LENGTH, dim_v, dtype=dtype), "BHSD"),
    }


QKV = ("query", "key", "value")


def attention(**options):
    return lambda **given: (diffmax.attention(**given, **options, enable_gqa=True),)


@on_ranks(2)
def test_attention_of_shards_of_the_batch_or_of_the_heads_sends_nothing():
    alpha = (torch.linspace(0.3, 0.9, HEADS), "H")
    for letter in "BH":
        for learned in ((), QKV):  # the same call without a backward and with one: what is kept differs
            check(attention(is_causal=True), heads(), letter, learned)
        check(attention(window_size=(20, 5), softcap=3.0), heads(2), letter, QKV)
        check(attention(), {**heads(), "alpha": alpha}, letter, QKV)
        check(attention(), {**heads(), "alpha": alpha}, letter, (*QKV, "alpha"))
        sink, slopes = (torch.randn(HEADS), "H"), (torch.rand(HEADS), "H")
        check(attention(), {**heads(), "sink": sink, "alibi_slopes": slopes, "alpha": alpha}, letter, (*QKV, "sink", "alpha"))
        check(attention(), {**heads(), "alibi_slopes": (torch.rand(BATCH, HEADS), "BH")}, letter, QKV)


@on_ranks(2)
def test_a_mask_and_a_bias_are_sharded_where_they_are_not_shared():
    for letter in "BH":
        for shape in ((BATCH, HEADS, LENGTH, LENGTH), (1, HEADS, LENGTH, LENGTH), (BATCH, 1, 1, LENGTH), (LENGTH, LENGTH)):
            bias = torch.randn(shape)
            check(attention(), {**heads(), "attn_mask": (bias, "BHLS")}, letter, (*QKV, "attn_mask"))
            check(attention(), {**heads(), "attn_mask": (bias, "BHLS")}, letter, QKV)
            check(attention(), {**heads(), "attn_mask": (bias > 0, "BHLS")}, letter, QKV)


@on_ranks(2)
def test_one_head_of_keys_stays_whole_and_key_heads_that_cannot_be_cut_evenly_are_gathered():
    check(attention(), heads(1), "H", QKV)
    check(attention(), heads(1), "B", QKV)
    check(attention(), heads(3), "B", QKV)
    check(attention(), heads(3), "H", QKV, gathers=True)


@on_ranks(2)
def test_what_is_sharded_along_tokens_is_gathered():
    check(attention(), heads(), "L", QKV, gathers=True)
    check(attention(), heads(), "S", QKV, gathers=True)


@on_ranks(2)
def test_packed_sequences_are_sharded_along_their_heads():
    ends = (torch.tensor([0, 30, 30, LENGTH], dtype=torch.int32), "N")
    given = {name: (t[0].transpose(0, 1).contiguous(), "LHD") for name, (t, _) in heads(2, batch=1).items()}

    def varlen(**tensors):
        return (diffmax.attention_varlen(**tensors, max_seqlen_q=40, max_seqlen_k=40, enable_gqa=True, is_causal=True),)

    more = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "alpha": (torch.linspace(0.3, 0.9, HEADS), "H")}
    check(varlen, {**given, **more}, "H", (*QKV, "alpha"))


@on_ranks(2)
def test_one_alpha_of_no_mesh_is_every_ranks():
    mesh = init_device_mesh("cpu", (2,))
    for letter in "RBH":
        query, key, value = (placed(t, axes, letter, mesh) for t, axes in heads().values())
        for alpha in (torch.tensor(0.7), torch.tensor([0.7])):
            found = diffmax.attention(query, key, value, alpha=alpha)
            torch.testing.assert_close(found, diffmax.attention(query, key, value, alpha=0.7))
            query_first, *caches = (t.transpose(1, 2) for t in (query, key, value))
            with torch.no_grad():
                found = diffmax.attention_with_kvcache(query_first, *caches, alpha=alpha)
                torch.testing.assert_close(found, diffmax.attention_with_kvcache(query_first, *caches, alpha=0.7))


@on_ranks(2)
def test_dropout_is_refused_where_ranks_would_draw_their_own():
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    given = [placed(t, axes, "B", mesh) for t, axes in heads().values()]
    with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
        diffmax.attention(*given, dropout_p=0.5)
    rule = SPECS["attention"].sharding["attention"]
    seed = distribute_tensor(torch.zeros(2, dtype=torch.int64), mesh, [Replicate()])
    flat = [t._spec for t in given] + [
        False,
        False,
        1.0,
        0.5,
        None,
        None,
        False,
        -1,
        -1,
        None,
        None,
        0,
        0,
        None,
        None,
        0.0,
        None,
    ]
    assert len(rule(*flat, 0.5, seed._spec)) == 1  # whole
    assert len(rule(*flat, 0.0, None)) == 3


@on_ranks(2)
def test_decoding_appends_to_the_shards_of_the_cache():
    for letter in "BH":
        for kv_heads in (HEADS, 2, 1):
            cache = torch.randn(2, BATCH, 80, kv_heads, 16)
            lengths = torch.tensor([5, 64, 17, 70], dtype=torch.int32)
            new = torch.randn(2, BATCH, 3, kv_heads, 16)
            given = {
                "q": (torch.randn(BATCH, 3, HEADS, 16), "BLHD"),
                "k_cache": (cache[0], "BSHD"),
                "v_cache": (cache[1], "BSHD"),
                "k": (new[0], "BLHD"),
                "v": (new[1], "BLHD"),
                "cache_seqlens": (lengths, "B"),
                "alpha": (torch.linspace(0.3, 0.9, HEADS), "H"),
                "sink": (torch.randn(HEADS), "H"),
                "alibi_slopes": (torch.rand(BATCH, HEADS), "BH"),
            }

            def decode(k_cache, v_cache, **tensors):
                found = diffmax.attention_with_kvcache(k_cache=k_cache, v_cache=v_cache, causal=True, **tensors)
                return found, k_cache, v_cache

            check(decode, given, letter)
            given.pop("cache_seqlens")
            check(functools.partial(decode, cache_seqlens=70), given, letter)
            check(decode, {name: given[name] for name in ("q", "k_cache", "v_cache")}, letter)  # of a cache that is full


@on_ranks(2)
def test_bounds_and_codes_of_a_cache_are_sharded_with_it():
    for letter in "BH":
        cache = torch.randn(2, BATCH, 80, 2, 16)
        lengths = torch.tensor([5, 64, 17, 70], dtype=torch.int32)
        bounds = diffmax.page_bounds(cache[0], lengths, page_size=16, bits=4)
        given = {
            "q": (3 * torch.randn(BATCH, 1, HEADS, 16), "BLHD"),
            "k_cache": (cache[0], "BSHD"),
            "v_cache": (cache[1], "BSHD"),
            "k": (torch.randn(BATCH, 1, 2, 16), "BLHD"),
            "v": (torch.randn(BATCH, 1, 2, 16), "BLHD"),
            "low": (bounds.low, "BPHD"),
            "high": (bounds.high, "BPHD"),
            "codes": (bounds.codes, "BPHDT"),
            "cache_seqlens": (lengths, "B"),
        }

        def decode(low, high, codes, **tensors):
            kept = diffmax.PageBounds(low, high, 16, codes)
            return diffmax.attention_with_kvcache(page_bounds=kept, alpha=0.5, **tensors), low, high, codes

        check(decode, given, letter)


@on_ranks(2)
def test_a_cache_in_pages_is_sharded_along_its_heads():
    table = (torch.tensor([[3, 1], [0, 5], [2, 4], [6, 7]], dtype=torch.int32), "BP")
    given = {
        "q": (torch.randn(BATCH, 1, HEADS, 16), "BLHD"),
        "k_cache": (torch.randn(8, 64, 2, 16), "NSHD"),
        "v_cache": (torch.randn(8, 64, 2, 16), "NSHD"),
        "k": (torch.randn(BATCH, 1, 2, 16), "BLHD"),
        "v": (torch.randn(BATCH, 1, 2, 16), "BLHD"),
        "cache_seqlens": (torch.tensor([5, 64, 17, 70], dtype=torch.int32), "B"),
        "block_table": table,
    }

    def decode(k_cache, v_cache, **tensors):
        return diffmax.attention_with_kvcache(k_cache=k_cache, v_cache=v_cache, **tensors), k_cache, v_cache

    check(decode, given, "H")
    with pytest.raises(Exception, match=r"q and k_cache sharded alike.*not along rows or pages") as caught:
        check(decode, given, "B")
    assert "redistribute q" in str(caught.value)


@on_ranks(2)
def test_new_tokens_are_refused_where_the_cache_would_have_to_move():
    """A cache that is brought elsewhere for a call would keep the tokens for itself."""
    mesh = init_device_mesh("cpu", (2,))
    q, new, cache = torch.randn(4, 1, 2, 16), torch.randn(4, 1, 2, 16), torch.randn(4, 64, 2, 16)
    lengths = placed(torch.full((4,), 7, dtype=torch.int32), "B", "R", mesh)
    for of_q, of_cache in (("B", "H"), ("H", "B"), ("B", "S"), ("B", "R"), ("R", "B")):
        given = [placed(q, "BLHD", of_q, mesh), *(placed(cache, "BSHD", of_cache, mesh) for _ in range(2))]
        more = [placed(new, "BLHD", of_q, mesh) for _ in range(2)]
        with pytest.raises(Exception, match="q and k_cache sharded alike"):
            diffmax.attention_with_kvcache(*given, *more, cache_seqlens=lengths)
        out = diffmax.attention_with_kvcache(*given, cache_seqlens=lengths)  # without new tokens it may move
        expected = diffmax.attention_with_kvcache(q, cache, cache, cache_seqlens=7)
        torch.testing.assert_close(out.full_tensor(), expected)


@on_ranks(2)
def test_the_loss_of_shards_of_the_rows_sends_nothing():
    for reduction in ("none", "sum"):
        for shape, axes in (((BATCH, 9), "BC"), ((BATCH, 9, HEADS), "BCH")):
            for letter in axes.replace("C", ""):
                rows = (*shape[:1], *shape[2:])
                index = torch.randint(9, rows)
                index[0] = -100
                soft = torch.rand(shape).softmax(1)
                for target in ((index, axes.replace("C", "")), (soft, axes)):
                    for learned in ((), ("X",), ("X", "alpha")):
                        given = {
                            "X": (torch.randn(shape), axes),
                            "target": target,
                            "alpha": (torch.tensor([[0.5]] if len(shape) == 2 else [[[0.5]]]), axes),
                        }
                        check_loss(given, letter, learned, reduction)


def check_loss(given, letter, learned, reduction):
    if reduction == "none":
        check(lambda **t: (diffmax.diffmax_loss(**t, reduction="none"),), given, letter, learned)
        return
    mesh = init_device_mesh("cpu", (2,))
    own = {name: placed(t, axes, letter, mesh) for name, (t, axes) in given.items()}
    total = diffmax.diffmax_loss(**own, reduction="sum")
    assert total.placements[0].is_partial()
    torch.testing.assert_close(
        total.full_tensor(), diffmax.diffmax_loss(**{n: t for n, (t, _) in given.items()}, reduction="sum")
    )


@on_ranks(2)
def test_a_loss_too_large_to_keep_its_weights_as_a_whole_is_right_in_parts():
    """Each part keeps them: its size decides."""
    given = {"X": (torch.randn(2, 600_000), "BC"), "target": (torch.tensor([3, 5]), "B")}
    check(lambda **t: (diffmax.diffmax_loss(**t, alpha=0.5, reduction="none"),), given, "B", ("X",))


@on_ranks(2)
def test_the_mean_of_a_loss_is_that_of_all_rows():
    mesh = init_device_mesh("cpu", (2,))
    x, target = torch.randn(6, 9), torch.tensor([1, -100, -100, 2, 3, 4])
    whole, own = x.clone().requires_grad_(), placed(x, "BC", "B", mesh).requires_grad_()
    expected = diffmax.diffmax_loss(whole, target)
    loss = diffmax.diffmax_loss(own, placed(target, "B", "B", mesh))
    torch.testing.assert_close(loss.full_tensor(), expected)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(own.grad.full_tensor(), whole.grad)


@on_ranks(2)
def test_power_attention_of_shards_sends_nothing():
    for letter in "BH":
        for kv_heads in (HEADS, 2, 1):
            given = heads(kv_heads)
            states = (BATCH, kv_heads, expanded_dim(16, 2))
            gates = (-torch.rand(BATCH, kv_heads, LENGTH), "BHS")
            state = {"sums": (torch.randn(*states, 8), "BHPD"), "norm": (torch.rand(states) + 1, "BHP")}

            def plain(**t):
                return (diffmax.power_attention(**t),)

            def from_a_state(sums, norm, **t):
                out, end = diffmax.power_attention(**t, initial_state=(sums, norm), chunk_size=32, return_final_state=True)
                return out, *end

            check(plain, given, letter)
            check(plain, given, letter, QKV)
            gates_are_whole = letter == "H" and kv_heads == 1  # whose gradient is a partial sum, which clamping adds up
            check(plain, {**given, "log_gates": gates}, letter, (*QKV, "log_gates"), gathers=gates_are_whole)
            check(from_a_state, {**given, **state}, letter, (*QKV, "sums", "norm"))


@on_ranks(2, marks=[pytest.mark.slow])
def test_threshold_attention_of_shards_sends_nothing():
    for letter in "BH":
        for weights in ("scores", "softmax", "diffmax"):
            for kv_heads in (HEADS, 2, 1):
                level = 0.02 if weights != "scores" else 0.2

                def call(weights=weights, **t):
                    return (diffmax.threshold_attention(**t, weights=weights, power=2.0, is_causal=True),)

                theta = (level + 0.01 * torch.rand(HEADS), "H")
                bias = (torch.randn(HEADS, 12), "HW")
                check(call, {**heads(kv_heads), "threshold": theta}, letter)
                check(call, {**heads(kv_heads), "threshold": theta}, letter, (*QKV, "threshold"))
                check(call, {**heads(kv_heads), "threshold": theta, "bias": bias}, letter, (*QKV, "threshold", "bias"))
        alpha = (torch.linspace(0.3, 0.9, HEADS), "H")
        check(call, {**heads(2), "threshold": theta, "alpha": alpha}, letter, (*QKV, "threshold", "alpha"))
        mask = (torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.3, "BHLS")
        check(call, {**heads(), "threshold": (torch.rand(BATCH, HEADS, LENGTH), "BHL"), "attn_mask": mask}, letter, QKV)


@on_ranks(4)
def test_batch_and_heads_are_sharded_together():
    mesh = init_device_mesh("cpu", (2, 2))
    alpha = (torch.linspace(0.3, 0.9, HEADS), "H")
    check(attention(), {**heads(2), "alpha": alpha}, "BH", (*QKV, "alpha"), mesh)
    check(attention(), heads(2), "BB", QKV, mesh)
    given = {**heads(2), "log_gates": (-torch.rand(BATCH, 2, LENGTH), "BHS")}
    check(lambda **t: (diffmax.power_attention(**t),), given, "BH", (*QKV, "log_gates"), mesh)


@on_ranks(4)
def test_heads_that_two_dimensions_of_the_mesh_would_cut_unevenly_are_gathered():
    """Six key heads in two halves of two parts: 2, 1, 2, 1; of twelve query heads 3, 3, 3, 3."""
    mesh = init_device_mesh("cpu", (2, 2))
    given = heads(HEADS)
    given["query"] = (torch.randn(BATCH, 2 * HEADS, LENGTH, 16), "BHLD")
    check(attention(), given, "HH", QKV, mesh, gathers=True)
    check(attention(), heads(), "HH", QKV, mesh)  # all heads are cut at the same places, evenly or not


@pytest.mark.skipif(torch.__version__ < "2.5", reason="needs a DTensor that takes our rules: pip install 'torch>=2.13'")
def test_every_tensor_of_an_operator_has_its_axes():
    """A tensor without a placement would reach the operator as it lies."""

    class Given:
        def __init__(self, ndim, shape):
            self.ndim, self.shape, self.placements = ndim, shape, ()

    for name in ("attention", "decoding", "power", "threshold"):
        for schema in SPECS[name].schemas:
            declared = getattr(torch.ops.diffmax, schema.name).default._schema
            flat = [Given(4, (1, 1, 1, 1)) if "Tensor" in str(a.type) else 0 for a in declared.arguments]
            ((results, placements),) = SPECS[name].sharding[schema.name](*flat)
            assert len(results) == len(declared.returns)
            for argument, placement in zip(declared.arguments, placements, strict=True):
                assert (placement is not None) == ("Tensor" in str(argument.type)), f"{schema.name}: {argument.name}"


@on_ranks(2)
def test_heads_of_the_module_are_sharded_and_a_checkpoint_of_them_loads_whole():
    import copy
    import tempfile

    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor.debug import CommDebugMode

    from diffmax import HillMap
    from diffmax.distributed import shard_heads
    from diffmax.nn import DiffmaxAttention

    mesh, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    for options in (
        {"alpha": 0.7, "alpha_map": HillMap(c=0.5), "sink": "learned"},
        {"alpha": torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64), "bias": False},
        {"alpha": torch.nn.Parameter(torch.tensor(0.6, dtype=torch.float64)), "window_size": (3, 0)},
        {"alpha": 0.7},
    ):
        whole = DiffmaxAttention(32, 4, num_kv_heads=2, **options).double()
        own = copy.deepcopy(whole)
        if rank:
            torch.nn.init.zeros_(own.q_proj.weight)  # the first rank's values count
        assert shard_heads(own, mesh) is own
        results = []
        for attend in (own, whole):
            leaf = x.clone().requires_grad_()
            with CommDebugMode() as sent:
                out = attend(leaf, is_causal=True)
            assert sent.get_total_counts() == (attend is own)
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for (name, mine), theirs in zip(own.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-12, atol=1e-12)
            assert mine.to_local().numel() * (2 - (name in ("alpha", "out_proj.bias"))) == theirs.numel()
        folder = [tempfile.mkdtemp() if rank == 0 else None]
        torch.distributed.broadcast_object_list(folder)
        dcp.save(own.state_dict(), checkpoint_id=folder[0])
        other = DiffmaxAttention(32, 4, num_kv_heads=2, **options).double()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        state = other.state_dict()
        dcp.load(state, checkpoint_id=folder[0])
        other.load_state_dict(state)
        torch.testing.assert_close(other(x, is_causal=True), whole(x, is_causal=True))
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder[0])


@on_ranks(2)
def test_what_cannot_be_sharded_by_heads_is_refused():
    from diffmax.distributed import shard_heads
    from diffmax.nn import DiffmaxAttention

    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="got 4 query heads and 1 key heads for 2 ranks"):
        shard_heads(DiffmaxAttention(32, 4, num_kv_heads=1), mesh)
    with pytest.raises(ValueError, match="module must be without head_gate and dropout"):
        shard_heads(DiffmaxAttention(32, 4, head_gate=True, dropout=0.1), mesh)
    with pytest.raises(ValueError, match="mesh must have one dimension, got 2"):
        shard_heads(DiffmaxAttention(32, 4), init_device_mesh("cpu", (2, 1)))
    with pytest.raises(TypeError, match=r"must be a diffmax\.nn\.DiffmaxAttention, got Linear"):
        shard_heads(torch.nn.Linear(4, 4), mesh)
