"""Result files as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only, no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, ScalarFormatter

from benchmarks.gpu.targets import Record, Results, kernel_ratio, records_of, seconds
from benchmarks.labels import push_apart
from benchmarks.plots import write
from benchmarks.recurrence import plots as recurrence
from benchmarks.recurrence.on_gpu import collect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Ours in red and orange; what computes the same in colours; what computes something else in grey.
_STYLES = {
    "ours": ("rmt_kernels, Triton", "#c8372d", "-"),
    "cuda": ("rmt_kernels, CUDA", "#e07b1f", "-"),
    "flex": ("FlexAttention", "#2f6db3", "-"),
    "split_cudnn": ("three-call split, cuDNN", "#1d7a5f", "-"),
    "split_flash": ("three-call split, flash", "#6dab3c", "-"),
    "dense": ("SDPA, dense mask", "#a8772a", "-"),
    "dense_cudnn": ("SDPA, dense mask, cuDNN", "#d3a44a", "-"),
    "naive": ("naive PyTorch", "#7d5ba6", "-"),
    "plain_cudnn": ("plain causal, cuDNN *", "#6b7280", "--"),
    "plain_flash": ("plain causal, flash *", "#a3a9b3", "--"),
    "plain": ("plain causal, default *", "#c3c8d0", "--"),
}
_LINE = "#333a45"
_OWN = ("ours", "cuda")


def _spread_labels(ax: Axes, ends: Sequence[tuple[str, float]], right: float) -> None:
    """Names beside the ends of the lines, pushed apart where they would overlap, each with a thin line to its end."""
    low, high = ax.get_ylim()
    apart = 0.058 * (high - low)
    places = push_apart([y for _, y in ends], apart, low, high)
    for (name, y), place in zip(sorted(ends, key=lambda end: end[1]), places, strict=True):
        label, colour, _ = _STYLES[name]
        ax.annotate(
            label, (right, y), xytext=(right * 1.14, place), textcoords="data", va="center", fontsize=8,
            color=colour, fontweight="bold" if name in _OWN else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def _series(records: Sequence[Record], which: str, memory: int, head_dim: int) -> dict[str, list[tuple[int, Record]]]:
    found: dict[str, list[tuple[int, Record]]] = {}
    for record in records:
        sizes = record.get("sizes")
        if not sizes or not record.get("tflops") or record["contestant"] not in _STYLES:
            continue
        if (record["pass"], record["memory_rows"], sizes["head_dim"]) == (which, memory, head_dim):
            found.setdefault(record["contestant"], []).append((sizes["tokens"], record))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def _panels(records: Sequence[Record], which: str) -> list[tuple[int, int]]:
    found = {
        (r["memory_rows"], r["sizes"]["head_dim"])
        for r in records
        if r["pass"] == which and "sizes" in r and r.get("tflops")
    }
    return sorted(found)


def _device(results: Results) -> str:
    gpu = results.get("environment", {}).get("gpu", {})
    return str(gpu.get("name", gpu.get("torch_name", "GPU")))


def _rates(results: Results, stage: str, which: str) -> Figure | None:
    records = records_of(results, stage)
    panels = _panels(records, which)
    if not panels:
        return None
    memories, head_dims = sorted({m for m, _ in panels}), sorted({d for _, d in panels})
    figure, axes = plt.subplots(
        len(memories), len(head_dims), figsize=(0.6 + 6.4 * len(head_dims), 0.9 + 4.1 * len(memories)), squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    for i, memory in enumerate(memories):
        for j, head_dim in enumerate(head_dims):
            ax, series = axes[i][j], _series(records, which, memory, head_dim)
            if not series:
                ax.set_axis_off()
                continue
            lengths = sorted({tokens for points in series.values() for tokens, _ in points})
            ends = []
            for name in [name for name in _STYLES if name in series][::-1]:
                _, colour, line = _STYLES[name]
                x, y = zip(*[(tokens, record["tflops"]) for tokens, record in series[name]], strict=True)
                ax.plot(
                    x, y, line, marker="o", markersize=5 if name in _OWN else 3.5, color=colour,
                    linewidth=2.8 if name in _OWN else 1.4, zorder=3 if name in _OWN else 2,
                )  # fmt: skip
                if x[-1] == lengths[-1]:
                    ends.append((name, y[-1]))
            ax.set_xscale("log", base=2)
            ax.set_ylim(bottom=0)
            ax.set_xlim(lengths[0] * 0.88, lengths[-1] * (2.9 if len(lengths) > 1 else 2.0))
            ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
            ax.minorticks_off()
            ax.tick_params(labelbottom=True)
            ax.set_title(f"head_dim {head_dim}, {memory} memory rows", fontsize=11)
            ax.set_xlabel("tokens in the segment")
            if j == 0:
                ax.set_ylabel("visible TFLOP/s")
            ax.grid(True, axis="y", alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            _spread_labels(ax, ends, lengths[-1])
    what = "Backward alone" if which == "backward" else "Forward"
    figure.suptitle(
        f"{what}, rmt_decoder, bf16, 16,384 tokens in a call, {_device(results)}\n"
        "kernel time, L2 flushed; * no memory rules: the ceiling, its own entries counted",
        fontsize=11,
    )
    return figure


def _ratios(results: Results) -> Figure | None:
    shown = (("flex",), ("dense", "dense_cudnn"), ("split_flash",), ("split_cudnn",))
    titles = ("FlexAttention", "SDPA, dense mask", "three-call split, flash", "three-call split, cuDNN")
    passes = [w for w in ("forward", "backward") if _panels(records_of(results, w), w)]
    if not passes:
        return None
    figure, axes = plt.subplots(
        len(passes),
        len(shown),
        figsize=(15.5, 0.9 + 4.3 * len(passes)),
        squeeze=False,
        layout="constrained",
        sharey="row",
    )
    for i, which in enumerate(passes):
        records = records_of(results, which)
        cases: dict[str, dict[str, Record]] = {}
        for record in records:
            if record["pass"] == which and "sizes" in record:
                sizes = record["sizes"]
                key = f"D={sizes['head_dim']} M={record['memory_rows']} T={sizes['tokens']}"
                cases.setdefault(key, {})[record["contestant"]] = record

        def order(key: str) -> tuple[int, ...]:
            return tuple(int(part.split("=")[1]) for part in key.split())

        keys = sorted(cases, key=order, reverse=True)
        for j, names in enumerate(shown):
            ax = axes[i][j]
            for y, key in enumerate(keys):
                ratio = kernel_ratio(cases[key], names)
                if ratio is None:
                    kind = next((cases[key][n]["kind"] for n in names if n in cases[key]), "")
                    ax.text(0.03, y, kind if kind != "right" else "", va="center", fontsize=7, color="#8b8f98")
                    continue
                ax.barh(y, ratio, color=_STYLES["ours"][1] if ratio >= 1 else "#a3a9b3", height=0.72)
                ax.text(
                    ratio, y, f" {ratio:.2f}", va="center", fontsize=7.5, zorder=3,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
            ax.axvline(1.0, color=_LINE, linewidth=1, zorder=2)
            ax.set_yticks(range(len(keys)), keys, fontsize=7.5)
            ax.set_title(f"{which}: against {titles[j]}", fontsize=9.5)
            ax.set_xlim(left=0)
            ax.spines[["top", "right"]].set_visible(False)
            ax.margins(x=0.16)
    figure.suptitle(f"Triton backend: times faster, bf16, rmt_decoder, {_device(results)} (grey: slower)", fontsize=12)
    return figure


def _short(results: Results) -> Figure | None:
    every = [r for r in records_of(results, "short") if "sizes" in r and r.get("kernel")]
    records = [r for r in every if r["sizes"]["head_dim"] == 64]
    panels = [
        (which, what) for which in ("forward", "backward") for what in ("kernel",)
        if any(r["pass"] == which for r in records)
    ]  # fmt: skip
    if any((r.get("calls") or {}).get("enqueue") for r in records if r["pass"] == "forward"):
        panels.append(("forward", "enqueue"))
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(0.6 + 5.6 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    for ax, (which, what) in zip(axes[0], panels, strict=True):
        lengths = sorted({r["sizes"]["tokens"] for r in records if r["pass"] == which})
        for name, (label, colour, line) in _STYLES.items():
            points = sorted(
                (r["sizes"]["tokens"], time * 1e6)
                for r in records
                if r["pass"] == which and r["contestant"] == name and (time := seconds(r, what)) is not None
            )
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(
                    x, y, line, marker="o", markersize=4, color=colour, label=label,
                    linewidth=2.8 if name in _OWN else 1.4, zorder=3 if name in _OWN else 2,
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.minorticks_off()
        ax.set_title(f"{which}: {'kernel time' if what == 'kernel' else 'host time of a call'}", fontsize=11)
        ax.set_xlabel("tokens in the segment")
        ax.set_ylabel("µs")
        ax.grid(True, axis="y", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for ax in axes[0]:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"Short segments: batch 1, 16 heads x 64, 16 memory rows, bf16, {_device(results)} (* no memory rules)",
        fontsize=11,
    )
    return figure


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Write the pictures that the results allow to ``folder``; their captions and files."""
    figures = {
        "Forward: visible TFLOP/s": ("forward", _rates(results, "forward", "forward")),
        "Backward: visible TFLOP/s": ("backward", _rates(results, "backward", "backward")),
        "Times faster": ("ratios", _ratios(results)),
        "Short segments": ("short", _short(results)),
        **recurrence.draw(collect(results), _device(results)),
    }
    return write(figures, folder)
