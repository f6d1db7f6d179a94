"""What the Triton backend and the CUDA backend must reach, and whether they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.cases import Case
from benchmarks.goals import Goal
from benchmarks.gpu.cases import FULL, filling, short
from benchmarks.gpu.compare import sizes

__all__ = ["goals", "kernel_ratio", "records_of", "seconds"]

Record = dict[str, Any]
Results = dict[str, Any]
Rates = dict[tuple[str, int], tuple[float, float, float]]

_RATES: Rates = {  # visible TFLOP/s by (pass, head_dim), at 1k / 2k / 4k
    ("forward", 64): (290, 340, 360),
    ("forward", 128): (290, 340, 370),
    ("backward", 128): (150, 220, 270),
}
_STRETCH: Rates = {("forward", 128): (400, 500, 550)}
_LENGTHS = (1024, 2048, 4096)
COPY_SHARE, SHORT_KERNEL, SHORT_CALL = 0.60, 1.3, 1.5
_CUDA_RATES: Rates = {("forward", 128): (260, 298, 319), ("backward", 128): (140, 210, 266)}  # FlashAttention-2's
CUDA_COPY_SHARE, CUDA_SHORT_TOKENS = 0.70, 512
_FILLING = filling(FULL)


def records_of(results: Results, stage: str) -> list[Record]:
    """All records of a stage, those of repeated runs included once."""
    items = results.get("stages", {}).get(stage, {}).get("items", {})
    return [record for item in items.values() for record in item.get("records", [])]


def seconds(record: Record | None, which: str = "kernel") -> float | None:
    """The median kernel time, or with "call" and "enqueue" the host's time per call."""
    if record is None:
        return None
    held = (record.get("calls") or {}) if which in ("call", "enqueue") else record
    found = held.get(which)
    return None if not found else float(found["median"])


def _cases(records: Iterable[Record], which: str, mine: str = "ours") -> Iterator[tuple[Record, dict[str, Record]]]:
    """``(the record of mine, {contestant: record})`` for each case of a pass."""
    by_case: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["pass"] == which:
            by_case.setdefault(record["case"], {})[record["contestant"]] = record
    for rows in by_case.values():
        if mine in rows:
            yield rows[mine], rows


def kernel_ratio(rows: dict[str, Record], names: tuple[str, ...], mine: str = "ours") -> float | None:
    """How many times faster contestant ``mine`` is than the fastest of ``names`` that has a time."""
    own = seconds(rows.get(mine))
    theirs = [time for name in names if (time := seconds(rows.get(name))) is not None]
    return None if own is None or not theirs else min(theirs) / own


def _name(record: Record) -> str:
    found = record["sizes"]
    return f"T={found['tokens']} M={record['memory_rows']} D={found['head_dim']}"


def _expected(chosen: Callable[[Record], bool], cases: Sequence[Case] = _FILLING) -> dict[str, float | None]:
    """The cases that a target speaks of, each without a value yet."""
    records = [{"sizes": sizes(case), "memory_rows": case.layout.write} for case in cases]
    return {_name(record): None for record in records if chosen(record)}


def _ratios(
    results: Results, stage: str, which: str, names: tuple[str, ...], chosen: Callable[[Record], bool]
) -> dict[str, float | None]:
    return _expected(chosen) | {
        _name(ours): kernel_ratio(rows, names)
        for ours, rows in _cases(records_of(results, stage), which)
        if chosen(ours)
    }


def _filled(results: Results) -> Iterator[Goal]:
    def at_most_1k(record: Record) -> bool:
        return bool(record["sizes"]["tokens"] <= 1024)

    def beyond(record: Record) -> bool:
        return not at_most_1k(record)

    def every(record: Record) -> bool:
        return True

    dense = ("dense", "dense_cudnn")
    for which, names, chosen, bound, what in (
        ("forward", ("flex",), at_most_1k, 1.3, "forward against FlexAttention, T ≤ 1k"),
        ("forward", ("flex",), beyond, 1.1, "forward against FlexAttention, T > 1k"),
        ("backward", ("flex",), every, 1.5, "backward against FlexAttention"),
        ("forward", dense, every, 4.0, "forward against SDPA with the dense mask, its fastest form"),
        ("backward", dense, every, 3.0, "backward against SDPA with the dense mask, its fastest form"),
        ("forward", ("split_flash",), every, 1.0, "forward against the three-call split, flash"),
        ("backward", ("split_flash",), every, 1.0, "backward against the three-call split, flash"),
        ("forward", ("split_cudnn",), at_most_1k, 1.0, "forward against the three-call split, cuDNN, T ≤ 1k"),
        ("backward", ("split_cudnn",), at_most_1k, 1.0, "backward against the three-call split, cuDNN, T ≤ 1k"),
    ):
        yield Goal(what, bound, _ratios(results, which, which, names, chosen))
    yield from _rates(results, _RATES)
    yield from _rates(results, _STRETCH, "stretch: ", optional=True)


