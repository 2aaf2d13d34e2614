"""States from what the chunks add to them: each is the one before, decayed, and its own."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "steps", "chunks", "first_chunk"])
def power_scan_kernel(
    state_ptr, decay_ptr, slots, steps, chunks, first_chunk,
    SLOT: tl.constexpr, BLOCK: tl.constexpr, GATES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """state[c + 1] += decay[first_chunk + c] state[c] in place for c = 0 .. steps - 1; REVERSE: state[c] += decay state[c + 1].

    Grid: (B * H_kv * blocks of a state,). decay (B * H_kv, chunks) has one number for each chunk of the call.
    """
    BLOCKS: tl.constexpr = (SLOT + BLOCK - 1) // BLOCK
    index = tl.program_id(0)
    head = (index // BLOCKS).to(tl.int64)
    at = index % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = at < SLOT
    state_ptr += head * slots * SLOT + at
    if REVERSE:
        carried = tl.load(state_ptr + tl.cast(steps, tl.int64) * SLOT, mask=inside)
    else:
        carried = tl.load(state_ptr, mask=inside)
    for step in range(steps):
        if REVERSE:
            chunk = tl.cast(steps - 1 - step, tl.int64)
            here = state_ptr + chunk * SLOT
        else:
            chunk = tl.cast(step, tl.int64)
            here = state_ptr + (chunk + 1) * SLOT
        if GATES:
            carried *= tl.load(decay_ptr + head * chunks + first_chunk + chunk)
        carried += tl.load(here, mask=inside)
        tl.store(here, carried, mask=inside)
