"""A rank that ends or stays away: every other rank raises, says which one it is, and does not wait longer than the timeout."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

from tests import fresh, ranks

SIZE, LOST, TIMEOUT, ROLL_CALL = 3, 1, 2.0, 1.0
ROOT = Path(__file__).parents[1]
CODE = """
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests import test_faults
test_faults.all_ranks(Path("{folder}"))
"""
WAYS = ("backward", "exchange", "gather", "late")


def test_a_rank_that_ends_or_stays_away_is_named_on_every_other_rank(tmp_path):
    fresh.python(CODE.format(folder=tmp_path), ROOT, seconds=200, **ranks.loopback())
    for way in WAYS:
        for rank in {0, 1, 2} - {LOST}:
            found = json.loads((tmp_path / f"{way}{rank}").read_text())
            assert found["kind"] == "RuntimeError", found
            what = f"a message needs every rank of the group, got no answer from rank {LOST} of {SIZE} within 1 s\n"
            assert what in found["what"], found
            assert "see the logs of rank 1, then start the group again" in found["what"]
            assert found["cause"], "torch's own error is the cause"
            assert found["seconds"] <= 10 * (TIMEOUT + ROLL_CALL), found  # where cores are shared; gloo's own default is 1800


def _rank(way, rank, folder):
    """One rank of a group in which rank LOST ends, or does not come, in one way."""
    import torch
    import torch.distributed as dist

    import diffmax
    from diffmax.distributed import attention_context_parallel, diffmax_bisect_sharded
    from diffmax.operators.common import messages

    torch.manual_seed(0)
    messages.ROLL_CALL_SECONDS = ROLL_CALL
    store = dist.FileStore(str(folder / f"store-{way}"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=100))
    x = torch.randn(4, 10, requires_grad=True)
    q, k, v = (torch.randn(1, 3, 6, 4, requires_grad=True) for _ in range(3))

    def call(group, ends):
        with diffmax.use_backend("cpu"):
            if way in ("exchange", "gather"):
                method = "all_gather" if way == "gather" else "ulysses"
                y = attention_context_parallel(q, k, v, group=group, method=method)
            else:
                y = diffmax_bisect_sharded(x, 0.5, group=group)
        if ends:
            os._exit(0)
        y.sum().backward()

    call(dist.group.WORLD, False)  # imports and connects, with time
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    dist.barrier()
    lost = rank == LOST
    if lost and way == "late":
        time.sleep(2 * (TIMEOUT + ROLL_CALL))
        os._exit(0)
    start = time.monotonic()
    found = {"kind": "none", "what": "", "cause": ""}
    try:
        call(group, lost)
    except BaseException as error:  # noqa: BLE001 - the test says what it must be
        found = {"kind": type(error).__name__, "what": str(error), "cause": str(error.__cause__ or "")}
    (folder / f"{way}{rank}").write_text(json.dumps({**found, "seconds": time.monotonic() - start}))


def all_ranks(folder):
    import torch._dynamo  # noqa: F401 - what the first message imports, once for all ranks, which are forks of this process

    import diffmax.distributed  # noqa: F401

    ways = {}
    for way in WAYS:
        for rank in range(SIZE):
            child = os.fork()
            if not child:
                try:
                    _rank(way, rank, folder)
                finally:
                    os._exit(0)
            ways[child] = way
    for child in ways:
        os.waitpid(child, 0)
