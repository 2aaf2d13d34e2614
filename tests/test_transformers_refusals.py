"""Models that would keep softmax, or a wrong mask: user code of every shape that transformers takes without a word."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")

from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from diffmax.integrations.transformers import register  # noqa: E402
from diffmax.integrations.transformers.masks import UnbuiltMask, read  # noqa: E402

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture(autouse=True)
def _registered():
    register()
    register("diffmax-partial", partial=True)


def eager(module, query, key, value, attention_mask, scaling=8**-0.5, **_):
    scores = query @ key.mT * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class Asking(nn.Module):
    def __init__(self, config, is_causal=True):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(16, 48)
        if is_causal is not None:
            self.is_causal = is_causal

    def heads(self, x):
        return self.linear(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)

    def forward(self, x, mask=None, **kwargs):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        return attend(self, *self.heads(x), mask, **kwargs)[0].flatten(2)


class Softmax(Asking):
    """Attention by itself, written with whatever torch offers."""

    def __init__(self, config, how):
        super().__init__(config)
        self.how = how
        self.torchs = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, mask=None, **kwargs):
        q, k, v = self.heads(x)
        scores = q @ k.mT / 8**0.5
        outputs = {
            "softmax": lambda: torch.softmax(scores, -1) @ v,
            "method": lambda: scores.softmax(dim=-1).matmul(v),
            "functional": lambda: torch.matmul(
                nn.functional.dropout(nn.functional.softmax(scores, dim=-1), 0.1, self.training), v
            ),
            "module": lambda: nn.Softmax(-1)(scores) @ v,
            "einsum": lambda: torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v),
            "bmm": lambda: torch.bmm(scores.flatten(0, 1).softmax(-1), v.flatten(0, 1)).view_as(v),
            "half": lambda: scores.float().softmax(-1).to(v.dtype).transpose(-1, -2).mT @ v,
            "log": lambda: scores.log_softmax(-1).exp() @ v,
            "tensordot": lambda: torch.tensordot(scores.softmax(-1), v[0, 0], 1).expand_as(v),
            "linear": lambda: nn.functional.linear(scores.softmax(-1), v[0, 0].T).expand_as(v),
            "sdpa": lambda: nn.functional.scaled_dot_product_attention(q, k, v),
        }
        if self.how == "torch's module":
            return self.torchs(x, x, x)[0]
        return outputs[self.how]().transpose(1, 2).flatten(2)


class Model(LlamaForCausalLM):
    """A model from a user's file: its class inherits from one that asks, its layers are its own."""

    def __init__(self, config, layers):
        PreTrainedModel.__init__(self, config)
        self.embed = nn.Embedding(31, 16)
        self.layers = nn.ModuleList([make(config) for make in layers])

    def forward(self, input_ids, mask=None, fail=False, **kwargs):
        if fail:
            raise KeyError("no such input")
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x, mask, **kwargs)
        return (x,)


def model_of(*layers, name="diffmax"):
    return Model(LlamaConfig(**SIZES, attn_implementation=name), layers)


HOWS = [
    "softmax",
    "method",
    "functional",
    "module",
    "einsum",
    "bmm",
    "half",
    "log",
    "tensordot",
    "linear",
    "sdpa",
    "torch's module",
]


@pytest.mark.parametrize("how", HOWS)
def test_softmax_written_in_any_way_is_found_at_the_first_forward_pass(how):
    owner = "MultiheadAttention" if how == "torch's module" else "Softmax"
    alone = model_of(lambda config: Softmax(config, how))
    with pytest.raises(
        ValueError, match=f'"diffmax": Model must ask .* without a call\nit computed softmax in {owner}: .*eager'
    ):
        alone(IDS)
    both = model_of(Asking, lambda config: Softmax(config, how))
    with pytest.raises(
        ValueError, match=rf"also computes softmax itself, in {owner}\nto have .* register\(..., partial=True\)"
    ):
        both(IDS)
    with pytest.raises(ValueError, match="also computes softmax itself"):  # not only once
        both.eval()(IDS)
    allowed = model_of(Asking, lambda config: Softmax(config, how), name="diffmax-partial")
    assert torch.isfinite(allowed(IDS)[0]).all()
    with pytest.raises(ValueError, match="without a call"):
        model_of(lambda config: Softmax(config, how), name="diffmax-partial")(IDS)


