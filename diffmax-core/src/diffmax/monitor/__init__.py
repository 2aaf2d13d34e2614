"""Metrics during training: `diffmax_bisect_monitored` for one call, `Monitor` for all calls in a model."""

from diffmax.monitor.logs import Log
from diffmax.monitor.model import Monitor
from diffmax.monitor.rows import diffmax_bisect_monitored

__all__ = ["Log", "Monitor", "diffmax_bisect_monitored"]
