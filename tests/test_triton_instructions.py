"""Instructions per score stay within the table of budgets, benchmarks/instructions.json. Nothing runs on a device.

A count that falls by more than 5 % passes, and asks for `python -m benchmarks.count_instructions --write`. What the table has
from today's sources and Triton is counted again for some cases only, and for all with DIFFMAX_RECOUNT=1 (`make nightly`).
"""

import json
import os
from dataclasses import replace

import pytest

from benchmarks import count_instructions as counting
from benchmarks.count_instructions import Case, cases, counted, read, triton_version
from benchmarks.machine_code import Instruction, Program, _parse_amdgcn, _parse_sass, idle, likely
from benchmarks.model_of_time import CASES, passes_of, tile_times
from benchmarks.sources import ROOT, fingerprint, text
from diffmax.testing.ahead_of_time import TARGETS

pytestmark = pytest.mark.compiler

GROWTH = 1.05
ROUNDING = 0.05

FAST = (
    Case("rows", "sm90", "bfloat16", 1024, "0.5"),
    Case("attention", "sm90", "bfloat16", 64, "0.5"),
    Case("power", "sm90", "bfloat16", 64, "p2"),
)
# Bytes, by part and size, and dtype where it matters: outside of the loops, or two registers where four warps share a
# multiprocessor with as many
KNOWN_SPILLS = {
    ("dK, dV", 128): 8,
    ("dense pass", 128): 24,
    ("dense pass, dead", 128): 24,
    ("further pass", 128): 24,
    ("output, training", 64): 24,
    ("output, training", 128): 24,
    ("power output, inference", 64): 24,
    ("power update, inference", 32): 40,
    ("power update, of queries", 32): 96,
    ("power update, training", 32): 32,
    ("threshold dK, dV", 64): 32,
    ("threshold dK, dV, dead", 64): 32,
    ("threshold dK, dV", 64, "float32"): 112,
    ("threshold dK, dV, dead", 64, "float32"): 112,
}

SLOW = tuple(case for case in cases() if case not in FAST)


def faults(found, table):
    """What grew, spills more, or is missing; and what fell so far that the table is out of date."""
    grown, fell = [], []
    for line in found:
        budget = table.get(line.key)
        name = f"Triton {line.triton}, {line.target}, {line.part}, {line.dtype} {line.size}, alpha {line.alpha}"
        if budget is None:
            grown.append(f"{name} is not in the table: {line.instructions}")
            continue
        if line.instructions > GROWTH * budget.instructions + ROUNDING:
            grown.append(f"{name}: {line.instructions} instructions per score, budget {budget.instructions}")
        if line.special > GROWTH * budget.special + ROUNDING:
            grown.append(f"{name}: {line.special} special functions per score, budget {budget.special}")
        if line.spilled > budget.spilled:
            grown.append(f"{name}: spills {line.spilled} bytes, budget {budget.spilled}")
        if line.instructions < budget.instructions / GROWTH - ROUNDING:
            fell.append(f"{name}: {line.instructions} instructions per score, the table has {budget.instructions}")
    return grown, fell


def check(case, capsys):
    found, table = counted(case), read()
    of_case = {line.key[:2] + line.key[3:] for line in found}
    if not any(key[:2] + key[3:] in of_case for key in table if key[2] in {line.part for line in found}):
        pytest.skip(f"benchmarks/instructions.json has no lines for Triton {triton_version()} and {case}")
    assert found
    grown, fell = faults(found, table)
    if fell:
        with capsys.disabled():
            print("\nrenew with `python -m benchmarks.count_instructions --write`:", *fell, sep="\n  ")
    assert not grown, "\n".join(grown)


