"""A small random model of each type that transformers knows, and what becomes of its attention under diffmax.

`python tests/model_types.py` writes docs/models.md, in some three minutes.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from diffmax.integrations.transformers import register

TASKS = {
    "causal": (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": (transformers.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked": (transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "base": (transformers.AutoModel, modeling_auto.MODEL_MAPPING_NAMES),
}
BATCH, LENGTH, TARGETS, WORDS, HEAD_DIM = 2, 12, 7, 99, 8

# A size per setting, by its name. What is smaller already stays.
_SIZES = {
    r"(.*_)?vocab_size(_.*)?": WORDS,
    r"(.*_)?num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks?|n_blocks": 2,
    r"(.*_)?(num_attention_heads|num_heads|attention_heads|n_heads?)": 4,
    r"num_key_value_heads|n_head_kv|num_kv_heads": 2,
    r"(.*_)?(hidden_size|embed_dim|projection_(dim|size)|dim_model)|d_model|n_embd|embedding_size": 32,
    r"(hidden_|emb_|model_)?dim": 32,
    r"(.*_)?(intermediate_size|ffn_dim)|d_ff|n_inner|dim_feedforward|ffn_hidden_size|d_inner": 48,
    r"(.*_)?head_dim|kv_channels|d_kv|d_head": HEAD_DIM,
    r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|seq_length|max_seq_len": 64,
    r"(.*_)?num_experts|n_routed_experts|num_local_experts": 4,
    r"(.*_)?experts_per_tok(en)?|moe_topk|top_k_experts|moe_k": 2,
    r"(q|kv)_lora_rank": 16,
    r"image_size|img_size|crop_size": 32,
    r"patch_size": 8,
    r"rotary_dim": 4,
    r"num_mel_bins|n_mels": 16,
}
_SIZES = {re.compile(pattern): size for pattern, size in _SIZES.items()}
_LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|depth|n_blocks|num_blocks")
_WHOLE = {"rope_parameters", "backbone_kwargs"}
_LEFT_OUT = {
    *("architectures", "id2label", "label2id", "model_type", "out_features", "out_indices", "per_layer_config"),
    *("rope_scaling", "stage_names", "transformers_version"),
}
# Rotary tables of time, height and width, whose default is written in the code of the model
_SECTIONS = re.compile(r"(glm4v|glm46v|glmga|glm_ocr|glm_image|qwen2_vl|qwen2_5_vl|paddleocr_vl)(_moe)?(_text)?")
# What the sizes above do not agree on, or what is missing by default
_OTHERWISE = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "mobilebert": {"embedding_size": 32, "hidden_size": 32, "intra_bottleneck_size": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
}
LARGEST = 8_000_000  # parameters


class UnbuiltError(Exception):
    """No small model of this type, or no inputs for it, are known here."""


def _size(name, value):
    if name == "image_size" and isinstance(value, (list, tuple)):
        return [32] * len(value)
    if value is None:
        return {"head_dim": HEAD_DIM, "num_key_value_heads": 4, "vocab_size": WORDS}.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        for pattern, size in _SIZES.items():
            if pattern.fullmatch(name):
                return min(value, size)
        return 3 if name.endswith("token_id") and value >= WORDS else value
    return value


def _shrink(settings):
    depths = {value for name, value in settings.items() if _LAYERS.fullmatch(name) and isinstance(value, int)}
    small = {}
    for name, value in settings.items():
        if name in _LEFT_OUT or name.startswith("_"):
            continue
        if isinstance(value, dict) and name not in _WHOLE:
            small[name] = _shrink(value) | {key: value[key] for key in ("model_type",) if key in value}
        elif isinstance(value, (list, tuple)) and len(value) in depths and len(value) > 2:
            kinds = list(dict.fromkeys(value)) if all(isinstance(v, (str, int)) for v in value) else list(value)
            small[name] = [_size(name, v) for v in (kinds + kinds[:1])[:2]]
        else:
            small[name] = _size(name, value)
    if "qk_rope_head_dim" in small:  # latent attention: the others follow from it, and a key head per query head
        small.pop("head_dim", None), small.pop("qk_head_dim", None)
        small["num_key_value_heads"] = 4
    return small


def config_of(model_type):
    """A small configuration, or an error of transformers'."""
    kind = CONFIG_MAPPING[model_type]
    small = _shrink(kind().to_dict())
    rope = [
        part for part in (small, *small.values()) if isinstance(part, dict) and isinstance(part.get("rope_parameters"), dict)
    ]
    for part in rope if _SECTIONS.fullmatch(model_type) else ():
        half = int(HEAD_DIM * part["rope_parameters"].get("partial_rotary_factor", 1.0)) // 2
        part["rope_parameters"]["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4] if half > 2 else [1, 1, 0]
    config = kind(**{**small, **_OTHERWISE.get(model_type, {})})
    for part in _parts(config):
        part._experts_implementation_internal = "eager"  # the others lack float64
    return config


def _parts(config):
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "sub_configs"):
            yield from _parts(part)


