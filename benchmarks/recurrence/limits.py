"""What training through many segments may cost, and what it did: numbers derived from a result.

A result is what ``runs.run`` returns, or the stage "recurrence" of a GPU run put in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.goals import Goal

__all__ = ["failures", "goals", "growth", "memory_of", "rounds_of", "seconds_of"]

Results = dict[str, Any]

STATE_BYTES = 8192  # of saved random state, a segment and device
ROWS_FACTOR = 1.1
MOST_PEAK = 1.02
LEAST_SAVED, AIM_SAVED, SAVED_AT = 20.0, 28.0, 32
MOST_TIME = 1.05
LEAST_ATTENTION = 80.0  # percent
_LEAST_ROUNDS = 8  # for a difference that is a few percent of what is timed
LEAST_GRAPHS = 2.0
MOST_EVALUATION_MEMORY, MOST_EVALUATION_TIME = 1.0, 5.0  # percent
# Ours at constant memory. Kept attention grows with the segments, by design; offloaded memories are on the host.
_CONSTANT = {"replay": "Replay()", "driver": "replay_step"}
_FULL = ("loop", "full")
_CHECKPOINTS = ("checkpoint", "checkpoint_clone")


def memory_of(results: Results, name: str, what: str = "activation_bytes") -> dict[int, int]:
    """``{number of segments: bytes}`` of a contestant, where they were measured."""
    return {
        record["segments"]: record[what]
        for record in sorted(results.get("memory", []), key=lambda record: record["segments"])
        if record["contestant"] == name and record[what] is not None
    }


def _record(results: Results, name: str) -> dict[str, Any] | None:
    return next((record for record in results.get("time", []) if record["contestant"] == name), None)


def rounds_of(results: Results, name: str) -> list[float]:
    """Seconds of each round of a contestant's step; none where it has no time."""
    record = _record(results, name)
    return [] if record is None else list(record["rounds"])


def seconds_of(results: Results, name: str) -> float | None:
    """The median of them."""
    rounds = rounds_of(results, name)
    return median(rounds) if rounds else None


def _paired(results: Results, names: Sequence[str], value: Callable[..., float]) -> float | None:
    """The median over rounds of ``value`` of the named contestants' seconds in that round."""
    rounds = [rounds_of(results, name) for name in names]
    return float(median(map(value, *rounds))) if all(rounds) else None


def _fastest(results: Results, names: Sequence[str]) -> str | None:
    times = {name: seconds for name in names if (seconds := seconds_of(results, name)) is not None}
    return min(times, key=lambda name: times[name]) if times else None


def growth(results: Results, name: str) -> float | None:
    """Activation bytes a segment more costs, from the fewest segments measured to the most."""
    points = memory_of(results, name)
    if len(points) < 2:
        return None
    few, many = min(points), max(points)
    return (points[many] - points[few]) / (many - few)


def _allowed(results: Results) -> float:
    return ROWS_FACTOR * float(results.get("memory_rows_bytes", 0)) + STATE_BYTES


def _net(results: Results, name: str) -> float | None:
    """Peak activations at the most segments, less what the segments between may cost, over those at the fewest."""
    points = memory_of(results, name)
    if len(points) < 2:
        return None
    few, many = min(points), max(points)
    return (points[many] - (many - few) * _allowed(results)) / points[few]


def _saved(results: Results, name: str) -> float | None:
    ours = memory_of(results, name).get(SAVED_AT)
    full = [points[SAVED_AT] for other in _FULL if SAVED_AT in (points := memory_of(results, other))]
    return min(full) / ours if ours and full else None


def _attention_saved(results: Results) -> float | None:
    """Percent of the recomputed segments' attention, forward, that keeping it saves; the last one isn't recomputed."""
    # It is a small part of a step: where one segment that is run again was timed by itself, that is taken.
    alone: Results = {"time": results.get("attention_time", [])}
    timed = alone if alone["time"] else results
    record = _record(timed, "replay")
    share = seconds_of(timed, "attention")
    saved = _paired(timed, ("replay", "replay_attention"), lambda a, b: a - b)
    if record is None or not share or saved is None or len(record["rounds"]) < _LEAST_ROUNDS:
        return None
    if timed is alone:
        return 100 * saved / share
    segments: int = record["segments"]
    return 100 * saved / (share * (segments - 1) / segments) if segments > 1 else None


