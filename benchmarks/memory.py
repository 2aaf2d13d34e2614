"""Peak memory of one call beyond its inputs.

torch's profiler records each allocation and release of the CPU allocator with its size and time, those inside an operator
too; the peak is the largest running sum. The result itself counts, so softmax needs 1 tensor. This is exact and repeatable,
where the growth of a process's resident set depends on what the allocator kept from earlier calls. Not seen: memory that
does not come from torch's allocator, such as stack arrays of compiled code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result  # after the recording: until then the result is part of the peak
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some builds of the profiler write a line to file descriptor 2 at each start and stop, in the middle of a progress bar."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
