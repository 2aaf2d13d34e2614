"""Train a small transformer from scratch with weights of several kinds. Real data, minutes.

The weights are softmax, diffmax with a fixed alpha and with one that each head learns, the difference of two maps of either
(differential attention), and lazy attention.

Two tasks: handwritten digits (scikit-learn), read as 16 patches, and the weekly CO2 of Mauna Loa (statsmodels), whose next
value is told from 48 weeks. Each setting is trained with several seeds. What is done is kept in the output's JSON file, so
that a run that was stopped goes on where it was. With `--rates` alpha is learned with each of these learning rates instead.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import Tensor, nn
from tqdm import tqdm

from diffmax import DiffmaxBisectModule, HillMap, diffmax_bisect, lazy_attention, plot
from diffmax.nn import DiffAttention, LazyAttention, param_groups

SETTINGS = ("softmax", "alpha 0.85", "alpha 0.5", "learned", "difference, softmax", "difference, alpha 0.5", "lazy")
SEEDS = (0, 1, 2)
RATE = 0.03  # the learning rate of a learned alpha
LAYERS, HEADS, WIDTH = 2, 4, 32
START = 0.7  # of a learned alpha; HillMap(c=0.9) keeps it in (0.1, 1)


class Attention(nn.Module):
    """Multi-head self-attention whose weights come from softmax or diffmax."""

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.weights: nn.Module = nn.Softmax(dim=-1)
        if setting == "learned":
            self.weights = DiffmaxBisectModule(torch.full((HEADS, 1, 1), START), alpha_map=HillMap(c=0.9))
        elif setting != "softmax":
            self.weights = DiffmaxBisectModule(float(setting.removeprefix("alpha ")))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        weights = self.weights(q @ k.mT * q.shape[-1] ** -0.5)
        self.last = weights.detach()
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Difference(DiffAttention):
    """Differential attention of half as many heads, each of two maps, that keeps its weights when it is evaluated."""

    def __init__(self, setting: str, depth: int) -> None:
        alpha = None if setting.endswith("softmax") else float(setting.rpartition(" ")[2])
        super().__init__(WIDTH, HEADS // 2, depth=depth, weights="softmax" if alpha is None else "diffmax", alpha=alpha)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            q, k, _ = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            maps = scores.softmax(-1) if self.weights == "softmax" else diffmax_bisect(scores, self.current_alpha)
            self.last = maps[:, 0::2] - self.current_lambda * maps[:, 1::2]
        return super().forward(x)


class Lazy(LazyAttention):
    """Lazy attention among all tokens, without rotary positions, that keeps its weights when it is evaluated."""

    def __init__(self, tokens: int) -> None:
        super().__init__(WIDTH, HEADS, window_size=tokens, rope_base=None, is_causal=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            q, k = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
            of_each = torch.eye(x.shape[1]).expand(*k.shape[:2], -1, -1)  # with such values the output is the weights
            self.last = lazy_attention(q, k, of_each, self.attention_biases, self.tau, is_causal=False)
        return super().forward(x)


def attention_of(setting: str, depth: int, tokens: int) -> nn.Module:
    """The attention of a layer."""
    if setting == "lazy":
        return Lazy(tokens)
    return Difference(setting, depth) if setting.startswith("difference") else Attention(setting)


class Block(nn.Module):
    """A layer with the norms before its two parts."""

    def __init__(self, setting: str, depth: int, tokens: int) -> None:
        super().__init__()
        self.attention = attention_of(setting, depth, tokens)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """Tokens (B, T, F) to an output (B, O), by the mean over the tokens."""

    def __init__(self, setting: str, tokens: int, features: int, outputs: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(features, WIDTH), nn.Parameter(0.02 * torch.randn(tokens, WIDTH))
        self.blocks = nn.Sequential(*(Block(setting, depth, tokens) for depth in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)).mean(1))

    def alphas(self) -> list[float]:
        """Of each head that learns one, layer by layer."""
        modules = [getattr(block.attention, "weights", None) for block in self.blocks]
        return [a for m in modules if getattr(m, "alpha_map", None) for a in m.current_alpha.flatten().tolist()]


def digits() -> tuple[Tensor, Tensor, int]:
    """Images as 16 patches of 2 by 2, their classes, and how many are for training."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return patches[order], torch.tensor(data.target)[order], 1300


def co2() -> tuple[Tensor, Tensor, int]:
    """Windows of 48 weeks less their last value, what the next week adds, and how many are for training: the earlier ones."""
    from statsmodels.datasets import co2

    values = torch.tensor(co2.load().data["co2"].interpolate().to_numpy(), dtype=torch.float32)
    windows = values.unfold(0, 49, 1)
    return (windows[:, :48] - windows[:, 47:48]).unsqueeze(-1), windows[:, 48] - windows[:, 47], 1700


TASKS = {"digits": digits, "co2": co2}


def train(task: str, setting: str, seed: int, epochs: int, bar: tqdm, rate: float = RATE) -> dict:
    """One run: the score on held-out data, the share of exact zeros there, and what alpha each head had after each epoch."""
    x, y, split = TASKS[task]()
    classify = task == "digits"
    torch.manual_seed(seed)
    model = Transformer(setting, x.shape[1], x.shape[2], 10 if classify else 1)
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3, alpha_lr=rate, decay_biases_and_norms=True))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history, start = [model.alphas()], time.process_time()
    for _ in range(epochs):
        for batch in torch.randperm(split).split(64):
            output = model(x[batch])
            value = nn.functional.cross_entropy(output, y[batch]) if classify else (output[:, 0] - y[batch]).square().mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        schedule.step()
        history.append(model.alphas())
        bar.update()
    seconds = time.process_time() - start
    with torch.no_grad():
        output = model.eval()(x[split:])
        square = (output[:, 0] - y[split:]).square().mean()
        loss = nn.functional.cross_entropy(output, y[split:]) if classify else square
    right = (output.argmax(1) == y[split:]).float().mean() if classify else square.sqrt()
    support = [(block.attention.last > 0).sum(-1).float().mean((0, 2)).tolist() for block in model.blocks]
    zeros = torch.stack([(block.attention.last == 0).float().mean() for block in model.blocks]).mean()
    found = {"score": right.item(), "loss": loss.item(), "zeros": zeros.item(), "seconds": seconds}
    return found | {"alphas": history, "support": support}


