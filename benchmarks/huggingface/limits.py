"""What RMT around models of transformers must reach, and what it did: numbers derived from a result."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.goals import Goal

__all__ = ["JUDGED", "LOOP", "failures", "find", "goals", "over"]

Results = dict[str, Any]
Record = dict[str, Any]

LEAST_SPEED = {"cpu": 1.3, "cuda": 2.0}  # of a training step
LEAST_SAVED = 2.0
LEAST_READ = 3.0  # on a GPU
MOST_LENGTH = 1.0  # percent by which peak memory may differ between lengths
LEAST_CACHED = 5.0
MOST_BEHIND = 1.05
LOOP = "hidden"  # the stock reader that ours is compared with
JUDGED = ("gpt2-small", "llama-1b")
_TRAINERS, _READERS = ("full", "replay", "full_graphs", "replay_graphs"), ("ours", "ours_graphs")


def find(results: Results, part: str, model: str, contestant: str | None = None) -> list[Record]:
    """The records of a part, in order."""
    return [
        record for record in results["records"]
        if (record["part"], record["model"]) == (part, model) and contestant in (None, record["contestant"])
    ]  # fmt: skip


def over(record: Record, other: Record | None, what: str = "tokens_per_second") -> float | None:
    """How many times as much one record has of something."""
    if other is None or not record.get(what) or not other.get(what):
        return None
    return float(record[what]) / float(other[what])


def _one(records: Sequence[Record]) -> Record | None:
    return records[-1] if records else None


def _growth(records: Sequence[Record]) -> float | None:
    peaks = [record["peak_bytes"] for record in records if record["peak_bytes"]]
    return 100 * (max(peaks) / min(peaks) - 1) if len(peaks) > 1 else None


def _behind(records: Sequence[Record]) -> float | None:
    """Time of a token with the most segments behind over that with the fewest, the median over turns."""
    cached = sorted((r for r in records if "behind" in r and r["rounds"]), key=lambda record: record["behind"])
    if len(cached) < 2:
        return None
    return float(median(many / few for many, few in zip(cached[-1]["rounds"], cached[0]["rounds"], strict=True)))


def goals(results: Results) -> list[Goal]:
    """Every number that must be reached, with what was measured; of the parts that were run, and of ``JUDGED``."""
    speed: dict[str, float | None] = {}
    saved: dict[str, float | None] = {}
    read: dict[str, float | None] = {}
    length: dict[str, float | None] = {}
    cached: dict[str, float | None] = {}
    behind: dict[str, float | None] = {}
    for model in (name for name in results["models"] if name in JUDGED):
        authors = _one(find(results, "train", model, "authors"))
        for name in _TRAINERS:
            for record in find(results, "train", model, name):
                key = f"{model}, {record['label']}"
                speed[key] = over(record, authors)
                saved[key] = None if authors is None else over(authors, record, "peak_bytes")
        for name in _READERS:
            records = find(results, "prefill", model, name)
            if records:
                key = f"{model}, {records[-1]['label']}, {records[-1]['tokens']:,} tokens"
                read[key] = over(records[-1], _one(find(results, "prefill", model, LOOP)))
                length[key] = _growth(records)
        records = find(results, "generate", model)
        recomputed = _one(find(results, "generate", model, "recompute"))
        for record in records:
            if record is not recomputed:
                cached[f"{model}, {record['label']}"] = over(record, recomputed)
        if records:
            behind[model] = _behind(records)
    on_gpu = results["device"] != "cpu"
    found = [
        Goal("training step: tokens/s of the authors' loop's", LEAST_SPEED[results["device"]], speed),
        Goal("training step: the authors' loop's peak memory over ours", LEAST_SAVED, saved, optional=on_gpu),
        Goal("prefill: difference of peak memory between lengths", MOST_LENGTH, length, at_most=True, unit=" %"),
        Goal("generation: tokens/s of recomputation's", LEAST_CACHED, cached),
        Goal("generation: time of a token, most segments behind over fewest", MOST_BEHIND, behind, at_most=True),
    ]
    if on_gpu:
        found.insert(2, Goal("prefill: tokens/s of the eager loop's, without its output layer", LEAST_READ, read))
    return [goal for goal in found if goal.values]


def failures(results: Results) -> list[str]:
    """Every contestant that gave a wrong result or failed, in words. A missed goal is not among them."""
    said = {
        f"{record['model']}, {record['label']}: {record['note']}": None
        for record in results["records"]
        if record["match"] is False or record["note"].startswith(("WRONG", "failed"))
    }
    return list(said)
