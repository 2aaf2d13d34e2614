"""`python -m benchmarks.bench_e2e_attention`: a decoder's training step with diffmax in its attention, against torch's SDPA.

The model is a pre-norm decoder with causal attention; both variants have the same parameters and see the same tokens. Prints
milliseconds per step, and writes them and peak memory as JSON with `--output`. `--quick` is a small model on the CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import diffmax
from benchmarks import harness

VOCABULARY = 512
SIZES = {"length": 8192, "batch": 2, "width": 1024, "heads": 16, "layers": 8, "steps": 10}
QUICK = {"device": "cpu", "length": 64, "batch": 1, "width": 64, "heads": 2, "layers": 1, "steps": 2}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Attention and a feed-forward network, each on a normalised input."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        split = self.projections(self.before_attention(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = (t.transpose(1, 2) for t in split.unbind(2))
        x = x + self.output(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.network(self.before_network(x))


def decoder(width: int, heads: int, layers: int, attend: Attend) -> nn.Sequential:
    """Tokens (B, L) to logits; the same parameters at every call."""
    torch.manual_seed(0)
    blocks = (Layer(width, heads, attend) for _ in range(layers))
    return nn.Sequential(nn.Embedding(VOCABULARY, width), *blocks, nn.LayerNorm(width), nn.Linear(width, VOCABULARY))


def contestants(alphas: list[float]) -> dict[str, Attend]:
    """torch's attention, and diffmax at each alpha."""
    field: dict[str, Attend] = {"sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)}
    for alpha in alphas:
        field[f"diffmax {alpha}"] = lambda q, k, v, alpha=alpha: diffmax.attention(q, k, v, is_causal=True, alpha=alpha)
    return field


def step_times(model: nn.Module, tokens: Tensor, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """First step in seconds, the median of the others in milliseconds, peak memory, and the last loss."""
    device = tokens.device
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    median = sorted(times[1:])[steps // 2]
    return {"first_step_s": times[0], "median_ms": median * 1e3, "peak_bytes": peak, "loss": last}


def main(arguments: list[str]) -> int:
    parser = harness.command_line("bench_e2e_attention", __doc__ or "")
    parser.add_argument("--device", default="cuda")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.9])
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_e2e_attention: torch sees no GPU here; nothing was measured. --quick runs on the CPU", file=sys.stderr)
        return 1
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tokens = torch.randint(VOCABULARY, (options.batch, options.length + 1), device=options.device)
    rows = []
    for name, attend in contestants(options.alphas).items():
        model = decoder(options.width, options.heads, options.layers, attend).to(options.device)
        rows.append({"contestant": name, **step_times(model, tokens, options.steps, dtype)})
        ratio = rows[-1]["median_ms"] / rows[0]["median_ms"]
        print(f"{name:14} {rows[-1]['median_ms']:10.2f} ms {ratio:6.2f} x sdpa   loss {rows[-1]['loss']:.4f}")
    if options.output:
        shape = {key: getattr(options, key) for key in ("device", *SIZES, "alphas")}
        device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
        harness.write(Path(options.output), {"device_name": device, "torch": torch.__version__, **shape, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
