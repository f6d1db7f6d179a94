"""Draws the pictures of docs/cuda_kernel.md and prints every number that it cites. No GPU is needed.

``python docs/make_cuda_pictures.py`` after a change of the kernels. Tiles and shared memory come from csrc/cuda, asked
by ``cuda_facts.cpp``; what is visited, multiplied and copied from the emulated GPU; registers and instructions from
nvcc. Needs the module ``_emulated`` (``make setup``), a C++ compiler, nvcc, nvdisasm, which triton has too, and
matplotlib.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

os.environ["RMT_KERNELS_EMULATE"] = "1"

import torch
from PIL import Image

from rmt_kernels import SegmentLayout, segment_attention
from rmt_kernels.backends import cuda
from rmt_kernels.backends.cuda import report

ROOT = Path(__file__).resolve().parent.parent
# A multiprocessor: registers, warps, and by architecture bytes of shared memory, of which a block takes 1 KiB more than
# it asks for. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS, WARPS, SHARED = 65_536, 64, {"80": 164 << 10, "86": 100 << 10, "90a": 228 << 10}
# What one of sm_80 does in a clock: multiply-adds of 16-bit elements, bytes of shared memory, exponentials,
# instructions of a warp. One `mma` is 16 x 8 x 16 multiply-adds, one LDSM or LDGSTS 512 bytes.
MULTIPLIES, BYTES, EXPONENTIALS, SCHEDULERS = 1024, 128, 16, 4
MMA, LDSM = 16 * 8 * 16, 512
DECODER, ENCODER = SegmentLayout.rmt_decoder(960, 32), SegmentLayout.rmt_encoder(992, 32)
SHORT, WINDOW = SegmentLayout.rmt_decoder(448, 16), SegmentLayout.rmt_decoder(4064, 16, window=512)
Facts = dict[str, Any]


# -- the kernels' own code ---------------------------------------------------------------------------------------------


@cache
def program() -> str:
    """cuda_facts.cpp, compiled; it goes when this process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    built = str(Path(folder.name) / "facts")
    sources = [ROOT / "docs/cuda_facts.cpp", *sorted((ROOT / "csrc/cuda/emulation").glob("*.cpp"))]
    defined = ["-DRMT_EMULATED", "-DRMT_ELEMENT=BF16", "-DRMT_WIDTH=64"]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", *defined, *map(str, sources), "-o", built]
    subprocess.run(command, check=True)
    return built


def facts(*arguments: int) -> Facts:
    """What it tells: the tile table, where chunks lie, what lanes hold; or, with arguments, the order of blocks."""
    said = subprocess.run([program(), *map(str, arguments)], check=True, capture_output=True, text=True).stdout
    found: Facts = json.loads(said)
    return found


def tiles_of(found: Facts, kernel: str, length: str, width: int, dropout: int = 0) -> dict[str, int]:
    key = {"kernel": kernel, "length": length, "width": width, "dropout": dropout}
    (row,) = (row for row in found["tiles"] if key.items() <= row.items())
    return dict(row)


# -- compiled: registers, and the instructions of a tile that needs no mask --------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture; ``loop`` counts the instructions of one turn of the loop that multiplies, the
    shortest one that copies the next tile's even rows."""

    registers: int
    loop: Counter[str]


