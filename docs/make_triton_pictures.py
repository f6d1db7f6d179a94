"""Draws the pictures of docs/triton_kernel.md and prints the numbers in the second; no GPU is needed.

``python docs/make_triton_pictures.py`` after a change of the kernels' walk or of their inner loop: ``triton_walk.png``
shows the tiles that ``walk.key_walk`` visits, as Triton's interpreter runs it; ``triton_ladder.png`` the instructions
that the compiler makes, for sm_90, of the forward kernel and of its simpler ancestors below. Needs matplotlib.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from rmt_kernels import SegmentLayout, segment_attention
from rmt_kernels.backends.triton.tiles import rows_of
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile
from rmt_kernels.reference import segment_mask

PICTURES = Path(__file__).resolve().parent / "pictures"
OPEN, EDGE, NONE, HOLE, INK = "#2f6db3", "#f28e2b", "#eef0f4", "#ffffff", "#333a45"
SM = 90


def save(figure: plt.Figure, name: str) -> None:
    """Write one picture. Without the version of matplotlib the same picture is the same file."""
    file = PICTURES / name
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"{file.name}: {file.stat().st_size // 1024} kB")


# -- the walk, in the interpreter --------------------------------------------------------------------------------------

TILE = 64


@triton.jit
def walk_kernel(order_ptr, key_tiles, queries, layout, sample, TILE: tl.constexpr):  # noqa: N803
    """order (row tiles, key tiles): the place in the program's order, negative where the tile needs a mask; 0 unseen."""
    tile = tl.program_id(0)
    query = tile * TILE + tl.arange(0, TILE)
    lo, hi, gap_lo, gap_hi, _ = rows_of(query, query < queries, layout, sample, True, False)
    _, walk = key_walk(lo, hi, gap_lo, gap_hi, TILE, True)
    order = order_ptr + tile * key_tiles
    for i in range(0, open_count(walk)):
        tl.store(order + open_tile(i, walk), i + 1)
    for i in range(0, edge_count(walk)):
        tl.store(order + edge_tile(i, walk), -(open_count(walk) + i + 1))


@dataclass(frozen=True)
class Panel:
    """A sample whose walk is drawn."""

    title: str
    layout: SegmentLayout
    token_begin: int
    token_end: int

    def order(self) -> Tensor:
        """What the kernel visits, checked against the dense mask."""
        queries, keys = self.layout.num_queries, self.layout.num_keys
        order = torch.zeros(triton.cdiv(queries, TILE), triton.cdiv(keys, TILE), dtype=torch.int32)
        sample = (self.token_begin, self.token_end, 0, self.layout.ints[6])
        walk_kernel[(order.shape[0],)](order, order.shape[1], queries, self.layout.ints, sample, TILE)
        mask = self.mask()
        for row, tiles in enumerate(order.tolist()):
            here = mask[row * TILE : (row + 1) * TILE]
            here = here[here.any(1)]  # rows that see nothing are left out
            for tile, place in enumerate(tiles):
                block = here[:, tile * TILE : (tile + 1) * TILE]
                assert place != 0 or not block.any(), "a tile that is seen is not visited"
                assert place <= 0 or block.all(), "a tile without a mask hides something"
        return order

    def mask(self) -> Tensor:
        """bool (queries, keys)."""
        starts, lengths = (torch.tensor([n], dtype=torch.int32) for n in (self.token_begin, self.token_end))
        left = self.token_begin > 0
        found: Tensor = segment_mask(
            self.layout, token_starts=starts if left else None, token_lengths=None if left else lengths
        )
        return found.reshape(self.layout.num_queries, self.layout.num_keys)


PANELS = (
    Panel("rmt_decoder(560, 40)", SegmentLayout.rmt_decoder(560, 40), 0, 560),
    Panel("padded right: token_lengths = 290", SegmentLayout.rmt_decoder(560, 40), 0, 290),
    Panel("window = 150", SegmentLayout.rmt_decoder(560, 40, window=150), 0, 560),
)


