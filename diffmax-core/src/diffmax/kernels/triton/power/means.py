"""What the backward needs of each query, once: the mean of dP, and factors."""

import triton
import triton.language as tl

from diffmax.kernels.triton.power.tiles import load_tile, place_head


@triton.jit(do_not_specialize=["grad_b", "grad_h", "grad_row", "heads", "group", "blocks", "length", "n_keys"])
def power_bwd_means_kernel(
    grad_ptr, out_ptr, total_ptr, since_ptr, weight_ptr, inverse_ptr, factor_ptr,
    grad_b, grad_h, grad_row, heads, group, blocks, length, n_keys,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ALIGNED: tl.constexpr, GATES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """weight = -sum grad * out, inverse = 1 / total, factor = inverse * since.  Grid: (B * H * blocks,).

    A query whose weights are all 0 propagates no gradient: its inverse is 0.
    """
    index = tl.program_id(0)
    of_head = (index // blocks).to(tl.int64)
    batch, head = of_head // heads, of_head % heads
    query = index % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = query < length
    at = of_head * length + query
    head_grad, grad_row = place_head(grad_ptr, batch, head, grad_b, grad_h, grad_row, ALIGNED)
    grad = load_tile(head_grad, query, grad_row, inside, VALUE_DIM, BLOCK_V)
    out = load_tile(out_ptr + of_head * length * VALUE_DIM, query, VALUE_DIM, inside, VALUE_DIM, BLOCK_V)
    total = tl.load(total_ptr + at, mask=inside, other=0.0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    tl.store(weight_ptr + at, -tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1), mask=inside)
    tl.store(inverse_ptr + at, inverse, mask=inside)
    if GATES:
        of_kv = batch * (heads // group) + head // group
        inverse *= tl.load(since_ptr + of_kv * n_keys + n_keys - length + query, mask=inside, other=0.0)
    tl.store(factor_ptr + at, inverse, mask=inside)
