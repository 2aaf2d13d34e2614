"""Plans of others for models with diffmax: transformers' tensor parallelism, FSDP2 over heads that are sharded."""

import copy
import importlib.util
import os
import shutil
import tempfile

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh

from tests import ranks

TORCH = Version(torch.__version__)
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers: pip install transformers"
)
NEEDS_SHARD_HEADS = pytest.mark.skipif(
    Version("2.13") > TORCH, reason="needs torch 2.13, with which shard_heads runs: pip install torch==2.13.0"
)


def shared_folder():
    """A folder that the first rank has made."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return folder[0]


@ranks.on_ranks(2, marks=[NEEDS_TRANSFORMERS])
def test_a_transformer_with_tp_plan_auto_is_that_of_one_process():
    """Its plan shards the projections by heads; what diffmax sees are fewer heads."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from diffmax.integrations.transformers import register

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}  # as torchrun sets them
    folder = shared_folder()
    tokens = torch.randint(64, (2, 20))
    register(alpha=0.5)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)
    if rank == 0:
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="diffmax")
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="diffmax", tp_plan="auto")
    results = [model(tokens, labels=tokens) for model in (own, whole)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-5, atol=1e-5)
    for result in results:
        result.loss.backward()
    sharded = 0
    for (name, mine), theirs in zip(own.named_parameters(), whole.parameters(), strict=True):
        if "_proj" in name:
            sharded += mine.to_local().numel() < theirs.numel()
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-6)
    assert sharded == 2 * 7  # of each layer four projections of attention and three of the MLP
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert (eager(tokens).logits - results[1].logits).abs().max() > 1e-3  # it is diffmax that was compared
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


@ranks.on_ranks(2, 4, marks=[NEEDS_SHARD_HEADS, pytest.mark.slow])
def test_fsdp2_over_sharded_heads_trains_and_saves_as_one_process_does():
    """A mesh of data and heads; the learned alpha is sharded over both."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.fsdp import fully_shard

    from diffmax import HillMap
    from diffmax.distributed import shard_heads
    from diffmax.nn import DiffmaxAttention

    data = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("data", "heads"))
    options = {"alpha": torch.full((4,), 0.7, dtype=torch.float64), "alpha_map": HillMap(c=0.5), "sink": "learned"}
    torch.manual_seed(1)
    whole = DiffmaxAttention(32, 4, num_kv_heads=2, **options).double()
    own = fully_shard(shard_heads(copy.deepcopy(whole), mesh["heads"]), mesh=mesh["data"])
    pairs = list(zip(own.parameters(), whole.parameters(), strict=True))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9) for model in (own, whole)]
    before = [theirs.detach().clone() for theirs in whole.parameters()]
    for _ in range(2):
        x = torch.randn(4, 10, 32, dtype=torch.float64)
        part = x.chunk(data)[mesh.get_local_rank("data")]
        for model, given in ((own, part), (whole, x)):
            model.zero_grad()
            model(given, is_causal=True).square().mean().backward()
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-10, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    for (mine, theirs), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-10, atol=1e-12)
        assert not torch.equal(theirs, old)
    folder = shared_folder()
    checkpoint.save(own.state_dict(), checkpoint_id=folder)
    other = DiffmaxAttention(32, 4, num_kv_heads=2, **options).double()
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x, is_causal=True), whole(x, is_causal=True))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
