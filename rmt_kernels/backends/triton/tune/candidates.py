"""Keys of the table of ``configs``, and what is tried for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

import torch

from rmt_kernels.backends.triton.configs import BACKWARD, FORWARD, Backward, Tile
from rmt_kernels.backends.triton.resources import CHIPS

__all__ = ["DTYPES", "KEYS", "Config", "Key", "Trial", "selected", "trials"]

Config = Tile | Backward
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
_LIVE = 224  # registers of a thread that accumulators and scores may fill: addresses and row data need the rest


@dataclass(frozen=True)
class Key:
    """What a row of the table is chosen by, the architecture aside, and which table."""

    kind: str
    width: int
    length: str
    backward: bool
    dropout: bool

    @property
    def name(self) -> str:
        part, dropout = "backward" if self.backward else "forward", "dropout" if self.dropout else "plain"
        return f"{self.kind}:{self.width}:{self.length}:{part}:{dropout}"

    def present(self, arch: int) -> Config:
        """What the table says now."""
        table = BACKWARD if self.backward else FORWARD
        wanted = (arch, self.width, self.kind, self.length, self.dropout)
        return next(row.config for row in table if row.applies(*wanted))


def _keys() -> Iterator[Key]:
    for kind, dropout, widths in product(("half", "tf32", "float32"), (False, True), ((64, 128), (256,))):
        for lengths in (("long", "short"), ("few",)):
            for backward, length, width in product((False, True), lengths, widths):
                yield Key(kind, width, length, backward, dropout)


# In order of importance.
KEYS = tuple(sorted(_keys(), key=lambda key: (key.kind != "half", key.length == "few" and key.backward)))


def selected(patterns: Sequence[str]) -> list[Key]:
    """The keys that a pattern names: the beginning of a name, fields apart by ``:``, ``*`` in a field as in file names.

    Raises ValueError for a pattern that names none.
    """
    split = [pattern.split(":") for pattern in patterns]

    def named(key: Key, wanted: Sequence[str]) -> bool:
        parts = key.name.split(":")
        return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))

    for pattern, wanted in zip(patterns, split, strict=True):
        if not any(named(key, wanted) for key in KEYS):
            raise ValueError(f"{pattern!r} names no key; a key is, for example, {KEYS[0].name} or {KEYS[-1].name}")
    return [key for key in KEYS if any(named(key, wanted) for wanted in split)]


@dataclass(frozen=True)
class Trial:
    """A configuration, and what of it is run: "whole", or of a backward pass "keys" or "queries" alone."""

    part: str
    config: Config

    @property
    def label(self) -> str:
        if isinstance(self.config, Tile):
            return _tile(self.config)
        copies = ", copy engine" if self.config.descriptors else ""
        if self.part != "whole":
            return f"{self.part} {_tile(getattr(self.config, self.part))}{copies}"
        joint = ", joint" if self.config.joint else ""
        return f"keys {_tile(self.config.keys)}, queries {_tile(self.config.queries)}{joint}{copies}"


def _tile(tile: Tile) -> str:
    extra = ", copy engine" * tile.descriptors + ", specialized" * tile.specialize
    return f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}{extra}"


def trials(key: Key, arch: int, *, specialized: bool = False) -> list[Trial]:
    """The present configuration, then the candidates that may fit, those that cannot left out."""
    present = key.present(arch)
    copies = (False, True) if arch >= 90 and key.length != "few" else (False,)
    configs: list[Trial] = []
    if isinstance(present, Tile):
        few = key.length == "few"
        for rows, keys, stages in product((16, 32, 64) if few else (64, 128), (32, 64, 128), (2, 3, 4)):
            for warps, copy in product((2, 4) if few else (4, 8) if rows > 64 else (4,), copies):
                configs.append(Trial("whole", Tile(rows, keys, warps, stages, copy)))
            if specialized and copies[-1]:
                configs.append(Trial("whole", Tile(rows, keys, 4, stages, True, True)))
    elif key.length == "long":
        for warps, stages, copy in product((4, 8), (2, 3), copies):
            for rows, keys in product((32, 64, 128), (64, 128)):
                config = replace(present, keys=Tile(rows, keys, warps, stages), joint=False, descriptors=copy)
                configs.append(Trial("keys", config))
            for rows, keys in product((64, 128), (32, 64, 128)):
                config = replace(present, queries=Tile(rows, keys, warps, stages), joint=False, descriptors=copy)
                configs.append(Trial("queries", config))
    else:
        shapes = product((32, 64), (64, 128), (64, 128), (32, 64))
        for (r, k, qr, qk), warps, stages, copy in product(shapes, (4, 8), (2, 3), copies):
            config = Backward(Tile(r, k, warps, stages), Tile(qr, qk, warps, stages), True, copy)
            configs.append(Trial("whole", config))
    fitting = (trial for trial in configs if _may_fit(key, arch, trial))
    return list(dict.fromkeys([Trial("whole", present), *fitting]))


def _may_fit(key: Key, arch: int, trial: Trial) -> bool:
    """Whether the registers and shared memory that a program needs at the very least are there."""
    shared = max(chip.shared_per_program for chip in CHIPS.values())
    config, size = trial.config, DTYPES[key.kind].itemsize
    parts = [("whole", config)] if isinstance(config, Tile) else [("keys", config.keys), ("queries", config.queries)]
    for part, tile in parts:
        if part != trial.part and trial.part != "whole":
            continue
        own, walked = (tile.keys, tile.rows) if part == "keys" else (tile.rows, tile.keys)
        sums, scores = (2 if part == "keys" else 1), (1 if part == "whole" else 2)
        live = (sums * own * key.width + scores * own * walked) / (32 * tile.warps)
        in_registers = not 100 <= arch < 120  # there, in tensor memory
        if (in_registers and live > _LIVE) or (tile.stages - 1) * 2 * walked * key.width * size > shared:
            return False
    return True
