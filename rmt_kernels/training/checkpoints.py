"""Checkpoints: tensors and plain values, read without executing anything, never half written, checked when read."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FORMAT", "VERSION", "CheckpointError", "differences", "load_checkpoint", "save_checkpoint", "write"]

FORMAT = "rmt_kernels checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint, or is damaged, or belongs to something else."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts, with format, version and digest.

    The file is replaced as a whole once the new one is on the disk: an interrupted save leaves the previous one.

    Raises:
        TypeError: a value of another kind.
        OSError: the file can't be written; the previous one is untouched.
    """
    whole = {"format": FORMAT, "version": VERSION, "content": content, "digest": _digest(content)}
    write(path, lambda file: torch.save(whole, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, tensors on the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: no checkpoint, one of another version, or a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds something other than tensors and plain values, or is damaged "
            f"({_first(error)}); nothing in it was executed"
        ) from error
    # A damaged archive fails in as many ways as its parts have readers.
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: damaged, or no checkpoint ({type(error).__name__}: {_first(error)}); an interrupted save does "
            "not do this: restore the file from a copy"
        ) from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise CheckpointError(f"{path}: no checkpoint of rmt_kernels; one is a dict with format={FORMAT!r}")
    if whole.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: a checkpoint of version {whole.get('version')!r}; this rmt_kernels reads version {VERSION}"
        )
    content = whole.get("content")
    if not isinstance(content, dict) or _digest(content) != whole.get("digest"):
        raise CheckpointError(f"{path}: damaged: its content is not what was saved; restore the file from a copy")
    return content


def write(path: Path, save: Any) -> None:
    """Have ``save(file)`` write a file, put on the disk and then in the place of ``path`` in one step."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name, too, is on the disk only when its directory is
        directory = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def differences(stored: Any, given: Any, name: str = "") -> list[str]:
    """Where two nests of plain values differ: ``"model.width: 64, not 128"``, stored first."""
    if isinstance(stored, dict) and isinstance(given, dict):
        inside = [*stored] + [key for key in given if key not in stored]
        return [
            line
            for key in inside
            for line in differences(stored.get(key), given.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if stored == given else [f"{name}: {stored!r}, not {given!r}"]


def _digest(content: Any) -> str:
    found = hashlib.sha256()
    _feed(found, content)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Every value with its kind and length, so that different contents never feed the same bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous()
        found.update(f"tensor {raw.dtype} {tuple(raw.shape)}\n".encode())
        found.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    elif type(value) is dict:
        found.update(f"dict {len(value)}\n".encode())
        for key, inside in value.items():
            _feed(found, key)
            _feed(found, inside)
    elif type(value) in (list, tuple):
        found.update(f"{type(value).__name__} {len(value)}\n".encode())
        for inside in value:
            _feed(found, inside)
    elif type(value) in (type(None), bool, int, float, str):  # a subclass would be saved by its name
        text = repr(value).encode()
        found.update(f"{type(value).__name__} {len(text)}\n".encode() + text)
    else:
        raise TypeError(f"a checkpoint holds tensors and plain values, got {type(value).__name__}")


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