class Routed(Asking):
    """Softmax that is no attention: a router, a gate, a loss."""

    def forward(self, x, mask=None, **kwargs):
        experts = (x @ torch.ones(16, 3)).softmax(-1)
        gate = experts.max(-1, keepdim=True).values
        return super().forward(x, mask, **kwargs) * gate + 0 * (x.flatten(0, 1).softmax(-1) @ torch.ones(16, 16)).view_as(x)


class SampledAttention(Asking):
    """Weights of softmax without a product: by entries, and row by row."""

    def forward(self, x, mask=None, **kwargs):
        if self.training:
            return (x.mean(-1, keepdim=True).softmax(1) * x).sum(1, keepdim=True).expand_as(x)
        return torch.stack([(one @ one.T).softmax(-1) @ one for one in x])


@pytest.mark.parametrize("training", [True, False])
def test_softmax_in_a_class_named_after_attention_is_found_whatever_becomes_of_it(training):
    with pytest.raises(ValueError, match="also computes softmax itself, in SampledAttention"):
        model_of(Asking, SampledAttention).train(training)(IDS)


def test_an_interrupted_first_forward_pass_does_not_hide_the_next_model():
    class Interrupted(Asking):
        def forward(self, x, mask=None, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_of(Interrupted)(IDS)
    for _ in range(2):
        with pytest.raises(ValueError, match="without a call"):
            model_of(lambda config: Softmax(config, "softmax"))(IDS)
    assert torch._C._len_torch_function_stack() == 0


def test_softmax_that_is_no_attention_is_let_be():
    model = model_of(Routed, Asking)
    assert torch.isfinite(model(IDS)[0]).all()


def test_a_model_without_attention_says_so():
    with pytest.raises(ValueError, match=r"Model must ask for its attention .*\nit computed no attention at all: load .*eager"):
        model_of()(IDS)


def test_a_failed_forward_pass_is_not_the_first():
    model = model_of(lambda config: Softmax(config, "softmax"))
    with pytest.raises(KeyError, match="no such input"):
        model(IDS, fail=True)
    with pytest.raises(ValueError, match="without a call"):
        model(IDS)
    other = model_of(Asking)
    with pytest.raises(KeyError):
        other(IDS, fail=True)
    other(IDS)
    torch.softmax(torch.ones(2, 2, 2), -1) @ torch.ones(2, 2, 2)  # nobody listens any more
    other(IDS)


def test_copies_pickles_and_threads_are_watched_too():
    model = model_of(lambda config: Softmax(config, "sdpa"))
    for twin in (copy.deepcopy(model), model):
        with pytest.raises(ValueError, match="without a call"):
            twin(IDS)
    good = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="diffmax")
    file = io.BytesIO()
    torch.save(good, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(IDS).logits, good(IDS).logits)
    errors = []

    def run():
        try:
            model_of(lambda config: Softmax(config, "einsum"))(IDS)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    good(IDS)
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert all("without a call" in error for error in errors)


def test_a_softmax_model_is_not_watched():
    register()
    model = model_of(lambda config: Softmax(config, "softmax"), name="eager")
    assert torch.isfinite(model(IDS)[0]).all()
    asked = model_of(Asking)
    asked.set_attn_implementation("eager")
    asked(IDS)


def refused(words):
    return pytest.raises(ValueError, match=words)


class Sometimes(Asking):
    """Attention, and another that only runs where the input asks for it."""

    def __init__(self, config, other):
        super().__init__(config)
        self.other = other(config)

    def forward(self, x, mask=None, image=False, **kwargs):
        x = super().forward(x, mask, **kwargs)
        return x + self.other(x, mask) if image else x


class AskingAttention(Asking):
    """In order, by a name that is looked at."""


def sometimes(other, name="diffmax"):
    return model_of(lambda config: Sometimes(config, other), name=name)