def tasks_of(model_type):
    """The heads that are tried; the bare model only where it has none of them."""
    return [task for task, (_, names) in TASKS.items() if model_type in names and task != "base"] or ["base"]


def build(model_type, task, implementation):
    """The same weights at each call: wide enough for zeros at alpha = 0.5."""
    make = TASKS[task][0].from_config
    with torch.device("meta"):
        model = make(config_of(model_type))
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise UnbuiltError("large even so")
    torch.manual_seed(0)
    model = make(config_of(model_type), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
                parameter.normal_(0, 1.5 / max(1, fan_in) ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def inputs_of(model, padded):
    """What the model's forward pass may take, the likeliest first."""
    names = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1:, LENGTH - 4 if padded else LENGTH :] = 0

    def words(length):
        return torch.randint(5, WORDS - 9, (BATCH, length), generator=generator)

    def floats(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def known(**inputs):
        return {name: value for name, value in inputs.items() if name in names}

    def setting(part, *keys, default):
        return next((value for key in keys if (value := getattr(part, key, None)) is not None), default)

    text = known(input_ids=words(LENGTH), attention_mask=mask)
    targets = known(decoder_input_ids=words(TARGETS))
    vision = setting(config, "vision_config", default=config)
    channels = setting(vision, "num_channels", "in_channels", default=3)
    size = setting(vision, "image_size", default=32)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    images = [floats(BATCH, channels, *s) for s in (size, (64, 64), (224, 224))]

    for name in ("input_values", "input_features"):
        mels = setting(config, "num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", default=16)
        for shape in ((4000,), (mels, 128), (128, mels), (160, 2 * mels), (1, 4000), (1, 1024, 64)) if name in names else ():
            frames = torch.ones(BATCH, shape[0], dtype=torch.long)
            frames[1:, shape[0] - shape[0] // 3 if padded else shape[0] :] = 0
            yield {name: floats(BATCH, *shape), **known(attention_mask=frames, input_features_mask=frames.bool()), **targets}
            yield {name: floats(BATCH, *shape), **targets}
    if "bbox" in names:
        yield text | {"bbox": torch.randint(0, 30, (BATCH, LENGTH, 1), generator=generator).repeat(1, 1, 4)}
    if "input_ids" in names:
        yield text | targets
        yield text
    for image in images if "pixel_values" in names else ():
        yield {"pixel_values": image, **text, **targets}
        yield {"pixel_values": image, **targets}
        yield {"pixel_values": image, **text, **known(qformer_input_ids=words(LENGTH))}
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names and "input_ids" not in names), None)
    patch, steps = setting(vision, "patch_size", default=8), setting(vision, "temporal_patch_size", default=1)
    for name in ("hidden_states", "pixel_values") if grid else ():
        where = {grid: torch.tensor([[1, 4, 4]] * BATCH)}
        for shape in ((channels * steps * patch * patch,), (channels, patch, patch)) if name in names else ():
            yield {name: floats(16 * BATCH, *shape), **where}
            yield {name: floats(16 * BATCH, *shape), **where, "merge_sizes": torch.tensor([2, 2])}
    count = setting(config, "num_frames", "frames_per_clip", default=2)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in names:
            yield {name: floats(BATCH, count, channels, *size)}
            yield {name: floats(BATCH, count, channels, *size), **text}
    if "past_values" in names:
        yield {"past_values": floats(BATCH, setting(config, "context_length", default=32), 1)}


def inputs_that_run(model, padded):
    """The first inputs that the model takes."""
    for inputs in inputs_of(model, padded):
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:  # noqa: BLE001  # any: the inputs are guesses
            continue
        return inputs
    raise UnbuiltError("no inputs known")


class ExactSoftmax(TorchFunctionMode):
    """Softmax in the dtype of its scores, and zeros for a row that sees nothing, as torch's attention has them."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") != "softmax":
            return function(*args, **(kwargs or {}))
        return self._softmax(*args, **(kwargs or {}))

    def _softmax(self, input, dim=-1, _stacklevel=3, dtype=None):  # noqa: A002
        self.longest = max(self.longest, input.shape[dim] if input.dim() > 2 else 0)
        empty = (input <= torch.finfo(torch.float32).min).all(dim, keepdim=True)  # hidden, as transformers writes it
        return torch.softmax(input.masked_fill(empty, 0.0), dim) * ~empty


def _tensors(output, name=""):
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, (Mapping, list, tuple)):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            if key != "past_key_values":
                yield from _tensors(value, f"{name}.{key}")


def run(model, inputs):
    """Outputs where the input is no padding, the gradients of a random projection of them, and the longest row of softmax."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    mask = inputs.get("attention_mask")
    with ExactSoftmax() as softmax:
        outputs = dict(_tensors(model(**{name: value.clone() for name, value in inputs.items()})))
    for name, value in outputs.items():
        if mask is not None and value.shape[:2] == mask.shape:
            outputs[name] = value * mask.to(value.dtype).view(*mask.shape, *[1] * (value.dim() - 2))
    generator = torch.Generator().manual_seed(1)
    projected = [
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum()
        for value in outputs.values()
        if value.requires_grad
    ]
    if projected:
        sum(projected).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, gradients, softmax.longest


def distance(expected, got):
    """The largest difference of two dictionaries of tensors, relative to the largest entry of each, or a thousandth of all."""
    if expected.keys() != got.keys() or any(expected[name].shape != got[name].shape for name in expected):
        return float("inf")
    if not expected:
        return 0.0
    top = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    floor = max(1e-6, 1e-3 * max(top.values()))
    return max(
        float((value - got[name]).abs().max()) / max(top[name], floor) if value.numel() else 0.0
        for name, value in expected.items()
    )


TOLERANCE = 1e-5  # in float64, but for rotary tables and norms that some models insist on in float32


def answer(model_type, task):
    """What diffmax does with the model: "served", "refused: ...", "no attention: ..."; or AssertionError, or UnbuiltError."""
    try:
        return _answer_of_a_small_one(model_type, task)
    except UnbuiltError:
        # of any size it may be refused when it is loaded
        try:
            with torch.device("meta"):
                TASKS[task][0].from_config(CONFIG_MAPPING[model_type](), attn_implementation="diffmax-one")
        except Exception as error:  # noqa: BLE001  # transformers' own need not be ours
            if str(error).startswith("attn_implementation="):
                return _refusal(str(error))
        raise


def _answer_of_a_small_one(model_type, task):
    register("diffmax-one", alpha=torch.ones((), dtype=torch.float64))
    register("diffmax-half", alpha=0.5)
    try:
        eager = build(model_type, task, "eager")
    except UnbuiltError:
        raise
    except Exception as error:
        raise UnbuiltError(f"transformers builds none so small: {type(error).__name__}") from error
    moved, rows, as_sdpa = 0.0, 0, False
    for padded in (False, True):
        inputs = inputs_that_run(eager, padded)
        try:
            outputs, gradients, longest = run(eager, inputs)
        except RuntimeError as error:
            raise UnbuiltError("its gradient fails with eager attention too") from error
        rows = max(rows, longest)
        try:
            model = build(model_type, task, "diffmax-one")
            ours, our_gradients, _ = run(model, inputs)
        except ValueError as error:
            return _refusal(str(error))
        apart = distance(outputs, ours), distance(gradients, our_gradients)
        if not max(apart) < TOLERANCE:
            assert _is_that_of_sdpa(model_type, task, inputs, ours, our_gradients), (
                f"outputs and gradients differ by {apart}, padded: {padded}"
            )
            as_sdpa = True
        model.set_attn_implementation("diffmax-half")
        moved = max(moved, distance(outputs, run(model, inputs)[0]))
    assert moved > 1e-6 or rows == 1, "alpha = 0.5 must change the output"
    return "served, as with SDPA, from which eager attention differs here" if as_sdpa else "served"


def _is_that_of_sdpa(model_type, task, inputs, ours, our_gradients):
    """Whether it is eager attention that reads the model's mask otherwise than transformers' other functions do."""
    try:
        outputs, gradients, _ = run(build(model_type, task, "sdpa"), inputs)
    except ValueError:  # the model does not allow it
        return False
    return max(distance(outputs, ours), distance(gradients, our_gradients)) < TOLERANCE


def _refusal(message):
    first, _, second = message.partition("\n")
    if "computed no attention" in second:
        return "no attention: refused at the first forward pass"
    kept = re.search(r"also computes softmax itself, in ([\w, ]+)", message)
    if kept:
        return f"refused at the first forward pass: softmax stays in {kept[1]} (`partial=True` allows it)"
    alone = re.search(r"it computed softmax in ([\w, ]+):", second)
    if alone:
        return f"refused at the first forward pass: it computes softmax alone, in {alone[1]}"
    argument = re.match(r"diffmax attention: (\w+) is not implemented", first)
    if argument:
        return f"refused: its layers hand over `{argument[1]}`, which changes the weights"
    which = re.search(r": (\w+) (computes its attention itself|takes its attention from a table of classes)", first)
    assert which, message
    return f"refused when loaded: {which[1]} {which[2]}"


PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Models of transformers

What `attn_implementation="diffmax"` does with each type of model in transformers {version}, after `register()`. The table is
made by `python tests/model_types.py` and held by `tests/test_model_types.py`: of each type a small random model is built,
once with eager attention and once with diffmax. **Served** means that at alpha = 1 outputs and gradients equal those of
eager attention, without padding and with it, and that alpha = 0.5 changes them. All others are refused with the reason, and
none is changed in silence. A refused part of a larger model can be left as it is, by a dictionary:
`attn_implementation={{"text_config": "diffmax", "vision_config": "eager"}}`. With another version of transformers, from 5.0
on, a type may be served or refused that is not here; none is changed in silence there either.

`save_pretrained` does not write which attention a model had, so `from_pretrained` without `attn_implementation="diffmax"`
gives the model with softmax, and nothing warns of it. Pass it, and call `register` with the same alpha, wherever the model
is loaded. A model whose heads were set by `replace` keeps them in its configuration, and loads as it was where
`diffmax.integrations.transformers` is imported; it refuses another alpha.

Types that take images or sound beside text are tried with what they take at the least, often text alone; their towers have
rows of their own, and a tower that is refused is refused in the larger model too, when it first runs.

Some of transformers' own code gives a loaded model another attention. That is refused too:
`generate(return_token_timestamps=True)` of Whisper, with the pipeline's `return_timestamps="word"`, and continuous batching
where FlashAttention is installed. Your own `model.config._attn_implementation = "sdpa"` warns;
`model.set_attn_implementation("sdpa")` is the way to ask for it.

Models that are served also generate the same words and train to the same losses as with eager attention: static, sliding and
chunked caches, left padding, packed rows, speculative decoding, `torch.compile`, the `Trainer` with gradient checkpointing,
PEFT and pipelines are in `tests/test_transformers_world.py`. On the CPU, words that follow
thousands of others come faster with `past_key_values=RoundedModelCache(model.config)`:
[Decoding](decoding.md#in-transformers-generate).

A model that was trained with softmax wants the matched scale: `register(alpha=0.85, scale="match")`. On a language model it
costs a fifth of what the same alpha costs at the model's own scale ([Choosing alpha](choosing.md)).

{served} types are served, {refused} refused, {none} have no attention; {untried} were not tried.

| type | tried as | answer |
|---|---|---|
"""


def survey(report=print):
    """Of each type, the tasks that it was tried as and the answer; or why it was not tried."""
    tried, untried = {}, {}
    for model_type in sorted(modeling_auto.MODEL_MAPPING_NAMES):
        answers = {}
        for task in tasks_of(model_type):
            try:
                answers[task] = answer(model_type, task)
            except UnbuiltError as error:
                untried[model_type] = str(error)
            except AssertionError as error:
                answers[task] = f"WRONG: {error}"
        if answers:
            untried.pop(model_type, None)
            tried[model_type] = answers
        report(model_type, answers or untried[model_type])
    return tried, untried


def page(tried, untried):
    """docs/models.md."""
    rows = []
    for model_type, answers in tried.items():
        for text in dict.fromkeys(answers.values()):
            rows.append((model_type, ", ".join(task for task, given in answers.items() if given == text), text))
    kinds = [next(iter(answers.values())).partition(" ")[0].strip(":,") for answers in tried.values()]
    head = HEAD.format(
        version=transformers.__version__,
        served=kinds.count("served"),
        refused=kinds.count("refused"),
        none=kinds.count("no"),
        untried=len(untried),
    )
    table = "".join(f"| {model_type} | {tasks} | {text} |\n" for model_type, tasks, text in rows)
    why = {}
    for model_type, reason in untried.items():
        why.setdefault(reason, []).append(model_type)
    listed = "".join(f"- {reason}: {', '.join(types)}\n" for reason, types in sorted(why.items()))
    return f"{head}{table}\nNot tried, since no small random model of them runs here:\n\n{listed}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tried, untried = survey(lambda *line: print(*line, file=sys.stderr, flush=True))
    PAGE.write_text(page(tried, untried))