def shortest_turn(code: list[str], labels: dict[str, int]) -> Counter[str]:
    """The instructions of the shortest way once around the innermost loop with tensor-core instructions, among the ways
    with most copies and without a turn of a loop within."""
    last = [i for i, line in enumerate(code) if re.match(r"(@!?\w+ +)?(BRA|EXIT|RET|BRX)\b", line)]
    starts = sorted({0, *labels.values(), *(i + 1 for i in last)} - {len(code)})
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    following: dict[int, list[int]] = {}
    for start, end in ends.items():
        line, following[start] = code[end - 1], []
        target = re.search(r"BRA.*`\((\.L\w+)\)", line)
        if target and "BRA.DIV" not in line:  # that one is taken by warps out of step
            following[start].append(labels[target[1]])
        conditional = re.match(r"@", line) or re.search(r"BRA(\.DIV|\S* +!?U?P\d)", line)
        if end < len(code) and (end - 1 not in last or conditional):
            following[start].append(end)
    loops = [(there, ends[start]) for start in starts for there in following[start] if there <= start]
    names = [re.sub(r"@!?\w+ +", "", line).split(" ")[0].split(".")[0] for line in code]
    begin, end = min((loop for loop in loops if "HMMA" in names[slice(*loop)]), key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if begin <= loop[0] and loop[1] < end]
    # By block, and by number of copies so far: the fewest instructions, and the blocks they are in.
    ways: dict[int, dict[int, tuple[int, tuple[int, ...]]]] = {begin: {0: (0, ())}}
    around: list[tuple[int, int, tuple[int, ...]]] = []
    for start in (s for s in starts if begin <= s < end and not any(a <= s < b for a, b in inner)):
        for copies, (length, way) in ways.get(start, {}).items():
            more = copies + names[start : ends[start]].count("LDGSTS")
            now, passed = length + ends[start] - start, (*way, start)
            for there in following[start]:
                if there == begin:
                    around.append((-more, now, passed))
                elif there > start and now < ways.setdefault(there, {}).get(more, (1 << 30,))[0]:
                    ways[there][more] = now, passed
    _, _, shortest = min(around)
    return Counter(name for start in shortest for name in names[start : ends[start]])


def disassemble(cubin: Path) -> dict[str, tuple[list[str], dict[str, int]]]:
    """Of each kernel its instructions, and which of them labels name."""
    command = [str(report.tool("nvdisasm")), "--print-code", "--no-dataflow", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, tuple[list[str], dict[str, int]]] = {}
    for line in text.splitlines():
        if name := re.match(r"\.text\.(\w+):", line):
            code, labels = found.setdefault(name[1], ([], {}))
        elif label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return found


def compiled() -> dict[tuple[str, str], Compiled]:
    """By architecture and by the kernel's template arguments, as ``report`` writes them."""

    def one(task: tuple[str, int, str]) -> dict[tuple[str, str], Compiled]:
        arch, width, file = task
        with tempfile.TemporaryDirectory() as folder:
            usages = report.compile_kernels(arch, "BF16", width, file, Path(folder))
            (cubin,) = Path(folder).glob("*.cubin")
            listed = disassemble(cubin)
        names = report.demangle(listed)
        loops = {
            names[kernel]: shortest_turn(*code)
            for kernel, code in listed.items()
            if any("HMMA" in line for line in code[0])
        }
        return {(arch, u.kernel): Compiled(u.registers, loops[u.kernel]) for u in usages if u.kernel in loops}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {key: value for part in pool.map(one, product(("80", "90a"), (64, 128), report.FILES))
                for key, value in part.items()}  # fmt: skip


def compiled_for(kernels: dict[tuple[str, str], Compiled], arch: str, tile: dict[str, Any]) -> Compiled:
    sizes = {
        "forward": f"ForwardConfig<BF16, {{width}}, {{rows}}, {{keys}}, {{warps}}, {tile['blocks']}, ",
        "decode": "DecodeConfig<BF16, {width}, ",
        "backward": "BackwardConfig<BF16, {width}, {rows}, {keys}, {warps}, ",
    }[tile["kernel"]].format(**tile)
    end = f"{'true' if tile['dropout'] else 'false'}>>"
    (found,) = (value for (a, name), value in kernels.items() if a == arch and sizes in name and name.endswith(end))
    return found


def resident(arch: str, tile: dict[str, Any], registers: int) -> dict[str, int]:
    """How many blocks an SM holds, and what each limit alone would allow. A warp's registers come in pieces of 256."""
    by = {
        "registers": REGISTERS // (-(-registers // 8) * 8 * 32 * tile["warps"]),
        "shared memory": SHARED[arch] // (tile["bytes"] + 1024),
        "warps": WARPS // tile["warps"],
    }
    return {"blocks": min(by.values()), **by}


def floors(tile: dict[str, Any], loop: Counter[str]) -> dict[str, Any]:
    """What one tile of rows and one of keys take of an SM of sm_80, in clocks of each of its parts."""
    warps = 1 if tile["kernel"] == "decode" else tile["warps"]  # there a turn of the loop is of one warp's keys
    shared = LDSM * (loop["LDSM"] + loop["LDGSTS"]) + 128 * (loop["LDS"] + loop["STS"])
    return {
        "mma": loop["HMMA"], "LDSM": loop["LDSM"], "bytes an mma": round(LDSM * loop["LDSM"] / loop["HMMA"]),
        "instructions": loop.total(), "clocks of products": loop["HMMA"] * warps * MMA // MULTIPLIES,
        "of shared memory": shared * warps // BYTES, "of instructions": loop.total() * warps // SCHEDULERS,
        "of exponentials": loop["MUFU"] * warps * 32 // EXPONENTIALS,
    }  # fmt: skip


