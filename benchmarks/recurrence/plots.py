"""A result as a picture: memory against the number of segments, and what it costs in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only, no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.labels import push_apart
from benchmarks.recurrence.limits import memory_of, rounds_of, seconds_of
from benchmarks.recurrence.model import Sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save"]

Results = dict[str, Any]
# Ours in reds; stock checkpoints in blues and greens; full back-propagation in grey.
_STYLES = {
    "loop": ("full BPTT", "#6b7280", "-"),
    "full": ("full BPTT, ours", "#a3a9b3", "--"),
    "truncated": ("truncated, k = 2 *", "#7d5ba6", ":"),
    "layer": ("checkpoint per layer", "#1d7a5f", "-"),
    "checkpoint": ("checkpoint per segment", "#2f6db3", "-"),
    "checkpoint_clone": ("checkpoint, memory cloned", "#7fb0e0", "-"),
    "replay_attention": ("Replay, attention kept", "#e0863a", "-"),
    "replay_keep4": ("Replay(keep=4)", "#d3a44a", "-"),
    "replay_offload": ("Replay(offload=True)", "#e3a29c", "--"),
    "driver": ("replay_step", "#8c1d18", "-"),
    "driver_graphs": ("replay_step, CUDA graphs", "#4a0f0c", "-"),
    "replay": ("Replay()", "#c8372d", "-"),
}
_LINE = "#333a45"


def _ends(ax: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Names beside the ends of lines on a logarithmic axis, pushed apart where they would overlap."""
    low, high = (math.log10(limit) for limit in ax.get_ylim())
    apart = 0.047 * (high - low)
    right = ax.get_xlim()[1]
    order = sorted(ends, key=lambda end: end[2])
    places = push_apart([math.log10(y) for _, _, y in order], apart, low + apart / 2)
    for (name, x, y), place in zip(order, places, strict=True):
        label, colour, _ = _STYLES[name]
        ax.annotate(
            label, (x, y), xytext=(right * 1.08, 10**place), textcoords="data", va="center", fontsize=8.5,
            color=colour, fontweight="bold" if name == "replay" else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "alpha": 0.6},
        )  # fmt: skip


def _bytes(value: float, _: Any = None) -> str:
    mib = value / 2**20
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:.3g} MiB" if mib >= 0.1 else f"{mib * 1024:.3g} KiB"


