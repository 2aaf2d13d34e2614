"""docs/arguments.md: every argument of the other libraries is there, and does what its row says."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.bias import causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

import diffmax
from diffmax import attention, attention_varlen, attention_with_kvcache
from diffmax.compat import adasplash, entmax, power_attention, retention
from diffmax.compat import flash_attn as flash
from diffmax.compat.adasplash.attention import entmax_attention

PAGE = (Path(__file__).parents[1] / "docs" / "arguments.md").read_text(encoding="utf-8")
ONE = torch.tensor(1.0)
close = torch.testing.assert_close
B, L, S, H, KV, D = 2, 5, 7, 4, 2, 8
ENDS_Q, ENDS_K = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 7], dtype=torch.int32)

# flash-attn 2.8's own signatures, without defaults
OPTIONS = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
FLASH = {
    "flash_attn_func": f"q k v {OPTIONS}",
    "flash_attn_kvpacked_func": f"q kv {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv {OPTIONS}",
    "flash_attn_varlen_func": f"q k v {LENGTHS} {OPTIONS} block_table",
    "flash_attn_varlen_kvpacked_func": f"q kv {LENGTHS} {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {OPTIONS}",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
    "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
}


def rows():
    """(library, argument) to status."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        library = section.splitlines()[0]
        for names, status in re.findall(r"^\| (`.*?`) \| ([a-z ]+) \|", section, re.MULTILINE):
            found |= {(library, name): status for name in re.findall(r"`(\w+)`", names)}
    return found


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tokens():
    return randn(B, L, H, D), randn(B, S, KV, D), randn(B, S, KV, D)


def packed():
    return randn(5, H, D), randn(7, KV, D), randn(7, KV, D)


def caches(rows=B):
    return randn(B, 1, H, D), randn(rows, 12, KV, D), randn(rows, 12, KV, D)


def by_hand(q, k, v, causal=False, scale=None, window=(-1, -1), softcap=0.0, slopes=None, alpha=0.5):
    """flash_attn_func from its definition: (B, L, H, D), aligned at the lower right; and tau."""
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(q.shape[2] // t.shape[2], 1) for t in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    behind = torch.arange(k.shape[2]) - torch.arange(q.shape[2]).unsqueeze(1) - (k.shape[2] - q.shape[2])
    if slopes is not None:
        scores = scores - slopes.view(-1, slopes.shape[-1], 1, 1) * behind.abs()
    left, right = window
    hidden = (behind > (0 if causal else right)) & (causal or right >= 0) | (behind < -left) & (left >= 0)
    scores = scores.masked_fill(hidden, -torch.inf)
    p = diffmax.diffmax_bisect(scores, alpha, backend="reference")
    some = p.argmax(-1, keepdim=True)  # tau of Eq. 1, from the largest weight
    tau = scores.gather(-1, some) - p.gather(-1, some) ** (1 - alpha) / (1 - alpha)
    return (p @ v).transpose(1, 2), tau.squeeze(-1)


def of_packed(q, k, v, **options):
    parts = [
        by_hand(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0][0] for (a, b), (c, d) in zip(*spans(), strict=True)
    ]
    return torch.cat(parts)


def spans():
    return [list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)) for ends in (ENDS_Q, ENDS_K)]


def check_func(ours, theirs, **more):
    """One option of all functions, against the definition."""
    q, k, v = tokens()
    close(flash.flash_attn_func(q, k, v, alpha=0.5, **ours), by_hand(q, k, v, **theirs)[0])
    kv = torch.stack([k, v], 2)
    close(flash.flash_attn_kvpacked_func(q, kv, alpha=0.5, **ours), by_hand(q, k, v, **theirs)[0])
    qkv = randn(B, L, 3, H, D)
    close(flash.flash_attn_qkvpacked_func(qkv, alpha=0.5, **ours), by_hand(*qkv.unbind(2), **theirs)[0])
    q, k, v = packed()
    if (slopes := ours.get("alibi_slopes")) is None or slopes.ndim == 1:
        expected = of_packed(q, k, v, **theirs)
        lengths = (ENDS_Q, ENDS_K, 3, 4)
        close(flash.flash_attn_varlen_func(q, k, v, *lengths, alpha=0.5, **ours), expected)
        kv = torch.stack([k, v], 1)
        close(flash.flash_attn_varlen_kvpacked_func(q, kv, *lengths, alpha=0.5, **ours), expected)
        qkv = randn(5, 3, H, D)
        expected = torch.cat([by_hand(*(t[None, a:b] for t in qkv.unbind(1)), **theirs)[0][0] for a, b in spans()[0]])
        close(flash.flash_attn_varlen_qkvpacked_func(qkv, ENDS_Q, 3, alpha=0.5, **ours), expected)
    q, k, v = caches()
    got = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=9, alpha=0.5, **ours)
    close(got, by_hand(q, k[:, :9], v[:, :9], **theirs)[0])


