"""Result records as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only, no display needed
import matplotlib.pyplot as plt

from benchmarks.measure import RMS_TOLERANCE
from benchmarks.tables import Results, median, pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_COLOURS = {"ours": "#c8372d", "dense": "#2f6db3", "split": "#3f9b5b", "plain": "#8b8f98", "naive": "#a8772a"}
_LABELS = {
    "ours": "rmt_kernels",
    "dense": "SDPA, dense mask",
    "split": "three-call split",
    "plain": "plain causal SDPA*",
    "naive": "naive",
}


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Names at the ends of lines on a logarithmic axis, pushed apart where they would overlap."""
    low, high = (math.log10(y) for y in ax.get_ylim())
    apart, previous = 0.055 * (high - low), -math.inf
    for name, x, y in sorted(ends, key=lambda end: end[2]):
        at = max(math.log10(y), previous + apart)
        previous = at
        ax.annotate(
            _LABELS[name], (x, y), xytext=(x * 1.12, 10**at), textcoords="data", va="center", fontsize=9,
            color=_COLOURS[name], fontweight="bold" if name == "ours" else "normal", annotation_clip=False,
        )  # fmt: skip


def _against_length(results: Results, what: str) -> Figure | None:
    records = results.get("lengths", [])
    panels = list(dict.fromkeys((r["dtype"], r["mode"]) for r in records))
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 5.4 * len(panels), 4.6), squeeze=False, layout="constrained"
    )
    for ax, (dtype, mode) in zip(axes[0], panels, strict=True):
        ends = []
        for name in _COLOURS:
            points = []
            for record in records:
                if (record["dtype"], record["mode"], record["contestant"]) == (dtype, mode, name):
                    seconds = median(record)
                    value = seconds and seconds * 1e3 if what == "time" else (record["peak_bytes"] or 0) / 2**20
                    if value:
                        points.append((record["sizes"]["tokens"], value))
            if points:
                points.sort()
                x, y = zip(*points, strict=True)
                ax.plot(x, y, marker="o", markersize=4, color=_COLOURS[name], linewidth=2.6 if name == "ours" else 1.5)
                ends.append((name, x[-1], y[-1]))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        lengths = sorted({r["sizes"]["tokens"] for r in records if (r["dtype"], r["mode"]) == (dtype, mode)})
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.minorticks_off()
        ax.set_xlim(lengths[0] * 0.85, lengths[-1] * 2.3)
        ax.set_title(f"{dtype}, {mode}", fontsize=11)
        ax.set_xlabel("tokens in the segment (+ 2 x 16 memory)")
        ax.set_ylabel("ms" if what == "time" else "peak MiB allocated during the call")
        ax.grid(True, which="major", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        _label_ends(ax, ends)
        wrong = [r for r in records if (r["dtype"], r["mode"]) == (dtype, mode) and r["match"] is False]
        for i, name in enumerate(dict.fromkeys(r["contestant"] for r in wrong)):
            ax.text(
                0.98, 0.03 + 0.06 * i, f"{_LABELS[name]}: wrong result, no time", transform=ax.transAxes, ha="right",
                color=_COLOURS[name], fontsize=9,
            )  # fmt: skip
    title = "Time" if what == "time" else "Memory"
    note = "* no memory rules" if what == "time" else "* no memory rules; masks, built beforehand, are not counted"
    figure.suptitle(f"{title} against length: rmt_decoder, batch 1, 12 heads x 64\n({note})", fontsize=11)
    return figure


def _ratios(results: Results) -> Figure | None:
    found = [(ours, best) for ours, best in pairs(results) if median(ours) and median(best)]
    if not found:
        return None
    panels = list(dict.fromkeys((ours["dtype"], ours["mode"]) for ours, _ in found))
    cases = list(dict.fromkeys(ours["case"] for ours, _ in found))[::-1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 + 3.4 * len(panels), 1.4 + 0.3 * len(cases)), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for ax, panel in zip(axes[0], panels, strict=True):
        for ours, best in found:
            if (ours["dtype"], ours["mode"]) == panel and best is not None:
                ratio = best["seconds"]["median"] / ours["seconds"]["median"]
                ax.barh(cases.index(ours["case"]), ratio, color=_COLOURS["ours" if ratio >= 1 else "plain"], height=0.7)
                ax.text(ratio, cases.index(ours["case"]), f" {ratio:.2f}", va="center", fontsize=8)
        ax.axvline(1.0, color="#333a45", linewidth=1)
        ax.set_yticks(range(len(cases)), cases, fontsize=8)
        ax.set_title(f"{panel[0]}, {panel[1]}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.15)
    figure.suptitle("Times faster than the fastest stock composition that computes the same", fontsize=12)
    return figure


def _errors(results: Results) -> Figure | None:
    records = [r for r in [*results.get("published", []), *results.get("target", [])] if r["errors"]]
    if not records:
        return None
    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(1.0 + 4.6 * len(dtypes), 4.2), squeeze=False, layout="constrained"
    )
    names = ("out", "grad query", "grad key", "grad value")
    shown = ("ours", "dense", "split", "naive")
    tolerances = {str(dtype).removeprefix("torch."): limit for dtype, limit in RMS_TOLERANCE.items()}
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        for j, contestant in enumerate(shown):
            points = [
                (names.index(name) + 0.17 * (j - 1.5), error["rms"])
                for record in records
                if (record["dtype"], record["contestant"]) == (dtype, contestant)
                for name, error in record["errors"].items()
            ]
            if points:
                x, y = zip(*points, strict=True)
                ax.scatter(x, y, s=16, color=_COLOURS[contestant], alpha=0.7, label=_LABELS[contestant], linewidths=0)
        limit = tolerances[dtype]
        ax.hlines([limit, 2 * limit], [-0.5, 0.5], [0.5, 3.5], color="#333a45", linestyles="--", linewidth=1)
        ax.set_yscale("log")
        ax.set_xticks(range(4), names)
        ax.set_title(dtype, fontsize=11)
        ax.set_ylabel("RMS error / RMS of the result")
        ax.grid(True, axis="y", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    figure.suptitle("Errors against float64, every case; dashed: what ours may have", fontsize=12)
    return figure


def draw(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write the pictures that the results allow to ``folder``; their captions and files."""
    figures = {
        "Time against length": ("length_time", _against_length(results, "time")),
        "Memory against length": ("length_memory", _against_length(results, "memory")),
        "Published cases": ("published", _ratios(results)),
        "Errors against float64": ("errors", _errors(results)),
    }
    return write(figures, folder)


def write(figures: dict[str, tuple[str, Figure | None]], folder: Path) -> dict[str, Path]:
    """Write figures, given by captions and names of files, to ``folder``; the captions and files of those there are."""
    files = {}
    for caption, (name, figure) in figures.items():
        if figure is not None:
            files[caption] = folder / f"{name}.png"
            figure.savefig(files[caption], dpi=120)
            plt.close(figure)
    return files
