"""The text that ships with Python: its language documentation and the sources of its standard library.

Both differ from one version of Python to the next; :func:`fingerprint` tells versions apart.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "common_words", "documentation", "fingerprint", "source_files", "sources"]

Bytes = npt.NDArray[np.uint8]
_LEFT_OUT = frozenset(["test", "idlelib", "lib2to3", "tkinter", "turtledemo", "encodings", "pydoc_data", "distutils"])


@functools.cache
def documentation(held_out: bool) -> Bytes:
    """Python's language documentation in English, uint8 (n,). Held out: its last tenth."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics)).encode()
    border = whole.index(b"\n", len(whole) * 9 // 10) + 1
    return np.frombuffer(whole[border:] if held_out else whole[:border], dtype=np.uint8)


@functools.cache
def sources(held_out: bool) -> Bytes:
    """The standard library's Python sources, uint8 (n,). Held out: every tenth file.

    Raises:
        FileNotFoundError: this Python has no sources on disk.
    """
    return np.frombuffer(b"\n".join(path.read_bytes() for path in source_files(held_out)), dtype=np.uint8)


def source_files(held_out: bool) -> list[Path]:
    """The files of :func:`sources`: modules of the standard library, without tests and tables, in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for path in root.iterdir() if root.is_dir() else ():
        # What a platform generates is no module by name, so the list is the same on all.
        if path.name.removesuffix(".py") in sys.stdlib_module_names - _LEFT_OUT:
            found += [path] if path.suffix == ".py" else path.rglob("*.py")
    found = [path for path in found if not {"test", "tests"} & set(path.relative_to(root).parts)]
    if len(found) < 100:
        raise FileNotFoundError(
            f"source: the standard library's sources are not in {root} ({len(found)} files there); use the task 'text'"
        )
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    return [path for i, path in enumerate(found) if (i % 10 == 9) == held_out]


def fingerprint(*texts: Bytes) -> str:
    """16 hexadecimal digits that differ where the texts do."""
    found = hashlib.sha256()
    for text in texts:
        found.update(len(text).to_bytes(8, "little") + text.tobytes())
    return found.hexdigest()[:16]


@functools.cache
def common_words(number: int, without: frozenset[str], held_out: bool) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """The documentation as words: the ``number`` most frequent ones, and the text as indices of them, int64 (n,).

    Index ``number`` stands for any other word. ``without``: words that count as such.
    """
    words = [re.findall("[a-z]+", documentation(part).tobytes().decode().lower()) for part in (False, True)]
    counts = Counter(word for word in words[0] if word not in without)
    known = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]]
    index = {word: i for i, word in enumerate(known)}
    return tuple(known), np.array([index.get(word, number) for word in words[held_out]], dtype=np.int64)
