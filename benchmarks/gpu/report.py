"""The report of a GPU run: ``report.html`` (self-contained), ``report.md`` and pictures.

``python -m benchmarks.gpu.report RESULT.json --out DIR`` renders a result file again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.tables import stage_tables, status_table, summary_lines, target_table
from benchmarks.report import write

__all__ = ["main", "render", "terminal"]

_TITLE = "rmt_kernels on a GPU"


def terminal(results: dict[str, Any]) -> str:
    """Stages, targets, where it ran and what went wrong; the rest stays in the report."""
    parts = [table.terminal() for table in (status_table(results), target_table(results)) if table.rows]
    return "\n\n".join([*parts, "\n".join(line[:400] for line in summary_lines(results))])


def _pictures(results: dict[str, Any], folder: Path) -> tuple[dict[str, Path], str]:
    """The pictures, and why there are none where they could not be drawn."""
    try:
        from benchmarks.gpu.plots import draw

        return draw(results, folder), ""
    except Exception as error:  # the tables must be written whatever happens to the pictures
        return {}, f"no pictures: {type(error).__name__}: {error}"


def render(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and the pictures to ``folder``; returns the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, missing = _pictures(results, folder)
    where = summary_lines(results) + ([missing] if missing else [])
    first = (target_table(results), status_table(results))
    return write(_TITLE, where, first, pictures, stage_tables(results), folder)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("result", type=Path, help="a result file, such as benchmarks/results/NAME.json or gpu.json")
    parser.add_argument("--out", type=Path, help="where the report goes (default: beside the result)")
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{options.result}: {error}")
    if not isinstance(results, dict) or "stages" not in results:
        parser.error(f"{options.result}: not a result of python -m benchmarks.gpu")
    print(terminal(results))
    print(f"\nreport: {render(results, options.out or options.result.parent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
