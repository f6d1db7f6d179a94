"""The directory of a run: what is in it, when it may be used again, and how a run is read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmt_kernels.training.checkpoints import CheckpointError, differences, load_checkpoint, write
from rmt_kernels.training.config import TrainConfig

__all__ = ["CHECKPOINT", "CURVE", "LOG", "RUN", "SUMMARY", "check_same", "claim", "read_config", "write_json"]

RUN, LOG, CHECKPOINT, SUMMARY, CURVE = "run.json", "log.jsonl", "checkpoint.pt", "summary.json", "curve.png"
_FORMAT = "rmt_kernels run"
_VERSION = 1
# The marker goes last: a directory half emptied still is known as a run.
_OURS = (CHECKPOINT, LOG, SUMMARY, CURVE, *(f"{name}.new" for name in (CHECKPOINT, LOG, SUMMARY, CURVE, RUN)), RUN)


@dataclass(frozen=True)
class Claim:
    """A directory that belongs to a run from now on."""

    directory: Path
    checkpoint: dict[str, Any] | None  # to go on from


def claim(directory: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> Claim:
    """Make a directory the run's, or take an existing one where that is asked for.

    Raises:
        FileExistsError: it exists, and neither ``resume`` nor ``overwrite`` allows its use.
        FileNotFoundError: there is nothing to resume.
        CheckpointError: the checkpoint is damaged, or of another config.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite: give one of them")
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory}: is a file; --out names a directory")
    if resume:
        stored = read_config(directory)
        check_same(directory / RUN, stored, config.to_dict())
        path = directory / CHECKPOINT
        return Claim(directory, load_checkpoint(path) if path.exists() else None)
    if directory.exists() and any(directory.iterdir()):
        is_run = _is_run(directory)
        if not overwrite:
            ways = "; --resume goes on with it, --overwrite replaces it," if is_run else ";"
            raise FileExistsError(f"{directory}: exists already{ways} --out takes another directory")
        strange = sorted(path.name for path in directory.iterdir() if path.name not in _OURS)
        if not is_run or strange:
            what = f"it also holds {', '.join(strange[:5])}" if is_run else f"it has no {RUN} of a run"
            raise FileExistsError(f"{directory}: --overwrite replaces runs only, and {what}; remove it yourself")
        for name in _OURS:
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RUN, {"format": _FORMAT, "version": _VERSION, "config": config.to_dict()})
    return Claim(directory, None)


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a run, as plain values.

    Raises:
        FileNotFoundError: no run is there.
        CheckpointError: its ``run.json`` is damaged, or of another version.
    """
    path = directory / RUN
    if not path.exists():
        raise FileNotFoundError(f"{directory}: there is no run to resume (no {RUN}); leave --resume out to begin one")
    marker = _marker(path)
    if marker is None or marker.get("format") != _FORMAT or not isinstance(marker.get("config"), dict):
        raise CheckpointError(f"{path}: damaged, or not written by rmt_kernels")
    if marker.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: a run of version {marker.get('version')!r}; this rmt_kernels reads version {_VERSION}"
        )
    config: dict[str, Any] = marker["config"]
    return config


def check_same(path: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the fields, where a stored config is another one."""
    found = differences(json.loads(json.dumps(stored)), json.loads(json.dumps(given)))
    if found:
        raise CheckpointError(f"{path}: of another run: {'; '.join(found)} (stored, not asked for)")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values, in one step."""
    text = json.dumps(values, indent=2) + "\n"
    write(path, lambda file: file.write(text.encode()))


def _is_run(directory: Path) -> bool:
    marker = _marker(directory / RUN)
    return marker is not None and marker.get("format") == _FORMAT


def _marker(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