def check_dropout():
    q, k, v = tokens()
    torch.manual_seed(1)
    dropped = flash.flash_attn_func(q, k, v, 0.5)
    assert not torch.allclose(dropped, flash.flash_attn_func(q, k, v))
    assert not flash.flash_attn_func(q, k, v, 1.0).any()


def check_windows():
    for two, three in ((2, 3), (np.int64(2), np.int32(3)), (torch.tensor(2), torch.tensor(3))):
        check_func({"window_size": (two, three)}, {"window": (2, 3)})
        check_func({"window_size": [two, -1], "causal": True}, {"window": (2, -1), "causal": True})
        x = randn(B, H, L, D)
        close(attention(x, x, x, window_size=(two, three)), attention(x, x, x, window_size=(2, 3)))


def check_slopes():
    check_func({"alibi_slopes": (s := torch.rand(H))}, {"slopes": s})
    check_func({"alibi_slopes": (s := torch.rand(B, H))}, {"slopes": s})
    q, k, v = inputs = [t.requires_grad_() for t in packed()]
    for causal in (False, True):
        slopes = torch.rand(2, H)
        expected = torch.cat(
            [
                by_hand(q[None, a:b], k[None, c:d], v[None, c:d], causal, slopes=own)[0][0]
                for (a, b), (c, d), own in zip(*spans(), slopes, strict=True)
            ]
        )
        got = flash.flash_attn_varlen_func(*inputs, ENDS_Q, ENDS_K, 3, 4, causal=causal, alibi_slopes=slopes, alpha=0.5)
        close(got, expected)
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (got, expected)), strict=True):
            close(a, b)
    out, stats = attention_varlen(
        *(q, k, v, ENDS_Q, ENDS_K, 3, 4), enable_gqa=True, alibi_slopes=slopes, alpha=0.5, return_stats=True
    )
    assert stats.tau.shape == stats.support_size.shape == out.shape[:2]


def check_return_attn_probs():
    q, k, v = tokens()
    out, tau, nothing = flash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, alpha=0.5)
    expected, wanted = by_hand(q, k, v, causal=True)
    close(out, expected)
    close(tau, wanted)
    assert nothing is None
    q, k, v = packed()
    out, tau, nothing = flash.flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, 3, 4, return_attn_probs=True, alpha=0.5)
    wanted = [by_hand(q[None, a:b], k[None, c:d], v[None, c:d])[1][0] for (a, b), (c, d) in zip(*spans(), strict=True)]
    close(tau, torch.cat(wanted, 1))
    assert nothing is None


def check_longest():
    q, k, v = packed()
    expected = of_packed(q, k, v)
    for three, four in ((3, 4), (np.int64(3), np.int32(4)), (torch.tensor(3), torch.tensor(4))):
        close(flash.flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, three, four, alpha=0.5), expected)


def check_pages():
    q, k, v = packed()
    pages = [randn(6, 2, KV, D) for _ in range(2)]
    table = torch.tensor([[5, 0], [3, 1]], dtype=torch.int32)  # 4 and 3 tokens
    for page, t in zip(pages, (k, v), strict=True):
        page[[5, 0]] = t[:4].view(2, 2, KV, D)
        page[3], page[1, 0] = t[4:6], t[6]
    inputs = [q.requires_grad_(), *(page.requires_grad_() for page in pages)]
    got = flash.flash_attn_varlen_func(*inputs, ENDS_Q, ENDS_K, 3, 4, causal=True, block_table=table, alpha=0.5)
    close(got, of_packed(q, k, v, causal=True))
    assert all(grad.any() for grad in torch.autograd.grad(got.square().sum(), inputs))
    q = randn(2, 1, H, D)
    lengths = torch.tensor([4, 3], dtype=torch.int32)
    with torch.no_grad():
        got = flash.flash_attn_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table, alpha=0.5)
    for row, (a, b) in enumerate(spans()[1]):
        close(got[row : row + 1], by_hand(q[row : row + 1], k[None, a:b], v[None, a:b])[0])


def check_cache():
    q, k_cache, v_cache = caches()
    new_k, new_v = randn(B, 2, KV, D), randn(B, 2, KV, D)
    lengths = torch.tensor([3, 8], dtype=torch.int32)
    got = flash.flash_attn_with_kvcache(q, k_cache, v_cache, new_k, new_v, None, None, lengths, causal=True, alpha=0.5)
    for row, end in enumerate((5, 10)):
        close(k_cache[row, end - 2 : end], new_k[row])
        close(got[row : row + 1], by_hand(q[row : row + 1], k_cache[row : row + 1, :end], v_cache[row : row + 1, :end])[0])


def check_cache_rows():
    q, k_cache, v_cache = caches(4)
    index = torch.tensor([3, 1], dtype=torch.int32)
    got = flash.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9, cache_batch_idx=index, alpha=0.5)
    close(got, by_hand(q, k_cache[index, :9], v_cache[index, :9])[0])