def _over_full(results: Results, name: str = "replay") -> float | None:
    """Time of a step over that of full back-propagation and one more forward pass."""
    full = _fastest(results, _FULL)
    if full is None:
        return None
    return _paired(results, (name, full, "forward"), lambda ours, step, forward: ours / (step + forward))


def _over_checkpoint(results: Results) -> float | None:
    stock = _fastest(results, _CHECKPOINTS)
    return None if stock is None else _paired(results, ("replay", stock), lambda ours, theirs: ours / theirs)


def _evaluation(results: Results) -> tuple[float | None, float | None]:
    """Percent by which peak memory differs between lengths, and by which time differs from linear growth."""
    records = sorted(results.get("evaluation", []), key=lambda record: record["segments"])
    if len(records) < 2:
        return None, None
    peaks = [record["peak_bytes"] for record in records]
    # What disturbs a call only makes it longer, so the fastest round is the truest.
    fastest = [min(record["rounds"]) / record["segments"] for record in records]
    off = max(abs(seconds / fastest[0] - 1) for seconds in fastest[1:])
    return 100 * (max(peaks) / min(peaks) - 1), 100 * off


def _graphs(results: Results) -> float | None:
    full = _fastest(results, _FULL)
    return None if full is None else _paired(results, ("driver_graphs", full), lambda ours, eager: eager / ours)


def goals(results: Results) -> list[Goal]:
    """Every number that training through many segments must reach, with what was measured."""
    on_gpu = results.get("device", "cpu") != "cpu"
    allowed = _allowed(results) / 1024
    per_segment = {
        label: None if (slope := growth(results, name)) is None else slope / 1024 for name, label in _CONSTANT.items()
    }
    evaluated, slowed = _evaluation(results)
    read = f"{max((r['tokens'] for r in results.get('evaluation', [])), default=0):,} tokens"
    found: list[Goal] = [
        Goal("activation memory of one segment more", allowed, per_segment, at_most=True, unit=" KiB"),
        Goal(
            "peak activations at the most segments over those at 4, net of that", MOST_PEAK,
            {label: _net(results, name) for name, label in _CONSTANT.items()}, at_most=True,
        ),
        Goal(
            f"full BPTT's peak activations over ours, {SAVED_AT} segments", LEAST_SAVED,
            {label: _saved(results, name) for name, label in _CONSTANT.items()},
        ),
        Goal(
            f"stretch: full BPTT's peak activations over ours, {SAVED_AT} segments", AIM_SAVED,
            {label: _saved(results, name) for name, label in _CONSTANT.items()}, optional=True,
        ),
        Goal(
            "time of a step over full BPTT's and one more forward pass", MOST_TIME,
            {"Replay()": _over_full(results)}, at_most=True, optional=on_gpu,
        ),
        Goal(
            "share of the recomputed attention that keeping it saves", LEAST_ATTENTION,
            {'Replay(recompute="except_attention")': _attention_saved(results)}, unit=" %", optional=on_gpu,
        ),
        Goal(
            "time of a step over stock checkpoint per segment's", 1.0, {"Replay()": _over_checkpoint(results)},
            at_most=True, optional=on_gpu,
        ),
        Goal(
            "evaluation: difference of peak memory between lengths", MOST_EVALUATION_MEMORY, {read: evaluated},
            at_most=True, unit=" %",
        ),
        Goal(
            "evaluation: difference of time from linear", MOST_EVALUATION_TIME, {read: slowed}, at_most=True, unit=" %",
        ),
    ]  # fmt: skip
    if on_gpu:
        what = "CUDA-graph driver: tokens/s of the eager loop's"
        found.append(Goal(what, LEAST_GRAPHS, {"replay_step": _graphs(results)}))
    return found


def failures(results: Results) -> list[str]:
    """Every contestant that gave a wrong result or failed, in words. A missed target is not among them."""
    said = {
        f"{record['label']}: {record['note']}": None
        for section in ("checks", "time", "attention_time", "memory")
        for record in results.get(section, [])
        if record.get("match") is False or record["note"].startswith(("WRONG", "failed"))
    }
    return list(said)
