"""What was measured as text, and rows as Python."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from rmt_kernels.backends.triton.configs import Backward, Row, Tile

__all__ = ["printed", "row_source"]

_WIDTH = 120  # of a line of the table


def _source(value: object) -> str:
    """Python that makes the value, defaults left out."""
    if isinstance(value, Row | Tile | Backward):
        return f"{type(value).__name__}({', '.join(_arguments(value))})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _arguments(value: Row | Tile | Backward) -> list[str]:
    return [
        source if each.default is MISSING else f"{each.name}={source}"
        for each in fields(value)
        if (given := getattr(value, each.name)) != each.default
        for source in [_source(given)]
    ]


def row_source(row: Row) -> str:
    """The row as it stands in the table."""
    line = f"    {_source(row)},"
    if len(line) <= _WIDTH:
        return line
    reason = _source(row.reason)
    head, tail = line.split(f" {reason}")
    words = textwrap.wrap(row.reason, _WIDTH - 30, drop_whitespace=False, break_on_hyphens=False)
    return "\n        ".join([head, *map(_source, words)]) + tail


def printed(report: Mapping[str, Any]) -> str:
    """Every candidate of every key, then the rows to paste of those that are complete."""
    lines, rows = [], []
    for name, record in report["keys"].items():
        lines.append(name + ("" if record["complete"] else ", INCOMPLETE"))
        if "failed" in record:
            lines.append(f"  FAILED: {record['failed']}")
        lines += [*_table(record), ""]
        if record["complete"] and "row" in record:
            table, width = "BACKWARD" if ":backward:" in name else "FORWARD", int(name.split(":")[1])
            rows.append((table, record["before"].strip().rstrip(","), width, name, record["row"]))
    heading: tuple[str, str] | None = None
    for table, before, _, _, row in sorted(rows):
        if heading != (table, before):
            heading = table, before
            lines.append(f"# In {table}, in front of {before}:")
        lines.append(row)
    return "\n".join(lines)


def _table(record: Mapping[str, Any]) -> list[str]:
    entries = record.get("candidates", [])
    if not entries:
        return []
    rows = [["", "candidate", "registers", "per SM", *(f"{case}, µs" for case in record["cases"]), "", ""]]
    for entry in entries:
        times = [f"{seconds * 1e6:.1f}" for seconds in entry["seconds"]] or [""] * len(record["cases"])
        used = ["" if entry[name] is None else str(entry[name]) for name in ("registers", "programs")]
        rows.append(["*" * entry["final"], entry["label"], *used, *times, entry["rate"], entry["note"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [*lines, "  * measured again, beside the present configuration"]