def check_leftpad():
    for index in (None, torch.tensor([2, 0], dtype=torch.int32)):
        for length, options in ((1, {}), (3, {"causal": True}), (3, {"causal": True, "window_size": (2, 0)})):
            q, k_cache, v_cache = randn(B, length, H, D), randn(3, 12, KV, D), randn(3, 12, KV, D)
            new_k, new_v = randn(B, length, KV, D), randn(B, length, KV, D)
            lengths, pad = (torch.tensor(t, dtype=torch.int32) for t in ([6, 8], [2, 5]))
            rows = [0, 1] if index is None else index.tolist()
            untouched = [k_cache[row, : lengths[n]].clone() for n, row in enumerate(rows)]
            got, tau = flash.flash_attn_with_kvcache(
                *(q, k_cache, v_cache, new_k, new_v),
                cache_seqlens=lengths,
                cache_batch_idx=index,
                cache_leftpad=pad,
                return_softmax_lse=True,
                alpha=0.5,
                **options,
            )
            for n, row in enumerate(rows):
                first, end = int(pad[n]), int(lengths[n]) + length
                close(k_cache[row, end - length : end], new_k[n])
                close(k_cache[row, : end - length], untouched[n])
                how = {"causal": length > 1, "window": options.get("window_size", (-1, -1))}
                seen = (t[row : row + 1, first:end] for t in (k_cache, v_cache))
                expected, wanted = by_hand(q[n : n + 1], *seen, **how)
                close(got[n : n + 1], expected)
                close(tau[n : n + 1], wanted)


def check_lse():
    q, k, v = caches()
    for function in (flash.flash_attn_with_kvcache, attention_with_kvcache):
        out, tau = function(q, k, v, cache_seqlens=9, alpha=0.5, return_softmax_lse=True)
        expected, wanted = by_hand(q, k[:, :9], v[:, :9])
        close(out, expected)
        close(tau, wanted)


def check_mask():
    query, key = randn(B, H, L, D), randn(B, H, S, D)
    for mask in (torch.rand(B, 1, L, S) < 0.8, randn(L, S), causal_upper_left(L, S)):
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            mask[..., 0] = True
        close(attention(query, key, key, mask, alpha=ONE), sdpa(query, key, key, mask))


def as_sdpa(**options):
    query, key = randn(B, H, L, D), randn(B, 2 if options.get("enable_gqa") else H, S, D)
    close(attention(query, key, key, alpha=ONE, **options), sdpa(query, key, key, **options))


def check_sdpa_dropout():
    x = randn(B, H, L, D)
    assert not torch.allclose(attention(x, x, x, dropout_p=0.5), attention(x, x, x))


def check_dtype():
    for x in (X.half(), X.float(), X.round().int(), torch.nested.as_nested_tensor([X, X[:1]], layout=torch.jagged)):
        for dtype in (torch.float32, torch.float64):
            got = diffmax.diffmax_bisect(x, ONE, dtype=dtype)
            assert got.dtype == dtype
            for a, b in zip(got.unbind(), torch.softmax(x, -1, dtype=dtype).unbind(), strict=True):
                close(a, b)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'float32' of type str"):
        diffmax.diffmax_bisect(X, dtype="float32")
    with pytest.raises(TypeError, match=r"dtype, to which X is converted first, must be float16, .* got int32$"):
        diffmax.diffmax_bisect(X, dtype=torch.int32)
    assert "float64" in str(diffmax.explain("diffmax_bisect", X.float(), dtype=torch.float64))
    assert diffmax.explain("diffmax_bisect", x, 0.5, 1)


X, TARGET = randn(3, 5) * 2, torch.tensor([0, 1, 4])


def as_entmax(name, *arguments, **options):
    """The installed entmax's function, and ours."""
    theirs = pytest.importorskip("entmax", reason="needs entmax: pip install entmax==1.3")
    close(getattr(entmax, name)(*arguments, **options), getattr(theirs, name)(*arguments, **options), atol=1e-6, rtol=1e-6)


def check_entmax_losses(**options):
    theirs = pytest.importorskip("entmax", reason="needs entmax: pip install entmax==1.3")
    for name in ("SparsemaxLoss", "Entmax15Loss", "EntmaxBisectLoss"):
        ours, other = (getattr(library, name)(**options) for library in (entmax, theirs))
        close(ours(X, TARGET), other(X, TARGET), atol=1e-6, rtol=1e-6)


def check_unnormalized():
    raw = entmax.entmax_bisect(X, 1.5, ensure_sum_one=False)
    close(raw / raw.sum(-1, keepdim=True), entmax.entmax_bisect(X, 1.5))


def unchanged(function, *arguments, **options):
    """That an argument changes nothing."""
    changed = function(*arguments, **options)
    assert torch.equal(changed, function(*arguments))


