"""Attention for recurrent-memory transformers, as kernels."""

from rmt_kernels._version import __version__
from rmt_kernels.attention import Explanation, explain, segment_attention
from rmt_kernels.layout import Region, Rule, SegmentLayout
from rmt_kernels.modules import RMTAttention
from rmt_kernels.recurrence import RecurrentMemory, Replay, ReplayError, Truncate, replay_step
from rmt_kernels.reference import reference_attention
from rmt_kernels.relative import Relative, alibi_slopes

__all__ = [
    "Explanation",
    "RMTAttention",
    "RecurrentMemory",
    "Region",
    "Relative",
    "Replay",
    "ReplayError",
    "Rule",
    "SegmentLayout",
    "Truncate",
    "__version__",
    "alibi_slopes",
    "explain",
    "reference_attention",
    "replay_step",
    "segment_attention",
]
