"""A result as a picture: tokens a second and peak memory of a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display needed
import matplotlib.pyplot as plt

from benchmarks.huggingface.limits import find

__all__ = ["save"]

_OURS, _STOCK, _LINE = "#c8372d", "#8b94a3", "#333a45"


def save(results: dict[str, Any], where: str, path: Path) -> None:
    """Draw every model's contestants that have a time; a result without the training part is not drawn."""
    shown = {
        model: [record for record in find(results, "train", model) if record["seconds"] and record["peak_bytes"]]
        for model in results["models"]
    }
    shown = {model: records for model, records in shown.items() if records}
    if not shown:
        return
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        heights = [len(records) for records in shown.values()]
        figure, grid = plt.subplots(
            len(shown), 2, squeeze=False, figsize=(10, 1.1 + 0.42 * sum(heights)), layout="constrained",
            gridspec_kw={"height_ratios": heights}, sharey="row",
        )  # fmt: skip
        for axes, (model, records) in zip(grid, shown.items(), strict=True):
            colours = [_OURS if record["label"].startswith("ours") else _STOCK for record in records]
            labels = [record["label"] for record in records]
            parts = (
                (axes[0], "tokens/s, more is better", [record["tokens_per_second"] for record in records]),
                (axes[1], "peak MiB of a step, less is better", [r["peak_bytes"] / 2**20 for r in records]),
            )
            for ax, title, values in parts:
                bars = ax.barh(labels, values, color=colours, height=0.65)
                texts = [f"{value:,.0f}  ({value / values[0]:.2f}x)" for value in values]
                ax.bar_label(bars, texts, padding=4, color=_LINE, fontsize=8.5)
                ax.set(xlim=(0, 1.3 * max(values)), title=f"{model}: {title}")
                ax.tick_params(axis="y", length=0)
            axes[0].invert_yaxis()
        figure.suptitle(
            f"A training step of RMT around models of transformers, {results['dtype']}, {where}", fontsize=9
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)
