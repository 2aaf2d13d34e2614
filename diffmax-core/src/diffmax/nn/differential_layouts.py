"""Weights of differential attention from one published layout to another. See docs/differential.md for a table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffmax.operators.common.checks import is_whole

Layout: TypeAlias = Literal["timm", "unilm", "diffllama"]

_NAME = "convert_diff_attention"
_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_SPLIT = tuple(f"{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias"))
# What each layout's state dict may hold. The common form between two layouts is unilm's, with biases.
_ENTRIES: dict[str, tuple[str, ...]] = {
    "timm": ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "sub_norm.weight", "lambda_a", "lambda_b", *_VECTORS),
    "unilm": (*_SPLIT, "out_proj.weight", "subln.weight", *_VECTORS),
    "diffllama": (*_SPLIT, "o_proj.weight", "o_proj.bias", *_VECTORS),
}


def convert_diff_attention(
    state: Mapping[str, Tensor], source: Layout, target: Layout, *, num_heads: int, num_kv_heads: int | None = None
) -> dict[str, Tensor]:
    """The state dict of one layer of differential attention, in another layout: the same function of the tokens.

    The layouts are those of timm's `DiffAttention` (and `diffmax.nn.DiffAttention`), of unilm's `MultiheadDiffAttn`, and of
    `DiffLlamaAttention` of transformers. They order heads differently: timm and unilm have both maps of a pair side by side,
    DiffLlama has first maps in its first half of heads and second maps in the other. And unilm rotates neighbours in a
    head for rotary positions, DiffLlama a head's halves.

    A state dict holds no depth, positions or causality. The target must be made with the same depth (DiffLlama's layer_idx),
    eps of the norm (1e-5) and positions; timm has none, and needs is_causal=True to equal the other two.

    Args:
        state: Of one attention layer, without a prefix. Any floating dtype and device.
        source, target: "timm", "unilm" or "diffllama".
        num_heads: H, the number of pairs: num_heads of timm and of unilm, half of DiffLlama's num_attention_heads.
        num_kv_heads: Pairs of keys: num_kv_heads of unilm, half of DiffLlama's num_key_value_heads. Default: H. For timm,
            which has no groups, they are repeated.
    Returns:
        The entries of `target`. A norm's weight that DiffLlama lacks is multiplied into its output projection; timm's lambda
        of two numbers becomes vectors with the same products; biases that are missing beside others are 0.
    Raises:
        TypeError: A number of heads is not an int, or an entry not a floating tensor.
        ValueError: A layout is unknown, numbers or shapes do not fit, an entry is missing, or the target has no place for
            one, such as a bias in unilm.
    Source: docs/differential.md; the published modules' state dicts. Written for diffmax.
    Example:
        >>> from diffmax.nn import DiffAttention
        >>> state = DiffAttention(32, 2, proj_bias=False).state_dict()
        >>> sorted(convert_diff_attention(state, "timm", "unilm", num_heads=2))[4:]
        ['lambda_q2', 'out_proj.weight', 'q_proj.weight', 'subln.weight', 'v_proj.weight']
    """
    groups = num_heads if num_kv_heads is None else num_kv_heads
    _check(state, source, target, num_heads, groups)
    common = _with_biases(_READ[source](dict(state), num_heads, groups))
    return _WRITE[target](common, num_heads, groups)


def _with_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projections to queries, keys and values have all a bias or none."""
    if any(f"{name}_proj.bias" in state for name in "qkv"):
        for name in "qkv":
            state.setdefault(f"{name}_proj.bias", torch.zeros_like(state[f"{name}_proj.weight"][:, 0]))
    return state


def _from_timm(state: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in state:
            for name, part in zip("qkv", state.pop(f"qkv.{kind}").chunk(3), strict=True):
                state[f"{name}_proj.{kind}"] = part
        if f"proj.{kind}" in state:
            state[f"out_proj.{kind}"] = state.pop(f"proj.{kind}")
    size = state["q_proj.weight"].shape[0] // (2 * heads)
    for number, (first, second) in (("lambda_a", _VECTORS[:2]), ("lambda_b", _VECTORS[2:])):
        if number in state:
            one = torch.zeros_like(state[number]).expand(size).clone()
            one[0] = 1
            state |= {first: state.pop(number) * one, second: one}
    state["subln.weight"] = state.pop("sub_norm.weight")
    return state


def _to_timm(state: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    result = {name: state[name] for name in _VECTORS} | {"sub_norm.weight": state["subln.weight"]}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in state:
            q, k, v = (state[f"{name}_proj.{kind}"] for name in "qkv")
            k, v = (t.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1) for t in (k, v))  # type: ignore[no-untyped-call]
            result[f"qkv.{kind}"] = torch.cat([q, k, v])
        if f"out_proj.{kind}" in state:
            result[f"proj.{kind}"] = state[f"out_proj.{kind}"]
    return result


def _from_unilm(state: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    return state


def _to_unilm(state: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    for name in [name for name in state if name.endswith("bias")]:
        bias = state.pop(name)
        if bias.is_meta or bias.any():
            got = "a tensor without numbers" if bias.is_meta else "numbers other than 0"
            raise ValueError(f"{_NAME}: unilm has no place for {name}, got {got}")
    return state


def _from_diffllama(state: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    for kind in ("weight", "bias"):
        if f"o_proj.{kind}" in state:
            state[f"out_proj.{kind}"] = state.pop(f"o_proj.{kind}")
        for name, pairs in (("q", heads), ("k", groups), ("v", groups)):
            if (key := f"{name}_proj.{kind}") in state:
                halves = _split(state[key], (2, pairs)).transpose(0, 1)
                if name != "v":
                    halves = halves[:, :, torch.argsort(_halves(halves.shape[2], halves.device))]
                state[key] = halves.flatten(0, 2)
    state["subln.weight"] = torch.ones_like(state["lambda_q1"]).repeat(2)
    return state


def _to_diffllama(state: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    has_bias = any(name.endswith("bias") for name in state)
    result = {name: state[name] for name in _VECTORS}
    out = _split(state["out_proj.weight"].T, (heads,)) * state["subln.weight"].unsqueeze(1)
    result["o_proj.weight"] = out.flatten(0, 1).T.contiguous().to(state["out_proj.weight"].dtype)
    for name, pairs in (("q", heads), ("k", groups), ("v", groups)):
        weight = state[f"{name}_proj.weight"]
        given = {"weight": weight}
        if has_bias:
            given["bias"] = state.get(f"{name}_proj.bias", torch.zeros_like(weight[:, 0]))
        for kind, t in given.items():
            sides = _split(t, (pairs, 2)).transpose(0, 1)
            if name != "v":
                sides = sides[:, :, _halves(sides.shape[2], sides.device)]
            result[f"{name}_proj.{kind}"] = sides.flatten(0, 2)
    if has_bias:
        result["o_proj.bias"] = state.get("out_proj.bias", torch.zeros_like(out[0, 0]))
    return result


_READ = {"timm": _from_timm, "unilm": _from_unilm, "diffllama": _from_diffllama}
_WRITE = {"timm": _to_timm, "unilm": _to_unilm, "diffllama": _to_diffllama}


def _split(t: Tensor, sizes: Iterable[int]) -> Tensor:
    """The first axis as heads and the numbers of each."""
    return t.reshape(*sizes, -1, *t.shape[1:])


def _halves(size: int, device: torch.device) -> Tensor:
    """The order in which neighbours, as unilm rotates them, stand in the two halves of a head."""
    return torch.cat([torch.arange(start, size, 2, device=device) for start in (0, 1)])


def _check(state: Any, source: Any, target: Any, heads: Any, groups: Any) -> None:
    for what, layout in (("source", source), ("target", target)):
        if layout not in tuple(_ENTRIES):
            raise ValueError(f'{_NAME}: {what} must be "timm", "unilm" or "diffllama", got {layout!r}')
    for what, number in (("num_heads", heads), ("num_kv_heads", groups)):
        if not is_whole(number):
            raise TypeError(f"{_NAME}: {what} must be an int, got {number!r} of type {type(number).__name__}")
    if heads < 1 or groups < 1 or heads % groups:
        raise ValueError(f"{_NAME}: num_heads must be a multiple of num_kv_heads, got {heads} and {groups}")
    if source == "timm" and groups != heads:
        raise ValueError(f"{_NAME}: num_kv_heads must be num_heads for timm, which has no groups, got {groups} and {heads}")
    _check_entries(state, source)
    _check_shapes(state, source, target, heads, groups)


def _check_entries(state: Any, source: str) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{_NAME}: state must be a state dict, got {type(state).__name__}\nof a module, pass its state_dict()")
    unknown = [str(name) for name in state if name not in _ENTRIES[source]]
    if unknown:
        raise ValueError(
            f"{_NAME}: other layouts have no place for {', '.join(unknown)} of {source}\n"
            "strip the prefix of the layer; norms of queries and keys, and alphas, cannot be converted"
        )
    scalars = "lambda_a" in state or "lambda_b" in state
    needed = {name for name in _ENTRIES[source] if name.endswith("weight")}
    needed |= {"lambda_a", "lambda_b"} if scalars else set(_VECTORS)
    if missing := sorted(needed - set(state)):
        raise ValueError(f"{_NAME}: the state dict of {source} must hold {', '.join(missing)}, got {', '.join(state)}")
    if scalars and (twice := [name for name in _VECTORS if name in state]):
        raise ValueError(f"{_NAME}: lambda must be of two numbers or of vectors, got lambda_a, lambda_b and {', '.join(twice)}")
    for name, entry in state.items():
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            got = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(f"{_NAME}: {name} must be a floating tensor, got {got}")


def _check_shapes(state: Mapping[str, Tensor], source: str, target: str, heads: int, groups: int) -> None:
    name, parts = ("qkv.weight", 3) if source == "timm" else ("q_proj.weight", 1)
    given = tuple(state[name].shape)
    if len(given) != 2:
        raise ValueError(f"{_NAME}: {name} must have 2 dimensions, got shape {given}")
    if given[0] % (2 * heads * parts) or not given[0]:
        raise ValueError(
            f"{_NAME}: the rows of {name} must be a multiple of {2 * heads * parts}, got {given[0]}\n"
            "num_heads is the number of pairs, half of DiffLlama's num_attention_heads"
        )
    size, tokens = given[0] // (2 * heads * parts), given[1]
    inner, keys = 2 * heads * size, 2 * groups * size
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(_VECTORS, (size,)) | {"lambda_a": (), "lambda_b": ()}
    wanted |= {"sub_norm.weight": (2 * size,), "subln.weight": (2 * size,)}
    for layer, rows in (("qkv", 3 * inner), ("q_proj", inner), ("k_proj", keys), ("v_proj", keys)):
        wanted |= {f"{layer}.weight": (rows, tokens), f"{layer}.bias": (rows,)}
    for layer in ("proj", "o_proj", "out_proj"):
        wanted |= {f"{layer}.weight": (tokens, inner), f"{layer}.bias": (tokens,)}
    for name, entry in state.items():
        if tuple(entry.shape) != wanted[name]:
            raise ValueError(
                f"{_NAME}: {name} must have shape {wanted[name]} for {heads} and {groups} pairs, got {tuple(entry.shape)}\n"
                "num_heads and num_kv_heads are numbers of pairs, half of DiffLlama's"
            )
    if target == "timm" and inner != tokens:
        raise ValueError(f"{_NAME}: for timm all heads together must have the size of the tokens, {tokens}, got {inner}")
