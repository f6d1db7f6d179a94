"""Results on disk: one file per stage while it runs, one merged file for the report; each is written whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["State", "Store", "complete", "pending", "read_json", "write_json"]

State = dict[str, Any]


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


@dataclass(frozen=True)
class Store:
    """The folder of one run. A stage's state is ``{"stage", "planned", "items": {key: item}, "seconds"}``, an item
    ``{"status": "done" | "failed", "attempts", "excluded", "seconds", "records", "facts", "failures", "error"}``."""

    folder: Path

    @property
    def merged(self) -> Path:
        """The file that holds everything."""
        return self.folder / "gpu.json"

    def stage_file(self, stage: str) -> Path:
        """Where the state of ``stage`` is."""
        return self.folder / "stages" / f"{stage}.json"

    def work(self, stage: str) -> Path:
        """A folder for what the stage's programs write."""
        folder = self.folder / "stages" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, stage: str) -> State:
        """The stage's state, that of a stage not begun where there is none."""
        state = read_json(self.stage_file(stage))
        if not isinstance(state, dict) or "items" not in state:
            return {"stage": stage, "planned": None, "items": {}, "seconds": 0.0}
        return state

    def save(self, state: State) -> None:
        """Write the stage's state."""
        write_json(self.stage_file(state["stage"]), state)

    def forget(self, stage: str) -> None:
        """Remove what an earlier run left of the stage."""
        self.stage_file(stage).unlink(missing_ok=True)
        for file in self.work(stage).iterdir():
            if file.is_file():
                file.unlink()

    def merge(self, about: dict[str, Any], stages: tuple[str, ...]) -> dict[str, Any]:
        """Write and return the merged results: ``about``, and the state of every stage that was begun."""
        found = {stage: self.load(stage) for stage in stages if self.stage_file(stage).exists()}
        before = read_json(self.merged) or {}
        result = {**{k: v for k, v in before.items() if k != "stages"}, **about, "stages": found}
        write_json(self.merged, result)
        return result


def pending(state: State) -> list[str]:
    """Keys of the items that are still to be run."""
    planned = state["planned"] or []
    return [key for key in planned if state["items"].get(key, {}).get("status") not in ("done", "failed")]


def complete(state: State) -> bool:
    """Whether every item of the stage was run, whatever came of it."""
    return state["planned"] is not None and not pending(state)
