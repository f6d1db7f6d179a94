"""What a table is: systems, each trained and evaluated with every seed, and what is to be seen in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.systems.goals import Goal
from benchmarks.tables import Table
from rmt_kernels.training import TrainConfig, configure

__all__ = ["SIZES", "Entry", "Results", "Study", "evaluations", "label_of", "seeds_of", "values"]

Results = dict[str, Any]
SIZES = ("small", "paper", "quick")


@dataclass(frozen=True)
class Entry:
    """One system on one task, with its options as :func:`rmt_kernels.training.configure` takes them."""

    key: str  # of its records and its directories
    label: str  # for people
    task: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, size: str, seed: int, device: str) -> TrainConfig:
        """The run with a seed. One thread a run: results then don't depend on how many share the machine."""
        return configure(self.task, self.model, size, **self.options, seed=seed, device=device, threads=1)


@dataclass(frozen=True)
class Study:
    """A table's name and title, its runs, and what is made of their records."""

    name: str
    title: str
    entries: Callable[[str], Sequence[Entry]]  # of a size
    tables: Callable[[Results], Sequence[Table]]
    goals: Callable[[Results], Sequence[Goal]]
    draw: Callable[[Results, Path], bool]  # a picture, False where there is nothing to draw
    caption: str  # of the picture


def seeds_of(results: Results) -> list[int]:
    """The seeds asked for."""
    return list(results["seeds"])


def label_of(results: Results, key: str) -> str:
    """An entry's name for people."""
    return next((str(run["label"]) for run in results["runs"] if run["entry"] == key), key)


def evaluations(results: Results, key: str, segments: int, carry: bool = True) -> list[dict[str, Any] | None]:
    """An entry's evaluation at so many segments, for each seed; None where there is none."""
    found = {
        run["seed"]: evaluation
        for run in results["runs"] if run["entry"] == key
        for evaluation in run["evaluations"] if (evaluation["segments"], evaluation["carry"]) == (segments, carry)
    }  # fmt: skip
    return [found.get(seed) for seed in seeds_of(results)]


def values(results: Results, key: str, segments: int, what: str, carry: bool = True) -> list[float | None]:
    """One number of :func:`evaluations`: ``"token"``, ``"answer"`` or ``"bits"``."""
    return [None if found is None else float(found[what]) for found in evaluations(results, key, segments, carry)]
