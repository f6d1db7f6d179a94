"""Results as tables in the terminal, as pictures, and in the chapter ``docs/systems``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.report import replace_block, source_line
from benchmarks.systems import accuracy, bottleneck, language
from benchmarks.systems.goals import goal_table
from benchmarks.systems.studies import Results, Study
from benchmarks.tables import Table, environment_lines

__all__ = ["CHAPTER", "PAGES", "PICTURES", "STUDIES", "lines", "update_docs", "whole"]

STUDIES: dict[str, Study] = {study.name: study for study in (accuracy.STUDY, language.STUDY, bottleneck.STUDY)}
CHAPTER, PICTURES = ROOT / "docs" / "systems", ROOT / "docs" / "pictures"
# The pages of single systems that show their rows of the table of accuracies.
PAGES = {
    "rmt": ("no memory", "RMT", "RMT, memory cut"),
    "transformer_xl": ("no memory", "Transformer-XL", "RMT on Tr-XL"),
    "memory_transformer": ("MemTransformer",),
    "memformer": ("Memformer",),
}


def whole(results: Results) -> list[Table]:
    """Goals, then the tables."""
    study = STUDIES[results["table"]]
    found = [goal_table(study.goals(results)), *study.tables(results)]
    return [table for table in found if table.rows]


def lines(results: Results) -> list[str]:
    """Where, with what, when; how long it took; and what is missing or failed."""
    told = [*environment_lines(results["environment"]), results["environment"]["command"]]
    done, planned = len(results["runs"]), len(results["planned"])
    seconds = sum(run["seconds"] for run in results["runs"])
    dates = sorted(run["date"] for run in results["runs"])
    if dates:
        told.append(
            f"{done} of {planned} runs, one thread each, {seconds / 60:.0f} minutes of training together, finished "
            f"{dates[0]} to {dates[-1]}"
        )
    if done < planned:
        told.append("not finished: call the same command again, and it goes on")
    return told + [f"FAILED {line}" for line in results["failed"]]


def update_docs(results: Results, result: Path, chapter: Path = CHAPTER, pictures: Path = PICTURES) -> None:
    """Write a result's tables and picture into the chapter, between comments with the table's name."""
    study = STUDIES[results["table"]]
    source = f"<sub>{'<br>'.join(lines(results))}<br>{source_line(result)}</sub>"
    block = [""]
    picture = pictures / f"systems_{study.name}.png"
    if study.draw(results, picture):
        block += [f"![{study.caption}](../pictures/{picture.name})", ""]
    for table in whole(results):
        block += [f"{table.title}:", "", table.markdown(level=0), ""]
    replace_block(chapter / "README.md", study.name, [*block, source])
    if study.name == "accuracy":
        for page, labels in PAGES.items():
            replace_block(chapter / f"{page}.md", "numbers", _rows(results, labels))


def _rows(results: Results, labels: tuple[str, ...]) -> list[str]:
    block = [""]
    for table in accuracy.tables(results):
        rows = [row for row in table.rows if row[0] in (*labels, accuracy.CHANCE)]
        block += [f"{table.title}:", "", Table(table.title, table.header, rows).markdown(level=0), ""]
    return block
