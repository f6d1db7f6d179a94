"""Result files as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.goals import Goal
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.targets import Record, Results, goals, kernel_ratio, records_of, seconds
from benchmarks.huggingface import limits as huggingface_limits
from benchmarks.huggingface import tables as huggingface
from benchmarks.huggingface.on_gpu import collect as collect_huggingface
from benchmarks.recurrence import limits
from benchmarks.recurrence.on_gpu import collect
from benchmarks.recurrence.tables import evaluation_table, memory_table, time_table
from benchmarks.tables import Table

__all__ = ["failures", "stage_tables", "status_table", "summary_lines", "target_table"]

_OPPONENTS = {
    "Triton": ("ours",),
    "flex": ("flex",),
    "dense mask": ("dense", "dense_cudnn"),
    "split flash": ("split_flash",),
    "split cuDNN": ("split_cudnn",),
    "naive": ("naive",),
    "plain flash *": ("plain_flash",),
    "plain cuDNN *": ("plain_cudnn",),
}


def failures(results: Results) -> list[str]:
    """Every wrong result and everything that failed, in words. A missed speed target is not among them."""
    found = []
    for name, stage in results.get("stages", {}).items():
        if stage.get("error"):
            found.append(f"{name}: {stage['error'][:300]}")
        for key, item in stage["items"].items():
            said = [*item.get("failures", [])] + ([item["error"]] if item.get("error") else [])
            found += [f"{name}, {key}: {line}" for line in said]
    return found


def _status(item: dict[str, Any]) -> str:
    if item["status"] != "done":
        return "failed" if item["status"] == "failed" else "not finished"
    return "failed" if item.get("failures") else "passed"


def status_table(results: Results) -> Table:
    """One line for each stage."""
    rows = []
    for name, stage in STAGES.items():
        state = results.get("stages", {}).get(name)
        if state is None:
            rows.append([name, "not run", "", "", ""])
            continue
        items, planned = state["items"], state["planned"] or []
        kinds = [_status(items[key]) if key in items else "not run" for key in planned]
        detail = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        rows.append([name, detail or "no item", f"{state['seconds']:.0f} s", stage.title, _detail(name, items)])
    return Table("Stages", ["stage", "items", "time", "what", "result"], rows)


def _detail(name: str, items: dict[str, Any]) -> str:
    facts = [item.get("facts") or {} for item in items.values()]
    if name.startswith("suite"):
        return "; ".join(
            ", ".join(f"{count} {kind}" for kind, count in sorted(fact["counts"].items()))
            for fact in facts
            if "counts" in fact
        )
    if name == "environment":
        for fact in facts:
            if "matmul_tflops" in fact:
                copied, product = fact["copy_bytes_per_second"] / 1e12, fact["matmul_tflops"]
                return f"copy {copied:.2f} TB/s, bf16 product {product:.0f} TFLOP/s"
    if name == "sanitizer":
        return "; ".join(f"{fact['tool']} {fact.get('found', 'not run')}" for fact in facts if "tool" in fact)
    if name == "build":
        for fact in facts:
            built = fact.get("cuda") or {}
            if "architectures" in built:
                sets = f"{', '.join(built['elements'])} at {', '.join(map(str, built['widths']))}"
                return f"CUDA: {sets} for {', '.join(built['architectures'])} by {built['compiler']}"
    if name.startswith("determinism"):
        repeats = {fact["repeats"] for fact in facts if "repeats" in fact}
        differing = sum(fact.get("differing", 0) for fact in facts)
        return f"{max(repeats, default=0)} repeats each, {differing} elements differ" if facts else ""
    if name.startswith("memory"):
        for fact in facts:
            if "share" in fact:
                peak = fact["peak_bytes"]["forward+backward"] / 2**20
                return f"T = {fact['tokens']:,}: {peak:.0f} MiB, {fact['share']:.1%} of the dense scores"
    return ""


def _value(goal: Goal, value: float) -> str:
    return f"{value:.2f}x" if goal.unit == "x" else f"{value:.0f}{goal.unit}"


def target_table(results: Results) -> Table:
    """Each target, how many cases reach it, and the worst of them."""
    rows = []
    around = huggingface_limits.goals(collect_huggingface(results))
    for goal in [*goals(results), *limits.goals(collect(results)), *around]:
        reached, measured, every = goal.counts
        worst = goal.worst
        rows.append([
            goal.what, f"{'≤' if goal.at_most else '≥'} {_value(goal, goal.bound)}",
            "-" if worst is None else f"{_value(goal, worst[1])} at {worst[0]}",
            "-" if worst is None else f"{worst[1] / goal.bound:.2f}x",
            f"{reached} of {measured}" + ("" if measured == every else f" ({every} asked for)"),
            goal.verdict if not goal.optional or goal.verdict != "missed" else "not yet",
        ])  # fmt: skip
    return Table(
        "Targets", ["what", "wanted", "measured, worst case", "of wanted", "reached by", "verdict"], rows,
        "Of the Triton backend, and where it says so of the CUDA backend. Ratios of kernel times measured in the same "
        "rounds; > 1 means that rmt_kernels is faster, except where 'time of' or 'overhead of' is asked for. TFLOP/s "
        "count visible entries only.",
    )  # fmt: skip


def _time(record: Record | None, which: str = "kernel") -> str:
    if record is None:
        return "-"
    found = seconds(record, which)
    if found is None:
        return {"wrong": "WRONG", "failed": "failed", "refused": "refused"}.get(record["kind"], "-")
    if which != "kernel":
        return f"{found * 1e6:.1f}"
    kernel = record["kernel"]
    return f"{found * 1e6:.1f} ± {(kernel['q3'] - kernel['q1']) * 5e5:.1f}" + ("" if kernel["by"] == "graph" else " †")


def _grouped(records: list[Record], which: str) -> Iterator[tuple[dict[str, Record], Record]]:
    cases = list(dict.fromkeys(r["case"] for r in records if r["pass"] == which))
    for case in cases:
        rows = {r["contestant"]: r for r in records if r["case"] == case and r["pass"] == which}
        first = next((row for row in rows.values() if "sizes" in row), None)
        if first is not None:
            yield rows, first


def _key(first: Record) -> tuple[int, int, int]:
    return first["sizes"]["head_dim"], first["memory_rows"], first["sizes"]["tokens"]


def _ratio_text(rows: dict[str, Record], names: tuple[str, ...], mine: str) -> str:
    ratio = kernel_ratio(rows, names, mine)
    if ratio is not None:
        return f"{ratio:.2f}x" + (" slower" if ratio < 1 else "")
    kinds = [rows[name]["kind"] for name in names if name in rows]
    return kinds[0] if kinds and kinds[0] != "right" else "-"


def _ratio_table(results: Results, stage: str, which: str, title: str, mine: str = "ours") -> Table:
    rows = []
    opponents = {name: names for name, names in _OPPONENTS.items() if mine not in names}
    records = records_of(results, stage)
    if not any(record["contestant"] == mine for record in records):
        return Table(title, [], [])
    for contestants, first in sorted(_grouped(records, which), key=lambda pair: _key(pair[1])):
        head_dim, memory, tokens = _key(first)
        own = contestants.get(mine)
        noise = kernel_ratio(contestants, ("again",))
        rows.append([
            f"D={head_dim} M={memory} T={tokens}", _time(own),
            "-" if not own or own.get("tflops") is None else f"{own['tflops']:.0f}",
            *(_ratio_text(contestants, names, mine) for names in opponents.values()),
            "-" if noise is None else f"{noise:.2f}x",
        ])  # fmt: skip
    return Table(
        title, ["case", "ours, µs", "TFLOP/s", *(f"against {name}" for name in opponents), "noise"], rows,
        "Kernel time: CUDA graph replays with the L2 cache overwritten before every call, contestants taking turns; "
        "± is half the distance between the quartiles. * computes something else, causal attention over as many rows "
        "without memory rules: the ceiling. Noise: the Triton backend timed twice. † timed without a graph.",
    )  # fmt: skip


def _rate_table(results: Results, stage: str, which: str, title: str) -> Table:
    records = records_of(results, stage)
    names = list(dict.fromkeys(r["contestant"] for r in records if r["pass"] == which and r["contestant"] != "again"))
    labels = {r["contestant"]: r["label"] for r in records}
    rows = []
    for contestants, first in sorted(_grouped(records, which), key=lambda pair: _key(pair[1])):
        head_dim, memory, tokens = _key(first)
        cells = []
        for name in names:
            record = contestants.get(name)
            rate = None if record is None else record.get("tflops")
            cells.append(_time(record) if rate is None else f"{rate:.0f}")
        rows.append([f"D={head_dim} M={memory} T={tokens}", *cells])
    return Table(
        title, ["case", *(labels[name] for name in names)], rows, "Visible TFLOP/s; each plain causal SDPA's own."
    )


def _memory_table(results: Results) -> Table:
    rows = []
    for stage, which in (("forward", "forward"), ("backward", "forward+backward")):
        for contestants, first in sorted(_grouped(records_of(results, stage), which), key=lambda pair: _key(pair[1])):
            head_dim, memory, tokens = _key(first)
            if tokens != 4096:
                continue
            for name, record in contestants.items():
                if name != "again" and record["peak_bytes"] is not None:
                    mask, compiled = record["facts"].get("mask_seconds"), record["facts"].get("compile_seconds")
                    rows.append([
                        f"{which} D={head_dim} M={memory} T={tokens}", record["label"],
                        f"{record['peak_bytes'] / 2**20:.0f}", str(record["facts"].get("sdpa", "")),
                        "" if mask is None else f"{mask * 1e3:.1f}", "" if compiled is None else f"{compiled:.1f}",
                    ])  # fmt: skip
    return Table(
        "Peak memory, and what FlexAttention needs before its first call",
        ["case", "contestant", "peak MiB", "SDPA's choice", "block mask, ms", "compilation, s"], rows,
        "Peak of one call, results included; masks and block masks, built beforehand, are not.",
    )  # fmt: skip


def _short_table(results: Results) -> Table:
    rows = []
    records = records_of(results, "short")
    for which in ("forward", "backward", "forward+backward"):
        for contestants, first in sorted(_grouped(records, which), key=lambda pair: _key(pair[1])):
            for name, record in contestants.items():
                if name != "again":
                    rows.append([
                        f"{which} D={first['sizes']['head_dim']} T={first['sizes']['tokens']}", record["label"],
                        _time(record),
                        _time(record, "kernel_warm"), _time(record, "call"), _time(record, "enqueue"),
                    ])  # fmt: skip
    return Table(
        "Batch 1, 16 heads, M = 16: microseconds",
        ["case", "contestant", "kernel", "kernel, warm L2", "call", "host part of a call"], rows,
        "A call is eager, without a graph; its host part ends when the host is free again.",
    )  # fmt: skip


def _decode_table(results: Results) -> Table:
    rows = []
    for record in records_of(results, "decode"):
        if record["contestant"] == "again":
            continue
        share, rate = record.get("copy_share"), record.get("bytes_per_second")
        rows.append([
            record["case"], record["label"], _time(record), "-" if rate is None else f"{rate / 1e12:.2f}",
            "-" if share is None else f"{share:.0%}", _time(record, "enqueue") if record["kind"] != "beside" else "",
        ])  # fmt: skip
    return Table(
        "Decoding one row", ["case", "contestant", "kernel, µs", "TB/s", "of the copy's", "host part of a call, µs"],
        rows, "Bytes of the visible keys and values over kernel time, beside a copy measured in the same rounds.",
    )  # fmt: skip


def _said(results: Results) -> Table:
    """Why a contestant has no time: its own words."""
    seen: dict[tuple[str, str], list[str]] = {}
    for stage in ("forward", "backward", "short", "decode"):
        for record in records_of(results, stage):
            if record.get("note"):
                seen.setdefault((record["label"], record["note"]), []).append(f"{record['case']} {record['pass']}")
    rows = [
        [label, note[:300], f"{where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")]
        for (label, note), where in seen.items()
    ]
    return Table("Contestants without a time, or with a remark", ["contestant", "reason", "where"], rows)


def _errors(results: Results) -> Table:
    worst: dict[tuple[str, str, str], dict[str, float]] = {}
    for stage in ("forward", "backward", "short", "decode"):
        for record in records_of(results, stage):
            for name, error in (record.get("errors") or {}).items():
                key = (record["label"], record["dtype"], name)
                if record["contestant"] != "again" and error["rms"] >= worst.get(key, {"rms": -1.0})["rms"]:
                    worst[key] = error
    rows = [
        [label, dtype, name, f"{e['rms']:.2e}", f"{e['max']:.2e}", f"{e['eager_max']:.2e}"]
        for (label, dtype, name), e in worst.items()
    ]
    return Table(
        "Largest errors against float64",
        ["contestant", "dtype", "result", "RMS ratio", "largest", "eager PyTorch's"],
        rows,
    )


def _checks(results: Results) -> Table:
    rows = []
    for stage in ("determinism_cuda", "memory_cuda", "sanitizer", "determinism", "memory"):
        for key, item in results.get("stages", {}).get(stage, {}).get("items", {}).items():
            said = "; ".join([*item.get("failures", []), *([item["error"]] if item.get("error") else [])])
            rows.append([stage, key, _status(item), said[:300]])
    return Table("Determinism, memory, graphs, compilation, sanitizer", ["stage", "check", "result", "said"], rows)


def _suite(results: Results) -> Table:
    rows = []
    for stage in ("suite_cuda", "suite", "suite_slow", "suite_cpu"):
        for item in results.get("stages", {}).get(stage, {}).get("items", {}).values():
            for test in (item.get("facts") or {}).get("failed", []):
                rows.append([stage, test["id"], test["message"][:300]])
    return Table("Failed tests", ["stage", "test", "assertion"], rows)


def _programs(results: Results) -> Table:
    rows = []
    for stage in ("build", "gate", "tune"):
        for key, item in results.get("stages", {}).get(stage, {}).get("items", {}).items():
            facts = item.get("facts") or {}
            last = str(facts.get("tail", "")).strip().splitlines()[-1:]
            taken = f"{facts['seconds']:.0f} s" if "seconds" in facts else ""
            rows.append([stage, key, _status(item), taken, last[0][:200] if last else ""])
    return Table("Builds, compile gate, tuning", ["stage", "step", "result", "time", "last line"], rows)


def stage_tables(results: Results) -> list[Table]:
    """The tables of every stage that has something to show."""
    found: list[Callable[[], Table]] = [
        lambda: _ratio_table(results, "forward", "forward", "Forward: times faster than each contestant"),
        lambda: _ratio_table(results, "backward", "backward", "Backward alone: times faster than each contestant"),
        lambda: _ratio_table(results, "backward", "forward+backward", "Forward + backward: times faster"),
        lambda: _ratio_table(results, "forward", "forward", "CUDA backend, forward: times faster", "cuda"),
        lambda: _ratio_table(results, "backward", "backward", "CUDA backend, backward alone: times faster", "cuda"),
        lambda: _rate_table(results, "forward", "forward", "Forward: visible TFLOP/s"),
        lambda: _rate_table(results, "backward", "backward", "Backward alone: visible TFLOP/s"),
        lambda: _short_table(results),
        lambda: _decode_table(results),
        lambda: _memory_table(results),
        lambda: time_table(collect(results)),
        lambda: memory_table(collect(results)),
        lambda: evaluation_table(collect(results)),
        lambda: _checks(results),
        lambda: _suite(results),
        lambda: _programs(results),
        lambda: _said(results),
        lambda: _errors(results),
    ]
    around = [table for table in huggingface.tables(collect_huggingface(results)) if "targets" not in table.title]
    return [table for make in found if (table := make()).rows] + around


def summary_lines(results: Results) -> list[str]:
    """Where, with what, when; and what went wrong."""
    here = results.get("environment", {})
    gpu, versions = here.get("gpu", {}), here.get("versions", {})
    lines = [
        f"{gpu.get('name', gpu.get('torch_name', 'unknown GPU'))}, {gpu.get('multiprocessors', '?')} multiprocessors, "
        f"{gpu.get('memory.total', '?')}, "
        f"driver {gpu.get('driver_version', '?')}, power limit {gpu.get('power.limit', '?')}",
        ", ".join(
            f"{name} {versions.get(name, '?')}"
            for name in ("rmt_kernels", "torch", "triton", "cuda", "cudnn", "python")
        ),
        f"commit {str(here.get('commit', 'unknown'))[:18]}, {here.get('date', '?')}, {here.get('command', '?')}",
    ]
    said = failures(results)
    return (
        lines + [f"FAILED {line}" for line in said[:40]] + ([f"… and {len(said) - 40} more"] if len(said) > 40 else [])
    )