# -- what is visited, and in which turn --------------------------------------------------------------------------------


def walks(layout: SegmentLayout, rows: int, keys: int) -> list[list[int]]:
    """The tiles of keys that each tile of rows visits, by csrc/layout.h."""
    sample = (0, layout.tokens, 0, -1)
    return [
        [tile for tile, _ in cuda.module.walk(layout.ints, sample, first, rows, keys)]
        for first in range(0, layout.num_queries, rows)
    ]


def wavefront(of_rows: list[list[int]], tickets: list[tuple[int, int]], places: int) -> list[list[dict[int, int]]]:
    """When each block adds to each of its tiles of rows: [head][tile of keys] -> {tile of rows: step}.

    A block, which is a tile of keys and a head, takes a step for a tile of rows, and adds only after those before it in
    turn; `places` blocks run at once, begun in the order of their tickets.
    """
    key_tiles, heads = (1 + max(numbers) for numbers in zip(*tickets, strict=True))
    todo = [[[i for i, walk in enumerate(of_rows) if j in walk] for j in range(key_tiles)] for _ in range(heads)]
    done: list[list[dict[int, int]]] = [[{} for _ in range(key_tiles)] for _ in range(heads)]
    turns = [[0] * len(of_rows) for _ in range(heads)]
    running: list[tuple[int, int]] = []
    begun = step = 0
    while running or begun < len(tickets):
        begin = min(len(tickets), begun + places - len(running))
        running += tickets[begun:begin]
        begun = begin
        added = [(j, head, todo[head][j][0]) for j, head in running if todo[head][j]]
        added = [(j, head, i) for j, head, i in added if turns[head][i] == sum(other > j for other in of_rows[i])]
        assert added or not any(todo[head][j] for j, head in running), "nobody can go on"
        for j, head, i in added:
            done[head][j][todo[head][j].pop(0)] = step
            turns[head][i] += 1
        running = [(j, head) for j, head in running if todo[head][j]]
        step += 1
    return done


