"""Bytes that a thread of a kernel may spill: what is known, and why it stays. A spill costs time, never a result."""

from __future__ import annotations

# Kernel and target to Triton's versions and bytes
SPILLS: dict[tuple[str, str], dict[str, int]] = {
    # Up to eight registers: the assembler's own choice of a round number, which lets one program more run at a time
    ("attention_bwd_dbias_kernel", "sm90"): {"3.9": 8},
    ("attention_bwd_dkv_kernel", "sm100"): {"3.6": 16, "3.9": 48},
    ("attention_bwd_dkv_kernel", "sm90"): {"3.6": 24},
    ("attention_out_kernel", "gfx1100"): {"3.6": 28},
    ("attention_out_kernel", "sm90"): {"3.6": 80, "3.9": 16},  # with U, outside of the loops; most in packed sequences
    ("attention_solve_kernel", "sm120"): {"3.9": 32},
    ("attention_solve_kernel", "sm80"): {"3.6": 8, "3.9": 24},
    ("kvcache_finish_kernel", "sm86"): {"3.9": 8},
    ("kvcache_finish_kernel", "sm90"): {"3.6": 8},
    ("bisect_rows_kernel", "gfx1100"): {"3.6": 52},
    ("bisect_rows_kernel", "sm90"): {"3.9": 32},
    ("split_finish_kernel", "sm80"): {"3.6": 8},
    ("split_step_kernel", "sm90"): {"3.6": 16},
    # float32 in three products of tf32, whose operands are held in parts: chunks of 16, or 16 warps, do not help on 3.6;
    # and options, which hold tiles of their own, beside heads of 256 entries
    ("attention_out_kernel", "sm100"): {"3.6": 96},
    ("attention_solve_kernel", "sm100"): {"3.6": 600, "3.9": 184},
    # Options besides causality: biases, ALiBi, softcap and dropout hold tiles of their own. Smaller tiles wait for a clock
    ("attention_bwd_dkv_kernel", "sm80"): {"3.6": 72, "3.9": 80},
    ("attention_bwd_dq_kernel", "sm80"): {"3.6": 312, "3.9": 216},
    ("attention_solve_kernel", "gfx942"): {"3.6": 56},
    # gfx11 has 256 registers for a thread and holds whole rows of an operand in them: long heads, or options
    ("attention_solve_kernel", "gfx1100"): {"3.6": 496, "3.9": 48},
    ("kvcache_read_kernel", "gfx1100"): {"3.6": 484, "3.9": 584},
    ("kvcache_start_kernel", "gfx1100"): {"3.6": 5104, "3.9": 3692},
    # Heads of 256 entries in tiles of decoding's one size, which a table can change; page bounds take three products
    ("kvcache_read_kernel", "sm80"): {"3.6": 272},
    ("kvcache_start_kernel", "sm80"): {"3.6": 200, "3.9": 616},
    # Power attention: parts of eight digits are held beside what they are parts of; tiles of 16 monomials wait for a clock
    ("power_bwd_dkv_kernel", "sm100"): {"3.6": 944},
    ("power_bwd_dkv_kernel", "sm120"): {"3.6": 96, "3.9": 136},
    ("power_bwd_dkv_kernel", "sm80"): {"3.9": 16},
    ("power_bwd_dkv_kernel", "sm86"): {"3.6": 80, "3.9": 80},
    ("power_bwd_dkv_kernel", "sm90"): {"3.9": 24},
    ("power_bwd_dq_kernel", "sm90"): {"3.6": 24, "3.9": 48},
    ("power_bwd_dq_kernel", "sm120"): {"3.9": 24},
    ("power_bwd_dq_kernel", "sm80"): {"3.6": 8},
    ("power_out_kernel", "sm120"): {"3.6": 104, "3.9": 176},
    ("power_out_kernel", "sm86"): {"3.6": 464, "3.9": 472},  # float16 for a backward, in three products of tf32
    # and gfx11 holds whole rows of an operand besides
    ("power_bwd_dkv_kernel", "gfx1100"): {"3.6": 3612, "3.9": 3688},
    ("power_bwd_dq_kernel", "gfx1100"): {"3.6": 1792, "3.9": 1272},
    ("power_out_kernel", "gfx1100"): {"3.6": 5028, "3.9": 4744},
    ("power_update_kernel", "gfx1100"): {"3.6": 4392, "3.9": 4288},
    # Threshold attention: float32 in three products of tf32, above all heads of 256; three operands beside a wide sum
    ("threshold_bwd_dbias_kernel", "sm90"): {"3.9": 16},
    ("threshold_bwd_dkv_kernel", "sm100"): {"3.6": 96, "3.9": 104},
    ("threshold_bwd_dkv_kernel", "sm86"): {"3.6": 752, "3.9": 616},
    ("threshold_bwd_dkv_kernel", "sm90"): {"3.6": 48, "3.9": 112},
    ("threshold_bwd_dkv_kernel", "sm80"): {"3.6": 56, "3.9": 64},
    ("threshold_bwd_dq_kernel", "sm80"): {"3.6": 16, "3.9": 48},
    ("threshold_bwd_dq_kernel", "sm86"): {"3.6": 1496, "3.9": 1816},
    ("threshold_bwd_dq_kernel", "sm120"): {"3.9": 48},
    ("threshold_out_kernel", "sm86"): {"3.6": 912, "3.9": 1240},
    ("threshold_out_kernel", "sm90"): {"3.6": 48, "3.9": 24},
    ("threshold_out_kernel", "sm80"): {"3.9": 8},
    # and gfx11 holds whole rows of an operand
    ("threshold_bwd_dbias_kernel", "gfx1100"): {"3.6": 904, "3.9": 900},
    ("threshold_bwd_dkv_kernel", "gfx1100"): {"3.6": 996, "3.9": 1020},
    ("threshold_bwd_dq_kernel", "gfx1100"): {"3.6": 992, "3.9": 1648},
    ("threshold_out_kernel", "gfx1100"): {"3.9": 432},
}


def allowed(version: str, kernel: str, target: str) -> int:
    """0 where nothing is listed."""
    return SPILLS.get((kernel, target), {}).get(".".join(version.split(".")[:2]), 0)