@pytest.mark.parametrize("case", FAST, ids=str)
def test_a_score_takes_no_more_instructions_than_budgeted(case, capsys):
    check(case, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_no_other_case_does(case, capsys):
    if os.environ.get("DIFFMAX_RECOUNT") != "1" and counting.up_to_date(case.operator):
        lines = [line for line in read().values() if line.triton == triton_version()]
        assert any(
            (line.target, line.dtype, line.size, line.alpha) == (case.target, case.dtype, case.size, case.alpha)
            for line in lines
        )
    else:
        check(case, capsys)


@pytest.mark.slow
def test_the_table_is_out_of_date_once_a_kernel_its_launch_code_or_the_counter_changes():
    def after(path, edit=lambda old: old + "\nNEW = 1\n"):
        changed = [file for file in (ROOT / path,) if file.exists()]
        assert changed
        found = {
            operator: fingerprint(operator, read=lambda file: edit(text(file)) if file in changed else text(file))
            for operator in before
        }
        return {operator for operator in before if found[operator] != before[operator]}

    core = "diffmax-core/src/diffmax"
    before = {operator: fingerprint(operator) for operator in ("rows", "attention", "power")}
    triton = "diffmax-core/src/diffmax/kernels/triton"
    assert after(f"{triton}/rows/steps.py") == {"rows"}
    assert after(f"{triton}/power/launch.py") == {"power"}
    assert after(f"{core}/operators/power/cost.py", lambda old: old.replace("CHUNKS = (64,", "CHUNKS = (32,")) == {"power"}
    assert after(f"{core}/operators/power/cost.py") == set()
    assert after(f"{core}/plugin.py", lambda old: old.replace("\nTILE = 64", "\nTILE = 32")) == {"attention"}
    assert after(f"{triton}/common/numerics.py") == set(before)
    assert after(f"{core}/operators/common/numerics.py", lambda old: old.replace("MIN_E = 2.0", "MIN_E = 4.0")) == set(before)
    for late in ("_WHOLE[torch.float32] = 2.0**-12", "_WHOLE.update({})", "if True:\n    MIN_E = 1.0"):
        assert after(f"{core}/operators/common/numerics.py", lambda old, late=late: f"{old}\n{late}\n") == set(before)
    assert after(f"{core}/reference/power.py") == {"power"}
    assert after("benchmarks/machine_code.py") == set(before)
    assert after(f"{triton}/rows/steps.py", lambda old: f"# a comment\n{old}") == set()
    assert after(f"{core}/operators/common/numerics.py") == set()
    assert after(f"{core}/plugin.py", lambda old: old.replace("API_VERSION = (1,", "API_VERSION = (7,")) == set()
    assert after("README.md", lambda old: "") == set()


def test_what_grows_spills_or_is_new_is_a_fault():
    line = next(iter(read().values()))
    table = {line.key: line}
    assert faults([line], table) == ([], [])
    assert len(faults([replace(line, instructions=1.06 * line.instructions + 0.1)], table)[0]) == 1
    assert len(faults([replace(line, special=line.special + 0.2)], table)[0]) == 1
    assert len(faults([replace(line, spilled=line.spilled + 8)], table)[0]) == 1
    assert len(faults([replace(line, alpha="0.123")], table)[0]) == 1
    assert faults([replace(line, instructions=line.instructions / 1.06 - 0.1)], table)[0] == []
    assert len(faults([replace(line, instructions=line.instructions / 1.06 - 0.1)], table)[1]) == 1


def test_plain_variants_on_sm90_do_not_spill():
    plain = [line for line in read().values() if line.target == "sm90" and line.alpha not in ("tensor", "fixed")]
    assert plain

    def known(line):
        return KNOWN_SPILLS.get((line.part, line.size, line.dtype), KNOWN_SPILLS.get((line.part, line.size), 0))

    assert [line for line in plain if line.spilled > known(line)] == []


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_4) ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/               @P2 BRA `(.L_x_2) ;
        /*0040*/                   FSEL R4, R4, -INF , P0 ;
        /*0050*/                   FSEL R5, R5, -INF , P0 ;
.L_x_2:
        /*0060*/                   BRA.U !UP0, `(.L_x_3) ;
        /*0070*/                   FFMA R4, R4, R5, R6 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   IADD3 R9, R9, 0x1, RZ ;
