"""Decoding over a cache on NVIDIA GPUs: core's shared kernels."""

from __future__ import annotations

from diffmax.kernels.triton.decoding.launch import Decoder
from diffmax_cuda.rows import own_table, processors

decoder = Decoder(processors, ptx=True, table=own_table)
attention_kvcache = decoder.attention_kvcache
warmup = decoder.warmup
