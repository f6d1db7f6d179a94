"""Accuracy against the number of segments: how far each system's memory carries.

Information is in the first segment, the answer in the last, noise between them. All systems see the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.systems.goals import Goal, differences
from benchmarks.systems.studies import Entry, Results, Study, seeds_of, values
from benchmarks.tables import Table
from rmt_kernels.models import MODELS
from rmt_kernels.training import TrainConfig
from rmt_kernels.training.tasks import IGNORE

__all__ = ["CHANCE", "STUDY", "SYSTEMS", "TASKS", "tables"]

TASKS = ("copy", "associative")
SYSTEMS = {
    "none": "no memory",
    "memory_transformer": "MemTransformer",
    "transformer_xl": "Transformer-XL",
    "rmt": "RMT",
    "rmt_transformer_xl": "RMT on Tr-XL",
    "memformer": "Memformer",
}
_SEGMENTS = (1, 2, 4, 8, 16, 32)
_TRAINED = 5
# Steps, as a share of RMT's: systems that hand nothing on only have one segment to learn, Transformer-XL a few.
_SHARE = {"none": 0.35, "memory_transformer": 0.35, "transformer_xl": 0.5}
_CUT, CHANCE = "RMT, memory cut", "best guess without memory"
_COLOURS = {
    "none": "#8a919c", "memory_transformer": "#b08d57", "transformer_xl": "#2f6db3", "rmt": "#c8372d",
    "rmt_transformer_xl": "#7d5ba6", "memformer": "#1d7a5f",
}  # fmt: skip
_INK = "#333a45"

_SMALL: dict[str, Any] = {
    "heads": 4, "layers": 2, "segments": _TRAINED, "curriculum": "random-grow", "batch": 32, "warmup": 50,
    "decay": "cosine", "evaluate_every": 0, "samples": 192,
}  # fmt: skip
# Weights that decay this fast carry a memory over more segments than they were trained on.
_TASK: dict[str, dict[str, Any]] = {
    "copy": {
        "length": 6, "tokens": 14, "width": 32, "memory": 6, "steps": 1200, "learning_rate": 4e-3, "weight_decay": 0.5,
    },
    # A token has to find the one before it, which ALiBi gives the first layer and learned positions give it late.
    "associative": {
        "pairs": 3, "keys": 8, "values": 8, "tokens": 16, "width": 64, "memory": 8, "steps": 1500,
        "learning_rate": 2e-3, "weight_decay": 1.0, "positions": "alibi",
    },
}  # fmt: skip
# What suits these better than RMT's options. One layer of Memformer is two: its encoder's and its decoder's.
_SYSTEM: dict[str, dict[str, Any]] = {
    "memformer": {"layers": 1, "temperature": 0.25, "learning_rate": 3e-3},
    "rmt_transformer_xl": {"learning_rate": 2e-3},
}


def entries(size: str) -> list[Entry]:
    """Every system on every task."""
    return [Entry(f"{task}-{model}", label, task, model, _options(size, task, model))
            for task in TASKS for model, label in SYSTEMS.items()]  # fmt: skip


def _options(size: str, task: str, model: str) -> dict[str, Any]:
    common: dict[str, Any] = {"evaluate": _SEGMENTS, "cut": model == "rmt"}
    if size == "paper":
        return {**common, "segments": _TRAINED}
    if size == "quick":
        return {**common, "segments": 2, "evaluate_every": 0}
    chosen = {**common, **_SMALL, **_TASK[task], **_SYSTEM.get(model, {})}
    chosen["steps"] = int(_SHARE.get(model, 1.0) * chosen["steps"])
    kind = MODELS[model]
    if "memory" not in kind.uses:
        del chosen["memory"]
    if chosen.get("positions") not in kind.choices.get("positions", ()):
        chosen.pop("positions", None)
    return chosen


def _numbers(results: Results) -> list[int]:
    return sorted({evaluation["segments"] for run in results["runs"] for evaluation in run["evaluations"]})


def _tasks(results: Results) -> list[str]:
    there = {run["task"] for run in results["runs"]}
    return [task for task in TASKS if task in there]


def _of(results: Results, task: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["task"] == task]


def _series(results: Results, task: str, what: str) -> Iterator[tuple[str, str, bool, dict[int, list[float]]]]:
    """Each line: system, its name, whether memory is carried, and its values by number of segments."""
    for model, label in SYSTEMS.items():
        for carry in (True, False) if model == "rmt" else (True,):
            points = {}
            for number in _numbers(results):
                found = values(results, f"{task}-{model}", number, what, carry)
                known = [value for value in found if value is not None]
                if known:
                    points[number] = known
            if points:
                yield model, label if carry else _CUT, carry, points


def _cell(found: Sequence[float] | None) -> str:
    if not found:
        return "-"
    mean = sum(found) / len(found)
    return f"{mean:.3f}" if max(found) - min(found) < 5e-4 else f"{mean:.3f} ({min(found):.3f} … {max(found):.3f})"


def tables(results: Results) -> list[Table]:
    """One for each task."""
    made = []
    for task in _tasks(results):
        runs, numbers = _of(results, task), _numbers(results)
        config = next((run["config"] for run in runs if run["model"] == "rmt"), runs[0]["config"])
        rows = [
            [label, *(_cell(points.get(number)) for number in numbers), _cell(whole.get(4))]
            for (_, label, _, points), (_, _, _, whole) in zip(
                _series(results, task, "token"), _series(results, task, "answer"), strict=True
            )
        ]  # fmt: skip
        chance = runs[0]["chance"]
        rows.append([CHANCE, *[f"{chance['token']:.3f}"] * len(numbers), f"{chance['answer']:.3f}"])
        made.append(Table(
            f"{task}: accuracy of an answer's tokens against the number of segments",
            ["system", *(str(number) for number in numbers), "whole answers, 4"], rows,
            f"Mean of {_count(results)}, in brackets the lowest and the highest. {_described(results, task, config)}",
        ))  # fmt: skip
    return made


def _count(results: Results) -> str:
    number = len(seeds_of(results))
    return f"{number} seed{'s' * (number != 1)}"


def _described(results: Results, task: str, config: dict[str, Any]) -> str:
    options, model = config["task_options"], config["model_options"]
    steps: dict[int, list[str]] = {}
    for run in _of(results, task):
        names = steps.setdefault(run["config"]["steps"], [])
        if run["label"] not in names:
            names.append(run["label"])
    told = "; ".join(f"{', '.join(names)}: {number}" for number, names in sorted(steps.items()))
    task_said = ", ".join(f"{name} {value}" for name, value in options.items())
    twice = [run["config"]["model_options"].get("layers") for run in _of(results, task) if run["model"] == "memformer"]
    apart = f" Memformer: {twice[0]} in its encoder, {twice[0]} in its decoder." if twice else ""
    return (
        f"Trained on up to {config['segments']} segments of {config['tokens']} tokens ({task_said or 'defaults'}); "
        f"{model.get('layers')} layers of width {model.get('width')}, {model.get('memory', 0)} memory rows, batch "
        f"{config['batch']}. Steps: {told}.{apart}"
    )


def goals(results: Results) -> list[Goal]:
    """Of the issue: recall over 4 segments and over 8, chance with the memory cut, and that others are worse."""
    found = []
    for task in _tasks(results):

        def one(model: str, number: int, what: str = "answer", carry: bool = True, task: str = task) -> Any:
            return tuple(values(results, f"{task}-{model}", number, what, carry))

        chance, labels = _chance(results, task), _labels(results, task)
        noise = 3 * math.sqrt(chance * (1 - chance) / max(1, labels))
        found += [
            Goal(f"{task}: RMT over 4 segments, whole answers", one("rmt", 4), 0.99),
            Goal(f"{task}: RMT over 8 segments, whole answers", one("rmt", 8), 0.95),
            Goal(
                f"{task}: RMT over 4 segments, memory cut, tokens (chance {chance:.4f}, and 3 standard errors)",
                one("rmt", 4, "token", carry=False), chance + noise, at_most=True, by="mean",
            ),
        ]  # fmt: skip
        for model in ("none", "memory_transformer", "transformer_xl"):
            found.append(
                Goal(
                    f"{task}: RMT better than {SYSTEMS[model]} over 4 segments, tokens",
                    differences(one("rmt", 4, "token"), one(model, 4, "token")), 0.0, strict=True, paired=True,
                )
            )  # fmt: skip
    return found


def _chance(results: Results, task: str) -> float:
    return float(_of(results, task)[0]["chance"]["token"])


def _labels(results: Results, task: str) -> int:
    """How many labels the mean over seeds is taken of."""
    found = 0
    for run in _of(results, task):
        if run["model"] == "rmt":
            config = TrainConfig.from_dict(run["config"])
            drawn = config.make_task().batch(1, config.segments, config.tokens, seed=0, step=0)
            found += int((drawn.labels != IGNORE).sum()) * run["evaluations"][0]["samples"]
    return found


def draw(results: Results, path: Path) -> bool:
    """Accuracy against the number of segments, a panel a task: means, and the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")  # files only, no display needed
    import matplotlib.pyplot as plt

    tasks = _tasks(results)
    if not tasks:
        return False
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.9 * len(tasks), 4.4), squeeze=False, layout="constrained", sharey=True
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        numbers = _numbers(results)
        trained = max(run["config"]["segments"] for run in _of(results, task))
        ax.axvspan(min(numbers), trained, color="#8a919c", alpha=0.12, linewidth=0)
        ax.text(trained * 0.96, 1.045, "trained on", ha="right", va="center", fontsize=8.5, color="#8a919c")
        for model, label, carry, points in _series(results, task, "token"):
            x = list(points)
            means = [sum(found) / len(found) for found in points.values()]
            colour, line = _COLOURS[model], "-" if carry else ":"
            ax.fill_between(
                x, [min(found) for found in points.values()], [max(found) for found in points.values()],
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
            ax.plot(
                x, means, line, marker="o", markersize=4, color=colour, linewidth=2.4 if model == "rmt" else 1.5,
                label=label,
            )  # fmt: skip
        chance = _chance(results, task)
        ax.axhline(chance, color=_INK, linestyle="--", linewidth=0.9)
        ax.annotate("chance", (1, chance), xytext=(2, 3), textcoords="offset points", fontsize=8, color=_INK)
        ax.set_xscale("log", base=2)
        ax.set_xticks(numbers, [str(number) for number in numbers])
        ax.minorticks_off()
        ax.set(xlabel="segments", ylim=(-0.03, 1.08), xlim=(numbers[0] * 0.93, numbers[-1] * 1.07))
        ax.set_title(task, loc="left", fontsize=11, fontweight="bold", color=_INK)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("accuracy of an answer's tokens")
    names = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names, loc="outside lower center", ncols=2 * len(tasks), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


STUDY = Study(
    "accuracy", "Accuracy against the number of segments", entries, tables, goals, draw,
    "Accuracy against the number of segments for each system: mean and range over seeds",
)  # fmt: skip