@pytest.mark.parametrize("how", ["softmax", "torch's module"])
def test_a_part_that_does_not_run_at_first_is_checked_when_it_does(how):
    model = sometimes(lambda config: Softmax(config, how))
    model(IDS)
    model(IDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), model):
        for _ in range(2):
            with pytest.raises(ValueError, match="Model asks for its attention function, and also computes softmax itself, in"):
                twin(IDS, image=True)
        twin(IDS)
    kept = sometimes(lambda config: Softmax(config, how), "diffmax-partial")
    kept(IDS)
    kept(IDS, image=True)
    model = sometimes(lambda config: Softmax(config, how))
    model(IDS)
    for name in ("diffmax-partial", "eager", "diffmax-partial"):  # what is left of an earlier name says nothing
        model.set_attn_implementation(name)
        for _ in range(2):
            model(IDS)
        model(IDS, image=True)


def test_a_part_that_does_not_run_at_first_may_be_in_order():
    model = sometimes(AskingAttention)
    model(IDS)
    other = model.layers[0].other
    assert other._forward_pre_hooks
    with torch.no_grad():
        wanted = model(IDS, image=True)[0]
    assert not other._forward_pre_hooks
    assert not other._forward_hooks
    torch.testing.assert_close(model(IDS, image=True)[0], wanted)
    compiled = torch.compile(sometimes(AskingAttention), backend="eager")
    assert torch.isfinite(compiled(IDS, image=True)[0]).all()


def from_transformers(code, **given):
    """Run code as if transformers did."""
    exec(code, {"__name__": "transformers.models.some.generation_some", **given})


def test_transformers_does_not_change_the_attention_of_a_model_unasked():
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="diffmax")
    before = model(IDS).logits
    for code in ('m.config._attn_implementation = "eager"', 'm.set_attn_implementation("eager")'):
        with pytest.raises(ValueError, match=r'LlamaFor.* must keep its attention, got "eager" from transformers\.models'):
            from_transformers(code, m=model)
        assert model.config._attn_implementation == "diffmax"
    assert torch.equal(model(IDS).logits, before)
    with pytest.warns(UserWarning, match='now computes "sdpa" instead, .*\n.* call model.set_attn_implementation') as caught:
        model.config._attn_implementation = "sdpa"
    assert caught[0].filename == __file__
    model.set_attn_implementation("diffmax")
    model.set_attn_implementation("sdpa")  # as asked
    from_transformers('m.set_attn_implementation("eager")', m=model)
    from_transformers('m.config._attn_implementation = "sdpa"', m=model)
    asked = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="diffmax")
    for twin in (copy.deepcopy(asked), asked):
        for code in ('m.config._attn_implementation = "eager"', 'm.set_attn_implementation({"": "eager"})'):
            with pytest.raises(ValueError, match="must keep its attention"):
                from_transformers(code, m=twin)
    with pytest.raises(ValueError, match=r"another model has this configuration: give the new one copy\.deepcopy"):
        AutoModelForCausalLM.from_config(asked.config, attn_implementation="sdpa")
    config = LlamaConfig(**SIZES)
    AutoModelForCausalLM.from_config(config, attn_implementation="diffmax")(IDS)
    AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")(IDS)  # the first is gone
    shared = LlamaConfig(**SIZES, attn_implementation="diffmax")
    from_transformers('c._attn_implementation = "eager"', c=shared)  # no model has it


def test_an_assignment_is_checked_as_the_method_is():
    model = model_of(lambda config: Softmax(config, "softmax"), name="eager")
    model(IDS)
    model.config._attn_implementation = "diffmax"
    with pytest.raises(ValueError, match="without a call"):
        model(IDS)
    config = transformers.BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=31)
    bloom = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with refused("BloomForCausalLM computes its attention itself|BloomModel computes its attention itself"):
        bloom.config._attn_implementation = "diffmax"
    assert bloom.config._attn_implementation == "eager"


def test_token_timestamps_do_not_bring_softmax_back():
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration._from_config(config, attn_implementation="diffmax").eval()
    model.generation_config.alignment_heads = [[0, 1]]
    model.generation_config.no_timestamps_token_id = 50
    model.generation_config.is_multilingual = False
    sound = torch.randn(1, 8, 40)
    model.generate(sound, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"WhisperFor.* must keep its attention.*\n.* without return_token_timestamps"):
        model.generate(sound, max_new_tokens=2, return_token_timestamps=True)
    assert model.config._attn_implementation == "diffmax"


