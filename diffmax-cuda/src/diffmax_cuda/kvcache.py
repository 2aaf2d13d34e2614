"""Decoding over a cache on NVIDIA GPUs: core's shared kernels."""

from __future__ import annotations

from diffmax.kernels.triton.kvcache_launch import Decoder
from diffmax_cuda.rows import processors

decoder = Decoder(processors, ptx=True)
attention_kvcache = decoder.attention_kvcache