def of_adasplash(**options):
    q, k, v = randn(B, H, L, D), randn(B, KV, S, D), randn(B, KV, S, D)
    alpha, causal, varlen = options.get("alpha", 1.5), options.get("is_causal", True), options.get("varlen")
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(D)
    hidden = torch.ones(L, S).triu(1).bool() if causal else torch.zeros(L, S).bool()
    if varlen is not None:
        hidden = hidden | (torch.arange(S) >= varlen.view(-1, 1, 1, 1))
    p = entmax.entmax_bisect(scores.masked_fill(hidden, -torch.inf), torch.as_tensor(alpha).reshape(-1, 1, 1))
    out = p @ v.repeat_interleave(2, 1)
    if varlen is not None:
        out = out.masked_fill(torch.arange(L).view(-1, 1) >= varlen.view(-1, 1, 1, 1), 0)
    close(adasplash.adasplash(q, k, v, **options), out)


def of_entmax_attention(padding="right", slopes=None, varlen=None, length=S):
    """Version 0.2.0's own lines, with a solver of other origin."""
    q, k, v = randn(B, H, length, D), randn(B, H, S, D), randn(B, H, S, D)
    scores = q @ k.mT / math.sqrt(D)
    if slopes is not None:
        place = torch.arange(length).unsqueeze(1) if length > 1 else torch.tensor([[S - 1]])
        scores = scores + slopes.view(-1, 1, 1) * (torch.arange(S) - place)
    scores = scores.masked_fill(torch.ones(length, S).triu(1 + S - length).bool(), -torch.inf)
    inside = torch.ones(B, S, dtype=torch.bool)
    if varlen is not None:
        inside = torch.arange(S) < varlen.unsqueeze(1) if padding == "right" else torch.arange(S) >= S - varlen.unsqueeze(1)
    scores = scores.masked_fill(~inside[:, None, None], -torch.inf)
    out = diffmax.diffmax_bisect(scores, 0.5, backend="reference") @ v
    if length == S:
        out = out.masked_fill(~inside[:, None, :, None], 0)
    given = {"varlen": varlen, "padding": padding, "alibi_slopes": slopes}
    close(entmax_attention(q, k, v, 1.5, is_causal=True, **given), out)


def check_entmax_attention(**options):
    for length in (S, 1, 3):
        of_entmax_attention(length=length, **options)


def power_by_hand(Q, K, V, log_G=None, deg=2, scale=None, causal=True):
    """(b, t, h, d) from the definition; log_G is cumulated already."""
    q, k, v = (t.transpose(1, 2) for t in (Q, K, V))
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(Q.shape[3]) if scale is None else scale
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    w = (q @ k.mT * scale) ** deg
    if log_G is not None:
        G = log_G.transpose(1, 2).repeat_interleave(group, 1)
        w = w * (G[:, :, -q.shape[2] :, None] - G[:, :, None]).exp()
    if causal:
        w = w.tril(k.shape[2] - q.shape[2])
    return ((w @ v) / w.sum(-1, keepdim=True)).transpose(1, 2)


def check_power(log_G=None, deg=2, **options):
    """Every whole function, against the definition."""
    Q, K, V = tokens()
    expected = power_by_hand(Q, K, V, None if log_G is None else log_G.cumsum(1), deg, options.get("scale"))
    functions = [retention.power_retention, power_attention.power_full] if "switch_over_seq_len" not in options else []
    for function in functions or [retention.power_retention]:
        close(function(Q, K, V, log_G, deg=deg, **options), expected)


def check_power_states():
    """A sequence in two parts, with gradients through the state."""
    Q, K, V = (randn(B, 40, heads, 16).requires_grad_() for heads in (H, KV, KV))
    gates = -torch.rand(B, 40, KV, dtype=torch.float64)
    expected = power_by_hand(Q, K, V, gates.cumsum(1))[:, 25:]
    first, then = ([t[:, part] for t in (Q, K, V, gates)] for part in (slice(25), slice(25, None)))
    _, S, s = retention.power_retention(*first, return_final_state=True, chunk_size=8)
    out = retention.power_retention(*then, initial_state=S, sum_of_keys=s, chunk_size=8)
    _, pair = power_attention.power_full(*first, return_final_state=True, chunk_size=8)
    for found in (out, power_attention.power_full(*then, initial_state=pair, chunk_size=8)):
        close(found, expected)
        for a, b in zip(
            *(torch.autograd.grad(t.square().sum(), (Q, K, V), retain_graph=True) for t in (found, expected)), strict=True
        ):
            close(a, b)


def check_power_lengths():
    for switch in (2, S, 512):
        check_power(switch_over_seq_len=switch, chunk_size=2)
    Q, K, V = (randn(B, 40, heads, 16) for heads in (H, KV, KV))
    _, S_, s = retention.power_retention(Q, K, V, return_final_state=True, chunk_size=8, original_t=29)
    _, expected, of_keys = retention.power_retention(*(t[:, :24] for t in (Q, K, V)), return_final_state=True, chunk_size=8)
    close((S_, s), (expected, of_keys))


