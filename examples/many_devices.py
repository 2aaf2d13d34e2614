"""A small transformer trained on four processes at once: data, sequence and tensor parallel, and equal to one process.

    make many-devices

The ranks are a mesh of 2 (data) by 2 (model). Each half of the batch is on one row of the mesh. Between layers each rank of a
row has half of the tokens; attention brings whole rows together (`attention_context_parallel`), with a learned alpha per head.
The feed-forward layer is sharded over its hidden units, and the head over the vocabulary: its logits are never gathered
(`diffmax_loss_sharded`). Each layer is checkpointed: backward computes it again, messages included. Gloo on the CPU, in
float64, so that the comparison with one process is strict. Torch 2.13.
"""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

import diffmax
from diffmax.distributed import attention_context_parallel, diffmax_loss_sharded

VOCABULARY, WIDTH, HIDDEN, HEADS, LAYERS = 61, 24, 32, 4, 2
BATCH, LENGTH, STEPS, RATE = 4, 32, 8, 0.3
ALPHA = 0.7


class Layer(nn.Module):
    """Attention and a feed-forward layer. `mesh`: None for one process, else this rank's share of both."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.sharpness = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        """(B, l, WIDTH), of this rank's tokens."""
        q, k, v = self.qkv(_normed(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        alpha = 0.5 + 0.4 * torch.sigmoid(self.sharpness)
        if self.mesh is None:
            seen = diffmax.attention(q, k, v, is_causal=True, alpha=alpha)
        else:
            seen = attention_context_parallel(q, k, v, group=self.mesh["model"], method="auto", is_causal=True, alpha=alpha)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + _scattered(self.down(nn.functional.gelu(self.up(_gathered(_normed(x), self.mesh)))), self.mesh)


class Model(nn.Module):
    """Token ids to the loss of the next ones."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(mesh) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():  # the whole weights on every rank, of which it keeps its share
                scale = 0.0 if name.endswith(("bias", "sharpness")) else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
        if mesh is not None:
            for name, axis in self.sharded().items():
                owner, leaf = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(owner, leaf, nn.Parameter(_share(getattr(owner, leaf).detach(), mesh, axis)))

    def sharded(self) -> dict[str, int]:
        """The parameters that are sharded over "model", and along which axis."""
        of_layers = {f"layers.{n}.{name}.weight": axis for n in range(LAYERS) for name, axis in (("up", 0), ("down", 1))}
        return {**of_layers, "head.weight": 0}

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        """The sum over tokens: `tokens` are this rank's, `target` those of its row of the mesh."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        logits = self.head(_gathered(_normed(x), self.mesh)).flatten(0, 1)
        if self.mesh is None:
            return diffmax.diffmax_loss(logits, target.flatten(), ALPHA, reduction="sum")
        return diffmax_loss_sharded(logits, target.flatten(), ALPHA, reduction="sum", group=self.mesh["model"])

    def add_gradients(self) -> None:
        """Sum what ranks have parts of: every gradient over "data", and over "model" if its tokens are sharded there."""
        if self.mesh is None:
            return
        for name, parameter in self.named_parameters():
            dist.all_reduce(parameter.grad, group=self.mesh.get_group("data"))
            # alpha's gradient is already that of the whole sequence
            if name not in self.sharded() and not name.endswith("sharpness"):
                dist.all_reduce(parameter.grad, group=self.mesh.get_group("model"))


def train(mesh: DeviceMesh | None) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the trained weights: this rank's share."""
    model = Model(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        text = (first + 7 * torch.arange(LENGTH + 1)) % VOCABULARY  # what can be learned
        tokens, target = text[:, :-1], text[:, 1:]
        if mesh is not None:
            tokens, target = (t.chunk(2)[mesh.get_local_rank("data")] for t in (tokens, target))
            tokens = _share(tokens, mesh, 1)
        loss = model(tokens, target) / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        model.add_gradients()
        optimizer.step()
        whole = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(whole, group=mesh.get_group("data"))
        losses.append(float(whole))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def difference(mesh: DeviceMesh) -> tuple[list[float], list[float], float]:
    """The losses of all ranks together, those of one process, and the largest difference of this rank's weights."""
    losses, weights = train(mesh)
    alone, whole = train(None)
    axes = Model(mesh).sharded()
    shares = {name: _share(t, mesh, axes[name]) if name in axes else t for name, t in whole.items()}
    return losses, alone, max(float((weights[name] - t).abs().max()) for name, t in shares.items())


def _normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (WIDTH,))


def _share(t: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    """This rank's part of what is sharded over "model"."""
    return t.tensor_split(mesh["model"].size(), axis)[mesh.get_local_rank("model")].contiguous()


def _gathered(x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """All tokens of the row of the mesh; its backward adds the parts of the gradient, and scatters them."""
    return x if mesh is None else collectives.all_gather_single_autograd(x, 1, mesh.get_group("model"))


def _scattered(x: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Parts of a sum, of all tokens, to the sum of this rank's tokens."""
    if mesh is None:
        return x
    return collectives.reduce_scatter_single_autograd(x.contiguous(), "sum", 1, mesh.get_group("model"))


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    losses, alone, error = difference(mesh)
    errors: list[Any] = [None] * 4
    dist.all_gather_object(errors, error)
    if rank == 0:
        for step, (together, one) in enumerate(zip(losses, alone, strict=True)):
            print(f"step {step}: loss {together:.12f} on four ranks, {one:.12f} on one")
        print(f"largest difference of a trained weight: {max(errors):.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        chosen = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (chosen,), nprocs=4)
