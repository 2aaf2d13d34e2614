"""Bytes that a thread of a kernel may spill: what is known, and why it stays. A spill costs time, never a result."""

from __future__ import annotations

# Kernel and target to Triton's versions and bytes
SPILLS: dict[tuple[str, str], dict[str, int]] = {
    # Up to a dozen registers: the assembler's own choice of a round number, which lets one program more run at a time
    ("attention_bwd_dkv_kernel", "sm100"): {"3.6": 8},
    ("attention_bwd_dkv_kernel", "sm90"): {"3.6": 48},
    ("attention_out_kernel", "sm90"): {"3.6": 72, "3.9": 16},  # with U, outside of the loops; most in packed sequences
    ("attention_solve_kernel", "sm120"): {"3.6": 16, "3.9": 24},
    ("kvcache_finish_kernel", "sm86"): {"3.9": 8},
    ("kvcache_finish_kernel", "sm90"): {"3.6": 8},
    ("kvcache_finish_kernel", "sm120"): {"3.6": 16},
    ("split_finish_kernel", "sm80"): {"3.6": 8},
    ("split_step_kernel", "sm90"): {"3.6": 16},
    ("bisect_rows_kernel", "sm90"): {"3.9": 32},
    ("bisect_rows_kernel", "gfx1100"): {"3.6": 52},
    # float32 in three products of tf32, whose operands are held in parts: chunks of 16, or 16 warps, do not help on 3.6;
    # and options, which hold tiles of their own, beside heads of 256 entries
    ("attention_solve_kernel", "sm80"): {"3.6": 384, "3.9": 376},
    ("attention_out_kernel", "sm80"): {"3.6": 32},
    ("attention_out_kernel", "sm100"): {"3.6": 72},
    ("attention_solve_kernel", "sm100"): {"3.6": 16},
    ("attention_solve_kernel", "sm86"): {"3.6": 440, "3.9": 440},
    ("attention_solve_kernel", "sm90"): {"3.6": 592, "3.9": 472},
    ("attention_bwd_dbias_kernel", "sm100"): {"3.9": 24},
    # Options besides causality: biases, ALiBi, softcap and dropout hold tiles of their own. Smaller tiles wait for a clock
    ("attention_bwd_dq_kernel", "sm90"): {"3.6": 144, "3.9": 24},
    # gfx11 has 256 registers for a thread and holds whole rows of an operand in them: long heads, or options
    ("attention_bwd_dkv_kernel", "gfx1100"): {"3.6": 836, "3.9": 832},
    ("attention_out_kernel", "gfx1100"): {"3.6": 756, "3.9": 756},
    ("attention_bwd_dq_kernel", "gfx1100"): {"3.6": 500, "3.9": 520},
    ("attention_bwd_dbias_kernel", "gfx1100"): {"3.6": 208},
    ("attention_solve_kernel", "gfx1100"): {"3.6": 540, "3.9": 232},
    ("kvcache_read_kernel", "gfx1100"): {"3.6": 1232, "3.9": 1140},
    ("kvcache_start_kernel", "gfx1100"): {"3.6": 2244, "3.9": 1636},
    ("kvcache_values_kernel", "gfx1100"): {"3.6": 1008, "3.9": 1128},
    # Heads of 256 entries in tiles of decoding's one size, which a table can change; page bounds take three products
    ("kvcache_read_kernel", "sm80"): {"3.6": 304, "3.9": 8},
    ("kvcache_read_kernel", "sm100"): {"3.6": 272, "3.9": 136},
    ("kvcache_read_kernel", "sm90"): {"3.9": 8},
    ("kvcache_start_kernel", "sm100"): {"3.6": 216, "3.9": 304},
    ("kvcache_start_kernel", "sm90"): {"3.9": 40},
    ("kvcache_values_kernel", "sm100"): {"3.6": 376, "3.9": 440},
    ("kvcache_values_kernel", "sm80"): {"3.6": 376, "3.9": 368},
    ("kvcache_values_kernel", "sm90"): {"3.6": 360, "3.9": 392},
    ("kvcache_start_kernel", "gfx942"): {"3.6": 272, "3.9": 36},
    # Power attention: parts of eight digits are held beside what they are parts of; tiles of 16 monomials wait for a clock
    ("power_bwd_dkv_kernel", "sm100"): {"3.6": 184, "3.9": 112},
    ("power_bwd_dkv_kernel", "sm120"): {"3.6": 96, "3.9": 136},
    ("power_bwd_dkv_kernel", "sm80"): {"3.6": 56},
    ("power_bwd_dkv_kernel", "sm86"): {"3.6": 80, "3.9": 80},
    ("power_bwd_dkv_kernel", "sm90"): {"3.6": 80, "3.9": 152},
    ("power_bwd_dq_kernel", "sm120"): {"3.9": 24},
    ("power_bwd_dq_kernel", "sm80"): {"3.6": 32, "3.9": 24},
    ("power_bwd_dq_kernel", "sm100"): {"3.6": 24, "3.9": 80},
    ("power_out_kernel", "sm120"): {"3.6": 104, "3.9": 176},
    ("power_out_kernel", "sm86"): {"3.9": 72},  # float16 for a backward, in three products of tf32
    ("power_out_kernel", "sm80"): {"3.6": 40, "3.9": 40},
    ("power_update_kernel", "sm100"): {"3.6": 216, "3.9": 256},
    ("power_update_kernel", "sm90"): {"3.6": 128},
    # and gfx11 holds whole rows of an operand besides
    ("power_bwd_dkv_kernel", "gfx1100"): {"3.6": 5472, "3.9": 5304},
    ("power_bwd_dq_kernel", "gfx1100"): {"3.6": 2996, "3.9": 2944},
    ("power_out_kernel", "gfx1100"): {"3.6": 328, "3.9": 360},
    # Threshold attention: float32 in three products of tf32, above all heads of 256; three operands beside a wide sum
    ("threshold_bwd_dbias_kernel", "sm90"): {"3.9": 16},
    ("threshold_bwd_dbias_kernel", "sm100"): {"3.6": 8},
    ("threshold_bwd_dkv_kernel", "sm100"): {"3.6": 64, "3.9": 152},
    ("threshold_bwd_dkv_kernel", "sm86"): {"3.6": 752, "3.9": 616},
    ("threshold_bwd_dkv_kernel", "sm90"): {"3.6": 768, "3.9": 800},
    ("threshold_bwd_dkv_kernel", "sm80"): {"3.6": 56, "3.9": 64},
    ("threshold_bwd_dq_kernel", "sm80"): {"3.6": 16, "3.9": 48},
    ("threshold_bwd_dq_kernel", "sm86"): {"3.6": 1496, "3.9": 1816},
    ("threshold_bwd_dq_kernel", "sm120"): {"3.9": 48},
    ("threshold_bwd_dq_kernel", "sm100"): {"3.9": 72},
    ("threshold_bwd_dq_kernel", "sm90"): {"3.6": 1584, "3.9": 1904},
    ("threshold_out_kernel", "sm86"): {"3.6": 912, "3.9": 1240},
    ("threshold_out_kernel", "sm90"): {"3.6": 944, "3.9": 1360},
    ("threshold_out_kernel", "sm80"): {"3.9": 8},
    ("threshold_out_kernel", "sm100"): {"3.9": 32},
    # and gfx11 holds whole rows of an operand
    ("threshold_bwd_dbias_kernel", "gfx1100"): {"3.6": 60, "3.9": 116},
    ("threshold_bwd_dkv_kernel", "gfx1100"): {"3.6": 4440, "3.9": 4488},
    ("threshold_bwd_dq_kernel", "gfx1100"): {"3.6": 3108, "3.9": 3696},
    ("threshold_out_kernel", "gfx1100"): {"3.6": 2444, "3.9": 2780},
}


def allowed(version: str, kernel: str, target: str) -> int:
    """0 where nothing is listed."""
    return SPILLS.get((kernel, target), {}).get(".".join(version.split(".")[:2]), 0)
