"""DTensor and FSDP2 over two ranks: where results are sharded, what is sent, and that nothing changes."""

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect
from diffmax.operators.common.spec import SPECS
from tests import fresh, ranks

TORCH = Version(torch.__version__)
TWO_ULP = 2 * torch.finfo(torch.float32).eps
NEEDS_RULES = pytest.mark.skipif(Version("2.5") > TORCH, reason="DTensor takes rules from outside since torch 2.5")
NEEDS_FSDP2 = pytest.mark.skipif(Version("2.6") > TORCH, reason="fully_shard runs on CPU since torch 2.6")


def on_two_ranks(body):
    return ranks.on_ranks(2, marks=[NEEDS_RULES])(body)


def same_as_on_one_process(x, alpha, placements, alpha_placements=None, dim=-1):
    """Run forward and backward both ways; returns the sharded (p, x.grad, alpha.grad) and what each direction sent."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    learned = isinstance(alpha, torch.Tensor)
    whole, whole_alpha = x.clone().requires_grad_(), alpha.clone().requires_grad_() if learned else alpha
    grad = torch.randn(x.shape).to(x.dtype)
    expected = diffmax_bisect(whole, whole_alpha, dim)
    expected.backward(grad)

    own = distribute_tensor(x, mesh, placements).requires_grad_()
    own_alpha = distribute_tensor(alpha, mesh, alpha_placements or [Replicate()]).requires_grad_() if learned else alpha
    own_grad = distribute_tensor(grad, mesh, placements)
    with CommDebugMode() as forward:
        p = diffmax_bisect(own, own_alpha, dim)
    with CommDebugMode() as backward:
        p.backward(own_grad)
    ulp = torch.finfo(x.dtype).eps
    assert float((p.full_tensor() - expected).abs().max()) <= 2 * ulp
    scale = max(1.0, float(whole.grad.abs().max()))
    assert float((own.grad.full_tensor() - whole.grad).abs().max()) <= 4 * ulp * scale
    if learned:  # the parts are summed in another order
        torch.testing.assert_close(own_alpha.grad.full_tensor(), whole_alpha.grad)
    sent = [sum(mode.get_comm_counts().values()) for mode in (forward, backward)]
    return (p, own.grad, own_alpha.grad if learned else None), sent


@on_two_ranks
def test_sharding_rows_sends_nothing():
    from torch.distributed.tensor import Shard

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, axis in (((4, 6, 8), 0), ((4, 6, 8), 1), ((3, 6, 8), 0), ((4, 5), 0)):
            x = torch.randn(shape).to(dtype)
            (p, grad, _), sent = same_as_on_one_process(x, 0.5, [Shard(axis)])
            assert p.placements == grad.placements == (Shard(axis),)
            assert sent == [0, 0]
    (p, grad, _), sent = same_as_on_one_process(torch.randn(4, 6, 8), 0.5, [Shard(2)], dim=1)
    assert p.placements == grad.placements == (Shard(2),)
    assert sent == [0, 0]


@on_two_ranks
def test_the_normalised_dimension_is_gathered_once_each_way():
    from torch.distributed.tensor import Replicate, Shard

    for alpha in (0.5, torch.full((6, 1), 0.5)):
        (p, _, _), sent = same_as_on_one_process(torch.randn(4, 6, 8), alpha, [Shard(2)])
        assert p.placements == (Replicate(),)
        assert sent == [1, 1]


@on_two_ranks
def test_what_is_replicated_stays_replicated():
    from torch.distributed.tensor import Replicate

    (p, grad, alpha_grad), sent = same_as_on_one_process(torch.randn(4, 6, 8), torch.full((6, 1), 0.5), [Replicate()])
    assert p.placements == grad.placements == alpha_grad.placements == (Replicate(),)
    assert sent == [0, 0]


@on_two_ranks
def test_a_partial_sum_is_added_up_first():
    from torch.distributed.tensor import DTensor, Partial

    x = torch.randn(4, 6)
    p = diffmax_bisect(DTensor.from_local(x, init_device_mesh("cpu", (2,)), [Partial()]), 0.5)
    assert float((p.full_tensor() - diffmax_bisect(2 * x, 0.5)).abs().max()) <= TWO_ULP


@on_two_ranks
def test_alpha_broadcasts_as_it_does_on_one_process():
    """Of every rank and with sizes of 1; its gradient is sharded where it is, and a partial sum where only x is."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    x = torch.randn(4, 6, 8)
    for shape in ((), (1,), (6, 1), (1, 6, 1), (4, 1, 1), (4, 6, 1)):
        alpha = 0.3 + 0.5 * torch.rand(shape)
        for axis in (0, 1):
            (p, _, grad), sent = same_as_on_one_process(x, alpha, [Shard(axis)])
            own_axis = axis - (3 - len(shape))
            follows = own_axis >= 0 and shape[own_axis] != 1
            assert p.placements == (Shard(axis),)
            assert grad.placements == ((Shard(own_axis),) if follows else (Partial(),))
            assert sent == [0, 0]
            if follows:
                assert same_as_on_one_process(x, alpha, [Shard(axis)], [Shard(own_axis)])[1] == [0, 0]
        (_, _, grad), _ = same_as_on_one_process(x, alpha, [Replicate()])
        assert grad.placements == (Replicate(),)


