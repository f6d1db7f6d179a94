"""Memory Transformer's forms within one segment: what it costs that tokens see one another through memory alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.systems.comparisons import Ordering, dots, ordering_goals, spread
from benchmarks.systems.goals import Goal
from benchmarks.systems.studies import Entry, Results, Study, values
from benchmarks.tables import Table

__all__ = ["FORMS", "STUDY", "TASKS"]

TASKS = ("text", "copy")
FORMS = {
    "memory_transformer": "MemTransformer",
    "mem_ctrl": "MemCtrl",
    "mem_ctrl_shared": "MemCtrl, shared",
    "mem_bottleneck": "MemBottleneck",
}
_UNITS = {"text": ("bits", "bits a masked byte"), "copy": ("token", "accuracy of an answer's tokens")}
_SMALL: dict[str, Any] = {
    "segments": 1, "curriculum": "constant", "evaluate": (1,), "evaluate_every": 0, "samples": 1024, "width": 32,
    "heads": 4, "layers": 2, "memory": 4, "batch": 32, "learning_rate": 4e-3, "warmup": 50, "decay": "cosine",
}  # fmt: skip
_TASK: dict[str, dict[str, Any]] = {
    "text": {"tokens": 48, "steps": 500},
    "copy": {"tokens": 26, "length": 12, "steps": 400},
}


def entries(size: str) -> list[Entry]:
    """Every form on every task."""
    return [Entry(f"{task}-{model}", label, task, model, _options(size, task))
            for task in TASKS for model, label in FORMS.items()]  # fmt: skip


def _options(size: str, task: str) -> dict[str, Any]:
    one = {"segments": 1, "curriculum": "constant", "evaluate": (1,)}
    if size == "paper":
        return one | ({"tokens": 50} if task == "copy" else {})
    if size == "quick":
        return {**one, "evaluate_every": 0}
    return {**_SMALL, **_TASK[task]}


def _tasks(results: Results) -> list[str]:
    return [task for task in TASKS if any(run["task"] == task for run in results["runs"])]


def tables(results: Results) -> list[Table]:
    """A column a task."""
    tasks = _tasks(results)
    if not tasks:
        return []
    rows = [
        [label, *(spread(values(results, f"{task}-{model}", 1, _UNITS[task][0])) for task in tasks)]
        for model, label in FORMS.items()
    ]
    return [Table(
        "One segment, read from both sides", ["", *(f"{task}: {_UNITS[task][1]}" for task in tasks)], rows,
        f"Mean of {len(results['seeds'])} seeds, in brackets the lowest and the highest. "
        + " ".join(_described(results, task) for task in tasks),
    )]  # fmt: skip


def _described(results: Results, task: str) -> str:
    config = next(run["config"] for run in results["runs"] if run["task"] == task)
    what = {"text": "text: 15 % of the bytes are hidden, lower is better", "copy": "copy: higher is better"}[task]
    model = config["model_options"]
    return (
        f"{what}; {config['tokens']} tokens, {model['memory']} memory rows, {model['layers']} layers of width "
        f"{model['width']}, {config['steps']} steps of {config['batch']} samples."
    )


def goals(results: Results) -> list[Goal]:
    """MemBottleneck is the worse one."""
    found = []
    for task in _tasks(results):
        ordering = Ordering(f"{task}-memory_transformer", f"{task}-mem_bottleneck", _UNITS[task][0])
        for goal in ordering_goals(results, [ordering], 1):
            found.append(Goal(f"{task}: {goal.what}", goal.values, 0.0, strict=True, paired=True, digits=4))
    return found


def draw(results: Results, path: Path) -> bool:
    """A panel a task."""
    panels: Sequence[tuple[str, str, dict[str, list[float | None]]]] = [
        (task, _UNITS[task][1], {label: values(results, f"{task}-{model}", 1, _UNITS[task][0])
                                 for model, label in FORMS.items()})
        for task in _tasks(results)
    ]  # fmt: skip
    return dots(panels, path)


STUDY = Study(
    "bottleneck", "Memory Transformer and its bottleneck", entries, tables, goals, draw,
    "Each form of the Memory Transformer: a dot a seed, a line their mean",
)  # fmt: skip
