"""The recurrence over segments: the wrapper, how gradients go back through it, and its explicit driver."""

from rmt_kernels.recurrence.driver import replay_step
from rmt_kernels.recurrence.graphs import ReplayGraphs
from rmt_kernels.recurrence.losses import SampleLoss, SegmentLoss, TokenLoss
from rmt_kernels.recurrence.policies import Replay, ReplayError, Truncate
from rmt_kernels.recurrence.schedules import Curriculum, RandomNumber
from rmt_kernels.recurrence.segments import Segments, crop
from rmt_kernels.recurrence.wrapper import RecurrentMemory, RecurrentOutput

__all__ = [
    "Curriculum",
    "RandomNumber",
    "RecurrentMemory",
    "RecurrentOutput",
    "Replay",
    "ReplayError",
    "ReplayGraphs",
    "SampleLoss",
    "SegmentLoss",
    "Segments",
    "TokenLoss",
    "Truncate",
    "crop",
    "replay_step",
]
