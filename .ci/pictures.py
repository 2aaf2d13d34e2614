"""The pictures of figures in docs/images, drawn from the committed JSON: `make pictures`. tests/test_pictures.py compares them.

Those of attention itself show a model that runs: `examples/demo.py --only-picture`, `examples/inspect_attention.py --picture`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # one example imports another


@dataclass(frozen=True)
class Picture:
    """A file of docs/images, the module that draws it from its results, and what of the results its function takes."""

    name: str
    module: str
    results: str
    part: str | None = None

    def draw(self, path: Path) -> None:
        """Write the picture, the same bytes each time."""
        result: Any = json.loads((ROOT / self.results).read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context({"svg.hashsalt": "diffmax"}):
            drawn = Path(folder) / path.name  # some draw others beside it
            importlib.import_module(self.module).draw(result if self.part is None else result[self.part], drawn)
            shutil.copyfile(drawn, path)


PICTURES = (
    Picture("adapt_minilm.png", "adapt_minilm", "examples/results/adapt_minilm.json"),
    Picture("length.svg", "length", "examples/results/length.json", "runs"),
    Picture("lm.svg", "lm", "examples/results/lm.json"),
    Picture("lm_adapted.svg", "lm", "examples/results/lm_adapted.json"),
    Picture(
        "power_attention.svg", "benchmarks.bench_power", "benchmarks/results/cpu-amd-epyc/2026-11-27-ce90da8ac6-power.json"
    ),
    Picture("train_alpha.png", "train_alpha", "examples/results/train_alpha.json", "runs"),
)
OF_MODELS = ("attention_map.png", "inspecting.png")


def main() -> None:
    """Draw all."""
    for picture in PICTURES:
        picture.draw(ROOT / "docs" / "images" / picture.name)
        print(f"docs/images/{picture.name} from {picture.results}")


if __name__ == "__main__":
    main()