def _gap(ax: Axes, series: dict[str, dict[int, int]]) -> None:
    """How many times less than full back-propagation Replay() takes, where both were measured last."""
    both = sorted(set(series.get("loop", {})) & set(series.get("replay", {})))
    if not both or len(both) < 2:
        return
    at = both[-2] if len(both) > 3 else both[-1]  # clear of the names where there is room
    high, low = series["loop"][at], series["replay"][at]
    ax.annotate(
        "", (at, low * 1.06), xytext=(at, high / 1.06), zorder=2,
        arrowprops={"arrowstyle": "<->", "color": _STYLES["replay"][1], "linewidth": 1},
    )  # fmt: skip
    ax.text(
        at, (high * low) ** 0.5, f"{high / low:.0f}x less", ha="center", va="center", fontsize=9, zorder=5,
        color=_STYLES["replay"][1], bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _memory(ax: Axes, results: Results) -> None:
    series = {name: points for name in _STYLES if (points := memory_of(results, name))}
    ends, values = [], []
    for name, points in series.items():
        _, colour, line = _STYLES[name]
        ours = name == "replay"
        ax.plot(
            list(points), list(points.values()), line, marker="o", markersize=5 if ours else 3.5, color=colour,
            linewidth=2.8 if ours else 1.5, zorder=4 if ours else 3,
        )  # fmt: skip
        ends.append((name, max(points), points[max(points)]))
        values += list(points.values())
    numbers = sorted({n for points in series.values() for n in points})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(numbers, [str(n) for n in numbers])
    ax.set_xlim(numbers[0] * 0.88, numbers[-1] * 1.12)
    ax.set_ylim(min(values) * 0.7, max(values) * 1.35)
    ax.yaxis.set_major_formatter(FuncFormatter(_bytes))
    ax.minorticks_off()
    ax.grid(True, which="major", alpha=0.25)
    ax.set_xlabel("segments back-propagated through")
    ax.set_title("Peak activations of a training step", fontsize=11, loc="left")
    _gap(ax, series)
    _ends(ax, ends)


def _time(ax: Axes, results: Results) -> None:
    base = seconds_of(results, "loop") or seconds_of(results, "full")
    assert base is not None
    names = [name for name in _STYLES if seconds_of(results, name)]
    names.sort(key=lambda name: seconds_of(results, name) or 0.0, reverse=True)
    for y, name in enumerate(names):
        colour = _STYLES[name][1]
        ratios = sorted(seconds / base for seconds in rounds_of(results, name))
        middle = (seconds_of(results, name) or 0.0) / base
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        ax.barh(y, middle, color=colour, height=0.68, alpha=0.9, zorder=2)
        ax.hlines(y, low, high, color=_LINE, linewidth=1.2, zorder=3)
        ax.text(
            max(middle, high) + 0.02, y, f"{middle:.2f}", va="center", fontsize=8.5, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    ax.set_yticks(range(len(names)), [_STYLES[name][0] for name in names], fontsize=8.5)
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set_color(_STYLES[name][1])
        tick.set_fontweight("bold" if name == "replay" else "normal")
    ax.axvline(1.0, color=_LINE, linewidth=1, zorder=1)
    forward = seconds_of(results, "forward")
    if forward is not None:
        ax.axvline(1 + forward / base, color=_LINE, linewidth=1, linestyle="--", zorder=1)
        ax.text(
            1 + forward / base, len(names) - 0.42, "one more forward pass", ha="center", va="bottom", fontsize=8,
            color=_LINE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    ax.set_xlim(0, 1.18 * max((seconds_of(results, name) or 0.0) / base for name in names))
    ax.set_ylim(-0.6, len(names) - 0.1)
    ax.set_xlabel("time of a step, full BPTT = 1")
    segments = next(r["segments"] for r in results["time"] if r["contestant"] == names[0])
    ax.set_title(f"Its time, {segments} segments", fontsize=11, loc="left")


def _figure(results: Results, where: str) -> Figure | None:
    panels = []
    if any(memory_of(results, name) for name in _STYLES):
        panels.append(_memory)
    if seconds_of(results, "loop") or seconds_of(results, "full"):
        panels.append(_time)
    if not panels:
        return None
    ratios = {_memory: 1.15, _time: 1.0}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(0.4 + 5.9 * len(panels), 4.7), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [ratios[panel] for panel in panels]},
    )  # fmt: skip
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.spines[["top", "right"]].set_visible(False)
        panel(ax, results)
    sizes = Sizes(**results["sizes"])
    note = "; * other gradients: they reach back two segments" if memory_of(results, "truncated") else ""
    figure.suptitle(
        f"{sizes.layers} layers of width {sizes.width}, segments of {sizes.tokens} tokens + 2 x {sizes.memory} memory, "
        f"batch {sizes.batch}, {results['dtype']}, {where}\n(beside parameters, gradients and inputs{note})",
        fontsize=9.5,
    )
    return figure


def draw(results: Results, where: str) -> dict[str, tuple[str, Any]]:
    """The figures that the results allow, as ``{caption: (name of a file, figure)}``; ``where`` names the machine."""
    return {"Training through many segments: memory and time": ("recurrence", _figure(results, where))}


def save(results: Results, where: str, file: Path) -> bool:
    """Write the picture alone, whether there is one. Without matplotlib's version the same picture is the same file."""
    figure = _figure(results, where)
    if figure is None:
        return False
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