def test_a_class_that_never_reads_the_interface_is_refused_when_loaded_and_when_changed():
    config = {**SIZES, "hidden_size": 16, "n_head": 2, "n_layer": 1, "seq_length": 32}
    with refused("BloomForCausalLM computes its attention itself and would keep softmax\n.*modeling_bloom, does not read"):
        AutoModelForCausalLM.from_config(transformers.BloomConfig(**config), attn_implementation="diffmax")
    model = AutoModelForCausalLM.from_config(transformers.BloomConfig(**config))
    with refused("BloomForCausalLM computes its attention itself"):
        model.set_attn_implementation("diffmax")
    assert model.config._attn_implementation == "eager"
    model(IDS)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.GPTNeoConfig(num_layers=1, attention_types=[[["global"], 1]], hidden_size=16, num_heads=2), "GPTNeo"),
        (transformers.FalconConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2), "Falcon"),
        (transformers.GPTJConfig(n_layer=1, n_embd=16, n_head=2, rotary_dim=4), "GPTJ"),
    ],
)
def test_a_class_with_a_table_of_attention_classes_is_no_bare_key_error(config, name):
    with refused(f"{name}ForCausalLM (computes its attention itself|takes its attention from a table of classes)"):
        AutoModelForCausalLM.from_config(config, attn_implementation="diffmax")


def llava(**implementation):
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=30)
    return AutoModel.from_config(config, **implementation)


def test_a_part_can_be_chosen_alone():
    model = llava(attn_implementation={"text_config": "diffmax", "vision_config": "eager"})
    assert model.config.vision_config._attn_implementation == "eager"
    images = torch.randn(1, 3, 8, 8)
    ids = torch.tensor([[30, 30, 30, 30, 3, 4]])
    mixed = model(input_ids=ids, pixel_values=images).last_hidden_state
    model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
    assert not torch.equal(mixed, model(input_ids=ids, pixel_values=images).last_hidden_state)
    model.set_attn_implementation({"text_config": "diffmax", "vision_config": "eager"})
    torch.testing.assert_close(mixed, model(input_ids=ids, pixel_values=images).last_hidden_state)


def test_a_part_that_does_not_let_itself_be_changed_is_refused():
    model = AutoModelForCausalLM.from_config(transformers.BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=31))
    with refused(r'the model must let its attention be chosen, got "diffmax" for one that keeps "eager"\n.*leave it out'):
        model.set_attn_implementation({"": "diffmax"})


# Masks


@pytest.mark.parametrize("is_causal", [None, False, True])
def test_a_decoder_whose_layers_do_not_say_that_they_are_causal_sees_no_future(is_causal):
    register("diffmax-one", alpha=torch.ones(()))

    class Decoder(Model):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            mask = create_causal_mask(self.config, x, attention_mask, None)
            return super().forward(input_ids, mask)

    torch.manual_seed(0)
    model = Decoder(LlamaConfig(**SIZES, attn_implementation="diffmax-one"), [lambda config: Asking(config, is_causal)])
    ours = model(IDS)[0]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, model(IDS)[0])


def test_without_a_mask_or_a_flag_the_call_is_refused():
    model = model_of(lambda config: Asking(config, None))
    with refused(r"Asking must be given a mask or is_causal, got neither, for 5 queries\neager .* create_causal_mask"):
        model(IDS)
    told = [model(IDS, is_causal=flag)[0] for flag in (False, True)]
    assert not torch.equal(*told)
    assert torch.isfinite(model(IDS[:, :1])[0]).all()  # one token sees all there is