@on_two_ranks
def test_a_plain_scalar_alpha_counts_as_replicated():
    from torch.distributed.tensor import Shard, distribute_tensor

    x = torch.randn(4, 6)
    own = distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(0)])
    p = diffmax_bisect(own, torch.tensor(0.5))
    assert p.placements == (Shard(0),)
    assert float((p.full_tensor() - diffmax_bisect(x, 0.5)).abs().max()) <= TWO_ULP


@on_two_ranks
def test_the_second_derivative_stays_sharded():
    from torch.distributed.tensor import Shard, distribute_tensor

    x = torch.randn(4, 6, 8)
    results = []
    for leaf in (x.clone(), distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(0)])):
        leaf.requires_grad_()
        (first,) = torch.autograd.grad(diffmax_bisect(leaf, 0.7).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append(second)
    assert results[1].placements == (Shard(0),)
    torch.testing.assert_close(results[1].full_tensor(), results[0])


@on_two_ranks
def test_compiled_with_aot_eager():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)]).requires_grad_()
    alpha = distribute_tensor(torch.full((1,), 0.5), mesh, [Replicate()]).requires_grad_()

    def weigh(x, alpha):
        return diffmax_bisect(x, alpha) * 2

    results = []
    for function in (weigh, torch.compile(weigh, backend="aot_eager", fullgraph=True)):
        y = function(x, alpha)
        assert y.placements == (Shard(0),)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, alpha))])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager.full_tensor(), compiled.full_tensor())


# The rules are registered when they are first needed, so each way to need them first takes a process of its own.
FIRST_CALL = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import diffmax
from torch.distributed.tensor import Shard, distribute_tensor
x = distribute_tensor(torch.randn(4, 6), dist.device_mesh.init_device_mesh("cpu", (1,)), [Shard(0)])
{call}
print(*p.placements)
dist.destroy_process_group()
"""


@pytest.mark.slow
@NEEDS_RULES
@pytest.mark.parametrize(
    "call",
    [
        "p = diffmax.diffmax_bisect(x, 0.5)",
        "with torch.inference_mode(): p = diffmax.diffmax_bisect(x, 0.5)",
        "with torch.inference_mode(): p = torch.ops.diffmax.bisect(x, 0.5, None, 1, 50, True, '')[0]",
        "m = x[:, :1]; p = torch.ops.diffmax.bisect_backward(x, x, m, m, None, 0.5, None, 1, False, '')[0]",
        "p = torch.compile(lambda x: diffmax.diffmax_bisect(x, 0.5), backend='aot_eager', fullgraph=True)(x)",
    ],
    ids=["eager", "inference mode", "the operator itself", "the backward operator", "compiled"],
)
@pytest.mark.sampled(3)
def test_the_rules_are_there_at_the_first_call(call):
    assert fresh.python(FIRST_CALL.format(call=call)).stdout.strip() in ("S(0)", "Shard(dim=0)")


def test_importing_diffmax_and_its_distributed_module_leaves_dtensor_alone():
    code = "import sys, diffmax.distributed; print('torch.distributed.tensor.experimental' in sys.modules)"
    assert fresh.python(code).stdout.strip() == "False"


def test_every_operator_on_whole_rows_has_a_rule():
    """Those on sharded rows know their ranks themselves."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffmax::") and "sharded" not in name}
    assert names == {f"diffmax::{name}" for spec in SPECS.values() for name in spec.sharding}