def print_rates(runs: dict[str, dict], rates: list[float], seeds: tuple[int, ...]) -> None:
    for task in TASKS:
        for rate in rates:
            of_seeds = [runs[f"{task}/rate {rate}/{seed}"] for seed in seeds]
            loss, final = statistics.mean(run["loss"] for run in of_seeds), of_seeds[0]["alphas"][-1]
            print(f"{task}, alpha_lr {rate}: held-out loss {loss:.4f}, alphas of seed 0 {min(final):.2f} to {max(final):.2f}")


def print_table(runs: dict[str, dict], seeds: tuple[int, ...]) -> None:
    for task in TASKS:
        print(f"\n{task}: {'accuracy' if task == 'digits' else 'root mean square error in ppm'} on held-out data")
        baseline = [runs[f"{task}/softmax/{seed}"]["score"] for seed in seeds]
        for setting in SETTINGS:
            of_seeds = [runs[f"{task}/{setting}/{seed}"] for seed in seeds]
            scores = [run["score"] for run in of_seeds]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            zeros = statistics.mean(run["zeros"] for run in of_seeds)
            difference = statistics.mean(a - b for a, b in zip(scores, baseline, strict=True))
            line = f"  {setting:22} {statistics.mean(scores):.4f} +- {spread:.4f} ({difference:+.4f} against softmax"
            if len(scores) > 1:  # paired by seeds: the 95 % interval of Student's t, which is wide for three seeds
                error = statistics.stdev(a - b for a, b in zip(scores, baseline, strict=True)) / len(scores) ** 0.5
                noise = student_t.ppf(0.975, len(scores) - 1) * error
                line += f" +- {noise:.4f}, noise" if abs(difference) <= noise else f" +- {noise:.4f}, more than noise"
            line += ")"
            seconds = statistics.mean(run["seconds"] for run in of_seeds)
            print(f"{line}   {100 * zeros:5.1f} % exact zeros   {seconds:.0f} s")
        for seed in seeds:
            final = runs[f"{task}/learned/{seed}"]["alphas"][-1]
            print(f"  alpha of each head, seed {seed}: {' '.join(f'{alpha:.2f}' for alpha in final)}")


def draw(runs: dict[str, dict], path: Path) -> None:
    """For each task the learned alphas while they are trained (first seed); a second picture has alpha against support."""
    learned = {task: runs[f"{task}/learned/{SEEDS[0]}"] for task in TASKS}
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (task, run) in zip(figure.subplots(1, 2, sharey=True), learned.items(), strict=True):
        for i, curve in enumerate(zip(*run["alphas"], strict=True)):
            axis.plot(curve, color=f"C{i // HEADS}", label=f"layer {i // HEADS + 1}" if i % HEADS == 0 else None)
        axis.set(title=task, xlabel="epoch", ylabel="alpha of each head")
        axis.legend()
    figure.savefig(path, dpi=80)
    for task, run in learned.items():
        alpha, support = (torch.tensor(t).view(LAYERS, HEADS) for t in (run["alphas"][-1], run["support"]))
        plot.alpha_and_support(alpha, support).savefig(path.with_name(f"{path.stem}_{task}.png"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed, to see that it runs")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of alpha to compare")
    parser.add_argument(
        "--output", type=Path, default=Path("train_alpha"), help="name of .json and .png (default: %(default)s)"
    )
    arguments = parser.parse_args()
    epochs, seeds = (1, SEEDS[:1]) if arguments.quick else (arguments.epochs, SEEDS)
    kept = arguments.output.with_suffix(".json")
    kept.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(kept.read_text()) if kept.exists() else {"torch": torch.__version__, "epochs": epochs, "runs": {}}
    if result["epochs"] != epochs:
        parser.error(f"{kept} holds runs of {result['epochs']} epochs, not {epochs}: choose another --output, or remove it")
    if arguments.rates:
        wanted = [(task, rate, seed) for task in TASKS for rate in arguments.rates for seed in seeds]
        wanted = [(task, rate, seed) for task, rate, seed in wanted if f"{task}/rate {rate}/{seed}" not in result["runs"]]
        with tqdm(total=len(wanted) * epochs, desc="training", unit="epoch") as bar:
            for task, rate, seed in wanted:
                result["runs"][f"{task}/rate {rate}/{seed}"] = train(task, "learned", seed, epochs, bar, rate)
                kept.write_text(json.dumps(result) + "\n")
        print_rates(result["runs"], arguments.rates, seeds)
        return
    missing = [(t, s, seed) for t in TASKS for s in SETTINGS for seed in seeds if f"{t}/{s}/{seed}" not in result["runs"]]
    with tqdm(total=len(missing) * epochs, desc="training", unit="epoch") as bar:
        for task, setting, seed in missing:
            bar.set_postfix_str(f"{task}, {setting}, seed {seed}")
            result["runs"][f"{task}/{setting}/{seed}"] = train(task, setting, seed, epochs, bar)
            kept.write_text(json.dumps(result) + "\n")
    print_table(result["runs"], seeds)
    draw(result["runs"], arguments.output.with_suffix(".png"))
    print(f"Wrote {kept} and its pictures.")


if __name__ == "__main__":
    main()