def waited(layout: SegmentLayout, tile: dict[str, int], heads: int, places: int) -> dict[str, Any]:
    """Steps until all blocks have ended, and how many there would be if no block waited for its turn."""
    of_rows = walks(layout, tile["rows"], tile["keys"])
    bytes_of_head = 8 * len(of_rows) * tile["rows"] * tile["width"]
    order = facts(-(-layout.num_keys // tile["keys"]), heads, bytes_of_head)["order"]
    tickets = list(zip(order[::2], order[1::2], strict=True))
    ended = wavefront(of_rows, tickets, places)
    ends = [0] * places  # the same blocks without turns, each begun where one ends first
    for j, _ in tickets:
        ends[ends.index(min(ends))] += sum(j in walk for walk in of_rows)
    steps = 1 + max(step for head in ended for block in head for step in block.values())
    return {"blocks": len(tickets), "steps": steps, "without turns": max(ends)}


# -- run on the emulated GPU -------------------------------------------------------------------------------------------


def counted(found: Facts, kernels: dict[tuple[str, str], Compiled]) -> Facts:
    """What launches do, one head; the products must be those of the tiles visited."""
    result: Facts = {}
    for width, (length, layout) in product((64, 128), (("long", DECODER), ("short", SHORT))):
        shape = (1, 1, layout.num_queries, width)
        query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        out = segment_attention(query, key, value, layout, backend="cuda")
        for kernel in ("forward", "backward"):
            if kernel == "backward":
                out.backward(torch.randn_like(out))
            counts = dict(cuda.module.counters())
            tile = tiles_of(found, kernel, length, width)
            pairs = sum(map(len, walks(layout, tile["rows"], tile["keys"])))
            loop = compiled_for(kernels, "80", tile).loop
            assert counts["multiplies"] == pairs * tile["warps"] * loop["HMMA"]
            result[f"{kernel}, rmt_decoder({layout.tokens}, {layout.read}), width {width}"] = {
                "tile": (tile["rows"], tile["keys"]), "pairs": pairs, **counts,
            }  # fmt: skip
    keys, group = 512, 4
    layout = SegmentLayout.causal(keys, 0).last(1)
    query = torch.randn(1, group, 1, 64, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 1, keys, 64, dtype=torch.bfloat16)
    segment_attention(query, key, value, layout, backend="cuda")
    result[f"decoding, {keys} keys, group of {group}, width 64"] = dict(cuda.module.counters())
    return result


def asked(found: Facts) -> Facts:
    """Arithmetic alone."""
    result: Facts = {}
    for width, length in product((64, 128), ("long", "short")):
        tile = tiles_of(found, "backward", length, width)
        rows, keys = tile["rows"], tile["keys"]
        one = 2 * rows * keys * width
        result[f"backward, width {width}, {length}: a pair of tiles"] = {
            "tile": (rows, keys), "operations, one product": one, "one pass, 5": 5 * one, "two passes, 7": 7 * one,
            "clocks of the two saved": 2 * one // (2 * MULTIPLIES),
            "rows fetched": 2 * 2 * rows * width, "sums read": 4 * rows * width, "sums written": 4 * rows * width,
        }  # fmt: skip
    for width in (64, 128):
        tile = tiles_of(found, "decode", "few", width)
        stage = 2 * 2 * 16 * width
        result[f"decoding, width {width}"] = {
            "a stage of a warp": stage, "under way in a block": tile["warps"] * (tile["stages"] - 1) * stage,
            "parts of a chunk, a row": 4 * (width + 2), "keys and values of a chunk": tile["chunk"] * 2 * 2 * width,
        }  # fmt: skip
    return result


# -- the pictures ------------------------------------------------------------------------------------------------------

OPEN, EDGE, NONE, INK, RED, WAIT = "#2f6db3", "#f28e2b", "#e6e9ef", "#333a45", "#c0392b", "#f3d9c0"
WORDS = ("#a9c8ea", "#f6c591", "#b5dba5", "#d9b8e2")
BANKS = ("#4e79a7", "#a0cbe8", "#f28e2b", "#ffbe7d", "#59a14f", "#8cd17d", "#b6992d", "#f1ce63")


def save(figure: Any, name: str) -> None:
    """Write one picture, in few colours: small. Without the version of matplotlib the same picture is the same file."""
    file = ROOT / "docs" / "pictures" / name
    figure.savefig(file, dpi=130, facecolor="white", metadata={"Software": None})
    Image.open(file).convert("RGB").quantize(96).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size // 1024} kB")


def bare(ax: Any, title: str, xlabel: str = "", ylabel: str = "") -> None:
    ax.set_title(title, fontsize=9, fontweight="bold", color=INK)
    ax.set_xlabel(xlabel, fontsize=8.5, color=INK)
    ax.set_ylabel(ylabel, fontsize=8.5, color=INK)
    ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    ax.spines[:].set_visible(False)


def draw_turns(plt: Any, found: Facts) -> None:
    tile = tiles_of(found, "backward", "long", 64)
    rows, keys = tile["rows"], tile["keys"]
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.8), width_ratios=(1, 1.65), layout="constrained")
    for (grid, time), (title, layout) in zip(
        axes, ((f"rmt_decoder({DECODER.tokens}, {DECODER.read})", DECODER),
               (f"rmt_encoder({ENCODER.tokens}, {ENCODER.read})", ENCODER)), strict=True,
    ):  # fmt: skip
        of_rows = walks(layout, rows, keys)
        tickets = [(j, 0) for j in reversed(range(-(-layout.num_keys // keys)))]
        (blocks,) = wavefront(of_rows, tickets, len(tickets))
        steps = 1 + max(step for block in blocks for step in block.values())
        shade = plt.get_cmap("viridis")
        for j, block in enumerate(blocks):
            lane, before = len(blocks) - 1 - j, -1
            for i, step in block.items():
                colour = shade(0.05 + 0.9 * step / steps)
                ink = "white" if step < 0.62 * steps else INK
                grid.add_patch(plt.Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
                turn = sum(other > j for other in of_rows[i])
                grid.text(j + 0.5, i + 0.52, turn + 1, ha="center", va="center", fontsize=7.5, color=ink)
                if step > before + 1:
                    time.barh(lane, step - before - 1, left=before + 1, height=0.9, color=WAIT)
                time.add_patch(plt.Rectangle((step, lane - 0.45), 1, 0.9, facecolor=colour, edgecolor="white"))
                time.text(step + 0.5, lane + 0.02, i, ha="center", va="center", fontsize=7, color=ink)
                before = step
        for i, walk in enumerate(of_rows):
            for j in set(range(len(blocks))) - set(walk):
                grid.add_patch(plt.Rectangle((j, i), 1, 1, facecolor=NONE, edgecolor="white", linewidth=1))
        grid.set(xlim=(0, len(blocks)), ylim=(len(of_rows), 0))
        grid.set_xticks([j + 0.5 for j in range(len(blocks))], range(len(blocks)))
        grid.set_yticks([i + 0.5 for i in range(len(of_rows))], range(len(of_rows)))
        bare(grid, f"{title}: turns", f"block = tile of {keys} keys", f"tile of {rows} query rows")
        time.set(xlim=(0, steps), ylim=(len(blocks) - 0.4, -0.6))
        time.set_yticks(range(len(blocks)), [f"keys {j}" for j in reversed(range(len(blocks)))])
        bare(time, f"when: {steps} steps, tiles of rows", "step", "blocks, in the order of tickets")
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, facecolor=WAIT, label="waits for its turn"),
                 plt.Rectangle((0, 0), 1, 1, facecolor=NONE, label="no row of the tile sees a key")],
        loc="outside lower center", ncols=2, frameon=False, fontsize=8.5,
    )  # fmt: skip
    save(figure, "cuda_turns.png")


def draw_held(ax: Any, plt: Any, held: dict[tuple[int, int], tuple[int, int]], rows: int, columns: int) -> None:
    """`held`: by element, which lane holds it, and in which of its words. The two of a word are drawn as one."""
    words: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for element, holder in held.items():
        words.setdefault(holder, []).append(element)
    for (lane, word), elements in words.items():
        (r, c), (r2, c2) = min(elements), max(elements)
        ax.add_patch(
            plt.Rectangle((c, r), c2 - c + 1, r2 - r + 1, facecolor=WORDS[word], edgecolor="white", linewidth=0.8)
        )
        ax.text((c + c2 + 1) / 2, (r + r2 + 1) / 2, lane, ha="center", va="center", fontsize=6.5, color=INK)
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal")
    ax.set_xticks([n + 0.5 for n in range(0, columns, 2)], range(0, columns, 2))
    ax.set_yticks([n + 0.5 for n in range(0, rows, 2)], range(0, rows, 2))


def draw_fragments(plt: Any, found: Facts) -> None:
    figure = plt.figure(figsize=(8.4, 7.0), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.985))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.12, 1))
    result = {divmod(n, 8): (i // 4, i % 4 // 2) for i, n in enumerate(found["c"])}
    left = {divmod(n, 64): (i // 8, i % 8 // 2) for i, n in enumerate(found["a"])}
    right = {divmod(n, 64)[::-1]: (i // 8, i % 8 // 2) for i, n in enumerate(found["b"])}
    of_c, of_a, of_b = upper.subplots(1, 3, width_ratios=(8, 16, 16))
    for ax, held, columns, title, xlabel, ylabel in (
        (of_c, result, 8, "result, 16 x 8", "n", "m"),
        (of_a, left, 16, "left operand, 16 x 16", "k", "m"),
        (of_b, right, 16, "right operands, two of 16 x 8", "n", "k"),
    ):
        draw_held(ax, plt, held, 16, columns)
        bare(ax, title, xlabel, ylabel)
    of_b.axvline(8, color=INK, linewidth=1.2)
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=c, label=f"word {i} of a lane") for i, c in enumerate(WORDS)]
    upper.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)

    chunks = found["chunks"]
    width = len(chunks) // 8
    for ax, title, bank in zip(
        lower.subplots(1, 2), ("a tile's chunks, one after another", "as they lie: chunk ^ (row & 7)"),
        (lambda r, c: (width * r + c) % 8, lambda r, c: chunks[width * r + c] // 16 % 8), strict=True,
    ):  # fmt: skip
        for r, c in product(range(8), range(width)):
            ax.add_patch(plt.Rectangle((c, r), 1, 1, facecolor=BANKS[bank(r, c)], edgecolor="white", linewidth=0.8))
            ax.text(c + 0.5, r + 0.52, 4 * bank(r, c), ha="center", va="center", fontsize=7, color=INK)
        ax.add_patch(plt.Rectangle((2, 0), 1, 8, fill=False, edgecolor=RED, linewidth=2.2, zorder=4))
        ax.set(xlim=(-0.1, width + 0.1), ylim=(8.1, -0.1), aspect="equal")
        ax.set_xticks([c + 0.5 for c in range(width)], range(width))
        ax.set_yticks([r + 0.5 for r in range(8)], range(8))
        bare(ax, title, "chunk of 8 elements", "row")
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=BANKS[2], label="number: first of four banks"),
        plt.Rectangle((0, 0), 1, 1, fill=False, edgecolor=RED, label="eight rows that LDSM reads at once"),
    ]
    lower.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    save(figure, "cuda_fragments.png")


def draw_budget(plt: Any, found: Facts, kernels: dict[tuple[str, str], Compiled]) -> None:
    tiles = [tile for tile in found["tiles"] if not tile["dropout"]]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 5.4), sharey=True, layout="constrained")
    for place, tile in enumerate(tiles):
        for arch, offset, colour in (("80", -0.19, OPEN), ("90a", 0.19, EDGE)):
            used = compiled_for(kernels, arch, tile)
            blocks = resident(arch, tile, used.registers)["blocks"]
            registers = 100 * -(-used.registers // 8) * 8 * 32 * tile["warps"] / REGISTERS
            shared = 100 * (tile["bytes"] + 1024) / SHARED[arch]
            for ax, each in zip(axes, (registers, shared), strict=True):
                ax.barh([place + offset] * blocks, [each] * blocks, left=[each * n for n in range(blocks)], height=0.34,
                        color=colour, edgecolor="white", linewidth=1.2)  # fmt: skip
            axes[0].text(101.5, place + offset, used.registers, va="center", fontsize=8, color=INK)
        axes[1].text(101.5, place, f"{tile['bytes'] / 1024:.0f} KiB", va="center", fontsize=8, color=INK)
    label = "{kernel}, {length}, width {width}\n{rows} x {keys}, {warps} warps"
    labels = [label.format(**tile) for tile in tiles]
    axes[0].set_yticks(range(len(tiles)), labels)
    axes[0].invert_yaxis()
    for ax, title, xlabel in zip(
        axes, ("registers", "shared memory"), ("% of an SM's; number: of a thread", "% of an SM's; number: of a block"),
        strict=True,
    ):  # fmt: skip
        ax.set(xlim=(0, 113), xticks=range(0, 101, 25))
        ax.axvline(100, color=RED, linewidth=1.2, linestyle="--")
        bare(ax, title, xlabel)
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=OPEN, label="sm_80"),
        plt.Rectangle((0, 0), 1, 1, facecolor=EDGE, label="sm_90a"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5,
                  title="each piece is one block that the SM holds", title_fontsize=8.5)  # fmt: skip
    save(figure, "cuda_budget.png")


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(0)
    found, kernels = facts(), compiled()
    draw_turns(plt, found)
    draw_fragments(plt, found)
    draw_budget(plt, found, kernels)
    lines: Facts = {}
    for tile in found["tiles"]:
        name = f"{tile['kernel']} {tile['length']}, width {tile['width']}{', dropout' if tile['dropout'] else ''}"
        used = {arch: compiled_for(kernels, arch, tile).registers for arch in ("80", "90a")}
        held = {arch: resident(arch, tile, used.get(arch, used["80"])) for arch in SHARED}
        lines[name] = {"tile": (tile["rows"], tile["keys"]), "warps": tile["warps"], "bytes": tile["bytes"],
                       "registers": used, "an SM holds": held}  # fmt: skip
        for arch in used:
            lines[f"{name}, sm_{arch}"] = floors(tile, compiled_for(kernels, arch, tile).loop)
    back = tiles_of(found, "backward", "long", 64)
    for name, layout in (("decoder", DECODER), ("encoder", ENCODER), ("decoder of 4,064 with a window of 512", WINDOW)):
        for heads in (1, 16, 64):
            lines[f"turns, {name}, {heads} heads on 132 SMs"] = waited(layout, back, heads, 132)
    for name, value in (lines | asked(found) | counted(found, kernels)).items():
        print(f"{name}: " + ", ".join(f"{key} {number}" for key, number in value.items()))


if __name__ == "__main__":
    main()
