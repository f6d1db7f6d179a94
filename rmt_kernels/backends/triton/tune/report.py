"""What was measured as text, and rows as Python."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from rmt_kernels.backends.triton.configs import Backward, Row, Tile

__all__ = ["printed", "row_source"]


def _source(value: object) -> str:
    """Python that makes the value, defaults left out."""
    if not isinstance(value, Row | Tile | Backward):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    parts = []
    for each in fields(value):
        given = getattr(value, each.name)
        if each.default is MISSING:
            parts.append(_source(given))
        elif given != each.default:
            parts.append(f"{each.name}={_source(given)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def row_source(row: Row) -> str:
    """The row as it stands in the table."""
    line = f"    {_source(row)},"
    if len(line) <= 120:
        return line
    chosen = ", ".join(_source(part) for part in (row.arch, row.width, row.kind, row.length, row.config))
    words = textwrap.wrap(row.reason, 100, drop_whitespace=False, break_on_hyphens=False)
    reason = "\n        ".join(map(_source, words))
    return f"    Row(\n        {chosen},\n        {reason},\n        dropout={row.dropout},\n    ),  # fmt: skip"


def printed(report: Mapping[str, Any]) -> str:
    """Every candidate of every key, then the rows to paste."""
    lines, found = [], report["keys"]
    for name, record in found.items():
        lines.append(f"{name} on {report['environment']['device']}")
        if "failed" in record:
            lines += [f"  FAILED: {record['failed']}", ""]
            continue
        table = [["", "candidate", "regs", "KiB", "p/SM", *(f"{case}, µs" for case in record["cases"]), "", ""]]
        scores = {id(e): (not e["final"], not e["seconds"], math.prod(e["seconds"])) for e in record["candidates"]}
        for entry in sorted(record["candidates"], key=lambda e: scores[id(e)]):
            times = [f"{seconds * 1e6:.1f}" for seconds in entry["seconds"]] or [""] * len(record["cases"])
            shared = "" if entry["shared"] is None else f"{entry['shared'] / 1024:.0f}"
            used = ["" if number is None else str(number) for number in (entry["registers"], entry["programs"])]
            rate = (entry["rates"] or [""])[0]
            table.append(["*" * entry["final"], entry["label"], used[0], shared, used[1], *times, rate, entry["note"]])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        lines += ["  * measured again, beside the present configuration", ""]
    for title in ("FORWARD", "BACKWARD"):
        rows = [
            (name.split(":"), record["row"])
            for name, record in found.items()
            if "row" in record and f":{title.lower()}:" in name
        ]
        if rows:
            lines.append(f"# {title}: each before the present rows of its width; widths ascend, new architectures lead")
            lines += [row for _, row in sorted(rows, key=lambda pair: (int(pair[0][1]), pair[0]))]
    return "\n".join(lines)
