"""A result as tables."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

from benchmarks.goals import goal_table
from benchmarks.huggingface.limits import LOOP, failures, find, goals, over
from benchmarks.tables import Table, environment_lines

__all__ = ["generate_table", "prefill_table", "summary_lines", "tables", "targets", "train_table"]

Results = dict[str, Any]
Record = dict[str, Any]


def targets(results: Results) -> Table:
    """Each target, what was measured, and whether it is reached."""
    return goal_table("RMT around models of transformers: targets", goals(results), "not asked for")


def _note(record: Record) -> str:
    return str(record["note"]).split(":")[0] or "-"


def _seconds(record: Record) -> str:
    seconds = record["seconds"]
    if not seconds:
        return _note(record)
    return f"{seconds['median']:.3f} ± {(seconds['q3'] - seconds['q1']) / 2:.3f}"


def _number(value: float | None, unit: str = "", digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def _rate(record: Record) -> str:
    return _number(record["tokens_per_second"], digits=0 if (record["tokens_per_second"] or 0) >= 100 else 1)


def _mib(record: Record) -> str:
    peak = record["peak_bytes"]
    return "-" if peak is None else _number(peak / 2**20, digits=0 if peak >= 100 * 2**20 else 1)


def _of(results: Results, model: str) -> str:
    sizes = results["models"][model]
    return (
        f"{model}: {sizes['layers']} layers, width {sizes['width']}, {sizes['heads']} heads, {sizes['kv_heads']} of "
        f"keys, vocabulary {sizes['vocabulary']}, {results['dtype']}"
    )


def train_table(results: Results, model: str) -> Table:
    """A training step of each contestant."""
    records = find(results, "train", model)
    authors = records[0] if records else None
    rows = [
        [record["label"], _seconds(record), _rate(record), _number(over(record, authors), "x"), _mib(record),
         _number(None if authors is None else over(authors, record, "peak_bytes"), "x")]
        for record in records
    ]  # fmt: skip
    sizes = results["models"][model]
    number = records[0]["segments"] if records else 0
    return Table(
        f"Training step, {number} segments of {sizes['segment']} + 2 x {sizes['memory']} rows, batch 1; "
        f"{_of(results, model)}",
        ["contestant", "seconds", "tokens/s", "authors' speed", "peak MiB", "authors' memory"], rows,
        "Forward and backward, no optimizer, no dropout. Medians of contestants that take turns; ± is half the "
        "distance between the quartiles. Peak: the most bytes that a step allocates, gradients included, weights not: "
        f"{sizes['parameter_bytes'] / 2**20:,.0f} MiB each. Loss and every parameter's gradient were checked before: a "
        "wrong one has no time.",
    )  # fmt: skip


def prefill_table(results: Results, model: str) -> Table:
    """Reading inputs for their memory."""
    records = find(results, "prefill", model)
    numbers = sorted({record["tokens"] for record in records})
    rows = []
    for name in dict.fromkeys(record["contestant"] for record in records):
        own = {record["tokens"]: record for record in find(results, "prefill", model, name)}
        last = own[numbers[-1]]
        loop = find(results, "prefill", model, LOOP)
        rows.append([
            last["label"], _seconds(last), _rate(last), _number(over(last, loop[-1]) if loop else None, "x"),
            *(_mib(own[number]) for number in numbers),
        ])  # fmt: skip
    return Table(
        f"Reading {numbers[-1] if numbers else 0:,} tokens for their memory, batch 1; {_of(results, model)}",
        ["contestant", "seconds", "tokens/s", "plain loop's speed", *(f"peak MiB at {n:,}" for n in numbers)], rows,
        "No gradients. The memory that is read was checked before. The authors' loop keeps every token's logits, as "
        "their wrapper does; the loop without output layer, the least that stock code has to do, is what the others "
        "are compared with.",
    )  # fmt: skip


def generate_table(results: Results, model: str) -> Table:
    """Generation, cached and recomputed."""
    records = find(results, "generate", model)
    recomputed = next((record for record in records if record["contestant"] == "recompute"), None)
    rows = []
    for record in records:
        rate = record["tokens_per_second"]
        spread = ""
        if rate and len(record["rounds"]) > 1:
            low, _, high = quantiles(record["rounds"], n=4, method="inclusive")
            spread = f" ± {5e2 * (high - low) * len(record['rounds']) / record['tokens']:.2f}"
        rows.append([
            record["label"], _note(record) if rate is None else f"{1e3 / rate:.2f}{spread}", _rate(record),
            _number(over(record, recomputed), "x"),
        ])  # fmt: skip
    size = results["models"][model]["segment"]
    return Table(
        f"Greedy generation of {size} tokens over one border, segments of {size}, batch 1; {_of(results, model)}",
        ["way", "ms a token", "tokens/s", "recomputation's speed"], rows,
        "States with few and many segments behind take turns. ± is half the distance between the quartiles of the "
        "turns, whose places in the segment differ. Recomputation is sampled at places spread over the segment. Tokens "
        "and logits were checked before.",
    )  # fmt: skip


def tables(results: Results) -> list[Table]:
    """All that have something to show."""
    found = [targets(results)]
    for model in results["models"]:
        found += [make(results, model) for make in (train_table, prefill_table, generate_table)]
    return [table for table in found if table.rows]


def summary_lines(results: Results) -> list[str]:
    """Where, with what; and what went wrong."""
    lines = environment_lines(results["environment"]) if "environment" in results else []
    gpu = f", {results['gpu']}" if results.get("gpu") else ""
    lines.append(f"transformers {results['transformers']}, random weights{gpu}")
    if "environment" in results:
        lines.append(f"{results['environment']['command']} ({results['plan']} run)")
    return lines + [f"FAILED {line}" for line in failures(results)]
