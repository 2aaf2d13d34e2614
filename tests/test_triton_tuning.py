"""Launch settings from tables, candidates for them, and what `warmup` leaves to compile. Nothing runs: no device is needed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffmax_cuda.configs
from benchmarks import tune_triton
from benchmarks.compile_kernels import TARGETS, kernels
from diffmax.kernels.triton.attention.launch import AttentionOperator
from diffmax.kernels.triton.attention.settings import backward_blocks, forward_settings
from diffmax.kernels.triton.common.tuning import (
    KERNELS,
    Case,
    Decode,
    Stream,
    Tile,
    candidates,
    read_tables,
    with_settings,
    write_tables,
)
from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax.plugin import TILE, AttentionCall, KVCacheCall, Wanted
from diffmax.testing.ahead_of_time import recording

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
H100 = "measured on a stand-in"


def attention_operator(table=None):
    return AttentionOperator(lambda device: "sm90", lambda device: 132, ptx=True, table=lambda device: table)


def test_entries_survive_writing_and_reading(tmp_path):
    tables = dict(diffmax_cuda.configs.tables())
    for kernel in KERNELS:
        for dtype in (torch.bfloat16, torch.float32):
            for extras in (False, True):
                launch = candidates(kernel, dtype, 100, "sm90", extras=extras)[-1]
                tables["9.0"] = tables["9.0"].with_entry(kernel, dtype, 100, launch, H100, extras=extras)
    write_tables(tmp_path / "tables.json", tables)
    assert read_tables(tmp_path / "tables.json") == tables
    text = (tmp_path / "tables.json").read_text()
    assert '"bfloat16 128 extras": {"warps"' in text
    assert H100 not in (ROOT / "diffmax-cuda" / "src" / "diffmax_cuda" / "tables.json").read_text()
    with pytest.raises(TypeError, match="decode is launched by a Decode, got Tile"):
        tables["9.0"].with_entry("decode", torch.float32, 64, Tile(1, 1), H100)


def test_a_table_compiled_anew_keeps_its_entries(tmp_path, monkeypatch):
    """What was measured, or chosen for one dtype."""
    tables = dict(diffmax_cuda.configs.tables())
    entries = tables["9.0"].entries
    assert entries
    write_tables(tmp_path / "tables.json", tables)
    monkeypatch.setattr(tune_triton, "FILES", {"cuda": tmp_path / "tables.json"})
    monkeypatch.setattr(tune_triton, "compiled_table", lambda target: replace(tables["8.0"], origin="compiled"))
    assert tune_triton.main(["--compile", "--targets", "sm90"]) == 0
    anew = read_tables(tmp_path / "tables.json")
    assert anew["9.0"] == replace(tables["8.0"], origin="compiled", entries=entries)
    assert anew["8.0"] == tables["8.0"]


def test_a_case_is_that_of_all_sizes_with_one_padded_length():
    assert Case.of("rows", torch.float32, 9) == Case.of("rows", torch.float32, 16)
    assert Case.of("rows", torch.float32, 1000) == Case(torch.float32, 1024)
    assert Case.of("attention_dq", torch.bfloat16, 40, True) == Case(torch.bfloat16, 64)
    assert Case.of("attention_out", torch.bfloat16, 80, True) == Case(torch.bfloat16, 128, True)
    assert Case.of("split", torch.float16, 100_000) == Case(torch.float16)
    for case in (Case(torch.float16), Case(torch.float32, 64), Case(torch.bfloat16, 256, True)):
        assert Case.read(str(case)) == case


def test_candidates_are_many_differ_and_begin_with_the_rule():
    for architecture in ("sm80", "sm90", "gfx942", "gfx1100"):
        for kernel, kind in KERNELS.items():
            for dtype in (torch.float32, torch.bfloat16):
                found = candidates(kernel, dtype, 128, architecture)
                assert 4 <= len(found) == len(set(found)) <= 80, (kernel, len(found))
                assert all(isinstance(launch, kind) for launch in found)
        solver, writer, _ = forward_settings(architecture, torch.bfloat16, 128, False)
        assert candidates("attention_solve", torch.bfloat16, 128, architecture)[0] == solver
        assert candidates("attention_out", torch.bfloat16, 128, architecture)[0] == writer
        blocks = backward_blocks(architecture, torch.bfloat16, 128)
        assert candidates("attention_dq", torch.bfloat16, 128, architecture)[0] == blocks.dq
        assert candidates("attention_dkv", torch.bfloat16, 128, architecture)[0] == blocks.dkv
        for block in candidates("attention_dkv", torch.bfloat16, 128, architecture):
            assert TILE % block.rows == TILE % block.keys == 0
    assert candidates("decode", torch.bfloat16, 128, "sm90")[0] == Decode()


def test_a_table_goes_before_the_rules_and_force_before_the_table():
    first, second = candidates("attention_out", torch.bfloat16, 64, "sm90")[1:3]
    table = diffmax_cuda.configs.tables()["9.0"].with_entry("attention_out", torch.bfloat16, 64, first, H100)
    operator, plain, capped = attention_operator(table), AttentionCall(scale=1, e=0.5), AttentionCall(scale=1, e=0.5, softcap=1)
    rule = forward_settings("sm90", torch.bfloat16, 64, False)
    assert operator.forward_settings(CPU, torch.bfloat16, 40, plain) == (rule.solve, first, None)
    assert operator.forward_settings(CPU, torch.bfloat16, 64, capped) == forward_settings("sm90", torch.bfloat16, 64, True)
    assert operator.forward_settings(CPU, torch.float16, 64, plain) == forward_settings("sm90", torch.float16, 64, False)
    with with_settings(operator, attention_out=second):
        assert operator.forward_settings(CPU, torch.bfloat16, 64, capped)[1] == second
    assert operator.forward_settings(CPU, torch.bfloat16, 64, plain) == (rule.solve, first, None)
    with (
        pytest.raises(TypeError, match="attention_out is not launched by Tile"),
        with_settings(operator, attention_out=Tile(1, 1)),
    ):
        pass


@pytest.mark.slow
def test_rows_and_decoding_are_launched_as_forced():
    table = diffmax_cuda.configs.tables()["9.0"]
    rows, decoder = RowOperator(lambda _: table, lambda _: 2, ptx=True), Decoder(lambda _: 132, ptx=True)
    x, long = torch.zeros(8, 100), torch.zeros(1, 40_000)
    with recording("sm90", *kernels()) as launched:
        with with_settings(rows, rows=Tile(2, 1), split=Stream(4096, 8, 1)):
            rows.bisect(x, 0.5, 1, 50, True)
            rows.bisect(long, 0.5, 1, 50, True)
        with with_settings(decoder, decode=Decode(2, 4, 8)):
            decoder.warmup(CPU, torch.bfloat16, 64, 64, 0.5, False, frozenset())
    short, *split = (one for one in launched if not one.name.startswith("kvcache"))
    assert short.grid[0] == 4
    assert short.resources["warps"] == 1
    assert {one.resources["warps"] for one in split} == {8}
    assert split[0].grid[0] == 2
    assert [one.resources["warps"] for one in launched if one.name.startswith("kvcache")] == [2, 4, 8, 4, 8, 4]


@pytest.mark.slow
def test_after_warmup_attention_compiles_nothing():
    """Forward and backward with a run-time exponent, causal, grouped, a learned sink: other sizes and alphas."""
    operator = attention_operator()
    with recording("sm90", *kernels()) as launched:
        operator.warmup(CPU, torch.bfloat16, 64, 64, 0.15, True, frozenset({"causal", "gqa", "sink"}))
        prepared = len(launched)
        calls = ((2, 6, 200, 200, 0.3, True), (1, 4, 65, 1000, 0.7, False), (40, 4, 130, 70, 0.4, False))
        for batch, heads, length, keys, e, lower_right in calls:
            query = torch.zeros(batch, length, heads, 64, dtype=torch.bfloat16).transpose(1, 2)
            key = torch.zeros(batch, keys, heads // 2, 64, dtype=torch.bfloat16).transpose(1, 2)
            call = AttentionCall(scale=0.1, e=e, right=0, lower_right=lower_right, sink=torch.zeros(heads))
            found = operator.attention(query, key, key, call, True, False)
            operator.attention_backward(found.out, query, key, key, found.saved, call, Wanted(sink=True))
    assert prepared == 8  # two calls: the last of `calls` gives each multiprocessor 128 queries
    binaries = [id(one.kernel) for one in launched]
    assert set(binaries[prepared:]) == set(binaries[:prepared])


def test_after_warmup_decoding_compiles_nothing():
    decoder = Decoder(lambda device: 132, ptx=True)
    with recording("sm90", *kernels()) as launched:
        features = frozenset({"causal", "paged", "gqa", "tensor_alpha"})
        decoder.warmup(CPU, torch.bfloat16, 64, 64, None, False, features, heads=16, kv_heads=2, room=8192)
        prepared = len(launched)
        cache, new = torch.zeros(140, TILE, 2, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)
        call = KVCacheCall(
            scale=0.1, e=torch.rand(16), cache_seqlens=torch.tensor([77], dtype=torch.int32), k=new, v=new,
            block_table=torch.arange(128, dtype=torch.int32).view(1, -1), right=0,
        )  # fmt: skip
        decoder.attention_kvcache(torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16), cache, cache, call, False)
    assert prepared == 6
    binaries = [id(one.kernel) for one in launched]
    assert set(binaries[prepared:]) == set(binaries[:prepared])


def test_the_page_of_what_was_compiled_lists_every_kernel_on_every_target():
    """docs/kernels.md is written by `make check-triton WRITE=--write`: a kernel that it does not know was never compiled."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    versions = dict(zip(*[iter(re.split(r"^## Triton (\S+)\n", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert list(versions) == ["3.6.0", "3.9.0"]
    for version, text in versions.items():
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
        header, _, *lines = rows
        assert sorted(header[1:]) == sorted(TARGETS), version
        assert {line[0] for line in lines} == {kernel.__name__.removesuffix("_kernel") for kernel in kernels()}, version
        for line in lines:
            assert len(line) == len(header)
            assert all(re.fullmatch(r"\d+( \*\*\+\d+\*\*)?, \d+", cell) for cell in line[1:]), (version, line)
