"""Threshold attention in Triton: `launch.ThresholdOperator` launches it."""
