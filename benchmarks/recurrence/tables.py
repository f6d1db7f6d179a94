"""A result as tables."""

from __future__ import annotations

from typing import Any

from benchmarks.goals import goal_table
from benchmarks.recurrence.limits import failures, goals, growth, memory_of, rounds_of, seconds_of
from benchmarks.tables import Table

__all__ = ["evaluation_table", "memory_table", "summary_lines", "tables", "targets", "time_table"]

Results = dict[str, Any]
_PARTS = ("again", "forward", "attention")  # of the time section, no contestants


def targets(results: Results) -> Table:
    """Each target, what was measured, and whether it is reached."""
    return goal_table("Training through many segments: targets", goals(results), "not yet")


def _labels(results: Results) -> dict[str, str]:
    return {record["contestant"]: record["label"] for record in results.get("memory", [])}


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f}" if value < 100 * 2**20 else f"{value / 2**20:,.0f}"


def memory_table(results: Results) -> Table:
    """Peak activations of each contestant against the number of segments."""
    records = results.get("memory", [])
    numbers = sorted({record["segments"] for record in records})
    rows = []
    for name, label in _labels(results).items():
        points = memory_of(results, name)
        notes = {record["segments"]: record["note"] for record in records if record["contestant"] == name}
        slope = growth(results, name)
        cells = [_mib(points[n]) if n in points else notes.get(n) or "-" for n in numbers]
        rows.append([label, *cells, "-" if slope is None else f"{slope / 1024:,.1f}"])
    gradients = {record["gradient_bytes"] for record in records if record["gradient_bytes"] is not None}
    extra = f" Gradients, {_mib(max(gradients))} MiB, and parameters" if gradients else " Gradients and parameters"
    return Table(
        "Peak activations of a training step, MiB, against the number of segments",
        ["contestant", *(str(n) for n in numbers), "KiB a segment"], rows,
        "The most bytes that a step holds beside parameters, gradients and inputs." + extra
        + f", {_mib(results.get('parameter_bytes', 0))} MiB, are the same for all. Memory rows that one segment hands "
        f"to the next: {results.get('memory_rows_bytes', 0) / 1024:,.0f} KiB. * computes something else: gradients "
        "that reach back no farther.",
    )  # fmt: skip


def _ms(record: dict[str, Any]) -> str:
    seconds = record["seconds"]
    if seconds is None:
        return str(record["note"]).split(":")[0] or "-"
    return f"{seconds['median'] * 1e3:,.1f} ± {(seconds['q3'] - seconds['q1']) * 5e2:,.1f}"


def time_table(results: Results) -> Table:
    """Time of a step of each contestant, and of a forward pass and its attention."""
    records = results.get("time", [])
    base = seconds_of(results, "loop") or seconds_of(results, "full")
    rows = []
    for record in records:
        seconds, rate = seconds_of(results, record["contestant"]), record["tokens_per_second"]
        part = record["contestant"] in _PARTS
        rows.append([
            record["label"], _ms(record), "-" if rate is None or part else f"{rate:,.0f}",
            "-" if seconds is None or base is None else f"{seconds / base:.3f}x",
        ])  # fmt: skip
    number = records[0]["segments"] if records else 0
    rounds = max((len(rounds_of(results, record["contestant"])) for record in records), default=0)
    return Table(
        f"Time of a training step through {number} segments, forward and backward, no optimizer",
        ["contestant", "ms", "tokens/s", "of full BPTT's"], rows,
        f"Medians of {rounds} rounds in which all take turns; ± is half the distance between the quartiles. Gradients "
        "were compared with a plain loop's in float64 before: a wrong one has no time. * computes something else.",
    )  # fmt: skip


def evaluation_table(results: Results) -> Table:
    """Reading very long inputs."""
    rows = []
    for record in results.get("evaluation", []):
        seconds = min(record["rounds"])
        rows.append([
            f"{record['tokens']:,}", f"{record['segments']:,}", f"{record['peak_bytes'] / 2**20:.3f}",
            f"{record['input_bytes'] / 2**20:.1f}", f"{seconds:.2f}", f"{seconds / record['segments'] * 1e3:.3f}",
        ])  # fmt: skip
    return Table(
        "Reading long inputs in evaluation: a small encoder, 499 tokens a segment",
        ["tokens", "segments", "peak MiB", "inputs, MiB", "seconds", "ms a segment"], rows,
        "Peak: what a call allocates; inputs, which are there before, are not in it. Time: the fastest round.",
    )  # fmt: skip


def tables(results: Results) -> list[Table]:
    """All that have something to show."""
    found = [targets(results), memory_table(results), time_table(results), evaluation_table(results)]
    return [table for table in found if table.rows]


def summary_lines(results: Results) -> list[str]:
    """What was left out or went wrong, and the noise."""
    lines = []
    again, replay = seconds_of(results, "again"), seconds_of(results, "replay")
    if again and replay:
        lines.append(f"noise: Replay() against itself {again / replay:.3f}x")
    if results.get("evaluation_again"):
        lines.append(f"long inputs were read in a run of their own, {results['evaluation_again']['date']}")
    if results.get("left_out"):
        left = results["left_out"]
        lines.append(f"left out, no time left: {len(left)} measurements ({left[0]} … {left[-1]})")
    return lines + [f"FAILED {line}" for line in failures(results)]
