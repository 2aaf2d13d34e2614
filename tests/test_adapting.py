"""The recipe of diffmax.integrations.transformers, on models small enough to check by hand."""

import copy
import json

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)

import diffmax
from diffmax import diffmax_bisect
from diffmax.integrations.transformers import adapt, calibrate, distil, refit, register, register_power, replace, suggest_alpha
from diffmax.integrations.transformers.adapting import final_output, relative_error
from diffmax.integrations.transformers.adapting.calibration import _grid, _of_layer, measure
from diffmax.integrations.transformers.adapting.outputs import mask_for
from diffmax.integrations.transformers.adapting.recording import Call, record
from diffmax.integrations.transformers.adapting.replacement import _device
from diffmax.nn import AlphaSchedule
from tests import fresh

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
LINEARS = [f"encoder.layer.{i}.{name}.dense" for i in range(2) for name in ("attention.output", "output")]


def bert(kind=BertModel):
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).eval()


def llama():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaModel(LlamaConfig(**sizes)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "dropout_rate": 0.0}
    return T5Model(T5Config(**sizes, decoder_start_token_id=0)).eval()


def batches(count=3, length=12):
    made = []
    for _ in range(count):
        mask = torch.ones(4, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        made.append({"input_ids": torch.randint(3, 50, (4, length)), "attention_mask": mask})
    return made


def zeros_of(model, data):
    """Share of exact zeros where a real query sees a real key."""
    zeros = entries = 0
    for batch in data:
        real = batch["attention_mask"].bool()
        pairs = (real[:, None, :, None] & real[:, None, None, :]).expand(-1, 4, -1, -1)
        with torch.no_grad():
            for weights in model(**batch, output_attentions=True).attentions:
                if isinstance(model, LlamaModel):
                    pairs = pairs & torch.ones_like(weights).bool().tril()
                zeros += ((weights == 0) & pairs).sum().item()
                entries += pairs.sum().item()
    return zeros / entries


def error(model, teacher, data):
    with torch.no_grad():
        return sum(relative_error(model(**batch), teacher(**batch), batch).item() for batch in data) / len(data)


@pytest.mark.parametrize("make", [bert, llama])
def test_the_share_of_zeros_that_was_asked_for_is_met_and_cheaper_than_a_bare_swap(make):
    model, data = make(), batches()
    before = copy.deepcopy(model.state_dict())
    heads = calibrate(model, data, zeros=0.4)
    assert model.config._attn_implementation == make().config._attn_implementation
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    adapted = replace(copy.deepcopy(model), heads)
    found = zeros_of(adapted, data)
    assert 0.35 < found < 0.5
    # the bare swap with as many zeros, found by bisection over its one alpha
    low, high = 0.01, 0.99
    for _ in range(12):
        alpha = (low + high) / 2
        register("diffmax-bare-test", alpha)
        bare = copy.deepcopy(model)
        bare.set_attn_implementation("diffmax-bare-test")
        low, high = (alpha, high) if zeros_of(bare, data) > found else (low, alpha)
    assert error(adapted, model, data) < 0.7 * error(bare, model, data)


@pytest.mark.parametrize("alpha", [0.5, torch.tensor(0.5)])
def test_with_one_alpha_only_the_scales_are_chosen_and_they_help(alpha):
    model, data = bert(), batches()
    heads = calibrate(model, data, alpha=alpha)
    assert {alpha for of_layer in heads.values() for alpha in of_layer["alpha"]} == {0.5}
    plain = {name: {"alpha": [0.5] * 4, "scale": [1.0] * 4} for name in heads}
    scaled, bare = (replace(copy.deepcopy(model), h) for h in (heads, plain))
    assert error(scaled, model, data) < error(bare, model, data)


def test_movement_is_the_true_one_where_the_output_is_linear_in_the_heads():
    """With an output that reads the last layer's attention linearly, the first-order estimate has no error but its sampling."""
    model = bert()
    (batch,) = batches(1)
    last = model.encoder.layer[1]
    kept = []
    last.attention.self.register_forward_hook(lambda *args: kept.append(args[2][0]))

    def attention_output(_, __):
        return kept[-1]

    table = measure("calibrate", model, [batch], _grid(0.5, None), attention_output, probes=2000)
    register("diffmax-half", 0.5)
    with torch.no_grad():
        model(**batch)
        soft = kept[-1]
        scores_only_last = copy.deepcopy(model)
        scores_only_last.encoder.layer[1].attention.self.config = copy.deepcopy(model.config)
        scores_only_last.encoder.layer[1].attention.self.config._attn_implementation = "diffmax-half"
        kept.clear()
        scores_only_last(**batch)
        change = (kept[-1] - soft).unflatten(-1, (4, 8)).square().sum((0, 1, 3))
    point = table.grid.index((0.5, 1.0))
    torch.testing.assert_close(table.movement[4:, point], change.double(), rtol=0.15, atol=0)


def test_the_attention_of_a_replaced_model_is_diffmax_of_scaled_scores():
    model, (batch,) = bert(), batches(1)
    heads = {"encoder.layer.0.attention.self": {"alpha": [0.2, 0.5, 0.8, 0.9], "scale": [0.5, 1.0, 2.0, 0.1]}}
    heads["encoder.layer.1.attention.self"] = heads["encoder.layer.0.attention.self"]
    replace(model, heads)
    attention, x = model.encoder.layer[0].attention.self, model.embeddings(input_ids=batch["input_ids"])
    q, k = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (attention.query, attention.key))
    scale, alpha = torch.tensor([0.5, 1.0, 2.0, 0.1]).view(4, 1, 1), torch.tensor([0.2, 0.5, 0.8, 0.9]).view(4, 1, 1)
    scores = (q @ k.mT * 8**-0.5 * scale).masked_fill(~batch["attention_mask"].bool()[:, None, None, :], -torch.inf)
    weights = model(**batch, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights, diffmax_bisect(scores, alpha), rtol=1e-4, atol=1e-6)


