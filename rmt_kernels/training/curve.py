"""The picture of a run: how it learned, and how far its memory carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmt_kernels.training.checkpoints import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rmt_kernels.training.trainer import Result

__all__ = ["draw_curve", "need_matplotlib"]

_TOKEN, _ANSWER, _CUT, _LOSS, _INK, _QUIET = "#2f6db3", "#3f9b5b", "#b07aa1", "#f28e2b", "#333a45", "#8a919c"


def need_matplotlib() -> None:
    """Raise ImportError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError(
            "the picture of a run needs matplotlib: pip install matplotlib, or leave it out with --no-picture"
        ) from None


def draw_curve(result: Result, path: str | Path) -> None:
    """Draw loss and accuracy over the steps, and the last accuracies over the number of segments, into a file (PNG).

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.9), layout="constrained", dpi=120)
    losses, accuracies, reach = figure.subplots(1, 3)
    config = result.config
    figure.suptitle(
        f"{config.task}, {config.model}: trained on up to {config.segments} segments of {config.tokens} tokens",
        color=_INK, fontweight="bold",
    )  # fmt: skip
    lines = [line for line in result.log if line["kind"] == "train"]
    _loss(losses, lines)
    _accuracy(accuracies, lines, result)
    _reach(reach, result)
    for ax in (losses, accuracies, reach):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.tick_params(colors=_INK)
    write(Path(path), lambda file: figure.savefig(file, format="png"))


def _loss(ax: Axes, lines: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    ax.plot(steps, losses, color=_LOSS, alpha=0.35, linewidth=0.9)
    ax.plot(steps, _smooth(losses), color=_LOSS, linewidth=1.8, label="loss")
    ax.set(xlabel="step", ylabel="loss of a token, nats", title="loss while training")
    ax.set_ylim(bottom=0)
    counts = ax.twinx()
    counts.step(steps, [line["segments"] for line in lines], where="post", color=_QUIET, alpha=0.6, linewidth=0.9)
    counts.set_ylabel("segments of a step", color=_QUIET)
    counts.tick_params(colors=_QUIET)
    counts.yaxis.set_major_locator(MaxNLocator(integer=True))
    counts.set_ylim(bottom=0)
    counts.spines[["top"]].set_visible(False)


def _accuracy(ax: Axes, lines: list[dict[str, Any]], result: Result) -> None:
    ax.plot(
        [line["step"] for line in lines], _smooth([line["accuracy"] for line in lines]), color=_TOKEN, alpha=0.5,
        linewidth=1.2, label="tokens, training",
    )  # fmt: skip
    found = [line for line in result.log if line["kind"] == "evaluation"]
    steps = [line["step"] for line in found]
    if found:
        ax.plot(steps, [line["token"] for line in found], "o-", color=_TOKEN, markersize=3.5, label="tokens, held out")
    if found and result.task.unit == "answer":
        ax.plot(
            steps, [line["answer"] for line in found], "o-", color=_ANSWER, markersize=3.5,
            label="whole answers, held out",
        )  # fmt: skip
    ax.axhline(result.chance.token, color=_QUIET, linestyle=":", label="tokens, best guess without memory")
    ax.set(xlabel="step", title=f"accuracy, {result.config.segments} segments held out", ylim=(-0.03, 1.03))
    ax.legend(fontsize=7.5, frameon=False)


def _reach(ax: Axes, result: Result) -> None:
    task, config = result.task, result.config
    chance = result.chance.token if task.unit == "token" else result.chance.answer
    for carry, colour, label in ((True, _ANSWER, "memory carried"), (False, _CUT, "memory cut")):
        found = sorted((e for e in result.evaluations if e.carry is carry), key=lambda e: e.segments)
        if found:
            numbers = [e.segments for e in found]
            ax.plot(numbers, [e.accuracy(task) for e in found], "o-", color=colour, markersize=5, label=label)
    ax.axhline(chance, color=_QUIET, linestyle=":", label="best guess without memory")
    trained = [line["segments"] for line in result.log if line["kind"] == "train"]
    ax.axvspan(min(trained), max(trained), color=_QUIET, alpha=0.13, linewidth=0, label="trained on")
    numbers = sorted({e.segments for e in result.evaluations} | {config.segments})
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers, [str(number) for number in numbers])
    ax.minorticks_off()
    what = "tokens" if task.unit == "token" else "whole answers"
    ax.set(xlabel="segments", title=f"accuracy of {what}, in the end", ylim=(-0.03, 1.03))
    ax.legend(fontsize=7.5, frameon=False)


def _smooth(values: list[float]) -> list[float]:
    """Each value with those around it: a running mean over a twentieth of all."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
