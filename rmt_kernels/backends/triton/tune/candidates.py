"""Keys of the tables of ``configs``, and what is tried for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product

import torch

from rmt_kernels.backends.triton import configs
from rmt_kernels.backends.triton.configs import Backward, Row, Tile
from rmt_kernels.backends.triton.resources import CHIPS

__all__ = ["DTYPES", "KEYS", "Config", "Key", "candidates", "label", "selected"]

Config = Tile | Backward
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
_LIVE = 224  # registers of a thread that accumulators and scores may fill: addresses and row data need the rest


@dataclass(frozen=True)
class Key:
    """What a row of the tables is chosen by, the architecture aside, and which table."""

    kind: str
    width: int
    length: str
    backward: bool
    calls: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.width}:{self.length}:{'backward' if self.backward else 'forward'}:{self.calls}"

    def row(self, arch: int) -> Row:
        """The row that the table has for it now."""
        table = configs.BACKWARD if self.backward else configs.FORWARD
        return next(row for row in table if row.applies(arch, self.width, self.kind, self.length, self.calls))


def _keys() -> Iterator[Key]:
    for kind, calls, widths in product(("half", "tf32", "float32"), ("plain", "extras", "gaps"), ((64, 128), (256,))):
        for lengths in (("long", "short"), ("few",)):
            for backward, length, width in product((False, True), lengths, widths):
                yield Key(kind, width, length, backward, calls)


# In order of importance.
KEYS = tuple(sorted(_keys(), key=lambda key: (key.kind != "half", key.length == "few" and key.backward)))


def selected(patterns: Sequence[str]) -> list[Key]:
    """The keys that a pattern names: the beginning of a name, fields apart by ``:``, ``*`` in a field as in file names.

    Raises ValueError for a pattern that names none.
    """

    def named(pattern: str) -> set[Key]:
        wanted = pattern.split(":")
        found = {
            key
            for key in KEYS
            if len(wanted) <= len(parts := key.name.split(":")) and all(map(fnmatchcase, parts, wanted))
        }
        if not found:
            raise ValueError(f"{pattern!r} names no key; a key is, for example, {KEYS[0].name} or {KEYS[-1].name}")
        return found

    chosen = set().union(*map(named, patterns))
    return [key for key in KEYS if key in chosen]


def label(config: Config) -> str:
    """A configuration in short: rows x keys of a tile, warps, stages."""
    if isinstance(config, Backward):
        extra = ", joint" * config.joint + ", copy engine" * config.descriptors
        return f"keys {label(config.keys)}, queries {label(config.queries)}{extra}"
    extra = ", copy engine" * config.descriptors + ", specialized" * config.specialize
    return f"{config.rows}x{config.keys} w{config.warps} s{config.stages}{extra}"


def candidates(key: Key, arch: int, *, specialized: bool = False) -> list[Config]:
    """The present configuration, then others that may fit; with ``specialized`` some that set warps apart for loads."""
    present, few = key.row(arch).config, key.length == "few"
    copies = (False, True) if arch >= 90 and not few else (False,)
    lean = key.kind == "half" and key.width < 256
    found: list[Config] = [present]
    if isinstance(present, Tile):
        rows, warps = ((16, 32, 64), (2, 4)) if few else ((32, 64, 128), (4, 8))
        keys, stages = ((32, 64, 128), (2, 3, 4)) if lean else ((16, 32, 64), (1, 2, 3))
        for tile in _fitting(key, arch, "whole", product(rows, keys, warps, stages)):
            if tile.warps == 8 and tile.rows < 128 and lean:  # a warp owns 16 rows
                continue
            found += [replace(tile, descriptors=copy) for copy in copies]
            if specialized and copies[-1] and tile.warps == 4:
                found.append(replace(tile, descriptors=True, specialize=True))
    else:
        ahead = (2, 3) if lean else (1, 2)
        if key.length == "long":  # one part varied, then the other: the tuner puts the best together
            many = (32, 64, 128) if lean else (16, 32, 64)
            key_tiles = _fitting(key, arch, "keys", product((16, 32, 64, 128), many, (4, 8), ahead))
            query_tiles = _fitting(key, arch, "queries", product((32, 64, 128), (16, 32, 64), (4, 8), ahead))
            apart = replace(present, joint=False)
            found += [apart, *(replace(apart, keys=tile) for tile in key_tiles)]
            found += [replace(apart, queries=tile) for tile in query_tiles]
        else:  # a grid that half the work would not fill: one launch
            few_keys = (32, 64) if lean else (16, 32)
            key_tiles = _fitting(key, arch, "keys", product((16, 32, 64), few_keys, (4, 8), ahead))
            query_tiles = _fitting(key, arch, "queries", product((32, 64), few_keys, (4, 8), ahead))
            found += [
                Backward(one, other, True)
                for one, other in product(key_tiles, query_tiles)
                if (one.warps, one.stages) == (other.warps, other.stages)
            ]
        found += [replace(present, descriptors=copy) for copy in copies]  # again with the fastest
    unique: dict[str, Config] = {}
    for config in found:
        unique.setdefault(label(config), config)
    return list(unique.values())


def _fitting(key: Key, arch: int, part: str, sizes: Iterable[tuple[int, int, int, int]]) -> list[Tile]:
    """Tiles of the sizes that leave a part, "keys" or "queries" of a backward pass or "whole", the registers for its
    accumulators and scores, and the shared memory for its loads in flight."""
    shared = max(chip.shared_per_program for name, chip in CHIPS.items() if name == arch or arch not in CHIPS)
    in_registers = not 100 <= arch < 120  # there, in tensor memory
    found = []
    for tile in (Tile(*each) for each in sizes):
        own, walked = (tile.keys, tile.rows) if part == "keys" else (tile.rows, tile.keys)
        sums, scores = 2 if part == "keys" else 1, 1 if part == "whole" else 2
        live = (sums * own * key.width + scores * own * walked) / (32 * tile.warps)
        loads = (tile.stages - 1) * 2 * walked * key.width * DTYPES[key.kind].itemsize
        if loads <= shared and (live <= _LIVE or not in_registers):
            found.append(tile)
    return found
