"""Modules: the row operator, multi-head attention, and add-ons of recent papers for any attention."""

from diffmax.nn.adaptive import AdaptiveLengthScale, ASEntmax
from diffmax.nn.affine import AffineScale
from diffmax.nn.attention import DiffmaxAttention
from diffmax.nn.bisect import DiffmaxBisectModule
from diffmax.nn.differential import DiffAttention, DiffAttentionV2
from diffmax.nn.differential_layouts import convert_diff_attention
from diffmax.nn.elastic import Elastic
from diffmax.nn.gate import HeadGate
from diffmax.nn.groups import param_groups
from diffmax.nn.lazy import LazyAttention
from diffmax.nn.length import LengthScale
from diffmax.nn.position import RelativePositionBias
from diffmax.nn.power import PowerAttention, PowerAttentionState
from diffmax.nn.schedule import AlphaSchedule
from diffmax.nn.sink import Sink

__all__ = [
    "ASEntmax",
    "AdaptiveLengthScale",
    "AffineScale",
    "AlphaSchedule",
    "DiffAttention",
    "DiffAttentionV2",
    "DiffmaxAttention",
    "DiffmaxBisectModule",
    "Elastic",
    "HeadGate",
    "LazyAttention",
    "LengthScale",
    "PowerAttention",
    "PowerAttentionState",
    "RelativePositionBias",
    "Sink",
    "convert_diff_attention",
    "param_groups",
]
