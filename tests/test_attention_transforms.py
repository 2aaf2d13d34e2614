"""torch.func, forward mode and second derivatives of diffmax.attention, against plain autograd and finite differences."""

from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad, gradcheck
from torch.autograd.functional import hessian as eager_hessian
from torch.autograd.functional import jvp as eager_jvp
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from diffmax import attention, attention_varlen, attention_with_kvcache
from diffmax.operators.attention import differentiable
from diffmax.operators.attention.operator import FORWARD
from diffmax.plugin import AttentionCall

newer_torch = pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5: vmap rules of operators")


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def arguments():
    """Query, key, value, bias, sink and alpha."""
    alpha = torch.tensor([0.6, 0.8], dtype=torch.float64)
    return randn(1, 2, 3, 4), randn(1, 2, 5, 4), randn(1, 2, 5, 2), randn(2, 3, 5), randn(2), alpha


@pytest.fixture
def g():
    return randn(1, 2, 3, 2)


def attend(query, key, value, bias, sink, alpha):
    return attention(query, key, value, bias, sink=sink, alpha=alpha, softcap=2.0, is_causal=True)


def loss(*arguments):
    *arguments, g = arguments
    return (attend(*arguments) * g).sum()


def agrees(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def plain_gradients(arguments, g):
    leaves = [t.clone().requires_grad_() for t in arguments]
    return torch.autograd.grad(attend(*leaves), leaves, g)


def test_grad_and_vjp_for_every_argument(arguments, g):
    expected = plain_gradients(arguments, g)
    agrees(grad(loss, argnums=tuple(range(6)))(*arguments, g), expected)
    agrees(vjp(attend, *arguments)[1](g), expected)


@newer_torch
def test_forwards_in_reverse_mode_and_under_vmap_hold_no_scores(arguments, g):
    """They run the fused kernels. Backwards under torch.func are composed, as torch may differentiate them again."""
    many = randn(4, *arguments[0].shape)
    with mock.patch.object(differentiable, "forward", None):
        grad(loss)(*arguments, g)
        vmap(grad(loss), in_dims=(0, *(None,) * 6))(many, *arguments[1:], g)
        with mock.patch.object(differentiable, "backward", None):
            vmap(attend, in_dims=(0, *(None,) * 5))(many, *arguments[1:])


def test_forward_mode(arguments):
    tangents = tuple(torch.randn_like(t) for t in arguments)
    expected = eager_jvp(attend, arguments, tangents)[1]
    out, tangent = jvp(attend, arguments, tangents)
    agrees(tangent, expected)
    agrees(out, attend(*arguments))
    with forward_ad.dual_level():
        dual = attend(*map(forward_ad.make_dual, arguments, tangents))
        agrees(forward_ad.unpack_dual(dual).tangent, expected)


@newer_torch
@pytest.mark.parametrize("place", range(6))
def test_vmap_over_one_argument(arguments, place):
    many = torch.stack([arguments[place] * (1 + n / 10) for n in range(3)])
    in_dims = tuple(0 if i == place else None for i in range(6))
    expected = torch.stack([attend(*arguments[:place], one, *arguments[place + 1 :]) for one in many])
    agrees(vmap(attend, in_dims=in_dims)(*arguments[:place], many, *arguments[place + 1 :]), expected)


@newer_torch
def test_vmap_over_another_axis_and_with_a_mask_of_each(arguments):
    _, key, value, *_ = arguments
    queries, masks = randn(1, 2, 3, 4, 6), torch.rand(6, 3, 5) > 0.3
    expected = torch.stack([attention(queries[..., n], key, value, masks[n], alpha=0.6) for n in range(6)])
    agrees(vmap(lambda q, mask: attention(q, key, value, mask, alpha=0.6), in_dims=(4, 0))(queries, masks), expected)
    one = vmap(lambda q: attention(q, key, value, masks[0], alpha=0.6), in_dims=4)(queries)
    agrees(one, torch.stack([attention(queries[..., n], key, value, masks[0], alpha=0.6) for n in range(6)]))


@newer_torch
def test_gradients_of_every_sample(arguments, g):
    many = randn(4, *arguments[0].shape)
    wanted = (0, 1, 3, 4, 5)
    ours = vmap(grad(loss, argnums=wanted), in_dims=(0, *(None,) * 6))(many, *arguments[1:], g)
    each = [grad(loss, argnums=wanted)(one, *arguments[1:], g) for one in many]
    agrees(ours, tuple(torch.stack(t) for t in zip(*each, strict=True)))


@newer_torch
def test_second_derivatives_in_either_order(arguments, g):
    query, *others = arguments
    expected = eager_hessian(lambda q: loss(q, *others, g), query)
    agrees(hessian(lambda q: loss(q, *others, g))(query), expected)
    agrees(jacrev(jacrev(lambda q: loss(q, *others, g)))(query), expected)
    agrees(jacrev(lambda q: attend(q, *others))(query), jacfwd(lambda q: attend(q, *others))(query))


def test_forward_mode_by_finite_differences(arguments):
    assert gradcheck(attend, tuple(t.requires_grad_() for t in arguments), check_forward_ad=True, fast_mode=True)


def test_the_operator_itself(arguments):
    _, key, value, *_ = arguments

    def call(query):
        return FORWARD(query, key, value, False, False, AttentionCall(scale=0.5, e=0.4))[0].square().sum()

    leaf = arguments[0].clone().requires_grad_()
    agrees(grad(call)(arguments[0]), torch.autograd.grad(call(leaf), leaf)[0])


@newer_torch
def test_packed_sequences():
    x, tangent, ends = randn(5, 2, 4), randn(5, 2, 4), torch.tensor([0, 2, 5], dtype=torch.int32)

    def packed(x):
        return attention_varlen(x, x, x, ends, ends, 3, 3, alpha=0.7, is_causal=True, sink=torch.zeros(2))

    leaf = x.clone().requires_grad_()
    agrees(grad(lambda x: packed(x).square().sum())(x), torch.autograd.grad(packed(leaf).square().sum(), leaf)[0])
    agrees(jvp(packed, (x,), (tangent,))[1], eager_jvp(packed, x, tangent)[1])
    many = randn(3, 5, 2, 4)
    agrees(vmap(packed)(many), torch.stack([packed(one) for one in many]))


@newer_torch
def test_dropout_under_vmap_is_as_random_as_asked_for(arguments):
    query, key, value, *_ = arguments
    many = query.expand(3, *query.shape)

    def call(query):
        return attention(query, key, value, dropout_p=0.5, alpha=0.9)

    same, different = (vmap(call, randomness=kind)(many) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(many)


@pytest.mark.slow
@newer_torch
def test_compiled_transforms(arguments, g):
    query, *others = arguments
    tangent, many = torch.randn_like(query), randn(4, *query.shape)
    sample = vmap(grad(loss), in_dims=(0, *(None,) * 6))
    for function, given in (
        (lambda q: grad(loss)(q, *others, g), (query,)),
        (lambda q, t: jvp(lambda q: attend(q, *others), (q,), (t,))[1], (query, tangent)),
        (lambda q: sample(q, *others, g), (many,)),
    ):
        agrees(torch.compile(function, backend="aot_eager", fullgraph=True)(*given), function(*given))


# --- what watches operators -----------------------------------------------------------------------------------------------


@newer_torch
@pytest.mark.parametrize("size", [8, 6])
def test_the_flop_counter_counts_what_it_counts_for_torchs_attention(size):
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils.flop_counter import FlopCounterMode

    import diffmax.integrations.flop_counter  # noqa: F401

    q, k, v = (torch.randn(shape, requires_grad=True) for shape in ((2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, size)))
    with FlopCounterMode(display=False) as expected:
        wide = (t.repeat_interleave(2, 1) for t in (k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            scaled_dot_product_attention(q, *wide).sum().backward()
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, enable_gqa=True).sum().backward()
    scores_once_more = 2 * 2 * 4 * 7 * 9 * 8
    assert counter.get_total_flops() == expected.get_total_flops() + scores_once_more


@newer_torch
def test_the_flop_counter_counts_each_packed_sequence_and_the_whole_cache():
    from torch.utils.flop_counter import FlopCounterMode

    import diffmax.integrations.flop_counter  # noqa: F401

    q, k, v = torch.randn(7, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 6)
    offsets = torch.tensor([0, 2, 7], dtype=torch.int32), torch.tensor([0, 8, 9], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        attention_varlen(q, k, v, *offsets, 5, 8, enable_gqa=True)
    assert counter.get_total_flops() == 4 * (2 * 8 + 5 * 1) * 2 * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        attention_with_kvcache(torch.randn(3, 1, 4, 8), torch.randn(3, 50, 2, 8), torch.randn(3, 50, 2, 8), cache_seqlens=20)
    assert counter.get_total_flops() == 3 * 4 * 50 * 2 * 16
    table = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    with FlopCounterMode(display=False) as counter:
        attention_with_kvcache(
            torch.randn(3, 1, 4, 8), torch.randn(6, 64, 2, 8), torch.randn(6, 64, 2, 8), cache_seqlens=20, block_table=table
        )
    assert counter.get_total_flops() == 3 * 4 * 128 * 2 * 16
