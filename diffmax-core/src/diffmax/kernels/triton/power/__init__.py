"""Power attention in Triton: `launch.PowerOperator` launches it."""
