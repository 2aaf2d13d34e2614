"""Fused attention in Triton: `launch_forward.AttentionOperator` launches it."""
