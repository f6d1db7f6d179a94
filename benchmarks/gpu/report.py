"""The report of a GPU run: ``report.html`` (self-contained), ``report.md`` and pictures.

``python -m benchmarks.gpu.report RESULT.json --out DIR`` renders a result file again.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.tables import stage_tables, status_table, summary_lines, target_table
from benchmarks.report import _STYLE

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
    md = [f"# {_TITLE}", "", *(f"- {line}" for line in where), ""]
    page = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_TITLE}</title>",
        f"<style>{_STYLE}</style><h1>{_TITLE}</h1>",
        "<p class='where'>" + "<br>".join(html.escape(line) for line in where) + "</p>",
    ]
    for table in (target_table(results), status_table(results)):
        md.append(table.markdown() + "\n")
        page.append(table.html())
    for caption, file in pictures.items():
        md.append(f"## {caption}\n\n![{caption}]({file.name})\n")
        data = base64.b64encode(file.read_bytes()).decode()
        page.append(
            f"<h2>{html.escape(caption)}</h2>\n<img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        )
    for table in stage_tables(results):
        md.append(table.markdown() + "\n")
        page.append(table.html())
    (folder / "report.md").write_text("\n".join(md), encoding="utf-8")
    report = folder / "report.html"
    report.write_text("\n".join(page) + "</html>\n", encoding="utf-8")
    return report


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
