"""The row operator on AMD GPUs: core's shared kernels with this vendor's tables."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffmax.kernels.triton.common.tuning import Table
from diffmax.kernels.triton.rows.launch import RowOperator
from diffmax_rocm import configs


@lru_cache
def table(device: torch.device) -> Table:
    """The tuning table for a device."""
    return configs.table(torch.cuda.get_device_properties(device).gcnArchName)


@lru_cache
def own_table(device: torch.device) -> Table | None:
    """The tuning table of the device's own architecture."""
    return configs.tables().get(str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0])


@lru_cache
def processors(device: torch.device) -> int:
    """Its number of compute units."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


operator = RowOperator(table, processors, ptx=False)
bisect = operator.bisect
bisect_backward = operator.bisect_backward
warmup = operator.warmup
