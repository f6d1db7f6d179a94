"""All tasks by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rmt_kernels.training.equations import Quadratic
from rmt_kernels.training.facts import Detect, Reasoning, Remember
from rmt_kernels.training.language import Source, Text
from rmt_kernels.training.symbols import Associative, Copy, Reverse
from rmt_kernels.training.tasks import Task

__all__ = ["TASKS", "make_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Copy, Reverse, Associative, Quadratic, Remember, Detect, Reasoning, Text, Source)
}  # fmt: skip


def make_task(name: str, **options: Any) -> Task:
    """The task that ``name`` stands for, with its options.

    Raises:
        TypeError, ValueError: an unknown name or option, or a value that is not accepted.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {list(TASKS)}, got {name!r}")
    accepted = [field.name for field in fields(TASKS[name])]
    unknown = [option for option in options if option not in accepted]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no option of the task {name!r}; it takes {accepted}")
    return TASKS[name](**options)
