"""Length generalization: small causal transformers trained on 32 to 64 tokens and tested on sequences 64 times as long.

The tasks are those of "Long-Context Generalization with Sparse Attention" (arXiv:2506.16640), at a size that trains on a CPU
in a minute: copy, reverse, sort, associative recall, and recall of keys and values of several tokens (MQMTAR). Half of the
heads have no positions, half have ALiBi, as there; a short convolution before attention replaces its further layers. The
weights are softmax; diffmax with a fixed alpha, one that each head learns, or one that descends from softmax in the first half
of the steps; and diffmax with a length scale on the heads without positions: `LengthScale`, or the one of ASEntmax.

A sequence counts as solved if every token that is asked for is predicted from the true ones before it: then, and only then,
greedy generation gives the same tokens. What is done is kept in the output's JSON file, so that a run that was stopped goes on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from torch import Tensor, nn
from tqdm import tqdm

from diffmax import HillMap, attention
from diffmax.nn import AdaptiveLengthScale, AlphaSchedule, LengthScale, param_groups

METHODS = ("softmax", "alpha 0.5", "learned alpha", "descending alpha", "length scale", "ASEntmax")
SEEDS = (0, 1, 2)
LAYERS, HEADS, WIDTH = 2, 4, 64
SLOPES = torch.tensor([1.0, 0.5, 0.0, 0.0])  # ALiBi's, and two heads without positions
ALPHA = 0.5  # entmax's 1.5
SHORTEST, TRAINED = 32, 64
TESTED = {64: 64, 128: 32, 256: 16, 512: 16, 1024: 8, 2048: 8, 4096: 4, 8192: 2}  # sequences of each length
MORE = 4  # times as many for recall, whose sequences ask for few tokens
NEAR = 4  # tokens that the convolution before attention mixes
BATCH, RATE = 16, 8e-3
ALPHABET, SYMBOLS, VOCABULARY = 128, 32, 136
MARK, SPACE = 128, 129  # between parts, and between pairs
IGNORED = -100


def distinct(batch: int, of: int, count: int) -> Tensor:
    """Distinct numbers below `of`, (batch, count)."""
    return torch.rand(batch, of).argsort(1)[:, :count]


Sample = Callable[[int, int], tuple[Tensor, Tensor]]  # of a number of sequences and their length


def transduction(target_of: Callable[[Tensor], Tensor]) -> Sample:
    """Source, mark, target: half of the tokens each."""

    def sample(batch: int, length: int) -> tuple[Tensor, Tensor]:
        source = torch.randint(ALPHABET, (batch, length // 2))
        target = target_of(source)
        tokens = torch.cat([source, torch.full((batch, 1), MARK), target[:, :-1]], 1)
        return tokens, torch.cat([torch.full_like(source, IGNORED), target], 1)

    return sample


def recall(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """8 pairs of a key and a value among noise, then the keys again in another order, each before its value."""
    slots, pairs = length // 2 - 8, 8
    context = torch.randint(2 * SYMBOLS, 3 * SYMBOLS, (batch, slots, 2))
    keys, values = distinct(batch, SYMBOLS, pairs), torch.randint(SYMBOLS, 2 * SYMBOLS, (batch, pairs))
    known = torch.stack([keys, values], 2)
    context.scatter_(1, distinct(batch, slots, pairs).unsqueeze(2).expand(-1, -1, 2), known)
    asked = known.gather(1, distinct(batch, pairs, pairs).unsqueeze(2).expand(-1, -1, 2))
    labels = torch.stack([asked[..., 1], torch.full_like(asked[..., 1], IGNORED)], 2).flatten(1)
    tokens = torch.cat([context.flatten(1), asked.flatten(1)], 1)
    return tokens, torch.cat([torch.full((batch, 2 * slots), IGNORED), labels], 1)


def multi_recall(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """As many pairs as fit, of a key of 2 tokens and a value of 2 tokens, then 2 of the keys, each before its value."""
    alphabet, queries = 2 * SYMBOLS, 2
    pairs = (length - 5 * queries) // 5
    names = distinct(batch, alphabet**2, pairs)
    values = torch.randint(alphabet, 2 * alphabet, (batch, pairs, 2))
    space = torch.full((batch, pairs, 1), SPACE)
    known = torch.cat([space, torch.stack([names // alphabet, names % alphabet], 2), values], 2)
    asked = known.gather(1, torch.randint(pairs, (batch, queries, 1)).expand(-1, -1, 5)).clone()
    asked[..., 0] = MARK
    labels = torch.full_like(asked, IGNORED)
    labels[..., 2:4] = asked[..., 3:5]
    tokens = torch.cat([known.flatten(1), asked.flatten(1)], 1)
    return tokens, torch.cat([torch.full((batch, 5 * pairs), IGNORED), labels.flatten(1)], 1)


TASKS = {
    "copy": transduction(lambda x: x),
    "reverse": transduction(lambda x: x.flip(1)),
    "sort": transduction(lambda x: x.sort(1).values),
    "associative recall": recall,
    "MQMTAR": multi_recall,
}


class Attention(nn.Module):
    """Causal self-attention with the weights of a method."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix = nn.Conv1d(WIDTH, WIDTH, NEAR, groups=WIDTH, padding=NEAR - 1, bias=False)
        self.method, self.scaled = method, int((SLOPES == 0).sum())
        self.scale: nn.Module | None = None
        if method == "length scale":
            self.scale = LengthScale(self.scaled)
        elif method == "ASEntmax":
            self.scale = AdaptiveLengthScale(WIDTH, self.scaled)
        self.map = HillMap(c=0.9)
        self.log_beta = nn.Parameter(self.map.inverse(torch.full((HEADS,), ALPHA)).log()) if method == "learned alpha" else None
        self.schedule: AlphaSchedule | None = None
        self.support: Tensor | None = None

    def alpha(self) -> float | Tensor:
        if self.schedule is not None:
            return self.schedule()
        return ALPHA if self.log_beta is None else self.map(self.log_beta.exp())

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.project(self.mix(x.mT)[..., : x.shape[1]].mT)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in mixed.chunk(3, -1))
        if self.scale is not None:
            rest, free = q.split([HEADS - self.scaled, self.scaled], 1)
            tokens = (x,) if isinstance(self.scale, AdaptiveLengthScale) else ()
            q = torch.cat([rest, self.scale(free, *tokens, keys=k.shape[2], is_causal=True)], 1)
        if self.method == "softmax":
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=alibi(x.shape[1]))
        elif self.training:
            out = attention(q, k, v, is_causal=True, alibi_slopes=SLOPES, alpha=self.alpha())
        else:
            out, stats = attention(q, k, v, is_causal=True, alibi_slopes=SLOPES, alpha=self.alpha(), return_stats=True)
            self.support = stats.support_size[:, -self.scaled :]
        return self.out(out.transpose(1, 2).flatten(2))