def draw_walk() -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13.2, 5.0), layout=ConstrainedLayoutEngine(w_pad=0.12))
    for ax, panel in zip(axes, PANELS, strict=True):
        order, mask = panel.order(), panel.mask()
        queries, keys = mask.shape
        for row, tiles in enumerate(order.tolist()):
            for tile, place in enumerate(tiles):
                colour = OPEN if place > 0 else EDGE if place < 0 else NONE
                x, y = tile * TILE, row * TILE
                size = min(TILE, keys - x), min(TILE, queries - y)
                ax.add_patch(Rectangle((x, y), *size, facecolor=colour, edgecolor="white", linewidth=1.5))
                if place:
                    ax.text(
                        x + size[0] / 2, y + size[1] / 2, str(abs(place)), ha="center", va="center", color="white",
                        fontsize=9, fontweight="bold",
                    )  # fmt: skip
        shade = torch.zeros(queries, keys, 4)
        shade[..., 3] = torch.where(mask, 0.0, 0.30) * (order != 0).repeat_interleave(TILE, 0).repeat_interleave(
            TILE, 1
        )[:queries, :keys]
        ax.imshow(shade.numpy(), extent=(0, keys, queries, 0), interpolation="nearest", zorder=3)
        ax.set(xlim=(0, keys), ylim=(queries, 0), aspect="equal", xlabel="keys, tiles of 64")
        borders = (0, panel.layout.read, panel.layout.read + panel.layout.tokens, keys)
        ax.set_xticks(borders, [""] * 4)
        ax.set_yticks(borders, [""] * 4)
        for start, end, name in zip(borders, borders[1:], ("READ", "TOKENS", "WRITE"), strict=False):
            ax.text((start + end) / 2, -9, name, ha="center", va="bottom", fontsize=8, color=INK)
        ax.tick_params(length=4, color=INK)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_title(panel.title, fontsize=11, fontweight="bold", color=INK, pad=18)
        opens, edges = int((order > 0).sum()), int((order < 0).sum())
        ax.text(
            keys / 2, queries + 58, f"{opens} open + {edges} edge of {order.numel()} tiles", ha="center", va="top",
            fontsize=10, color=INK,
        )  # fmt: skip
    axes[0].set_ylabel("queries, tiles of 64")
    key = [
        Patch(facecolor=OPEN, label="open: every row sees every key, no mask (visited first)"),
        Patch(facecolor=EDGE, label="edge: masked by comparison with the rows' intervals"),
        Patch(facecolor=NONE, label="not visited"),
        Patch(facecolor="#000000", alpha=0.30, label="computed and hidden"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    save(figure, "triton_walk.png")


# -- the ladder, compiled ----------------------------------------------------------------------------------------------

DENSE, INTERVALS, TWO_LOOPS, POWERS = 1, 2, 3, 4


@triton.jit
def ladder_tile(
    acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, start, lo, hi, rows, keys, scale,
    KEYS: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """One tile of keys, as each rung does it."""
    key, d = start + tl.arange(0, KEYS), tl.arange(0, D)
    if MASKED:
        k = tl.load(k_ptr + key[:, None] * D + d[None, :], mask=(key < keys)[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + key[:, None] * D + d[None, :])
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if STEP == 1:
        inside = (row < rows)[:, None] & (key < keys)[None, :]
        s = tl.where(tl.load(mask_ptr + row[:, None] * keys + key[None, :], mask=inside, other=0) != 0, s, float("-inf"))
    elif MASKED:
        s = tl.where((key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None]), s, float("-inf"))
    if STEP < 4:
        s = s * scale
    higher = tl.maximum(highest, tl.max(s, 1))
    pivot = higher
    if MASKED:
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
    if STEP < 4:
        p, fade = tl.exp(s - pivot[:, None]), tl.exp(highest - pivot)
    else:
        power = scale * 1.4426950408889634
        p, fade = tl.exp2(s * power - (pivot * power)[:, None]), tl.exp2(highest * power - pivot * power)
    total = total * fade + tl.sum(p, 1)
    if MASKED:
        v = tl.load(v_ptr + key[:, None] * D + d[None, :], mask=(key < keys)[:, None], other=0.0)
    else:
        v = tl.load(v_ptr + key[:, None] * D + d[None, :])
    return tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee"), total, higher


@triton.jit
def ladder_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lo_ptr, hi_ptr, out_ptr, rows, keys, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip  # noqa: N803
    """Attention of one head whose rows see keys [lo, hi): the ancestors of ``forward_kernel``, by STEP."""
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=(row < rows)[:, None], other=0.0)
    lo = tl.load(lo_ptr + row, mask=row < rows, other=keys)
    hi = tl.load(hi_ptr + row, mask=row < rows, other=0)
    acc, total = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    begin, end = 0, tl.cdiv(keys, KEYS)
    if STEP > 1:
        begin, end = tl.min(lo, 0) // KEYS, tl.cdiv(tl.max(hi, 0), KEYS)
    open_begin, open_end = begin, begin
    if STEP > 2:
        real = row < rows
        open_begin = tl.minimum(tl.cdiv(tl.max(tl.where(real, lo, 0), 0), KEYS), end)
        open_end = tl.maximum(tl.min(tl.where(real, hi, keys), 0) // KEYS, open_begin)
        for tile in range(open_begin, open_end):
            acc, total, highest = ladder_tile(
                acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, tile * KEYS, lo, hi, rows, keys, scale,
                KEYS, D, STEP, False,
            )  # fmt: skip
    for i in range(begin, end - (open_end - open_begin)):
        tile = i
        if STEP > 2:
            tile = tl.where(i >= open_begin, i + (open_end - open_begin), i)
        acc, total, highest = ladder_tile(
            acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, tile * KEYS, lo, hi, rows, keys, scale,
            KEYS, D, STEP, True,
        )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])


def check_ladder() -> None:
    """Every rung gives the attention of the reference, in the interpreter."""
    layout = SegmentLayout.rmt_decoder(90, 12)
    n, width, tile = layout.num_keys, 16, 32
    query, key, value = torch.randn(3, 1, 1, n, width, generator=torch.Generator().manual_seed(0)).unbind()
    wanted = segment_attention(query, key, value, layout, backend="reference")
    lo, hi = (ends.to(torch.int32).contiguous() for ends in layout.intervals().unbind(1))
    for step in (DENSE, INTERVALS, TWO_LOOPS, POWERS):
        out = torch.full_like(query, math.nan)
        ladder_kernel[(triton.cdiv(n, tile),)](
            query, key, value, layout.dense_mask(), lo, hi, out, n, n, width**-0.5, tile, tile, width, step
        )
        torch.testing.assert_close(out, wanted)


@dataclass(frozen=True)
class Rung:
    """A compiled rung: its name, the tiles of each of its loops, and the instructions of a tile in each."""

    name: str
    tiles: tuple[int, int]  # open, edge
    instructions: tuple[int, int]
    registers: int
    programs: int

    @property
    def issued(self) -> tuple[int, int]:
        """Instructions that a warp position issues in each loop, over all programs of one head."""
        return self.tiles[0] * self.instructions[0], self.tiles[1] * self.instructions[1]


def loops(cubin: bytes) -> list[int]:
    """Instructions of every innermost loop that multiplies in tensor cores, in SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w*):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*)", line):
            code.append(instruction[1])

    def back() -> Iterator[tuple[int, int]]:
        for end, instruction in enumerate(code):
            target = re.search(r"\bBRA.*`\((\.L\w*)\)", instruction)
            if target and labels.get(target[1], end + 1) <= end:
                body = code[labels[target[1]] : end + 1]
                if any("MMA" in line for line in body) and not any("EXIT" in line for line in body):
                    yield labels[target[1]], end

    found = list(back())
    return sorted(
        end - begin + 1
        for begin, end in found
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found)
    )


def count_tiles(layout: SegmentLayout, rows: int, keys: int) -> tuple[int, int, int]:
    """Tiles in all, open, and at an edge."""
    mask = layout.dense_mask()
    blocks = [b for strip in mask.split(rows) for b in strip.split(keys, dim=1)]
    whole = [bool(b.all()) and b.shape[1] == keys for b in blocks]
    seen = [bool(b.any()) for b in blocks]
    return len(blocks), sum(whole), sum(seen) - sum(whole)


def compiled_rungs(layout: SegmentLayout, width: int, rows: int, keys: int, warps: int, stages: int) -> list[Rung]:
    from rmt_kernels.backends.triton.configs import Row, Tile
    from rmt_kernels.backends.triton.resources import Variant, compile_variant, resources, specialize
    from rmt_kernels.backends.triton.variants import PLAIN, variants_of

    every, opens, edges = count_tiles(layout, rows, keys)

    def rung(name: str, variant: Variant, tiles: tuple[int, int]) -> Rung:
        used, bodies = resources(variant, SM), loops(compile_variant(variant, SM)[0].asm["cubin"])
        assert len(bodies) == sum(n > 0 for n in tiles), (name, bodies)
        assert used.spilled == used.stack == 0, name
        instructions = (bodies[0], bodies[-1]) if tiles[0] else (0, bodies[0])
        return Rung(name, tiles, instructions, used.registers, used.programs(SM))

    def ancestor(name: str, step: int, tiles: tuple[int, int]) -> Rung:
        half, ints = torch.empty(16, dtype=torch.bfloat16, device="meta"), torch.empty(16, dtype=torch.int32, device="meta")
        mask = torch.empty(16, dtype=torch.bool, device="meta")
        arguments = (half, half, half, mask, ints, ints, half, layout.num_queries, layout.num_keys, 0.125)
        made = specialize(ladder_kernel, SM, *arguments, rows, keys, width, step)
        variant = Variant("ladder", ladder_kernel, **made, num_warps=warps, num_stages=stages, dtype="bf16", head_dim=width, label=name)
        return rung(name, variant, tiles)

    def present(name: str, descriptors: bool) -> Rung:
        tile = Tile(rows, keys, warps, stages, descriptors=descriptors)
        row = Row(SM, width, "half", "long", tile, "")
        (variant,) = variants_of(row, SM, "long", width, torch.bfloat16, PLAIN, False)
        return rung(name, variant, (opens, edges))

    return [
        ancestor("online softmax, dense mask", DENSE, (0, every)),
        ancestor("intervals instead of the mask", INTERVALS, (0, opens + edges)),
        ancestor("two loops: open, then edge", TWO_LOOPS, (opens, edges)),
        ancestor("one multiply-add per exponent", POWERS, (opens, edges)),
        present("the whole kernel: every option", False),
        present("keys through the copy engine", True),
    ]


def draw_ladder() -> None:
    layout = SegmentLayout.rmt_decoder(1024, 16)
    rungs = compiled_rungs(layout, 64, 128, 64, 4, 3)
    figure, ax = plt.subplots(figsize=(11.5, 4.6), layout="constrained")
    for place, rung in enumerate(rungs):
        opens, edges = (n / 1000 for n in rung.issued)
        ax.barh(place, opens, color=OPEN, height=0.62)
        ax.barh(place, edges, left=opens, color=EDGE, height=0.62)
        parts = [f"{n} x {m:,}" for n, m in zip(rung.tiles, rung.instructions, strict=True) if n]
        ax.text(opens + edges + 2, place - 0.03, f"{opens + edges:.0f}k", va="bottom", fontsize=11, fontweight="bold", color=INK)
        ax.text(
            opens + edges + 2, place + 0.03, f"{' + '.join(parts)};  {rung.registers} registers", va="top", fontsize=9,
            color=INK,
        )  # fmt: skip
        print(f"{rung.name}: {rung.tiles} tiles x {rung.instructions}, {sum(rung.issued)}, {rung.registers} registers, {rung.programs} programs")
    ax.set_yticks(range(len(rungs)), [rung.name for rung in rungs], fontsize=10.5, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, max(sum(rung.issued) for rung in rungs) / 1000 * 1.27)
    ax.set_xlabel("instructions in the loops over keys, thousands: tiles x instructions of a tile, one head", color=INK)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(
        "Forward, rmt_decoder(1024, 16), head_dim 64, bfloat16, tiles of 128 x 64, compiled for sm_90", fontsize=11,
        fontweight="bold", color=INK, loc="left",
    )  # fmt: skip
    ax.legend(
        handles=[Patch(facecolor=OPEN, label="open tiles"), Patch(facecolor=EDGE, label="tiles that are masked")],
        loc="lower right", frameon=False,
    )  # fmt: skip
    save(figure, "triton_ladder.png")


def main() -> None:
    """A kernel is interpreted or compiled, which is decided when it is defined: one process for each."""
    if len(sys.argv) == 1:
        PICTURES.mkdir(exist_ok=True)
        for part, interpret in (("walk", "1"), ("ladder", "0")):
            subprocess.run([sys.executable, __file__, part], env={**os.environ, "TRITON_INTERPRET": interpret}, check=True)
    elif sys.argv[1] == "walk":
        check_ladder()
        draw_walk()
    else:
        draw_ladder()


if __name__ == "__main__":
    main()
