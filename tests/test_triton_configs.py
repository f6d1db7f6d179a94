"""The table of configurations, and that the compile gate is given all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from rmt_kernels.backends.triton import configs
from rmt_kernels.backends.triton.configs import BACKWARD, CALLS, FORWARD, KINDS, LENGTHS, SPLIT_KEYS, WIDTHS, Row, Tile
from rmt_kernels.backends.triton.resources import CHIPS
from rmt_kernels.backends.triton.variants import Use, uses

TABLES = {"forward": FORWARD, "backward": BACKWARD}

# In a process of its own, where kernels are not for the interpreter. Prints what each variant is, and its code's name.
_LISTING = """
import json, sys
from rmt_kernels.backends.triton import variants
print(json.dumps([
    [v.kernel, v.label, v.num_warps, v.dtype, repr((v.signature, v.constexprs, v.attrs, v.num_warps, v.num_stages))]
    for v in getattr(variants, sys.argv[1])(int(sys.argv[2]))
]))
"""


@cache
def listed(name: str, arch: int) -> list[list[Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _LISTING, name, str(arch)], check=True, capture_output=True, text=True, env=environment
    )
    found: list[list[Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_call_on_every_architecture_has_a_row(table: str) -> None:
    for arch in (*CHIPS, 86, 89, 103, 120, 0):
        for width, kind, length, calls in product(WIDTHS, KINDS, LENGTHS, CALLS):
            assert any(row.applies(arch, width, kind, length, calls) for row in TABLES[table])


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_taken_and_says_why(table: str) -> None:
    """A row that others hide, or that gives no reason, is a mistake."""
    taken = {use.row for arch in (*CHIPS, 0) for use in uses(TABLES[table], arch)}
    assert [row for row in TABLES[table] if row not in taken] == []
    assert all(row.reason for row in TABLES[table])
    assert len(set(TABLES[table])) == len(TABLES[table])


@pytest.mark.parametrize("table", TABLES)
def test_tiles_are_what_the_kernels_can_take(table: str) -> None:
    for row in TABLES[table]:
        for tile in row.config.tiles:
            assert tile.rows >= 16, row  # what a product takes, and the most heads that are packed
            assert tile.keys >= 16, row
            assert SPLIT_KEYS % tile.keys == 0, row
            assert tile.warps in (4, 8), row
            assert not tile.specialize or (tile.descriptors and tile.warps == 4), row
            assert not tile.descriptors or row.arch >= 90, row


def test_parts_of_one_launch_agree() -> None:
    """They share warps and stages: the table must not promise others."""
    for row in BACKWARD:
        config = row.config
        assert isinstance(config, configs.Backward)
        if config.joint:
            assert (config.keys.warps, config.keys.stages) == (config.queries.warps, config.queries.stages), row


def test_batch_and_heads_choose_nothing() -> None:
    """What a sample's result depends on must not follow from its neighbours."""
    names = set(Row.applies.__code__.co_varnames[: Row.applies.__code__.co_argcount])
    assert names == {"self", "arch", "width", "kind", "length", "calls"}


@pytest.mark.parametrize(
    ("rows", "keys", "length", "chunks"),
    [(1, 8192, "few", 16), (16, 512, "few", 1), (16, 513, "few", 2), (17, 8192, "short", 1), (1024, 9, "short", 1),
     (1025, 9, "long", 1)],
)  # fmt: skip
def test_lengths_and_splits(rows: int, keys: int, length: str, chunks: int) -> None:
    assert configs.length(rows) == length
    assert configs.splits(rows, keys) == chunks


@pytest.mark.parametrize(("head_dim", "width"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)])
def test_width(head_dim: int, width: int) -> None:
    assert configs.padded_width(head_dim) == width


@pytest.mark.parametrize(
    ("gaps", "extras", "calls"),
    [(False, False, "plain"), (True, False, "gaps"), (False, True, "extras"), (True, True, "extras")],
)
def test_calls(gaps: bool, extras: bool, calls: str) -> None:
    assert configs.calls(gaps, extras) == calls


def test_kinds() -> None:
    assert configs.kind(torch.bfloat16, "ieee") == configs.kind(torch.float16, "tf32") == "half"
    assert configs.kind(torch.float32, "ieee") == "float32"
    assert configs.kind(torch.float32, "tf32") == "tf32"


_DTYPES = {"half": ("bf16", "fp16"), "tf32": ("tf32",), "float32": ("fp32",)}


def parts(use: Use) -> list[tuple[str, str, int]]:
    """The kernels that a use of a row launches: which, tiles, warps."""

    def sizes(*tiles: Tile) -> str:
        return " ".join(f"{tile.rows}x{tile.keys}" for tile in tiles)

    config = use.row.config
    if isinstance(config, Tile):
        return [("forward", sizes(config), config.warps)]
    if config.joint:
        return [("keys and queries", sizes(config.keys, config.queries), config.keys.warps)]
    return [("keys", sizes(config.keys), config.keys.warps), ("queries", sizes(config.queries), config.queries.warps)]


@pytest.mark.parametrize(
    ("name", "arch"), [("variants", 80), ("variants", 90), ("variants", 100), ("all_variants", 90)]
)
def test_the_gate_is_given_every_row(name: str, arch: int) -> None:
    """For float16 and bfloat16, and in the long run for float32 too."""
    kinds = KINDS if name == "all_variants" else ("half",)
    wanted = {
        (*part, dtype)
        for use in (*uses(FORWARD, arch), *uses(BACKWARD, arch))
        if use.row.kind in kinds
        for part in parts(use)
        for dtype in (_DTYPES[use.row.kind] if use.calls == "plain" else _DTYPES[use.row.kind][:1])
    }
    given = set()
    for _, label, warps, dtype, _ in listed(name, arch):
        part, tiles, *_ = label.split(", ")
        given.add((part.split(" ", 1)[-1], tiles, warps, dtype))
    assert wanted - given == set()
    assert {each[0] for each in given} == {"forward", "combine", "prepare", *(part for part, *_ in wanted)}


@pytest.mark.parametrize("name", ["variants", "all_variants"])
def test_no_kernel_is_compiled_twice(name: str) -> None:
    codes = [(kernel, code) for kernel, _, _, _, code in listed(name, 90)]
    assert len(codes) == len(set(codes))


def test_the_gate_is_strict_with_the_compiler_that_is_pinned() -> None:
    pinned = Path(__file__).parents[1].joinpath("requirements-dev.txt").read_text()
    assert f"triton=={configs.CHOSEN_WITH};" in pinned
