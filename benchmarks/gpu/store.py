"""Results on disk: one file per stage while it runs, one merged file for the report; each is written whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.files import read_json, write_json

__all__ = ["State", "Store", "complete", "pending"]

State = dict[str, Any]


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