@pytest.mark.skipif(Version("2.5") <= TORCH, reason="needs a DTensor without our rules: pip install 'torch<2.5'")
def test_an_old_torch_refuses_a_dtensor():
    code = FIRST_CALL.format(call="p = diffmax.diffmax_bisect(x, 0.5)").replace("distributed.tensor", "distributed._tensor")
    done = fresh.python(code, check=False)
    assert "Operator diffmax.bisect.default does not have a sharding strategy registered" in done.stderr


@ranks.on_ranks(2, marks=[NEEDS_RULES])
def test_the_sharded_function_refuses_a_dtensor():
    from torch.distributed.tensor import Shard, distribute_tensor

    from diffmax.distributed import diffmax_bisect_sharded

    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, 6)
    own = distribute_tensor(x, mesh, [Shard(1)])
    with pytest.raises(TypeError, match=r"must be this rank's part, got a DTensor\npass X.to_local\(\)"):
        diffmax_bisect_sharded(own, 0.5)
    p = diffmax_bisect_sharded(own.to_local(), 0.5, group=mesh)  # as the message says
    assert float((p - distribute_tensor(diffmax_bisect(x, 0.5), mesh, [Shard(1)]).to_local()).abs().max()) <= TWO_ULP


@ranks.on_ranks(4, marks=[NEEDS_RULES])
def test_batch_and_heads_may_be_sharded_together():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2, 2))
    x, alpha = torch.randn(4, 6, 8), torch.full((6, 1), 0.5)
    own = distribute_tensor(x, mesh, [Shard(0), Shard(1)])
    own_alpha = distribute_tensor(alpha, mesh, [Replicate(), Shard(0)])
    with CommDebugMode() as mode:
        p = diffmax_bisect(own, own_alpha)
    assert p.placements == (Shard(0), Shard(1))
    assert mode.get_total_counts() == 0
    assert float((p.full_tensor() - diffmax_bisect(x, alpha)).abs().max()) <= TWO_ULP


class Attention(nn.Module):
    """Attention whose two heads learn an alpha each."""

    def __init__(self, alpha):
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.attend = DiffmaxBisectModule(alpha, alpha_map=HillMap(0.5))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.attend(q @ k.mT) @ v


@ranks.on_ranks(2, marks=[NEEDS_FSDP2])
def test_fsdp2_trains_a_learned_alpha_as_one_process_does():
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    for alpha in (torch.full((2, 1, 1), 0.8), torch.full((1,), 0.8)):
        torch.manual_seed(1)
        model = Attention(alpha)
        torch.manual_seed(1)
        sharded = Attention(alpha)
        fully_shard(sharded.attend)
        fully_shard(sharded)
        optimizers = [torch.optim.SGD(m.parameters(), lr=10.0, momentum=0.9) for m in (model, sharded)]
        x = torch.randn(4, 5, 8)
        expected, y = model(x), sharded(x.chunk(2)[rank])
        torch.testing.assert_close(y, expected.chunk(2)[rank])
        expected.square().mean().backward()
        y.square().mean().backward()  # FSDP takes the mean over the ranks
        pairs = list(zip(model.parameters(), sharded.parameters(), strict=True))
        assert float(model.attend.log_beta.grad.abs().min()) > 0
        for whole, own in pairs:
            torch.testing.assert_close(own.grad.full_tensor(), whole.grad)
        for optimizer in optimizers:
            optimizer.step()
        assert float((model.attend.log_beta - Attention(alpha).attend.log_beta).abs().min()) > 1e-3
        for whole, own in pairs:
            torch.testing.assert_close(own.full_tensor(), whole)


@ranks.on_ranks(2, marks=[NEEDS_FSDP2])
def test_fsdp2_takes_no_scalar_parameter_and_says_what_to_do():
    """Why docs/distributed.md says to give alpha the shape (1,)."""
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match=r"doesn't support scalar parameters\. Change log_beta to a 1D tensor"):
        fully_shard(Attention(0.8))