.L_x_3:
        /*00a0*/                   ISETP.NE.AND P3, PT, R9, R2, PT ;
        /*00b0*/               @P3 BRA `(.L_x_1) ;
.L_x_4:
        /*00c0*/                   STG.E [R2.64], R4 ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
"""
AMDGCN = """
_kernel:
; %bb.0:
	s_load_dword s4, s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	s_cbranch_vccnz .LBB0_2
	v_cndmask_b32_e32 v0, v1, v2, vcc
.LBB0_2:
	v_fma_f32 v0, v1, v2, v3
	s_cbranch_scc0 .LBB0_1
.LBB0_3:
	global_store_dword v0, v1, s[2:3]
	s_endpgm
"""


def test_the_way_through_a_loop_skips_masks_and_takes_powers():
    program = Program(*_parse_sass(SASS))
    (loop,) = program.product_loops()
    live, dead = program.turn(loop, likely), program.turn(loop, idle)
    assert (live.instructions, live.special, live.products) == (8, 1, 16 * 8 * 16)
    assert dead.instructions == 5
    assert program.whole().instructions == 4
    assert program.whole().stores == 1


def test_the_way_through_amds_code():
    program = Program(*_parse_amdgcn(AMDGCN))
    (loop,) = program.product_loops()
    assert (program.turn(loop).instructions, program.turn(loop).products) == (4, 32 * 32 * 8)
    assert program.whole().instructions == 4


def test_products_are_read_from_names():
    def products(name):
        return Instruction(name, False, None).products

    assert products("HGMMA.64x64x16.F32.BF16") == 64 * 64 * 16 // 4
    assert products("HMMA.1688.F32.TF32") == 16 * 8 * 8
    assert products("v_mfma_f32_16x16x16_bf16") == 16**3
    assert products("FFMA") == 0


def test_programs_at_a_time_follow_the_scarcest():
    target = TARGETS["sm90"]
    assert counting.programs_at_a_time(target, 4, 128, 0) == 4
    assert counting.programs_at_a_time(target, 4, 32, 100 * 1024) == 2
    assert counting.programs_at_a_time(target, 1, 24, 0) == 32


def test_written_lines_replace_those_of_their_case(tmp_path, monkeypatch):
    line = next(line for line in read().values() if (line.part, line.target) == ("dQ", "sm90"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{counting.BEGIN}\nold\n{counting.END}\nafter\n")
    monkeypatch.setattr(counting, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(counting, "PAGE", page)
    counting.write([line, replace(line, part="gone"), replace(line, part="rows backward")])
    counting.write([replace(line, instructions=1.0)])
    assert [(each["part"], each["instructions"]) for each in json.loads(counting.TABLE.read_text())["lines"]] == [
        ("dQ", 1.0), ("rows backward", line.instructions),
    ]  # fmt: skip
    assert not counting.up_to_date("attention")
    counting.write((), ["attention"])
    assert counting.up_to_date("attention")
    assert not counting.up_to_date("rows")
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    assert "| dQ |" in page.read_text()
    assert "\nold\n" not in page.read_text()


@pytest.mark.parametrize("case", CASES)
def test_the_model_of_time_follows_the_counts(case):
    """Half the instructions take at most the time, and at least half of it."""
    own = [line for line in read().values() if (line.target, line.dtype, line.size) == ("sm90", "bfloat16", 64)]
    lines = {line.part: line.instructions for line in own if line.alpha == passes_of(case).alpha}
    for direction in ("forward", "both"):
        whole = tile_times(lines, passes_of(case))[direction]
        half = tile_times({part: count / 2 for part, count in lines.items()}, passes_of(case))[direction]
        assert 0.5 * whole <= half < whole