def check_power_form(**options):
    """The quadratic form with its sums of weights, and normalized."""
    Q, K, V = tokens()
    G = -torch.rand(B, S, KV, dtype=torch.float64).cumsum(1)
    causal, first = options.get("causal", True), options.get("head_first", False)
    given = [t.transpose(1, 2) for t in (Q, K, V, G)] if first else [Q, K, V, G]
    expected = power_by_hand(Q, K, V, G, 4, 1.0, causal)
    group = {} if "r" not in options and "w" not in options else {"r": H // KV, "w": 1}
    options = {name: value for name, value in options.items() if name not in ("r", "w")}
    options.pop("norm", None)
    two = options.pop("use_log2", False)
    if two:
        given[3] = given[3] / math.log(2)
    options["use_log2"] = two
    found = power_attention.attention(*given, 4, **group, norm=True, **options)
    close(found.transpose(1, 2) if first else found, expected)
    sums, of_weights, rowmax = power_attention.attention(*given, 4, **group, **options)
    if first:
        sums, of_weights = sums.transpose(1, 2), of_weights.transpose(1, 2)
    close(sums / of_weights.unsqueeze(-1), expected)
    given[3] = given[3] * (math.log(2) if two else 1 / math.log(2))
    other = power_attention.attention(*given, 4, **{**options, "use_log2": not two})[2]
    close(rowmax * (math.log(2) if two else 1 / math.log(2)), other)


def check_power_parts():
    """Chunks: their own part in the quadratic form, and what the state before them holds."""
    Q, K, V = (randn(1, 32, 2, 16) for _ in range(3))
    chunks = [t.reshape(1, 4, 8, 2, 16) for t in (Q, K, V)]
    for vidrial in (False, True):
        tile = {"d_tile": 4} if vidrial else {}
        update = power_attention.update_state_vidrial if vidrial else power_attention.update_state
        query = power_attention.query_state_vidrial if vidrial else power_attention.query_state
        S_, s = update(chunks[1], chunks[2], 2, **tile)
        assert S_.shape[3] == (power_attention.default_D(16, 2, 4) if vidrial else power_attention.default_D(16, 2, 16))
        nothing = torch.zeros(1, 4, 2, dtype=torch.float64)
        S_, s = (power_attention.discumsum(t, nothing)[:, :-1] for t in (S_, s))
        within = [t.reshape(4, 8, 2, 16) for t in (Q, K, V)]
        sums = [t.reshape(1, 4, 8, *t.shape[2:]) for t in power_attention.attention(*within, None, 2, scale=0.25)]
        out = query(chunks[0], S_, s, *sums, 2, 0.25, zero_initial_state=True, **tile)
        close(out.reshape(1, 32, 2, 16), power_by_hand(Q, K, V))


F, T, E, A = "flash-attn", "torch's scaled_dot_product_attention", "entmax", "AdaSplash"
P, R = "power-attention and retention", "torch.softmax"
SERVED = {
    **{
        (F, name): lambda: check_func({}, {})
        for name in ("q", "k", "v", "qkv", "kv", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens")
    },
    (F, "dropout_p"): check_dropout,
    (F, "softmax_scale"): lambda: check_func({"softmax_scale": 0.7}, {"scale": 0.7}),
    (F, "causal"): lambda: check_func({"causal": True}, {"causal": True}),
    (F, "window_size"): check_windows,
    (F, "softcap"): lambda: check_func({"softcap": 1.5}, {"softcap": 1.5}),
    (F, "alibi_slopes"): check_slopes,
    (F, "return_attn_probs"): check_return_attn_probs,
    **{(F, name): check_longest for name in ("max_seqlen_q", "max_seqlen_k", "max_seqlen")},
    (F, "block_table"): check_pages,
    **{(F, name): check_cache for name in ("k_cache", "v_cache", "cache_seqlens")},
    (F, "cache_batch_idx"): check_cache_rows,
    (F, "cache_leftpad"): check_leftpad,
    (F, "return_softmax_lse"): check_lse,
    **{(T, name): as_sdpa for name in ("query", "key", "value")},
    (T, "attn_mask"): check_mask,
    (T, "dropout_p"): check_sdpa_dropout,
    (T, "is_causal"): lambda: as_sdpa(is_causal=True),
    (T, "scale"): lambda: as_sdpa(scale=0.3),
    (T, "enable_gqa"): lambda: as_sdpa(enable_gqa=True),
    (R, "dim"): lambda: [close(diffmax.diffmax_bisect(X, ONE, dim), X.softmax(dim)) for dim in (-1, 0, 1)],
    (R, "dtype"): check_dtype,
    (E, "X"): lambda: as_entmax("sparsemax", X),
    (E, "target"): lambda: as_entmax("entmax15_loss", X, TARGET),
    (E, "alpha"): lambda: as_entmax("entmax_bisect", X, 1.3),
    (E, "dim"): lambda: as_entmax("entmax_bisect", X, dim=0),
    (E, "n_iter"): lambda: as_entmax("entmax_bisect", X, n_iter=60),
    (E, "ensure_sum_one"): check_unnormalized,
    (E, "budget"): lambda: close(entmax.budget_bisect(X, budget=2).sum(-1), torch.full((3,), 2.0, dtype=torch.float64)),
    (E, "ignore_index"): lambda: check_entmax_losses(ignore_index=1),
    (E, "reduction"): lambda: [check_entmax_losses(reduction=how) for how in ("sum", "elementwise_mean")],
    **{(A, name): of_adasplash for name in ("q", "k", "v")},
    (A, "x"): lambda: close(adasplash.triton_entmax(X), entmax.entmax15(X)),
    (A, "alpha"): lambda: [of_adasplash(alpha=alpha) for alpha in (1.2, 2.0, 1 + torch.rand(H))],
    (A, "is_causal"): lambda: of_adasplash(is_causal=False),
    (A, "varlen"): lambda: of_adasplash(varlen=torch.tensor([5, 3])),
    (A, "padding"): lambda: [check_entmax_attention(padding=p, varlen=torch.tensor([7, 4])) for p in ("left", "right")],
    (A, "alibi_slopes"): lambda: [
        check_entmax_attention(slopes=torch.rand(H), **more)
        for more in ({}, {"varlen": torch.tensor([7, 4]), "padding": "left"})
    ],
    **{(P, name): check_power for name in ("Q", "K", "V")},
    (P, "log_G"): lambda: check_power(-torch.rand(B, S, KV, dtype=torch.float64)),
    **{(P, name): check_power_states for name in ("initial_state", "sum_of_keys", "return_final_state")},
    (P, "deg"): lambda: [check_power(deg=deg) for deg in (2, 4, 6)],
    (P, "scale"): lambda: check_power(scale=0.3),
    (P, "chunk_size"): lambda: [check_power(chunk_size=chunk) for chunk in (1, 3, S)],
    **{(P, name): check_power_lengths for name in ("switch_over_seq_len", "original_t")},
    **{(P, name): lambda name=name: check_power_form(**{name: True}) for name in ("head_first", "use_log2", "norm", "r", "w")},
    (P, "causal"): lambda: check_power_form(causal=False),
    **{
        (P, name): check_power_parts
        for name in ("S", "s", "Y_attn", "l_attn", "rowmax", "zero_initial_state", "X", "d", "d_tile")
    },
}
NO_EFFECT = {
    (F, "deterministic"): lambda: unchanged(flash.flash_attn_func, *tokens(), deterministic=True),
    (F, "rotary_interleaved"): lambda: unchanged(flash.flash_attn_with_kvcache, *caches(), rotary_interleaved=False),
    (F, "num_splits"): lambda: unchanged(flash.flash_attn_with_kvcache, *caches(), num_splits=4),
    (E, "k"): lambda: unchanged(entmax.entmax15, X, k=2),
    (A, "niter"): lambda: unchanged(adasplash.adasplash, *(randn(B, H, L, D) for _ in range(3)), niter=1),
    (A, "n_iter"): lambda: unchanged(adasplash.triton_entmax, X, n_iter=1),
    (A, "use_histogram"): lambda: unchanged(adasplash.triton_entmax, X, use_histogram=False),
    (A, "fast_math"): lambda: unchanged(adasplash.triton_entmax, X, fast_math=True),
}
REFUSED = {
    (F, name): (
        lambda name=name: [
            function(*caches(), **{name: torch.ones(12, D // 2)})
            for function in (flash.flash_attn_with_kvcache, attention_with_kvcache)
        ],
        f"{name} must be None, got Tensor\nrotate q and k before the call",
    )
    for name in ("rotary_cos", "rotary_sin")
}


def test_every_row_of_the_page_is_tested_and_the_reverse():
    found = rows()
    assert {key for key, status in found.items() if status == "served"} == set(SERVED)
    assert {key for key, status in found.items() if status == "no effect"} == set(NO_EFFECT)
    assert {key for key, status in found.items() if status == "refused"} == set(REFUSED)
    assert set(found.values()) == {"served", "no effect", "refused"}


def test_the_page_has_every_argument_of_the_libraries():
    listed = {library: {name for where, name in rows() if where == library} for library in (F, T, E, A, P)}
    assert listed[F] == {name for names in FLASH.values() for name in names.split()}
    assert listed[T] == {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}

    def arguments(module, *more):
        functions = [getattr(module, name) for name in module.__all__] + list(more)
        return {p for f in functions for p in inspect.signature(f).parameters} - {"kwargs"}

    assert {name for where, name in rows() if where == R} == {"dim", "dtype"}
    assert listed[E] == arguments(entmax)
    lazy = (adasplash.LazyAttention, adasplash.lazy_attention_triton)  # docs/lazy.md has theirs
    functions = [getattr(adasplash, name) for name in adasplash.__all__ if getattr(adasplash, name) not in lazy]
    assert listed[A] == {p for f in (*functions, entmax_attention) for p in inspect.signature(f).parameters} - {"kwargs"}
    samples = {
        name for name in (*power_attention.__all__, *retention.__all__) if name.startswith("create") or "propert" in name
    }
    functions = [
        getattr(module, name) for module in (power_attention, retention) for name in module.__all__ if name not in samples
    ]
    functions.remove(power_attention.ChunkState)
    own = {"backend", "state_layout"}
    assert listed[P] == {name for function in functions for name in inspect.signature(function).parameters} - own


@pytest.mark.parametrize("name", FLASH)
def test_signatures_are_flash_attns(name):
    parameters = inspect.signature(getattr(flash, name)).parameters
    ours = [p for p, given in parameters.items() if given.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert ours == FLASH[name].split()
    assert [p for p in parameters if p not in ours] == ["alpha", "backend"]
    assert set(FLASH) == set(flash.__all__)


@pytest.mark.sampled(15)
@pytest.mark.parametrize(("library", "name"), SERVED)
def test_what_is_served(library, name):
    SERVED[library, name]()


@pytest.mark.parametrize(("library", "name"), NO_EFFECT)
def test_what_has_no_effect(library, name):
    NO_EFFECT[library, name]()


@pytest.mark.parametrize(("library", "name"), REFUSED)
def test_what_is_refused(library, name):
    call, message = REFUSED[library, name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_results_are_laid_out_as_flash_attns():
    q, k, v = tokens()
    assert flash.flash_attn_func(q, k, v).is_contiguous()
    flash.flash_attn_func(q, k, v).view(B, L, -1)


def test_gradients_through_flash_attns_names():
    qkv = randn(B, L, 3, H, D).requires_grad_()
    alpha = torch.full((H,), 0.5, dtype=torch.float64, requires_grad=True)
    out = flash.flash_attn_qkvpacked_func(qkv, causal=True, alpha=alpha)
    expected = by_hand(*qkv.unbind(2), causal=True)[0]
    upstream = torch.randn_like(out)
    close(*(torch.autograd.grad(t, qkv, upstream, retain_graph=True)[0] for t in (out, expected)))
    assert torch.autograd.grad(out, alpha, upstream)[0].all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cache_that_begins_late_on_each_backend(backend):
    with diffmax.use_backend(backend):
        check_leftpad()


def pads(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "flash_attn_func: q must have 4 dimensions", lambda: flash.flash_attn_func(*packed())),
        (
            TypeError,
            "flash_attn_func: k must be a torch.Tensor, got list",
            lambda: flash.flash_attn_func(randn(1, 1, 1, 1), [], []),
        ),
        (
            ValueError,
            r"flash_attn_qkvpacked_func: qkv must have shape \(B, L, 3, H, D\), got \(2, 5, 4, 8\)",
            lambda: flash.flash_attn_qkvpacked_func(tokens()[0]),
        ),
        (
            ValueError,
            r"flash_attn_varlen_kvpacked_func: kv must have shape \(T, 2, H, D\), got \(7, 2, 8\)",
            lambda: flash.flash_attn_varlen_kvpacked_func(*packed()[:2], ENDS_Q, ENDS_K, 3, 4),
        ),
        (TypeError, "kv must be a torch.Tensor, got None", lambda: flash.flash_attn_kvpacked_func(tokens()[0], None)),
        (
            TypeError,
            "cache_leftpad must be an int32 tensor, got int",
            lambda: attention_with_kvcache(*caches(), cache_leftpad=2),
        ),
        (
            ValueError,
            r"cache_leftpad must have shape \(2,\), got \(1,\)",
            lambda: attention_with_kvcache(*caches(), cache_leftpad=pads(1)),
        ),
        (
            ValueError,
            r"between 0 and cache_seqlens, got \[1, 6\] for \[5, 5\]",
            lambda: attention_with_kvcache(*caches(), cache_seqlens=5, cache_leftpad=pads(1, 6)),
        ),
        (
            ValueError,
            "return_softmax_lse and return_stats exclude each other",
            lambda: attention_with_kvcache(*caches(), return_stats=True, return_softmax_lse=True),
        ),
        (TypeError, "num_splits must be an int", lambda: attention_with_kvcache(*caches(), num_splits="4")),
        (
            ValueError,
            r"with block_table, key must be \(num_blocks, page_size, H_kv, D\), got \(7, 2, 8\)",
            lambda: attention_varlen(*packed(), ENDS_Q, ENDS_K, 3, 4, block_table=torch.zeros(2, 2, dtype=torch.int32)),
        ),
        (
            ValueError,
            "block_table must have pages from 0 to 5",
            lambda: flash.flash_attn_varlen_func(
                *(packed()[0], randn(6, 2, KV, D), randn(6, 2, KV, D), ENDS_Q, ENDS_K, 3, 4),
                block_table=torch.full((2, 2), 6, dtype=torch.int32),
            ),
        ),
        (
            ValueError,
            "block_table must have pages for every token, got 2 places for 4",
            lambda: flash.flash_attn_varlen_func(
                *(packed()[0], randn(6, 2, KV, D), randn(6, 2, KV, D), ENDS_Q, ENDS_K, 3, 4),
                block_table=torch.zeros(2, 1, dtype=torch.int32),
            ),
        ),
        (
            TypeError,
            r"window_size must be a pair of ints \(left, right\), got \(1.0, 2.0\)",
            lambda: flash.flash_attn_func(*tokens(), window_size=(1.0, 2.0)),
        ),
        (TypeError, "window_size must be a pair", lambda: flash.flash_attn_func(*tokens(), window_size=(True, 2))),
        (
            TypeError,
            "window_size must be a pair",
            lambda: flash.flash_attn_func(*tokens(), window_size=torch.tensor([1.0, 2.0])),
        ),
        (
            TypeError,
            "max_seqlen_q must be an int, got 3.0",
            lambda: flash.flash_attn_varlen_func(*packed(), ENDS_Q, ENDS_K, 3.0, 4),
        ),
        (ValueError, "padding must be", lambda: entmax_attention(*(randn(1, 1, 2, 2) for _ in range(3)), padding="both")),
    ],
)
def test_says_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("adasplash_block_mask", ["sparse_attn"]),
        ("adasplash_no_block_mask", ["sparse_attn"]),
        ("adasplash_v2", ["sparse_attn"]),
        ("triton_entmax", ["triton_entmax"]),
        ("triton_entmax_v2", ["triton_entmax", "triton_entmax15", "triton_sparsemax"]),
        ("attention", ["entmax_attention"]),
    ],
)
def test_adasplashs_submodules(module, names):
    """`from adasplash.triton_entmax import triton_entmax` is how code for version 0.1 is written."""
    found = __import__(f"diffmax.compat.adasplash.{module}", fromlist=names)
    assert found.__name__ == f"diffmax.compat.adasplash.{module}"
    assert found.__all__ == names
    if module != "attention" and module != "adasplash_block_mask":
        assert callable(getattr(adasplash, module))  # the function of that name stays the package's attribute
    x = randn(B, H, L, D)
    for name in names:
        out = getattr(found, name)(*[x] * (1 if "triton" in name else 3))
        assert out.shape == x.shape


def test_extra_metadata_goes_out_with_the_metrics():
    """An argument that code for the older project passes, mostly as None."""
    records = []

    def log(metrics, *, step):
        records.append((step, metrics))

    x = torch.randn(3, 5, requires_grad=True)
    how = {"name_prefix": "layer", "log": log}
    plain = diffmax.diffmax_bisect_monitored(x, 0.5, step=1, extra_metadata=None, **how)
    extra = {"loss": 0.25, "depth": np.int64(3), "temperature": torch.tensor([1.5], requires_grad=True)}
    assert torch.equal(diffmax.diffmax_bisect_monitored(x, 0.5, step=2, extra_metadata=extra, **how), plain)
    assert diffmax.diffmax_bisect_monitored(torch.tensor(1.0), 0.5, step=3, extra_metadata=extra, **how) == 1
    diffmax.diffmax_bisect_monitored(x, 0.5, extra_metadata=extra, **how)  # no step: nothing goes out
    assert [step for step, _ in records] == [1, 2, 3]
    for _, metrics in records[1:]:
        assert {name: metrics[f"layer/{name}"] for name in extra} == {"loss": 0.25, "depth": 3.0, "temperature": 1.5}
        assert set(metrics) - {f"layer/{name}" for name in extra} == set(records[0][1])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([1.0], "extra_metadata must be a dictionary, got list"),
        ({"name": "x"}, "extra_metadata must hold numbers by name, got 'x' for 'name'\na text goes into name_prefix"),
        ({"loss": torch.ones(2)}, "must hold numbers by name"),
        ({3: 1.0}, "must hold numbers by name, got 1.0 for 3"),
    ],
)
def test_metadata_that_no_log_takes(extra, message):
    for step in (None, 1):
        with pytest.raises(TypeError, match=message):
            diffmax.diffmax_bisect_monitored(torch.randn(3), 0.5, step=step, extra_metadata=extra, log=print)


@pytest.mark.parametrize("what", ["alpha", "scale", "softcap", "dropout_p", "window_size"])
def test_an_integer_that_no_float_holds_is_refused_by_name(what):
    """It was an OverflowError that named nothing."""
    query, huge = torch.randn(1, 2, 8, 16), 10**400
    for value in (huge, -huge):
        with pytest.raises(ValueError, match=rf"diffmax\.attention: {what} must"):
            diffmax.attention(query, query, query, **{what: (value, 0) if what == "window_size" else value})
    if what == "scale":
        with pytest.raises(ValueError, match=r"diffmax\.power_attention: degree must"):
            diffmax.power_attention(query, query, query, degree=huge)
