"""Draws the pictures of docs/triton_kernel.md and prints every number that it cites. No GPU is needed.

``python docs/make_triton_pictures.py`` after a change of the kernels. The tiles are those that ``walk.key_walk`` visits
in Triton's interpreter; the instructions are those that the compiler makes for sm_90, of the kernels and of those in
``triton_ancestors.py``. Needs matplotlib.
"""

# ruff: noqa: N803

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
import triton_ancestors as ancestors

from rmt_kernels import SegmentLayout
from rmt_kernels.backends.triton.configs import BACKWARD, FORWARD, Row, backward_config, forward_config, splits
from rmt_kernels.backends.triton.tiles import rows_of
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile
from rmt_kernels.reference import segment_mask

SM = 90
HALF = torch.bfloat16
# One SM of that architecture in one clock: operations of its tensor cores, exponentials, instructions of a warp.
PRODUCTS, EXPONENTIALS, SCHEDULERS = 4096, 16, 4
CUT = SegmentLayout.rmt_decoder(560, 40)
# (title, layout, token_lengths or None)
DRAWN = (
    ("rmt_decoder(560, 40)", CUT, None),
    ("padded: token_lengths = 290", CUT, 290),
    ("window = 150", SegmentLayout.rmt_decoder(560, 40, window=150), None),
)
COUNTED = (
    *[(f"rmt_decoder({n}, {m})", SegmentLayout.rmt_decoder(n, m), None)
      for m, n in ((16, 512), (16, 1024), (16, 2048), (16, 4096), (128, 1024))],
    ("causal(1024, 16)", SegmentLayout.causal(1024, 16), None),
    ("transformer_xl(512, 512)", SegmentLayout.transformer_xl(512, 512), None),
    ("rmt_decoder(4096, 16, window=512)", SegmentLayout.rmt_decoder(4096, 16, window=512), None),
    ("rmt_decoder(1024, 16), 400 tokens", SegmentLayout.rmt_decoder(1024, 16), 400),
    ("rmt_encoder(1024, 16), 400 tokens", SegmentLayout.rmt_encoder(1024, 16), 400),
)  # fmt: skip


# -- in the interpreter: which tiles are visited -----------------------------------------------------------------------


@triton.jit
def walk_kernel(
    order_ptr, key_tiles, queries, layout, sample, ROWS: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr
):
    """order (row tiles, key tiles): the place in the program's order, negative where a mask is needed; 0 unseen."""
    tile = tl.program_id(0)
    query = tile * (ROWS // PACK) + tl.arange(0, ROWS) // PACK
    lo, hi, gap_lo, gap_hi, _ = rows_of(query, query < queries, layout, sample, True, False)
    _, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, True)
    order = order_ptr + tile * key_tiles
    for i in range(0, open_count(walk)):
        tl.store(order + open_tile(i, walk), i + 1)
    for i in range(0, edge_count(walk)):
        tl.store(order + edge_tile(i, walk), -(open_count(walk) + i + 1))


def mask_of(layout: SegmentLayout, tokens: int | None) -> torch.Tensor:
    """bool (queries, keys)."""
    lengths = None if tokens is None else torch.tensor([tokens], dtype=torch.int32)
    return segment_mask(layout, 1, torch.device("cpu"), lengths)[0][0]