CONFIG = LlamaConfig(**SIZES, attn_implementation="diffmax", sliding_window=3)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("make", [create_causal_mask, create_bidirectional_mask, create_sliding_window_causal_mask])
def test_an_unbuilt_mask_is_the_mask_in_every_operation(make, length):
    x = torch.randn(2, length, 16)
    arguments = {"past_key_values": None} if make is not create_bidirectional_mask else {}
    padded = torch.ones(2, length, dtype=torch.long)
    padded[0, 0] = 0
    eager_config = LlamaConfig(**SIZES, attn_implementation="eager", sliding_window=3)
    for attention_mask in (None, torch.ones(2, length, dtype=torch.long), padded):
        mask = make(CONFIG, inputs_embeds=x, attention_mask=attention_mask, **arguments)
        expected = make(eager_config, inputs_embeds=x, attention_mask=attention_mask, **arguments)
        expected = (
            torch.ones(2, 1, length, length, dtype=torch.bool) if expected is None else (expected == 0).expand(2, -1, -1, -1)
        )
        assert mask.shape == expected.shape
        assert mask.dtype == torch.bool
        for operation in (
            lambda m: m.clone(),
            lambda m: m[:, :, :, : m.shape[-1]],
            lambda m: m.to(torch.float64),
            lambda m: ~m,
            lambda m: m & True,
            lambda m: torch.where(m, 0.0, -torch.inf),
            lambda m: m.detach(),
            lambda m: torch.cat([m, m], 1),
            lambda m: torch.zeros(m.shape).masked_fill(m, 1.0),
            lambda m: m.expand(2, 4, -1, -1),
            lambda m: copy.deepcopy(m),
            lambda m: m.long().sum(),
            lambda m: torch.tensor(m.tolist()),
            lambda m: torch.from_numpy(m.numpy()),
            lambda m: pickle.loads(pickle.dumps(m)),
        ):
            got = operation(mask)
            assert type(got) is torch.Tensor
            assert torch.equal(got, operation(expected))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m[..., 2:, 1].fill_(False),
        lambda m: m.__setitem__((..., slice(2, None), 1), False),
        lambda m: m.logical_and_(torch.arange(5) != 1),
        lambda m: m.masked_fill_(torch.eye(5, dtype=torch.bool), False),
        lambda m: torch.logical_not(m, out=m),
        lambda m: m.copy_(torch.ones_like(m)),
        lambda m: m.share_memory_().zero_(),
    ],
)
def test_a_mask_that_is_changed_in_place_stays_changed(edit):
    def make():
        return create_causal_mask(CONFIG_LONG, inputs_embeds=torch.randn(1, 5, 16), attention_mask=None, past_key_values=None)

    mask, expected = make(), make().clone()
    edit(mask), edit(expected)
    written, is_causal = read(nn.Module(), mask, None, 5, 5)
    assert not is_causal
    assert torch.equal(written, expected)
    assert mask.data_ptr() == written.data_ptr() != 0
    register("diffmax-one", alpha=torch.ones(()))
    torch.manual_seed(0)
    model = model_of(Asking, name="diffmax-one")
    torch.testing.assert_close(model(IDS, mask)[0], model(IDS, expected)[0])


def test_layers_compiled_whole_one_by_one():
    register("diffmax-one", alpha=torch.ones(()))
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="diffmax-one").eval()
    with torch.no_grad():
        expected = model(IDS).logits
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(IDS).logits, expected)


def test_an_unbuilt_mask_holds_no_memory_and_is_read_in_a_word():
    x = torch.empty(4, 100_000, 1)
    mask = create_causal_mask(CONFIG_LONG, inputs_embeds=x, attention_mask=None, past_key_values=None)
    assert isinstance(mask, UnbuiltMask)
    assert repr(mask) == "UnbuiltMask(causal, (4, 1, 100000, 100000))"
    module = nn.Module()
    module.is_causal = False  # wrong, and not asked
    assert read(module, mask, None, 100_000, 100_000) == (None, True)


CONFIG_LONG = LlamaConfig(**SIZES, attn_implementation="diffmax")


def test_an_unbuilt_causal_mask_on_other_shapes_is_written_and_checked():
    x = torch.randn(1, 5, 16)
    mask = create_causal_mask(CONFIG, inputs_embeds=x, attention_mask=None, past_key_values=None)
    written, is_causal = read(nn.Module(), mask, None, 5, 7)
    assert not is_causal
    assert torch.equal(written, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())
    model = model_of(Asking)
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        model(IDS, create_causal_mask(CONFIG, inputs_embeds=torch.randn(1, 7, 16), attention_mask=None, past_key_values=None))


@pytest.mark.slow
def test_compiled_before_its_first_forward_pass():
    register("diffmax-one", alpha=torch.ones(()))
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="diffmax-one").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(IDS).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, model(IDS).logits)
