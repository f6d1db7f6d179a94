"""The report: tables in the terminal, ``report.html`` (self-contained), ``report.md`` and pictures.

``python -m benchmarks.report [FOLDER]`` renders a folder again; ``--save NAME`` keeps its result in
``benchmarks/results/NAME.json``; ``--readme FILE`` writes such a file's table into README.md.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.files import RESULTS, write_json
from benchmarks.huggingface import tables as huggingface
from benchmarks.huggingface.limits import failures
from benchmarks.recurrence import tables as recurrence
from benchmarks.tables import Table, error_table, headline, language_model, limits, published, summary_lines

__all__ = ["LATEST", "load", "main", "render", "replace_block", "source_line", "update_readme"]

LATEST = RESULTS / "latest"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222a35; max-width: 1150px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; border-bottom: 1px solid #dde1e8; text-align: right }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #8b94a3 }
td.bad { color: #b3261e; font-weight: 600 } td.good { color: #1d7a3a }
img { max-width: 100% } .where { color: #556070; font-size: 13px }
"""


def load(folder: Path) -> dict[str, Any]:
    """The results in ``folder``: those of the interleaved runs, with the other programs' where there are any."""
    file = folder / "results.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: run python -m benchmarks first")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name in ("language_model", "recurrence", "huggingface"):
        file = folder / f"{name}.json"
        if file.exists():
            results[name] = json.loads(file.read_text(encoding="utf-8"))
    return results


def _tables(results: dict[str, Any]) -> list[Table]:
    found = [headline(results), limits(results), language_model(results), published(results), error_table(results)]
    found += recurrence.tables(results["recurrence"]) if "recurrence" in results else []
    found += huggingface.tables(results["huggingface"]) if "huggingface" in results else []
    return [table for table in found if table is not None and table.rows]


def _lines(results: dict[str, Any]) -> list[str]:
    lines = summary_lines(results)
    lines += recurrence.summary_lines(results["recurrence"]) if "recurrence" in results else []
    return lines + ([f"FAILED {line}" for line in failures(results["huggingface"])] if "huggingface" in results else [])


def terminal(results: dict[str, Any]) -> str:
    """The tables as text; the errors stay in the report."""
    tables = _tables(results)
    shown = [table.terminal() for table in tables if not table.title.startswith("Errors")]
    return "\n\n".join([*shown, "\n".join(_lines(results))])


def render(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and the pictures to ``folder``; returns the path of report.html."""
    from benchmarks.plots import draw

    pictures = draw(results, folder)
    model = folder / "language_model.png"
    if "language_model" in results and model.exists():
        pictures["A language model on real text: the two loss curves"] = model
    segments = folder / "recurrence.png"
    if "recurrence" in results and segments.exists():
        pictures["Training through many segments: memory and time"] = segments
    tables = _tables(results)
    return write("rmt_kernels: benchmark report", _lines(results), tables[:1], pictures, tables[1:], folder)


def write(
    title: str, where: Sequence[str], first: Sequence[Table], pictures: Mapping[str, Path], rest: Sequence[Table],
    folder: Path,
) -> Path:  # fmt: skip
    """Write report.html and report.md to ``folder``: what was measured where, tables, pictures, more tables."""
    md = [f"# {title}", "", *(f"- {line}" for line in where), ""]
    page = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>",
        f"<style>{_STYLE}</style><h1>{title}</h1>",
        "<p class='where'>" + "<br>".join(html.escape(line) for line in where) + "</p>",
    ]
    for table in first:
        md.append(table.markdown() + "\n")
        page.append(table.html())
    for caption, file in pictures.items():
        md.append(f"## {caption}\n\n![{caption}]({file.name})\n")
        data = base64.b64encode(file.read_bytes()).decode()
        page.append(
            f"<h2>{html.escape(caption)}</h2>\n<img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        )
    for table in rest:
        md.append(table.markdown() + "\n")
        page.append(table.html())
    (folder / "report.md").write_text("\n".join(md), encoding="utf-8")
    report = folder / "report.html"
    report.write_text("\n".join(page) + "</html>\n", encoding="utf-8")
    return report


def replace_block(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands between the two ``name`` comments of a page.

    Raises:
        ValueError: the page does not have exactly one of each, in order.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{page}: expected one {start} followed by one {end}")
    before, rest = text.split(start)
    page.write_text("\n".join([before + start, *lines, end + rest.split(end)[1]]), encoding="utf-8")


def source_line(result: Path) -> str:
    """Where numbers on a page come from."""
    name = result.resolve().relative_to(ROOT) if result.resolve().is_relative_to(ROOT) else result.name
    return f"From `{name}`."


def update_readme(result: Path, readme: Path) -> None:
    """Replace what stands between the two ``measured`` comments of the README by the tables of a result file."""
    results = json.loads(result.read_text(encoding="utf-8"))
    table, model = headline(results), language_model(results)
    block = [table.title + ":", "", table.markdown(level=0), ""]
    if model is not None:
        block += [model.title + ":", "", model.markdown(level=0), ""]
    block += [f"<sub>{'<br>'.join(summary_lines(results)[:3])}<br>{source_line(result)}</sub>"]
    replace_block(readme, "measured", block)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=LATEST, help="a folder with results.json")
    parser.add_argument("--save", metavar="NAME", help="keep the results as benchmarks/results/NAME.json")
    parser.add_argument("--readme", metavar="FILE", type=Path, help="write this result file's table into README.md")
    options = parser.parse_args(arguments)
    if options.readme is not None:
        update_readme(options.readme, ROOT / "README.md")
        print(f"wrote the table of {options.readme} into README.md")
        return 0
    try:
        results = load(options.folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    if options.save:
        file = RESULTS / f"{options.save}.json"
        write_json(file, results)
        print(f"saved {file}")
    print(terminal(results))
    print(f"\nreport: {render(results, options.folder)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
