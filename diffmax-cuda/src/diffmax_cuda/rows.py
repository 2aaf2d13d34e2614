"""The row operator on NVIDIA GPUs: core's shared kernels with this vendor's tables."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffmax.kernels.triton.common.tuning import Table
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax_cuda import configs


@lru_cache
def table(device: torch.device) -> Table:
    """The tuning table for a device."""
    return configs.table(*torch.cuda.get_device_capability(device))


@lru_cache
def own_table(device: torch.device) -> Table | None:
    """The tuning table of the device's own architecture."""
    return configs.tables().get("{}.{}".format(*torch.cuda.get_device_capability(device)))


@lru_cache
def processors(device: torch.device) -> int:
    """Its number of multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


operator = RowOperator(table, processors, ptx=True)
bisect = operator.bisect
bisect_backward = operator.bisect_backward
warmup = operator.warmup
