"""``python -m benchmarks.huggingface``: RMT around models of transformers, against stock loops over segments.

Exit status: 0, or 1 where a contestant was wrong or failed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment
from benchmarks.files import RESULTS, write_json
from benchmarks.huggingface.limits import failures
from benchmarks.huggingface.models import SHAPES
from benchmarks.huggingface.runs import CPU, CUDA, PARTS, QUICK, run
from benchmarks.huggingface.tables import summary_lines, tables
from benchmarks.report import replace_block, source_line

__all__ = ["main", "update_docs"]

NAME = "huggingface"  # of the block, the result and the picture
PAGE = ROOT / "docs" / "huggingface.md"
PICTURE = ROOT / "docs" / "pictures" / "huggingface_benchmark.png"


def _where(results: dict[str, Any]) -> str:
    device = results["environment"]["device"]
    return results.get("gpu") or f"{device['cpu']}, {device['threads']} thread{'s' * (device['threads'] != 1)}"


def update_docs(results: dict[str, Any], result: Path) -> None:
    """Draw the picture, and write a result's tables between the ``huggingface`` comments of the page."""
    from benchmarks.huggingface import plots

    plots.save(results, _where(results), PICTURE)
    lines = [""]
    if any(record["part"] == "train" for record in results["records"]):
        lines += [f"![Tokens a second and peak memory of a training step](pictures/{PICTURE.name})", ""]
    for table in tables(results):
        lines += [table.title + ":", "", table.markdown(level=0), ""]
    lines.append(f"<sub>{'<br>'.join([*summary_lines(results), source_line(result)])}</sub>")
    replace_block(PAGE, NAME, lines)


def _has_block() -> bool:
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return f"<!-- {NAME}:start -->" in text and f"<!-- {NAME}:end -->" in text


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.huggingface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: under a minute")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=SHAPES, metavar="MODEL", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--out", type=Path, default=RESULTS / "latest", metavar="DIR", help="where results are written")
    parser.add_argument("--save", metavar="NAME", help="also keep benchmarks/results/NAME.json, and update the page")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing, update the page from FILE")
    options = parser.parse_args(arguments)
    if (options.save or options.render) and not _has_block():
        parser.error(f"{PAGE} has no block between <!-- {NAME}:start --> and <!-- {NAME}:end -->")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    if options.render:
        try:
            results = json.loads(options.render.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"{options.render}: {error}")
        if not isinstance(results, dict) or not {"models", "records", "transformers", "environment"} <= set(results):
            parser.error(f"{options.render}: not a result of python -m benchmarks.huggingface")
    else:
        plan = QUICK if options.quick else CUDA if options.device == "cuda" else CPU
        results = run(plan, torch.device(options.device), parts=options.only or PARTS, models=options.model)
        results["environment"] = environment()
        write_json(options.out / f"{NAME}.json", results)
    print("\n\n".join(table.terminal() for table in tables(results)))
    print("\n" + "\n".join(summary_lines(results)))
    if not options.render:
        print(f"{results['took_seconds']:.0f} s; written: {options.out / NAME}.json")
    if options.save:
        write_json(RESULTS / f"{options.save}.json", results)
    if options.save or options.render:
        result = options.render or RESULTS / f"{options.save}.json"
        update_docs(results, result)
        print(f"from {result}: {PAGE} and {PICTURE}")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