def test_a_small_share_is_near_softmax():
    model, data = bert(), batches()
    heads = calibrate(model, data, alpha=0.3)
    near = replace(copy.deepcopy(model), heads, share=1e-4)
    assert error(near, model, data) < 1e-5
    assert zeros_of(near, data) == 0


def test_refitting_and_distilling_bring_the_output_back():
    model, data, held_out = bert(), batches(30), batches(4)
    teacher = copy.deepcopy(model)
    replace(model, calibrate(model, data[:3], zeros=0.5))
    calibrated, zeros = error(model, teacher, held_out), zeros_of(model, held_out)
    refit(model, teacher, data, LINEARS)
    refitted = error(model, teacher, held_out)
    assert refitted < 0.9 * calibrated
    seen = []
    distil(model, teacher, held_out * 15, steps=60, lr=1e-3, anneal=0.0, progress=lambda *args: seen.append(args))
    assert error(model, teacher, held_out) < 0.7 * refitted
    assert abs(zeros_of(model, held_out) - zeros) < 0.15
    assert [step for step, _ in seen] == list(range(1, 61))


def test_refitting_one_layer_is_the_least_squares_solution():
    model, data = bert(), batches(8)
    teacher = copy.deepcopy(model)
    replace(model, calibrate(model, data[:3], zeros=0.6))
    inputs, outputs = [], []
    layer, original = model.encoder.layer[0].attention.output.dense, teacher.encoder.layer[0].attention.output.dense
    hooks = [
        layer.register_forward_hook(lambda _, x, __: inputs.append(x[0])),
        original.register_forward_hook(lambda _, __, y: outputs.append(y)),
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch), teacher(**batch)
    for hook in hooks:
        hook.remove()
    real = torch.cat([batch["attention_mask"].bool() for batch in data])
    x, y = torch.cat(inputs)[real].double(), torch.cat(outputs)[real].double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    expected = torch.linalg.lstsq(x, y).solution.T
    refit(model, teacher, data, LINEARS[:1], ridge=1e-9)
    torch.testing.assert_close(layer.weight.double(), expected[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias.double(), expected[:, -1], rtol=1e-3, atol=1e-4)


def test_refitting_a_layer_without_a_bias_is_the_least_squares_solution_too():
    """It was solved with a bias, which was then thrown away."""

    class Model(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.linear, self.shift = nn.Linear(4, 2, bias=False), shift

        def forward(self, x):
            return self.linear(x + self.shift)

    teacher = Model(0.0)
    student = copy.deepcopy(teacher)
    student.shift = 3.0
    data = [{"x": torch.randn(5, 7, 4)} for _ in range(4)]
    with torch.no_grad():
        x, y = (torch.cat([f(batch["x"]) for batch in data]).flatten(0, 1) for f in (lambda x: x + 3, teacher))
    refit(student, teacher, data, ["linear"], ridge=1e-9)
    torch.testing.assert_close(student.linear.weight.mT, torch.linalg.lstsq(x, y).solution, rtol=1e-4, atol=1e-5)


def encoder_and_decoder_batch(seen=4):
    """Inputs of one length on both sides, so that either mask would fit the other."""
    mask = torch.zeros(2, 10, dtype=torch.long)
    mask[:, :seen] = 1
    return {
        "input_ids": torch.randint(3, 50, (2, 10)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 50, (2, 10)),
    }


def test_the_encoders_padding_hides_nothing_of_the_decoder():
    model, batch = t5(), encoder_and_decoder_batch()
    out = model(**batch)
    assert torch.equal(final_output(out, batch), out.last_hidden_state)
    of_decoder = torch.ones(2, 10, dtype=torch.long)
    of_decoder[0, 7:] = 0
    final = final_output(out, {**batch, "decoder_attention_mask": of_decoder})
    assert torch.equal(final[of_decoder.bool()], out.last_hidden_state[of_decoder.bool()])
    assert (final[0, 7:] == 0).all()
    batch["decoder_attention_mask"] = of_decoder
    decoder = model.decoder.block[0].layer
    for part in (decoder[0].SelfAttention, decoder[1].EncDecAttention, decoder[2].DenseReluDense.wo):
        assert mask_for(model, part, batch) is of_decoder
    assert mask_for(model, model.encoder.block[1].layer[0].SelfAttention, batch) is batch["attention_mask"]


def test_zeros_of_the_decoder_are_counted_for_all_of_its_queries():
    model, batch = t5(), encoder_and_decoder_batch()
    other = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    tables = [measure("calibrate", model, [given], _grid(0.5, None), final_output, probes=1) for given in (batch, other)]
    first = [name for name, _ in tables[0].layers].index("decoder.block.0.layer.0.SelfAttention")  # sees no encoder
    rows = slice(4 * first, 4 * first + 4)
    assert torch.equal(tables[0].zeros[rows], tables[1].zeros[rows])
    assert not torch.equal(tables[0].zeros, tables[1].zeros)


def test_refitting_a_decoder_reads_all_of_its_tokens():
    model, data = t5(), [encoder_and_decoder_batch(1) for _ in range(8)]
    teacher, name = copy.deepcopy(model), "decoder.block.0.layer.2.DenseReluDense.wo"
    replace(model, calibrate(model, data[:2], alpha=0.3))
    inputs, outputs = [], []
    layer = model.get_submodule(name)
    hooks = [
        layer.register_forward_hook(lambda _, x, __: inputs.append(x[0])),
        teacher.get_submodule(name).register_forward_hook(lambda _, __, y: outputs.append(y)),
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch), teacher(**batch)
    for hook in hooks:
        hook.remove()
    x, y = (torch.cat(kept).flatten(0, 1).double() for kept in (inputs, outputs))
    refit(model, teacher, data, [name], ridge=1e-9)
    torch.testing.assert_close(layer.weight.double().mT, torch.linalg.lstsq(x, y).solution, rtol=1e-3, atol=1e-4)


def test_a_layer_that_runs_several_times_is_one_layer():
    """As ALBERT's one layer: its name came once for each run, with the heads of the last; and refit failed."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "embedding_size": 16, "initializer_range": 0.3}
    model, data = AlbertModel(AlbertConfig(**sizes, classifier_dropout_prob=0.0)).eval(), batches(6)
    teacher = copy.deepcopy(model)
    table = measure("calibrate", model, data[:1], _grid(0.5, None), final_output, probes=1)
    ((_, heads),) = table.layers
    assert len(table.zeros) == heads == 4
    replace(model, calibrate(model, data[:3], zeros=0.4))
    assert 0.3 < zeros_of(model, data) < 0.55
    before = error(model, teacher, data)
    refit(model, teacher, data, ["encoder.albert_layer_groups.0.albert_layers.0.ffn_output"], ridge=0.001)
    assert error(model, teacher, data) < 0.9 * before


def test_the_movement_of_a_layer_that_runs_several_times_is_that_of_the_sum_of_its_runs():
    """Runs add up before the square: here each doubles the other, and the output moves four times as much, not twice."""
    query, key, value, output = torch.randn(4, 2, 4, 5, 3).unbind()
    run = Call(nn.Module(), query, key, value, None, False, 0.6, output), torch.randn(7, 2, 4, 5, 3)
    once, twice = (_of_layer([run] * n, [(0.5, 0.7)], None) for n in (1, 2))
    torch.testing.assert_close(twice[0], 4 * once[0])
    assert torch.equal(twice[1], 2 * once[1])
    assert torch.equal(twice[2], 2 * once[2])


def test_calibrating_leaves_the_modes_and_implementations_of_all_parts():
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    text = {**SIZES, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    model.train()
    model.vision_model.eval()
    model.text_model.embeddings.eval()
    modes = [module.training for module in model.modules()]
    batch = {"input_ids": torch.randint(3, 50, (2, 6)), "pixel_values": torch.randn(2, 3, 8, 8)}
    heads = calibrate(model, [batch], alpha=0.5, output=lambda out, _: out.logits_per_image)
    assert len(heads) == 4
    assert [module.training for module in model.modules()] == modes
    assert model.text_model.config._attn_implementation == "sdpa"
    assert model.vision_model.config._attn_implementation == "eager"


def test_annealing_starts_near_softmax_and_ends_at_the_heads():
    model, data = bert(), batches(10)
    teacher = copy.deepcopy(model)
    heads = calibrate(model, data[:3], zeros=0.5)
    replace(model, heads)
    alphas = []
    attention = model.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda *_: alphas.append(attention.diffmax_heads.alpha.clone()))
    distil(model, teacher, data, steps=10, anneal=0.5)
    first, last = alphas[0], torch.tensor(heads["encoder.layer.0.attention.self"]["alpha"])
    torch.testing.assert_close(1 - first, 0.2 * (1 - last))
    torch.testing.assert_close(alphas[4], last)
    torch.testing.assert_close(attention.diffmax_heads.alpha, last)


def test_saved_and_loaded_it_is_the_same_model(tmp_path):
    """It ran with softmax, in silence, unless `replace` was called."""
    data = batches(7)
    model = adapt(bert(BertForMaskedLM), data, zeros=0.4, steps=2, calibration=2, refitting=3, linears=["bert." + LINEARS[0]])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["diffmax"] == model.config.diffmax
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**data[0]).logits, model(**data[0]).logits)
        without_head, report = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
        assert not report["missing_keys"]
        assert torch.equal(without_head.eval()(**data[0]).last_hidden_state, model.bert(**data[0]).last_hidden_state)
        loaded.save_pretrained(tmp_path / "again")
        again = replace(AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval())  # changes nothing
        assert torch.equal(again(**data[0]).logits, model(**data[0]).logits)
        softmax = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert softmax.config._attn_implementation == "eager"
        assert not torch.equal(softmax(**data[0]).logits, model(**data[0]).logits)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="needs a transformers that reads attn_implementation from a configuration: pip install 'transformers>=5.23'",
)
def test_an_adapted_model_does_not_run_softmax_where_diffmax_is_not_imported(tmp_path):
    replace(llama(), of_llama()).save_pretrained(tmp_path)
    done = fresh.python(f"import transformers; transformers.AutoModel.from_pretrained({str(tmp_path)!r})", check=False)
    assert 'attn_implementation="diffmax-adapted"` is not supported' in done.stderr


def test_a_model_whose_heads_were_given_up_is_a_softmax_model(tmp_path):
    """It was saved with an attention that it no longer had, and could not be used."""
    model, ids = replace(llama(), of_llama()), torch.tensor([[3, 4, 5]])
    model.config.diffmax = None
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    assert "adapted" not in (tmp_path / "config.json").read_text()
    assert torch.equal(AutoModel.from_pretrained(tmp_path, attn_implementation="eager")(ids)[0], llama_with("eager")(ids)[0])


def llama_with(implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    return model


def test_a_share_of_the_heads_is_saved(tmp_path):
    model, ids = replace(llama(), of_llama(0.5, 0.6), share=0.5), torch.tensor([[3, 4, 5]])
    assert model.config.diffmax["layers.0.self_attn"]["alpha"] == [0.75] * 4
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model(ids)[0])


def test_an_adapted_part_of_another_model_loads_as_it_was(tmp_path):
    encoder = replace(bert(), {f"encoder.layer.{i}.attention.self": {"alpha": [0.5] * 4, "scale": [1.0] * 4} for i in range(2)})
    decoder = transformers.BertLMHeadModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert loaded.encoder.config._attn_implementation == "diffmax-adapted"
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded.encoder(ids)[0], model.encoder(ids)[0])


def test_another_attention_that_is_asked_for_by_parts_is_kept(tmp_path):
    sizes = {**SIZES, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={**sizes, "eos_token_id": 2}, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=16
    )
    of_layer = {"alpha": [0.5] * 4, "scale": [1.0] * 4}
    with pytest.warns(UserWarning, match="heads name no layer of vision_config, which keeps its attention"):
        model = replace(CLIPModel(config), {f"text_model.encoder.layers.{i}.self_attn": of_layer for i in range(2)}).eval()
    kept = model.config.vision_config._attn_implementation
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert [written[part].get("attn_implementation") for part in ("text_config", "vision_config")] == ["diffmax-adapted", None]
    given = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    wanted = model(**given).logits_per_image
    for kind in (AutoModel, CLIPModel):
        for asked, vision in (
            (None, kept),
            ({"vision_config": "eager"}, "eager"),
            ({"text_config": "diffmax-adapted", "vision_config": "eager"}, "eager"),
        ):
            loaded = kind.from_pretrained(tmp_path, attn_implementation=asked).eval()
            assert loaded.config.text_config._attn_implementation == "diffmax-adapted"
            assert loaded.config.vision_config._attn_implementation == vision
            torch.testing.assert_close(loaded(**given).logits_per_image, wanted)
        loaded.set_attn_implementation({"text_config": "eager"})
        with pytest.warns(UserWarning, match="this CLIPModel runs eager where its configuration has heads"):
            loaded.save_pretrained(tmp_path / "again")
        loaded.config.diffmax = None
        loaded.save_pretrained(tmp_path / "given up")
        assert kind.from_pretrained(tmp_path / "given up").config.text_config._attn_implementation != "diffmax-adapted"
        top = kind.from_pretrained(tmp_path, attn_implementation={"": "eager"}).eval()
        torch.testing.assert_close(top(**given).logits_per_image, wanted)
        softmax = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
        torch.testing.assert_close(loaded(**given).logits_per_image, softmax(**given).logits_per_image)
        loaded = kind.from_pretrained(tmp_path)
        made = kind.from_config(loaded.config) if kind is AutoModel else kind(transformers.AutoConfig.from_pretrained(tmp_path))
        with pytest.raises(ValueError, match="this CLIPAttention has no heads yet"):
            made(**given)
        loaded = kind.from_pretrained(tmp_path, attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
        assert [loaded.config.text_config._attn_implementation, loaded.config.vision_config._attn_implementation] == [
            "eager",
            "sdpa",
        ]


def test_a_configuration_whose_diffmax_is_another_s_is_left_alone(tmp_path):
    model = llama()
    model.config.diffmax = {"temperature": 3}
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation != "diffmax-adapted"
    register("diffmax-another", 0.6)
    (batch,) = batches(1)
    model.set_attn_implementation("diffmax-another")
    model(**batch)
    model.set_attn_implementation("eager")
    assert calibrate(model, [batch], alpha=0.5).keys() == of_llama().keys()
    with pytest.raises(ValueError, match="not adapted before, got none"):
        replace(model)
    with pytest.raises(ValueError, match=r"must be free, got \{'temperature': 3\}"):
        replace(model, of_llama())
    assert model.config.diffmax == {"temperature": 3}


def test_heads_of_which_one_is_spoilt_are_refused_not_forgotten():
    model = replace(llama(), of_llama())
    del model.config.diffmax["layers.0.self_attn"]["scale"]
    (batch,) = batches(1)
    register("diffmax-another", 0.6)
    model.set_attn_implementation("diffmax-another")
    with pytest.raises(ValueError, match="has an alpha and a scale per head"):
        model(**batch)
    with pytest.raises(ValueError, match=r"heads of layers\.0\.self_attn must be a dictionary of alpha and scale"):
        replace(model)


def test_a_model_with_fewer_layers_than_heads_says_how_to_load_it(tmp_path):
    replace(llama(), of_llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'must have one layer layers.1.self_attn(.|\n)*pass attn_implementation="eager"'):
        AutoModel.from_pretrained(tmp_path, num_hidden_layers=1)


def test_a_model_of_an_adapted_configuration_says_that_its_heads_are_missing(tmp_path):
    replace(llama(), of_llama()).save_pretrained(tmp_path)
    model = LlamaModel(transformers.AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"this LlamaAttention of layer [01] has no heads yet\ncall .*replace\(model\)"):
        model(torch.tensor([[3, 4, 5]]))
    assert replace(model)(torch.tensor([[3, 4, 5]]))[0].isfinite().all()
    again = LlamaModel(LlamaConfig.from_dict(model.config.to_dict()))
    with pytest.raises(ValueError, match=r"this LlamaAttention of layer [01] has no heads yet"):
        again(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ValueError, match=r"another model has this configuration: give the new one copy\.deepcopy"):
        LlamaModel._from_config(model.config, attn_implementation="eager")
    twin = LlamaModel._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("eager", "diffmax-adapted")


def test_an_adapted_model_that_runs_softmax_warns_when_it_is_saved(tmp_path):
    replace(llama(), of_llama()).save_pretrained(tmp_path)
    model = LlamaModel.from_pretrained(tmp_path, attn_implementation="eager")
    with pytest.warns(UserWarning, match=r"this LlamaModel runs eager where .* heads.*\n.*config.diffmax to None"):
        model.save_pretrained(tmp_path / "again")
    model.config.diffmax = None
    model.save_pretrained(tmp_path / "again")
    model.set_attn_implementation("diffmax-adapted")
    with pytest.warns(UserWarning, match="heads that its configuration does not have, and will load with softmax"):
        model.save_pretrained(tmp_path / "again")
    assert LlamaModel.from_pretrained(tmp_path / "again").config._attn_implementation != "diffmax-adapted"


def test_heads_of_a_model_with_an_adapter_warn():
    model = llama()
    model.peft_config = {}
    with pytest.warns(UserWarning, match="save_pretrained does not write with an adapter"):
        replace(model, of_llama())


def test_heads_in_the_configuration_are_not_ignored_in_silence(tmp_path):
    """Saved with an alpha per head and loaded with attn_implementation="diffmax", it ran with the registered alpha."""
    data = batches(7)
    model = adapt(bert(BertForMaskedLM), data, zeros=0.4, steps=2, calibration=2, refitting=3, linears=["bert." + LINEARS[0]])
    model.save_pretrained(tmp_path)
    register()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="diffmax").eval()
    with pytest.raises(ValueError, match="the configuration of this BertSelfAttention has an alpha and a scale"):
        loaded(**data[0])
    with torch.no_grad():
        assert torch.equal(replace(loaded)(**data[0]).logits, model(**data[0]).logits)
    loaded.set_attn_implementation("diffmax")
    with pytest.raises(
        ValueError, match=r"transformers.replace\(model\), or to give them up set diffmax to None in that BertConfig"
    ):
        loaded(**data[0])
    for measure_it in (suggest_alpha, calibrate):  # they measured it with softmax, in silence
        with pytest.raises(ValueError, match=rf"^{measure_it.__name__}: .* got a BertForMaskedLM that was adapted"):
            measure_it(loaded, data[:1], zeros=0.5)
    loaded.config.diffmax = None
    suggest_alpha(loaded, data[:1], 0.5)  # runs the model under a name of its own
    loaded(**data[0])


def test_power_attention_does_not_ignore_heads_in_silence():
    sizes = {**SIZES, "num_key_value_heads": 4}
    model = LlamaModel(LlamaConfig(**sizes)).eval()
    replace(model, {f"layers.{i}.self_attn": {"alpha": [0.5] * 4, "scale": [1.0] * 4} for i in range(2)})
    register_power()
    model.set_attn_implementation("power")
    with pytest.raises(ValueError, match=r'^attn_implementation="power": the configuration of this LlamaAttention has'):
        model(torch.tensor([[1, 2, 3]]))


def test_heads_of_a_part_of_a_model_are_not_ignored_in_silence(tmp_path):
    """A composite model keeps its heads in its own configuration, and its layers look into that of their part."""
    sizes = {**SIZES, "intermediate_size": 32}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config={**sizes, "eos_token_id": 2}, vision_config=vision, projection_dim=16)
    model = CLIPModel(config).eval()
    of_layer = {"alpha": [0.5, 0.6, 0.7, 0.8], "scale": [1.0] * 4}
    heads = {f"text_model.encoder.layers.{i}.self_attn": of_layer for i in range(2)}
    with pytest.warns(UserWarning, match="heads name no layer of vision_config, which keeps its attention"):
        replace(model, heads).save_pretrained(tmp_path)
    register()
    ids, pixels = torch.tensor([[1, 5, 6, 2]]), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        wanted = model.get_text_features(input_ids=ids)
    for chosen in ("diffmax", {"text_config": "diffmax", "vision_config": "sdpa"}):
        loaded = CLIPModel.from_pretrained(tmp_path, attn_implementation=chosen).eval()
        for call in (loaded.get_text_features, lambda input_ids, m=loaded: m(input_ids=input_ids, pixel_values=pixels)):
            with pytest.raises(ValueError, match="configuration of this CLIPAttention has an alpha"):
                call(input_ids=ids)
    loaded = CLIPModel.from_pretrained(tmp_path, attn_implementation="diffmax").eval()
    with torch.no_grad():
        loaded.get_image_features(pixel_values=pixels)  # has no heads
        replace(loaded)
        loaded.set_attn_implementation({"vision_config": "diffmax"})
        found = loaded.get_text_features(input_ids=ids)
        torch.testing.assert_close(_pooled(found), _pooled(wanted))
        loaded(input_ids=ids, pixel_values=pixels)


def _pooled(features):
    return features if isinstance(features, torch.Tensor) else features.pooler_output  # transformers before 5.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alphas_stay_exact_in_half_precision_in_either_order(dtype):
    """They were rounded by .bfloat16(), where 1 - alpha can so become its double."""
    heads = {f"encoder.layer.{i}.attention.self": {"alpha": [0.997, 0.5, 0.9, 0.99], "scale": [0.3] * 4} for i in range(2)}
    models = replace(bert(), heads).to(dtype), replace(bert().to(dtype), heads)
    for model in models:
        buffers = model.encoder.layer[1].attention.self.diffmax_heads
        assert torch.equal(buffers.alpha, torch.tensor([0.997, 0.5, 0.9, 0.99]))
        assert torch.equal(buffers.scale, torch.full((4,), 0.3))
    first, second = (model(**batch).last_hidden_state for model in models for batch in [encoder_batch()])
    assert first.dtype == dtype
    assert torch.equal(first, second)


def encoder_batch():
    return {"input_ids": torch.arange(3, 15).view(2, 6)}


def test_the_heads_of_a_layer_are_on_its_device():
    """As with device_map="auto": all were on the device of the first parameter."""
    model, heads = bert(), {f"encoder.layer.{i}.attention.self": GOOD for i in range(2)}
    attention = model.encoder.layer[1].attention.self
    with FakeTensorMode():
        elsewhere = nn.ParameterList([torch.empty(2, device="cuda")])
    assert _device(elsewhere, model).type == "cuda"
    attention.to("meta")  # as accelerate leaves what it keeps elsewhere between calls
    replace(model, heads)
    assert attention.diffmax_heads.alpha.device.type == "cpu"


GOOD = {"alpha": [0.5] * 4, "scale": [1.0] * 4}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"alphas": [0.5] * 4},
            r"heads of encoder.layer.1.attention.self must be a dictionary of alpha and scale, got \['alphas'\]",
        ),
        ([0.5], "must be a dictionary of alpha and scale, got list"),
        ({**GOOD, "alpha": [0.5, 1.5, 0.5, 0.5]}, "each alpha of encoder.layer.1.attention.self must lie .* 0 and 1, got 1.5"),
        ({**GOOD, "scale": [0.5, -1.0, 0.5, 0.5]}, "each scale of .* must be positive, got -1.0"),
        ({"alpha": [0.5] * 3, "scale": [0.5] * 3}, "an alpha and a scale per head, got 3 and 3 for 4 heads"),
        ({**GOOD, "scale": [0.5] * 2}, "an alpha and a scale per head, got 4 and 2 for 4 heads"),
    ],
)
def test_wrong_heads_are_refused_before_anything_changes(bad, words):
    model = bert()
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=words):
        replace(model, {"encoder.layer.0.attention.self": GOOD, "encoder.layer.1.attention.self": bad})
    with pytest.raises(ValueError, match="must have one layer x, got 0"):
        replace(model, {"encoder.layer.0.attention.self": GOOD, "x": GOOD})
    assert not hasattr(model.config, "diffmax")
    assert model.config._attn_implementation == implementation
    assert not list(model.encoder.layer[0].attention.self.buffers())


def test_a_layer_that_does_not_say_how_many_heads_it_has():
    model = bert()
    attention = model.encoder.layer[0].attention.self
    del attention.num_attention_heads
    attention.config = None
    with pytest.raises(ValueError, match="an alpha and a scale per head, got 4 and 3"):
        replace(model, {"encoder.layer.0.attention.self": {**GOOD, "scale": [1.0] * 3}})
    replace(model, {f"encoder.layer.{i}.attention.self": GOOD for i in range(2)})


def test_what_the_replaced_model_would_refuse_is_refused_by_calibrate():
    """calibrate did not look at it, and the model that it had chosen for could not run."""
    model = bert()
    (batch,) = batches(1)
    with pytest.raises(ValueError, match=r"block_indices is not implemented, got 'x'\nload"):
        calibrate(model, [{**batch, "block_indices": "x"}], alpha=0.5)


@pytest.mark.parametrize("find", [suggest_alpha, calibrate])
def test_a_model_in_float16_gets_the_share_of_zeros_that_was_asked_for(find):
    """Small weights were 0 in float16 where they were counted, and not where the model runs."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "initializer_range": 0.5})).half().eval()
    data = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches(1, length=24)]
    heads = find(model, data, zeros=0.3)
    assert {*map(len, heads.values())} == {2}
    zeros = diffmax.inspect_attention(replace(model, heads), data[0]).zeros()
    assert abs(float(torch.stack(list(zeros.values())).mean()) - 0.3) < 0.05


def test_gradients_that_overflow_are_refused():
    model = bert()
    with pytest.raises(ValueError, match=r"movement of the output must be finite, got .*\n.* gradients of torch.float32"):
        calibrate(model, batches(1), zeros=0.1, output=lambda out, _: out.last_hidden_state * 1e30)


def test_what_a_model_gives_may_be_starts_and_ends_or_is_said():
    sizes = {**SIZES, "initializer_range": 0.5}
    asked = transformers.BertForQuestionAnswering(BertConfig(**sizes)).eval()
    for heads in (calibrate(asked, batches(1), zeros=0.1), suggest_alpha(asked, batches(2), zeros=0.1, steps=2)):
        assert len(heads) == 2
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    pair = CLIPModel(CLIPConfig(text_config={**SIZES, "eos_token_id": 2}, vision_config=vision, projection_dim=16)).eval()
    batch = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with pytest.raises(
        ValueError, match=r"logits or a last_hidden_state, got CLIPOutput with .*image_embeds.*\n.* output= .* loss="
    ):
        calibrate(pair, [batch], alpha=0.5)
    heads = calibrate(pair, [batch], alpha=0.5, output=lambda out, _: out.image_embeds)  # which read no text
    assert len(heads) == 4
    with pytest.raises(ValueError, match="output must depend on the attention, got one that no layer moves"):
        calibrate(pair, [batch], zeros=0.02, output=lambda out, _: out.image_embeds.detach() + batch_of(pair, batch))


def batch_of(model, batch):
    """Something with a gradient that reads no layer."""
    return model.logit_scale * torch.ones(len(batch["input_ids"]), 16)


def test_softmax_of_a_pooling_head_stays_with_a_warning():
    config = transformers.SiglipConfig(
        text_config={**SIZES, "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**SIZES, "image_size": 8, "patch_size": 4},
    )
    model = transformers.SiglipModel(config).eval()
    batch = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with pytest.warns(
        UserWarning, match="calibrate: SiglipModel keeps softmax in MultiheadAttention, which computes it itself"
    ):
        heads = calibrate(model, [batch], alpha=0.5, output=lambda out, _: out.logits_per_image)
    model = replace(model, heads)
    with pytest.warns(UserWarning, match="replace: SiglipModel keeps softmax in MultiheadAttention"):
        model(**batch)


def test_the_recipe_without_linears_anneals():
    model = adapt(bert(), batches(6), alpha=0.6, steps=3)
    assert {a for of_layer in model.config.diffmax.values() for a in of_layer["alpha"]} == {0.6}
    assert model.config._attn_implementation == "diffmax-adapted"


def test_the_final_output_is_zero_at_padding():
    model, (batch,) = bert(), batches(1)
    final = final_output(model(**batch), batch)
    assert (final[0, 6:] == 0).all()
    assert (final[0, :6] != 0).any()


def test_an_adapted_model_that_was_loaded_but_not_replaced_says_so():
    model, (batch,) = bert(), batches(1)
    replace(bert(), calibrate(model, [batch], alpha=0.5))  # registers the name
    model.set_attn_implementation("diffmax-adapted")
    with pytest.raises(ValueError, match=r"has no heads yet\ncall .*replace\(model\)"):
        model(**batch)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, b: calibrate(m, b), "either zeros or alpha, got zeros None and alpha None"),
        (lambda m, b: calibrate(m, b, zeros=0.5, alpha=0.5), "either zeros or alpha"),
        (lambda m, b: calibrate(m, b, zeros=1.5), "zeros must lie strictly between 0 and 1, got 1.5"),
        (lambda m, b: calibrate(m, b, alpha=1.5), "calibrate: alpha must lie strictly between 0 and 1"),
        (lambda m, _: calibrate(m, [], alpha=0.5), "a batch is needed, got none"),
        (
            lambda m, b: calibrate(m, b, zeros=0.999),
            r"no choice has a share of zeros of 0.999, the most is 0\.\d+\nask for less",
        ),
        (lambda m, _: replace(m), r"heads must be given .* got none\n.*calibrate finds them"),
        (lambda m, _: replace(m, {"x": {}}, share=0.0), "share must satisfy 0 < share <= 1, got 0"),
        (lambda m, _: replace(m, {"x": {"alpha": [0.5]}}), r"BertModel must have one layer x, got 0\nis it another model"),
        (lambda m, b: distil(m, m, b, steps=1), r"must have diffmax heads, got none\ncall replace"),
        (
            lambda m, b: (m.add_module("unused", nn.Linear(2, 2)), refit(m, m, b, ["unused"])),
            "that the models run, got 'unused'",
        ),
        (lambda m, b: refit(m, m, b, ["encoder"]), "linears must name nn.Linear layers of both models, got 'encoder'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(bert(), batches(1))


def test_too_few_batches_to_distil():
    model, data = bert(), batches(1)
    teacher = copy.deepcopy(model)
    replace(model, calibrate(model, data, alpha=0.5))
    with pytest.raises(ValueError, match=r"a batch per step is needed, got 1 for 3 steps\npass more"):
        distil(model, teacher, data, steps=3)
    with pytest.raises(ValueError, match=r"adapt: 66 batches are needed, got 1\npass more"):
        adapt(bert(), data, alpha=0.5, steps=3, linears=LINEARS)


def test_a_distillation_that_fails_leaves_the_heads_where_they_are_to_be():
    """They stayed where annealing had come to, beside a configuration that said otherwise."""
    model, data = bert(), batches(2)
    teacher = copy.deepcopy(model)
    heads = calibrate(model, data, alpha=0.5)
    replace(model, heads)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="got 2 for 10 steps"):
        distil(model, teacher, data, steps=10, anneal=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # known before the first step
    with pytest.raises(ValueError, match="got 2 for 10 steps"):
        distil(model, teacher, iter(data), steps=10, anneal=0.5)
    for name, of_layer in heads.items():
        buffers = model.get_submodule(name).diffmax_heads
        assert torch.equal(buffers.alpha, torch.tensor(of_layer["alpha"]))
        torch.testing.assert_close(buffers.scale, torch.tensor(of_layer["scale"]))


def test_a_model_without_the_interface_is_refused():
    class Other(transformers.PreTrainedModel):
        config_class = BertConfig
        _supports_attention_backend = True

        def __init__(self, config):
            super().__init__(config)
            self.layer = nn.Linear(2, 2)

        def forward(self, **_):
            return self.layer(torch.ones(1, 2))

    with pytest.raises(ValueError, match=r"calibrate: Other must ask for its attention function, got .* without a call\nit"):
        calibrate(Other(BertConfig(**SIZES)), batches(1), alpha=0.5, output=lambda out, _: out)


def of_llama(alpha=0.5, scale=1.0):
    return {f"layers.{i}.self_attn": {"alpha": [alpha] * 4, "scale": [scale] * 4} for i in range(2)}


def gemma2():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    return transformers.Gemma2Model(config).eval()


def test_what_the_configuration_keeps_is_its_own_and_can_be_saved(tmp_path):
    heads = {name: {what: torch.tensor(values) for what, values in of_layer.items()} for name, of_layer in of_llama().items()}
    model = replace(llama(), heads)
    heads["layers.0.self_attn"]["alpha"][0] = 0.1
    assert model.config.diffmax == of_llama()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(replace(LlamaModel.from_pretrained(tmp_path))(ids)[0], model(ids)[0])


def test_heads_may_be_given_layer_by_layer(tmp_path):
    model, heads, ids = llama(), of_llama(0.9), torch.tensor([[3, 4, 5, 6]])
    heads["layers.1.self_attn"]["alpha"] = [0.5] * 4
    replace(model, {"layers.0.self_attn": heads["layers.0.self_attn"]})
    with pytest.raises(ValueError, match=r"this LlamaAttention of layer 1 has no heads yet\n.*must name every layer that runs"):
        model(ids)
    replace(model, {"layers.1.self_attn": heads["layers.1.self_attn"]})
    assert model.config.diffmax == heads
    torch.testing.assert_close(replace(llama(), heads)(ids)[0], model(ids)[0])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(replace(LlamaModel.from_pretrained(tmp_path))(ids)[0], model(ids)[0])


@pytest.mark.parametrize(
    "kind",
    [np.array, torch.tensor, tuple, lambda values: [torch.tensor(v) for v in values]],
    ids=("numpy", "torch", "tuple", "0-d"),
)
def test_heads_of_every_kind_of_list(kind):
    given = {name: {what: kind(values) for what, values in of_layer.items()} for name, of_layer in of_llama().items()}
    assert replace(llama(), given).config.diffmax == of_llama()


@pytest.mark.parametrize(
    ("model", "heads", "kind", "says"),
    [
        (
            llama,
            0.85,
            TypeError,
            r"heads must be a dictionary .* got 0.85\nfor one alpha in the whole model, or a tensor with one per head",
        ),
        (
            llama,
            {"layers.0.self_attn": {"alpha": 0.5, "scale": [1.0] * 4}},
            TypeError,
            "alpha of layers.0.self_attn must be a list",
        ),
        (
            llama,
            {"layers.0.self_attn": {"alpha": ["a"] * 4, "scale": [1.0] * 4}},
            TypeError,
            "must be a list with a number per head",
        ),
        (lambda: nn.Linear(2, 2), of_llama(), TypeError, "the model must be one of transformers, got Linear"),
        (gemma2, of_llama(), ValueError, "Gemma2Attention caps its scores, which takes one scale for all heads"),
    ],
    ids=("a number", "no list", "no numbers", "no model", "capped scores"),
)
def test_replace_says_what_is_wrong_and_changes_nothing(model, heads, kind, says):
    given = model()
    with pytest.raises(kind, match=says):
        replace(given, heads)
    assert not any(hasattr(module, "diffmax_heads") for module in given.modules())


def test_capped_scores_take_one_scale_that_moves():
    model, ids = gemma2(), torch.tensor([[3, 4, 5, 6]])
    schedule = AlphaSchedule(0.6, steps=2)
    register("diffmax-capped", alpha=schedule, scale="match")
    model.set_attn_implementation("diffmax-capped")
    with torch.no_grad():
        for alpha in (1.0, 0.8, 0.6):
            register(
                "diffmax-capped-fixed", alpha=torch.tensor(alpha), scale=diffmax.matched_scale(alpha) if alpha < 1 else 1.0
            )
            moved = model(ids)[0]
            model.set_attn_implementation("diffmax-capped-fixed")
            torch.testing.assert_close(moved, model(ids)[0], rtol=1e-4, atol=1e-5)
            model.set_attn_implementation("diffmax-capped")
            schedule.step()
    learned = torch.tensor(0.6, requires_grad=True)
    register("diffmax-capped", alpha=learned, scale="match")
    with pytest.raises(
        ValueError, match=r"caps its scores \(softcap\), so the scale must be one number, got one that is learned"
    ):
        model(ids)


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_scale_is_positive_wherever_it_comes_from(scale):
    model = llama()
    with pytest.raises(ValueError, match="register: scale must be positive and finite, got"):
        register("diffmax-wrong", alpha=0.7, scale=torch.tensor([1.0, scale]))
    for given in (scale, torch.tensor(scale), torch.tensor([scale] * 4)):
        register("diffmax-wrong", alpha=0.7, scale=lambda _, given=given: given)
        model.set_attn_implementation("diffmax-wrong")
        with pytest.raises(ValueError, match="diffmax attention: scale must be positive and finite, got"):
            model(torch.tensor([[3, 4]]))
    register("diffmax-wrong", alpha=0.7, scale=lambda _: None)
    with pytest.raises(TypeError, match='diffmax attention: scale must be "match" or a positive number, or a tensor, got None'):
        model(torch.tensor([[3, 4]]))


def test_a_function_may_match_the_scale():
    model, ids = llama(), torch.tensor([[3, 4, 5, 6]])
    register("diffmax-matched", alpha=0.7, scale="match")
    register("diffmax-matched-too", alpha=0.7, scale=lambda module: "match")
    model.set_attn_implementation("diffmax-matched")
    wanted = model(ids)[0]
    model.set_attn_implementation("diffmax-matched-too")
    torch.testing.assert_close(model(ids)[0], wanted)


def test_calibration_says_that_it_needs_gradients_and_projections():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="calibrate: gradients are needed"):
        calibrate(llama(), batches(1), alpha=0.5)
    for probes in (0, 1.5, True):
        with pytest.raises(ValueError, match="calibrate: probes must be a positive int, got"):
            calibrate(llama(), batches(1), alpha=0.5, probes=probes)


def test_distil_wants_another_model_as_teacher_and_something_to_train():
    model = replace(llama(), of_llama())
    with pytest.raises(ValueError, match=r"the teacher must be another model than the student, got the same\nreplace changes"):
        distil(model, model, batches(1), steps=1)
    with pytest.raises(ValueError, match=r"must have a parameter to train, got none\ncall requires_grad_"):
        distil(model.requires_grad_(False), llama(), batches(1), steps=1)


def test_a_layer_that_holds_the_attention_is_not_taken_for_it():
    heads = {"layers.0": of_llama()["layers.0.self_attn"]}
    with pytest.raises(ValueError, match=r"layers.0 is no attention layer, but holds one\nis layers.0.self_attn meant\?"):
        replace(llama(), heads)


def test_recording_keeps_no_scores():
    """Of one layer at a time, not of all: those would take most of the memory of a calibration."""
    model = BertModel(BertConfig(**SIZES)).eval()
    batch = {"input_ids": torch.randint(30, (2, 128))}
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.shape[-1] * t.shape[-2]) or t if t.ndim == 4 else t, lambda t: t
    ):
        calls, final = record("calibrate", model, batch, final_output)
    assert max(held, default=0) < 128 * 128
    assert calls[0].scored().scores.shape == (2, 4, 128, 128)
    torch.testing.assert_close(final, model(**batch).last_hidden_state, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(final, [calls[0].output], torch.ones_like(final), retain_graph=True)
    (again,) = torch.autograd.grad(final, [calls[0].output], torch.ones_like(final))
    assert torch.equal(gradient, again)
