"""Attention over a cache in Triton: `launch.Decoder` launches it."""
