"""Tables with one number a contestant: its mean and range over seeds, and the orderings, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.systems.goals import Goal, differences
from benchmarks.systems.studies import Results, label_of, values

__all__ = ["Ordering", "dots", "ordering_goals", "spread"]

_INK, _POINT, _MEAN = "#333a45", "#2f6db3", "#c8372d"


@dataclass(frozen=True)
class Ordering:
    """One contestant better than another: fewer bits, or more of ``"token"`` or ``"answer"``."""

    better: str  # keys of entries
    worse: str
    what: str = "bits"


def ordering_goals(results: Results, orderings: Sequence[Ordering], segments: int) -> list[Goal]:
    """The advantage of the better one, above 0 with each seed; only what was asked for in this size."""
    found, known = [], {name.rpartition("-")[0] for name in results["planned"]}
    for ordering in orderings:
        if not {ordering.better, ordering.worse} <= known:
            continue
        better = values(results, ordering.better, segments, ordering.what)
        worse = values(results, ordering.worse, segments, ordering.what)
        gain = differences(worse, better) if ordering.what == "bits" else differences(better, worse)
        unit = {"bits": "bits fewer", "token": "accuracy more"}[ordering.what]
        found.append(Goal(
            f"{label_of(results, ordering.better)} before {label_of(results, ordering.worse)}, {unit}", gain, 0.0,
            strict=True, paired=True, digits=4,
        ))  # fmt: skip
    return found


def spread(found: Sequence[float | None], digits: int = 3) -> str:
    """Mean, and in brackets lowest and highest."""
    known = [value for value in found if value is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    return f"{mean:.{digits}f}" + (f" ({min(known):.{digits}f} … {max(known):.{digits}f})" if len(known) > 1 else "")


def dots(panels: Sequence[tuple[str, str, dict[str, list[float | None]]]], path: Path) -> bool:
    """A row a contestant: the seeds as dots, their mean as a line. A panel: title, what its axis says, values."""
    import matplotlib

    matplotlib.use("Agg")  # files only, no display needed
    import matplotlib.pyplot as plt

    panels = [panel for panel in panels if any(v is not None for found in panel[2].values() for v in found)]
    if not panels:
        return False
    most = max(len(panel[2]) for panel in panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.6 + 4.6 * len(panels), 1.2 + 0.34 * most), squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, (title, axis, rows) in zip(axes[0], panels, strict=True):
        for place, found in enumerate(rows.values()):
            known = [value for value in found if value is not None]
            if known:
                ax.plot(known, [place] * len(known), "o", color=_POINT, alpha=0.6, markersize=6, zorder=3)
                mean = sum(known) / len(known)
                ax.plot([mean, mean], [place - 0.28, place + 0.28], color=_MEAN, linewidth=2.2, zorder=4)
        ax.set_yticks(range(len(rows)), list(rows), fontsize=9, color=_INK)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
        ax.set_xlabel(axis)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
