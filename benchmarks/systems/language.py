"""Language modelling of bytes: what recurrence is worth, and how deep its gradients must reach.

Segments are short, so that what came before them counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.systems.comparisons import Ordering, dots, ordering_goals, spread
from benchmarks.systems.goals import Goal, differences
from benchmarks.systems.studies import Entry, Results, Study, label_of, values
from benchmarks.tables import Table

__all__ = ["CONTESTANTS", "SHARE", "STUDY"]

_TRAINED, _MEMORY, _TOKENS = 4, 4, 16
# Back-propagation through k segments is called BPTT-(k - 1) in the paper.
CONTESTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("no recurrence", "none", {}),
    "bptt0": ("RMT, BPTT-0", "rmt", {"bptt": 1}),
    "bptt3": ("RMT, BPTT-3", "rmt", {"bptt": "full"}),
    "xl": ("Transformer-XL, cache of a segment", "transformer_xl", {}),
    "xl_short": ("Transformer-XL, cache as small as the memory", "transformer_xl", {"cache": _MEMORY}),
}
_ORDERINGS = (Ordering("bptt0", "none"), Ordering("bptt3", "bptt0"))
SHARE = 0.8  # of what Transformer-XL gains that RMT must, to be as good as it; in the paper it is 0.84
_SMALL: dict[str, Any] = {
    "segments": _TRAINED, "tokens": _TOKENS, "width": 64, "heads": 4, "layers": 2, "batch": 32, "steps": 800,
    "learning_rate": 3e-3, "warmup": 50, "decay": "cosine", "curriculum": "constant", "evaluate": (_TRAINED, 16),
    "evaluate_every": 0, "samples": 512, "cut": True, "positions": "relative",
}  # fmt: skip


def entries(size: str) -> list[Entry]:
    """All contestants, on text."""
    return [Entry(key, label, "text", model, _options(size, model, own))
            for key, (label, model, own) in CONTESTANTS.items()]  # fmt: skip


def _options(size: str, model: str, own: dict[str, Any]) -> dict[str, Any]:
    if size == "paper":
        rows = {"cache": 10} if "cache" in own else {}
        return {"positions": "relative", "evaluate": (_TRAINED, 16), **own, **rows}
    if size == "quick":
        return {"segments": 2, "tokens": 16, "evaluate": (2,), "positions": "relative", "evaluate_every": 0, **own}
    return {**_SMALL, **({"memory": _MEMORY} if model == "rmt" else {}), **own}


def _judged(results: Results) -> int:
    """The number of segments that orderings are told by: that of training."""
    return int(results["runs"][0]["config"]["segments"]) if results["runs"] else 0


def _keys(results: Results) -> list[str]:
    there = {run["entry"] for run in results["runs"]}
    return [key for key in CONTESTANTS if key in there]


def _handed_on(config: dict[str, Any]) -> int:
    """Numbers that one segment hands to the next."""
    model = config["model_options"]
    rows = model.get("memory", 0) + model.get("layers", 0) * model.get("cache", 0)
    return int(rows * model["width"])


def tables(results: Results) -> list[Table]:
    """Bits a byte of each contestant."""
    keys = _keys(results)
    if not keys:
        return []
    numbers = sorted({e["segments"] for run in results["runs"] for e in run["evaluations"]})
    rows = []
    for key in keys:
        run = next(run for run in results["runs"] if run["entry"] == key)
        gain = [value for value in differences(
            values(results, "none", _judged(results), "bits"), values(results, key, _judged(results), "bits")
        ) if value is not None]  # fmt: skip
        rows.append([
            label_of(results, key), f"{_handed_on(run['config']):,}",
            *(spread(values(results, key, number, "bits")) for number in numbers),
            spread(values(results, key, _judged(results), "bits", carry=False)),
            "-" if key == "none" or not gain else f"{sum(gain) / len(gain):.3f}",
        ])  # fmt: skip
    config = results["runs"][0]["config"]
    model = config["model_options"]
    return [Table(
        "text: bits a byte, lower is better",
        ["", "numbers handed on", *(f"{number} segments" for number in numbers), "memory cut", "gain"], rows,
        f"Held-out text, mean of {len(results['seeds'])} seeds, in brackets the lowest and the highest. Trained on "
        f"{config['segments']} segments of {config['tokens']} bytes, {config['steps']} steps of {config['batch']} "
        f"samples; {model['layers']} layers of width {model['width']}, relative positions. Memory cut, of "
        f"{_judged(results)} segments: trained with it, evaluated without. Gain: bits fewer than no recurrence.",
    )]  # fmt: skip


def goals(results: Results) -> list[Goal]:
    """The orderings of the paper's table 2."""
    judged = _judged(results)
    if not judged:
        return []
    found = ordering_goals(results, _ORDERINGS, judged)
    gain = differences(values(results, "none", judged, "bits"), values(results, "bptt3", judged, "bits"))
    whole = differences(values(results, "none", judged, "bits"), values(results, "xl", judged, "bits"))
    shares = tuple(None if a is None or not b or b < 0 else a / b for a, b in zip(gain, whole, strict=True))
    found.append(Goal(
        "RMT, BPTT-3 as good as Transformer-XL with less handed on: share of its gain over no recurrence", shares,
        SHARE, by="mean",
    ))  # fmt: skip
    return found


def draw(results: Results, path: Path) -> bool:
    """Bits a byte."""
    judged = _judged(results)
    rows: dict[str, list[float | None]] = {
        label_of(results, key): values(results, key, judged, "bits") for key in _keys(results)
    }
    return dots([(f"text, {judged} segments", "bits a byte, held out: lower is better", rows)], path)


STUDY = Study(
    "language", "Language modelling", entries, tables, goals, draw,
    "Bits a byte of each contestant: a dot a seed, a line their mean",
)  # fmt: skip
