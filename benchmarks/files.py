"""Results on disk. Imports nothing that takes time: child processes that are supervised begin with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "read_json", "write_json"]

RESULTS = Path(__file__).resolve().parent / "results"


def write_json(file: Path, value: Any) -> None:
    """Replace ``file``; a reader, or a process that is ended meanwhile, sees the old content or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)


def read_json(file: Path) -> Any:
    """The content of ``file``, None where there is none or it is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