def order_of(layout: SegmentLayout, tokens: int | None, rows: int, keys: int, pack: int = 1) -> list[list[int]]:
    """What the kernel visits, checked against the dense mask."""
    high = rows // pack
    order = torch.zeros(-(-layout.num_queries // high), -(-layout.num_keys // keys), dtype=torch.int32)
    sample = (0, layout.tokens if tokens is None else tokens, 0, layout.skip)
    walk_kernel[(order.shape[0],)](order, order.shape[1], layout.num_queries, layout.ints, sample, rows, keys, pack)
    for strip, places in zip(mask_of(layout, tokens).split(high), order.tolist(), strict=True):
        for block, place in zip(strip[strip.any(1)].split(keys, 1), places, strict=True):
            assert place or not block.any(), "a tile that is seen is not visited"
            assert place <= 0 or bool(block.all()), "a tile without a mask hides something"
    found: list[list[int]] = order.tolist()
    return found


def counts(layout: SegmentLayout, tokens: int | None, rows: int, keys: int, pack: int = 1) -> dict[str, Any]:
    """Tiles in all, open and masked; entries computed for one that is visible."""
    places = [place for row in order_of(layout, tokens, rows, keys, pack) for place in row]
    opens, edges = sum(place > 0 for place in places), sum(place < 0 for place in places)
    computed = (opens + edges) * rows * keys / (int(mask_of(layout, tokens).sum()) * pack)
    return {"all": len(places), "open": opens, "edge": edges, "computed": round(computed, 2)}


def interpreted() -> dict[str, Any]:
    ancestors.check()
    found: dict[str, Any] = {name: counts(layout, tokens, 128, 64) for name, layout, tokens in COUNTED}
    for pack in (1, 4):
        found[f"rmt_decoder(512, 16), {pack} heads to a tile"] = counts(COUNTED[0][1], None, 128, 64, pack)
    found["rmt_decoder(2048, 16), 64 x 64"] = counts(COUNTED[2][1], None, 64, 64)
    for width in (64, 128):
        tile = forward_config(SM, width, "half", "long", "plain")
        found[f"ladder {width}"] = counts(COUNTED[2][1], None, tile.rows, tile.keys)
    found["drawn"] = [order_of(layout, tokens, 64, 64) for _, layout, tokens in DRAWN]
    return found


# -- compiled: what they take ------------------------------------------------------------------------------------------


def disassembled(cubin: bytes) -> tuple[list[str], list[list[str]]]:
    """SASS: all instructions, and those of every innermost loop that multiplies in tensor cores."""
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
    found = []
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA.*`\((\.L\w*)\)", instruction)
        begin = labels.get(target[1], end + 1) if target else end + 1
        body = code[begin : end + 1]
        if any("MMA" in line for line in body) and not any("EXIT" in line for line in body):
            found.append((begin, end))
    inner = [a for a in found if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in found)]
    return code, [code[begin : end + 1] for begin, end in inner]


def measure(variant: Any) -> dict[str, Any]:
    from rmt_kernels.backends.triton.resources import compile_variant, resources

    used = resources(variant, SM)
    code, loops = disassembled(compile_variant(variant, SM)[0].asm["cubin"])
    wanted = ("FFMA", "MUFU", "FMNMX", "FADD", "FMUL", "F2FP", "FSETP", "HGMMA", "STS|STSM|LDS|LDSM", "BAR")
    first = {op: sum(bool(re.search(rf"\b({op})\b", line)) for line in loops[0]) for op in wanted} if loops else {}
    return {
        "label": variant.label, "loops": [len(loop) for loop in loops], "first": first, "warps": variant.num_warps,
        "code": next(place for place, line in enumerate(code) if line.startswith("EXIT")),
        "registers": used.registers, "spilled": used.spilled + used.stack, "KiB": round(used.shared / 1024, 1),
        "programs": used.programs(SM),
    }  # fmt: skip


def compiled() -> dict[str, Any]:
    from rmt_kernels.backends.triton.resources import Variant, specialize
    from rmt_kernels.backends.triton.variants import FEATURES, variants_of

    half, ints = (torch.empty(16, dtype=dtype, device="meta") for dtype in (HALF, torch.int32))
    floats = torch.empty(16, device="meta")

    def ancestor(kernel: Any, width: int, warps: int, stages: int, *arguments: object) -> dict[str, Any]:
        made = specialize(kernel, SM, *arguments)
        return measure(Variant(kernel.fn.__name__, kernel, **made, num_warps=warps, num_stages=stages, dtype="bf16",
                               head_dim=width, label=""))  # fmt: skip

    def present(table: tuple[Row, ...], width: int, length: str) -> list[dict[str, Any]]:
        row = next(row for row in table if row.applies(SM, width, "half", length, "plain"))
        return [measure(variant) for variant in variants_of(row, SM, length, width, HALF, FEATURES["plain"][0])]

    found: dict[str, Any] = {}
    for width in (64, 128):
        tile = forward_config(SM, width, "half", "long", "plain")
        mask = torch.empty(16, dtype=torch.bool, device="meta")
        for step in ancestors.STEPS:
            found[f"ancestor {width} {step}"] = ancestor(
                ancestors.forward_rung, width, tile.warps, tile.stages, half, half, half, mask, ints, ints, half,
                2080, 2080, 0.125, tile.rows, tile.keys, width, step,
            )  # fmt: skip
        for described in (False, True):
            row = Row(SM, width, "half", "long", replace(tile, descriptors=described), "")
            (variant,) = variants_of(row, SM, "long", width, HALF, FEATURES["plain"][0])
            found[f"present {width} {'descriptors' if described else 'pointers'}"] = measure(variant)
        for length in ("few", "short", "long"):
            found[f"forward {width} {length}"] = present(FORWARD, width, length)
            found[f"backward {width} {length}"] = present(BACKWARD, width, length)
    unknown = (
        ints,
        ints,
        2087,
        (7,) * len(CUT.ints),
        (7,) * 4,
        64,
    )  # sizes that the compiler must not take for constants
    for choice in (False, True):
        found[f"turned, transposed {choice}"] = ancestor(
            ancestors.turned, 64, 4, 2, half, half, half, floats, 33, 64, 64, choice
        )
        found[f"spans, read {choice}"] = ancestor(ancestors.spans, 64, 4, 2, *unknown, choice)
    return found


# -- arithmetic alone --------------------------------------------------------------------------------------------------


def asked() -> dict[str, Any]:
    """What one head of a segment asks for, and how many clocks of one SM that takes at the least."""
    found: dict[str, Any] = {}
    for _, layout, _ in (COUNTED[0], COUNTED[2]):
        for width in (64, 128):
            rows, seen = layout.num_queries, layout.visible()
            moved = 4 * rows * width * 2 + rows * 4
            found[f"one head, {layout.tokens} tokens, width {width}"] = {
                "rows": rows, "entries": rows * rows, "visible": seen, "percent": round(100 * seen / rows**2, 1),
                "Mops": round(4 * seen * width / 1e6), "kB": round(moved / 1e3),
                "ops/byte": round(4 * seen * width / moved),
                "scores kB": round(rows**2 * 4 / 1e3), "mask kB": round(rows**2 / 1e3),
                "clocks of products": 4 * seen * width // PRODUCTS, "of exponentials": seen // EXPONENTIALS,
            }  # fmt: skip
    keys, width, group = 8192, 64, 4
    tile = forward_config(SM, width, "half", "few", "plain")
    chunks, parts = splits(group, keys), splits(group, keys) * group * (width + 2) * 4
    found["decoding, 8,192 keys, 8 key/value heads, group 4"] = {
        "chunks": chunks, "programs": [8, 8 * chunks],
        "tiles one after another": [keys // tile.keys, keys // chunks // tile.keys],
        "keys and values kB of a head": 2 * keys * width * 2 / 1e3, "parts kB": parts / 1e3,
    }  # fmt: skip
    config = backward_config(SM, width, "half", "short", "plain")
    found["backward, 512 tokens, 16 heads"] = {
        "joint": config.joint, "programs": [16 * -(-544 // config.keys.keys), 16 * -(-544 // config.queries.rows)]
    }  # fmt: skip
    return found


# -- the pictures ------------------------------------------------------------------------------------------------------

OPEN, EDGE, NONE, INK, RED = "#2f6db3", "#f28e2b", "#e6e9ef", "#333a45", "#c0392b"
STEPS = {
    "ancestor {} 1": "online softmax, dense mask, all tiles", "ancestor {} 2": "intervals: unseen tiles skipped",
    "ancestor {} 3": "two loops: open tiles, then edges", "ancestor {} 4": "exponent: one multiply-add",
    "present {} pointers": "the whole kernel, keys by pointers",
    "present {} descriptors": "the whole kernel, copy engine",
}  # fmt: skip


def save(figure: Any, name: str) -> None:
    """Write one picture. Without the version of matplotlib the same picture is the same file."""
    file = Path(__file__).resolve().parent / "pictures" / name
    figure.savefig(file, dpi=130, metadata={"Software": None})
    print(f"{file.name}: {file.stat().st_size // 1024} kB")


def draw_walk(plt: Any, orders: list[list[list[int]]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(8.0, 3.6))
    figure.subplots_adjust(left=0.085, right=0.995, top=0.92, bottom=0.235, wspace=0.06)
    for ax, (title, layout, tokens), order in zip(axes, DRAWN, orders, strict=True):
        queries, keys = layout.num_queries, layout.num_keys
        shade = torch.zeros(queries, keys, 4)
        for row, places in enumerate(order):
            for tile, place in enumerate(places):
                x, y = tile * 64, row * 64
                colour = OPEN if place > 0 else EDGE if place else NONE
                ax.add_patch(plt.Rectangle((x, y), 64, 64, facecolor=colour, edgecolor="white", linewidth=1.2))
                if place:
                    shade[y : y + 64, x : x + 64, 3] = 0.3
                    ax.text(x + 32, y + 33, abs(place), ha="center", va="center", color="white", fontsize=8, zorder=4)
        shade[..., 3] *= ~mask_of(layout, tokens)
        ax.imshow(shade.numpy(), extent=(0, keys, queries, 0), interpolation="nearest", zorder=3)
        borders = (0, layout.read, layout.read + layout.tokens, keys)
        middles = [(start + end) / 2 for start, end in pairwise(borders)]
        ax.set(xlim=(0, keys), ylim=(queries, 0), aspect="equal")
        ax.set_xticks(borders, [""] * 4)
        ax.set_yticks(middles, ("READ", "TOKENS", "WRITE") if ax is axes[0] else [""] * 3, fontsize=8, color=INK)
        ax.set_yticks(borders, minor=True)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(which="minor", length=4, color=INK)
        ax.tick_params(axis="x", length=4, color=INK)
        ax.spines[:].set_visible(False)
        ax.set_title(title, fontsize=9.5, fontweight="bold", color=INK)
        opens, edges = (sum((place > 0) if sign else (place < 0) for row in order for place in row) for sign in (1, 0))
        counted = f"{opens} open + {edges} edge of {len(order) * len(order[0])} tiles"
        ax.set_xlabel(f"keys: READ | TOKENS | WRITE\n{counted}", fontsize=9, color=INK, labelpad=0, linespacing=1.5)
    axes[0].set_ylabel("queries", fontsize=9, color=INK, labelpad=0)
    kinds = {"open: no mask, first": OPEN, "edge: masked": EDGE, "not visited": NONE, "computed, hidden": "#b3b3b3"}
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colour, label=label) for label, colour in kinds.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, "triton_walk.png")


def slots(found: dict[str, Any], width: int) -> dict[str, Any]:
    """Issue slots of one SM for each rung: a loop's instructions are issued once a warp, by four schedulers."""
    tiles, rungs = found[f"ladder {width}"], {}
    for name, label in STEPS.items():
        used = found[name.format(width)]
        visited = [tiles["open"], tiles["edge"]] if len(used["loops"]) > 1 else [tiles["open"] + tiles["edge"]]
        visited = [tiles["all"]] if label == STEPS["ancestor {} 1"] else visited
        issued = [n * i * used["warps"] // SCHEDULERS for n, i in zip(visited, used["loops"], strict=True)]
        rungs[label] = {"tiles": visited, "instructions": used["loops"], "slots": issued, "sum": sum(issued)}
    return rungs


def draw_ladder(plt: Any, found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(8.0, 6.4), layout="constrained")
    title = "Forward of one head, rmt_decoder(2048, 16), bfloat16, compiled for sm_90"
    figure.suptitle(title, fontsize=10.5, fontweight="bold", color=INK)
    for ax, width in zip(axes, (64, 128), strict=True):
        floor, rungs = found[f"one head, 2048 tokens, width {width}"]["clocks of products"] / 1000, slots(found, width)
        for place, rung in enumerate(rungs.values()):
            parts, end = [n / 1000 for n in rung["slots"]], rung["sum"] / 1000
            ax.barh(place, parts[0], height=0.66, color=OPEN if len(parts) > 1 else EDGE)
            ax.barh(place, end - parts[0], left=parts[0], height=0.66, color=EDGE)
            counted = " + ".join(f"{n} x {i:,}" for n, i in zip(rung["tiles"], rung["instructions"], strict=True))
            ax.text(max(end, floor) + 8, place, f"{end:.0f}k = {counted}", va="center", fontsize=8.5, color=INK)
        ax.axvline(floor, color=RED, linewidth=1.4, linestyle="--")
        longest = max(rung["sum"] for rung in rungs.values()) / 1000
        ax.set(yticks=range(len(rungs)), xlim=(0, longest * 1.32))
        ax.set_yticklabels(rungs, fontsize=9, color=INK)
        ax.invert_yaxis()
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=9, labelcolor=INK)
        tile = forward_config(SM, width, "half", "long", "plain")
        shape = f"tiles of {tile.rows} x {tile.keys}, {tile.warps} warps"
        ax.set_title(f"head_dim {width}: {shape}", fontsize=10, color=INK, loc="left")
    axes[1].set_xlabel("thousand issue slots of one SM for one head", fontsize=9, color=INK)
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=OPEN, label="tiles without a mask"),
        plt.Rectangle((0, 0), 1, 1, facecolor=EDGE, label="tiles with a mask"),
        plt.Line2D([], [], color=RED, linestyle="--", label="clocks of the tensor cores for visible entries"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, "triton_ladder.png")


def main() -> None:
    """A kernel is interpreted or compiled, which is decided when it is defined: one process for each."""
    if len(sys.argv) > 1:
        print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = asked()
    for part, interpret in (("interpreted", "1"), ("compiled", "0")):
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        command = [sys.executable, __file__, part]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    draw_walk(plt, found.pop("drawn"))
    draw_ladder(plt, found)
    for width in (64, 128):
        found |= {f"ladder {width}, {label}": rung for label, rung in slots(found, width).items()}
    for name, value in found.items():
        for each in value if isinstance(value, list) else [value]:
            print(f"{name}: " + ", ".join(f"{key} {number}" for key, number in each.items() if number not in ("", {})))


if __name__ == "__main__":
    main()
