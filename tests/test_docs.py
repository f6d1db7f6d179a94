"""The documentation holds: its Python runs, prints what it says it prints, and its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rmt_kernels.backends import cuda
from tests.emulation import EMULATED

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_FENCE = re.compile(r"^```(.*?)\n(.*?)^```[ ]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands after its fence, its text, and the number of the line before the text."""

    kind: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    return [
        Block(match[1].strip(), match[2], source.count("\n", 0, match.start(2))) for match in _FENCE.finditer(source)
    ]


KINDS = ("python", "python emulated") if EMULATED and not cuda.why_missing else ("python",)


def run(page: Path, found: list[Block], kinds: tuple[str, ...] = KINDS) -> None:
    """Run a page's Python from top to bottom; a block ``text printed`` is what the block above it prints.

    A block ``python emulated`` needs the emulated GPU: where there is none, it and what it prints are passed over.
    """
    namespace: dict[str, object] = {"__name__": "__docs__"}
    printed: str | None = ""
    for block in found:
        if block.kind in kinds:
            output = io.StringIO()
            # Blank lines in front, so that a traceback names the line of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, namespace)
            printed = output.getvalue()
        elif block.kind == "python emulated":
            printed = None
        elif block.kind == "text printed" and printed is not None:
            assert printed.strip() == block.text.strip(), f"{page.name}, line {block.line}: another text is printed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem if page.parent == ROOT else f"docs/{page.stem}")
def test_python(page: Path) -> None:
    found = blocks(page)
    known = {"python", "python no-run", "python emulated"}
    unknown = {block.kind for block in found if block.kind.startswith("python")} - known
    assert not unknown
    if not any(block.kind in KINDS for block in found):
        pytest.skip("no Python that is to be run")
    if page.stem in ("README", "huggingface") and any("transformers" in block.text for block in found):
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the fallback's, where nothing is compiled
        run(page, found)


def test_the_chapters_have_python() -> None:
    counts = {page.name: sum(block.kind == "python" for block in blocks(page)) for page in PAGES if page.parent != ROOT}
    assert counts["layouts.md"] >= 10
    assert counts["attention.md"] >= 10


def test_wrong_examples_are_found() -> None:
    page = Path("page.md")
    run(page, [Block("python", "print(1)\n", 0), Block("text printed", "1\n", 3)])
    with pytest.raises(AssertionError, match="another text"):
        run(page, [Block("python", "print(1)\n", 0), Block("text printed", "2\n", 3)])
    with pytest.raises(ZeroDivisionError):
        run(page, [Block("python", "1 / 0\n", 0)])
    emulated = [Block("python emulated", "print(1)\n", 0), Block("text printed", "2\n", 3)]
    run(page, emulated, ("python",))
    with pytest.raises(AssertionError, match="another text"):
        run(page, emulated, ("python", "python emulated"))


def _anchors(page: Path) -> set[str]:
    """GitHub's names for the headings of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem if page.parent == ROOT else f"docs/{page.stem}")
def test_links(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in _LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page if not file else (page.parent / file).resolve()
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in _anchors(target), f"{link}: no such heading"


def test_pictures_are_small() -> None:
    pictures = sorted((ROOT / "docs" / "pictures").glob("*.png"))
    assert pictures
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
