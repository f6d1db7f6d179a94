"""Training the published systems on the papers' kind of tasks: tasks, trainer, evaluation, checkpoints, recipes."""

from rmt_kernels.training.catalogue import TASKS, make_task
from rmt_kernels.training.checkpoints import CheckpointError
from rmt_kernels.training.config import TrainConfig
from rmt_kernels.training.curve import draw_curve
from rmt_kernels.training.evaluation import Evaluation, evaluate
from rmt_kernels.training.recipes import RECIPES, configure
from rmt_kernels.training.tasks import Batch, Chance, Task
from rmt_kernels.training.trainer import Result, load_run, train

__all__ = [
    "RECIPES",
    "TASKS",
    "Batch",
    "Chance",
    "CheckpointError",
    "Evaluation",
    "Result",
    "Task",
    "TrainConfig",
    "configure",
    "draw_curve",
    "evaluate",
    "load_run",
    "make_task",
    "train",
]