_masks: dict[int, Tensor] = {}


def alibi(length: int) -> Tensor:
    """What ALiBi and causality add to the scores, (1, H, L, L); the last one made is kept."""
    if length not in _masks:
        _masks.clear()
        place = torch.arange(length)
        distance = (place - place.unsqueeze(1)).float()
        _masks[length] = (SLOPES.view(-1, 1, 1) * distance).masked_fill_(distance > 0, -torch.inf).unsqueeze(0)
    return _masks[length]


class Block(nn.Module):
    """A layer with the norms before its two parts."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.attention, self.first, self.second = Attention(method), nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """Tokens (B, L) to logits (B, L, V)."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block(method) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def train(task: str, method: str, seed: int, steps: int, longest: int, bar: tqdm) -> dict:
    """One run: how many sequences of each length are solved, the share of right tokens, and what alpha each head learned."""
    torch.manual_seed(seed)
    model, sample = Transformer(method), TASKS[task]
    optimizer = torch.optim.AdamW(param_groups(model, lr=RATE, alpha_lr=1e-2), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    descent = AlphaSchedule(ALPHA, steps=max(1, steps // 2), shape="linear")  # from softmax
    for block in model.blocks:
        block.attention.schedule = descent if method == "descending alpha" else None
    start, losses = time.process_time(), []
    for _ in range(steps):
        tokens, labels = sample(BATCH, int(torch.randint(SHORTEST, TRAINED + 1, ())))
        asked = labels != IGNORED
        loss = nn.functional.cross_entropy(model(tokens)[asked], labels[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        descent.step()
        losses.append(loss.item())
        bar.update()
    trained = time.process_time() - start
    result = {"loss": statistics.mean(losses[-20:]), "seconds": trained, "lengths": {}}
    for length, found in test(model.eval(), sample, longest, MORE if sample in (recall, multi_recall) else 1):
        result["lengths"][str(length)] = found
    result["seconds_of_test"] = time.process_time() - start - trained
    if method == "learned alpha":
        result["alphas"] = [block.attention.alpha().tolist() for block in model.blocks]
    return result


@torch.inference_mode()
def test(model: Transformer, sample: Sample, longest: int, more: int) -> Iterator[tuple[int, dict]]:
    """By length: shares of solved sequences and right tokens, and the mean support of the heads without positions."""
    for length, count in ((length, more * count) for length, count in TESTED.items() if length <= longest):
        torch.manual_seed(length)  # the same sequences for every method and seed
        solved, right, support = [], [], []
        size = max(1, min(count, 4096 // length))
        for _ in range(0, count, size):
            tokens, labels = sample(size, length)
            asked = labels != IGNORED
            hit = (model(tokens).argmax(-1) == labels) | ~asked
            solved += hit.all(1).tolist()
            right.append(hit[asked].float().mean().item())
            supports = [block.attention.support for block in model.blocks if block.attention.support is not None]
            support += [s.float().mean().item() for s in supports]
        tokens_asked = int(asked.sum()) // size * count
        found = {"solved": statistics.mean(solved), "right": statistics.mean(right), "sequences": count, "tokens": tokens_asked}
        yield length, found | ({"support": statistics.mean(support)} if support else {})


def against_softmax(runs: dict[str, dict], task: str, method: str, length: str) -> str:
    """The difference of right tokens, paired by seeds, and the 95 % interval of Student's t, which is wide for three seeds."""
    pairs = [tuple(runs[f"{task}/{m}/{s}"] for m in (method, "softmax")) for s in seeds_of(runs, task, method, "softmax")]
    differences = [a["lengths"][length]["right"] - b["lengths"][length]["right"] for a, b in pairs]
    if len(differences) < 2:
        return ""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    noise = student_t.ppf(0.975, len(differences) - 1) * error
    return f"{mean:+.3f} +- {noise:.3f}, {'noise' if abs(mean) <= noise else 'more than noise'}"


def seeds_of(runs: dict[str, dict], task: str, *methods: str) -> list[int]:
    """The seeds that all of some methods have run with."""
    return [seed for seed in SEEDS if all(f"{task}/{method}/{seed}" in runs for method in methods)]


def print_tables(runs: dict[str, dict]) -> None:
    for task in TASKS:
        ran = [method for method in METHODS if seeds_of(runs, task, method)]
        if not ran:
            continue
        print(f"\n{task}: % of tokens right +- deviation over seeds (% of sequences solved)")
        for method in ran:
            of_seeds = [runs[f"{task}/{method}/{seed}"] for seed in seeds_of(runs, task, method)]
            cells = []
            for length in of_seeds[0]["lengths"]:
                right, solved = ([run["lengths"][length][what] for run in of_seeds] for what in ("right", "solved"))
                spread = f" +- {100 * statistics.stdev(right):.1f}" if len(right) > 1 else ""
                cells.append(f"{length}: {100 * statistics.mean(right):.1f}{spread} ({100 * statistics.mean(solved):.0f})")
            seconds = statistics.mean(run["seconds"] for run in of_seeds)
            print(f"  {method:14} {len(of_seeds)} seeds, {seconds:.0f} s  " + "  ".join(cells))
            if method != "softmax" and "softmax" in ran:
                longest = list(of_seeds[0]["lengths"])[-1]
                compared = {length: against_softmax(runs, task, method, length) for length in (str(TRAINED), longest)}
                print("".join(f"    against softmax at {n}: {text}\n" for n, text in compared.items() if text), end="")


def draw(runs: dict[str, dict], path: Path) -> None:
    """Right tokens by length, a plot a task: the mean of the seeds, and each seed as a thin line."""
    tasks = [task for task in TASKS if any(seeds_of(runs, task, method) for method in METHODS)]
    figure = Figure(figsize=(4 * len(tasks), 3.4), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, method in enumerate(METHODS):
            curves = [runs[f"{task}/{method}/{seed}"]["lengths"] for seed in seeds_of(runs, task, method)]
            lengths = [int(length) for length in curves[0]] if curves else []
            values = [[point["right"] for point in curve.values()] for curve in curves]
            for curve in values:
                axis.plot(lengths, curve, color=f"C{i}", linewidth=0.5, alpha=0.5)
            if values:
                mean = [statistics.mean(at) for at in zip(*values, strict=True)]
                axis.plot(lengths, mean, color=f"C{i}", marker="o", markersize=3, label=method)
        axis.axvline(TRAINED, color="0.6", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set(title=task, xlabel="tokens", ylabel="share of tokens right")
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="in this order (default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), help="default: all")
    parser.add_argument("--longest", type=int, choices=TESTED, default=4096, help="tokens tested (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("length"), help="name of .json and .svg (default: %(default)s)")
    arguments = parser.parse_args()
    kept = arguments.output.with_suffix(".json")
    kept.parent.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps, "batch": BATCH, "rate": RATE, "longest": arguments.longest}
    result = {"settings": settings, "torch": torch.__version__, "runs": {}}
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["settings"] != settings:
            parser.error(f"{kept} holds runs with {result['settings']}, not {settings}: choose another --output, or remove it")
    asked = [
        (t, m, s) for s in arguments.seeds for t in arguments.tasks for m in arguments.methods
    ]  # a run cut short has all tasks
    missing = [run for run in asked if "/".join(map(str, run)) not in result["runs"]]
    with tqdm(total=len(missing) * arguments.steps, desc="training", unit="step") as bar:
        for task, method, seed in missing:
            bar.set_postfix_str(f"{task}, {method}, seed {seed}")
            result["runs"][f"{task}/{method}/{seed}"] = train(task, method, seed, arguments.steps, arguments.longest, bar)
            kept.write_text(json.dumps(result, indent=1) + "\n")
    print_tables(result["runs"])
    draw(result["runs"], arguments.output.with_suffix(".svg"))
    print(f"Wrote {kept} and its picture.")


if __name__ == "__main__":
    main()