def _rates(
    results: Results, rates: Rates, prefix: str = "", mine: str = "ours", optional: bool = False
) -> Iterator[Goal]:
    for (which, head_dim), wanted in rates.items():
        for tokens, bound in zip(_LENGTHS, wanted, strict=True):

            def this(record: Record, wanted: tuple[int, int] = (tokens, head_dim)) -> bool:
                return (record["sizes"]["tokens"], record["sizes"]["head_dim"]) == wanted

            found = _cases(records_of(results, which), which, mine)
            values = _expected(this) | {_name(own): own["tflops"] for own, _ in found if this(own)}
            what = f"{prefix}{which}, head_dim {head_dim}, T = {tokens}"
            yield Goal(what, bound, values, unit=" TFLOP/s", optional=optional)


def _call_overhead(ours: Record, rows: dict[str, Record]) -> float | None:
    """Host time of a call over that of SDPA's default call, without a graph."""
    mine, theirs = seconds(ours, "enqueue"), seconds(rows.get("plain"), "enqueue")
    return None if mine is None or theirs is None else mine / theirs


def _short(results: Results) -> Iterator[Goal]:
    records = [record for record in records_of(results, "short") if record["sizes"]["head_dim"] == 64]
    plain = ("plain_flash", "plain_cudnn", "plain")
    values: dict[str, float | None] = {}
    calls: dict[str, float | None] = {}
    split: dict[str, float | None] = {}
    for which in ("forward", "backward"):
        for ours, rows in _cases(records, which):
            if ours["sizes"]["tokens"] <= 1024:
                split[f"{_name(ours)} {which}"] = kernel_ratio(rows, ("split_cudnn",))
    for ours, rows in _cases(records, "forward"):
        if ours["sizes"]["tokens"] == 512:
            faster = kernel_ratio(rows, plain)
            values[_name(ours)] = None if faster is None else 1 / faster
            calls[_name(ours)] = _call_overhead(ours, rows)
    yield Goal("batch 1, T = 512: kernel time of the fastest plain causal SDPA's", SHORT_KERNEL, values, at_most=True)
    yield Goal("batch 1, T = 512: call overhead of SDPA's (host time of a call)", SHORT_CALL, calls, at_most=True)
    yield Goal("batch 1, T ≤ 1k: against the three-call split, cuDNN", 1.0, split)


def _decode(results: Results, bound: float, prefix: str = "", mine: str = "ours") -> Goal:
    percent: dict[str, float | None] = {f"D={head_dim}": None for head_dim in FULL.head_dims}
    for record in records_of(results, "decode"):
        if record["contestant"] == mine:
            share = record.get("copy_share")
            percent[f"D={record['sizes']['head_dim']}"] = None if share is None else 100 * share
    return Goal(f"{prefix}decoding: bandwidth as a share of the copy's", 100 * bound, percent, unit=" %")


def _cuda(results: Results) -> Iterator[Goal]:
    yield from _rates(results, _CUDA_RATES, "CUDA: ", "cuda")

    def is_short(record: Record) -> bool:
        return bool(record["sizes"]["tokens"] <= CUDA_SHORT_TOKENS)

    records = records_of(results, "short")
    for which in ("forward", "backward"):
        found = {
            _name(own): kernel_ratio(rows, ("ours",), "cuda")
            for own, rows in _cases(records, which, "cuda")
            if is_short(own)
        }
        what = f"CUDA: {which} against Triton, batch 1, T ≤ {CUDA_SHORT_TOKENS}"
        yield Goal(what, 1.0, _expected(is_short, short(FULL)) | found)
    yield _decode(results, CUDA_COPY_SHARE, "CUDA: ", "cuda")
    calls: dict[str, float | None] = {}
    for which in ("forward", "forward+backward"):
        calls |= {f"{name} {which}": None for name in _expected(is_short, short(FULL))}
        for own, rows in _cases(records, which, "cuda"):
            if is_short(own):
                calls[f"{_name(own)} {which}"] = _call_overhead(own, rows)
    what = f"CUDA: call overhead of SDPA's (host time of a call), batch 1, T ≤ {CUDA_SHORT_TOKENS}"
    yield Goal(what, 1.0, calls, at_most=True)


def goals(results: Results) -> list[Goal]:
    """Every target of the speed lists, in their order: the Triton backend's, then the CUDA backend's."""
    return [*_filled(results), *_short(results), _decode(results, COPY_SHARE), *_cuda(results)]
