"""``python -m benchmarks.systems.maps``: what the memory of a trained copy model attends to, as a picture.

Trains an RMT (a minute or two), or takes a run of ``python -m rmt_kernels train --task copy``; lets it read held-out
samples; draws the first of them (arXiv 2207.06881 has such figures), and tells what all of them have in common.

Exit status: 0, or 1 where the model can't do the task, and nothing is drawn.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT
from rmt_kernels import Region
from rmt_kernels.maps import Recorded, plot_maps, record_attention
from rmt_kernels.models import SegmentModel
from rmt_kernels.recurrence.checks import at_least
from rmt_kernels.training import CheckpointError, TrainConfig, configure, load_run, train
from rmt_kernels.training.evaluation import correct
from rmt_kernels.training.symbols import Copy, Reverse

__all__ = ["Reading", "main", "read", "report"]

PICTURE = ROOT / "docs" / "pictures" / "copy_maps.png"
_CAPTION = (
    "One sample. Rows are queries, columns are keys; letters are the symbols to copy, dots noise, ? asks for the copy. "
    "WRITE rows become the READ rows of the next segment.\n"
    "Framed: where WRITE rows find the sequence, and what the rows that predict the answer find in memory. "
    "Grey: hidden by the layout."
)
# Noise in the write segment too, and as many slots as symbols.
_SIZES: dict[str, Any] = {
    "length": 8, "memory": 8, "tokens": 20, "segments": 4, "steps": 2000, "evaluate": (4,), "evaluate_every": 100,
    "until": 0.99, "cut": False,
}  # fmt: skip
_LEARNED = 0.95  # of the answers' tokens: what does less has no memory to show


@dataclass(frozen=True)
class Reading:
    """Held-out samples, read by a model.

    layers: calls of the layers' attention, [write segment, read segment] each.
    source: of the symbols of the answer in turn, which token of the write segment is their source.
    answer: query rows of the read segment that predict the answer's symbols.
    tokens: of the first sample, the text of both segments' tokens.
    accuracy: of the answers' tokens, over all samples.
    """

    task: Copy
    segments: int
    layers: dict[str, list[Recorded]]
    source: list[int]
    answer: list[int]
    tokens: list[list[str]]
    accuracy: float


def read(config: TrainConfig, model: SegmentModel, segments: int, samples: int) -> Reading:
    """Read samples of a run's task, its attention recorded.

    Raises:
        TypeError, ValueError: sizes that can't be, or a run whose memory can't be shown this way.
    """
    task = config.make_task()
    if not isinstance(task, Copy):
        raise ValueError(f"task: the maps are of copy or reverse, and this is a run of {task.name}")
    at_least("segments", segments, 2)
    if max(task.information, task.answer) > config.tokens:
        raise ValueError(
            f"tokens: one segment must hold the sequence ({task.information} tokens) and one the answer "
            f"({task.answer}), got segments of {config.tokens}"
        )
    batch = task.batch(samples, segments, config.tokens, seed=config.seed, step=0, causal=model.causal, held_out=True)
    model.eval()
    with record_attention(model) as calls:
        logits = model(batch.ids, outputs="logits").outputs
    assert logits is not None
    found = correct(logits, batch.labels, model.causal)
    layers = {}
    for i, (module, of_layer) in enumerate(calls.by_module().items()):
        first, last = of_layer[0], of_layer[-1]
        if len(of_layer) != segments or not all(call.layout.read and call.layout.write for call in of_layer):
            raise ValueError(
                f"model: the maps are of models whose layers attend once a segment, over READ, TOKENS and WRITE rows, "
                f"such as rmt; in {config.model}, {module} attends {len(of_layer)}x in {segments} segments, with the "
                f"layout {first.layout.name}"
            )
        layers[f"layer {i + 1}"] = [first, last]
    order = list(range(task.length))
    source = order[::-1] if isinstance(task, Reverse) else order
    read_layout = next(iter(layers.values()))[1].layout
    row = read_layout.query_offset(Region.TOKENS) + config.tokens - task.answer
    texts = [_text(word) for word in task.decode(batch.ids[0])]
    return Reading(
        task, segments, layers, source, [row + i for i in range(task.length)],
        [texts[: config.tokens], texts[-config.tokens :]], int(found.right.sum()) / int(found.counts.sum()),
    )  # fmt: skip


def _text(word: str) -> str:
    """Symbols as letters, as far as they go, and noise as a dot."""
    if word.startswith("s") and int(word[1:]) < 26:
        return chr(ord("A") + int(word[1:]))
    return "·" if word.startswith("n") else word


def report(reading: Reading) -> list[str]:
    """What the maps of all samples have in common, as lines of text."""
    length = reading.task.length
    lines = [
        f"{reading.task.name}, {len(next(iter(reading.layers.values()))[0].query)} held-out samples of "
        f"{reading.segments} segments: {reading.accuracy:.1%} of the answers' tokens right",
        "",
        "segment 1, attention of WRITE rows, mean over samples, heads and rows:",
    ]
    wanted: dict[str, Tensor] = {}  # (samples, slots, symbols): what WRITE rows give to each symbol of the answer
    for name, (write, _) in reading.layers.items():
        seen = write.probabilities("write").mean(dim=1)  # (samples, slots, keys)
        tokens = _of(seen, write, Region.TOKENS)
        sequence = tokens[..., :length]
        wanted[name] = tokens[..., reading.source]
        parts = {
            "READ": _of(seen, write, Region.READ), "sequence": sequence, "noise": tokens[..., length:],
            "WRITE": _of(seen, write, Region.WRITE),
        }  # fmt: skip
        lines.append(f"  {name}: {_shares(parts)}; most: {_most(tokens.mean(dim=(0, 1)), length)}")
    lines += ["", f"segment {reading.segments}, attention of the rows that predict the answer, mean likewise:"]
    looked: dict[str, Tensor] = {}  # (samples, symbols, slots)
    for name, (_, last) in reading.layers.items():
        seen = last.probabilities(reading.answer).mean(dim=1)
        looked[name] = _of(seen, last, Region.READ)
        parts = {"READ": looked[name], "TOKENS": _of(seen, last, Region.TOKENS)}
        lines.append(f"  {name}: {_shares(parts)}")
    lines += [
        "",
        "rows that look most at a READ slot whose WRITE row, in segment 1, looked most at their symbol, of all symbols "
        f"(by chance about {1 / length:.0%}):",
    ]
    for writer, given in wanted.items():
        symbol = given.argmax(dim=-1)  # (samples, slots)
        rows = torch.arange(length)
        shares = (
            f"reading in {reader}: {(symbol.gather(1, slots.argmax(dim=-1)) == rows).double().mean():.0%}"
            for reader, slots in looked.items()
        )
        lines.append(f"  written in {writer}, " + ", ".join(shares))
    return lines


def _of(seen: Tensor, call: Recorded, region: Region) -> Tensor:
    """The columns of a region's keys."""
    first = call.layout.key_offset(region)
    return seen[..., first : first + call.layout.key_size(region)]


def _shares(parts: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(part.sum(dim=-1).mean()):.0%}" for name, part in parts.items())


def _most(tokens: Tensor, length: int) -> str:
    """The tokens with the most attention."""
    best = tokens.topk(min(4, len(tokens)))
    return ", ".join(
        f"{'symbol' if i < length else 'noise at'} {i + 1} ({share:.0%})"
        for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems.maps", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run of copy or reverse (default: train one)")
    parser.add_argument("--segments", type=int, metavar="N", help="of the samples (default: as many as in training)")
    parser.add_argument("--samples", type=int, default=64, help="that the text is about (default: 64)")
    parser.add_argument("--heads", default="mean", metavar="mean|each|N", help="what is drawn (default: mean)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=PICTURE, metavar="FILE", help=f"(default: {PICTURE.relative_to(ROOT)})"
    )
    parser.add_argument("--anyway", action="store_true", help="draw a model that hasn't learned the task, too")
    options = parser.parse_args(arguments)
    try:
        at_least("--samples", options.samples, 1)
        if options.run is not None:
            config, model = load_run(options.run)
        else:
            config = configure("copy", "rmt", **_SIZES, seed=options.seed)
            model = train(config, say=print).model
        reading = read(config, model.cpu(), options.segments or config.segments, options.samples)
        print("\n" + "\n".join(report(reading)))
        if reading.accuracy < _LEARNED and not options.anyway:
            print(f"\nnothing is drawn: the model hasn't learned the task ({_LEARNED:.0%}); --anyway draws it")
            return 1
        figure = plot_maps(
            reading.layers,
            heads=int(options.heads) if options.heads.isdecimal() else options.heads,
            titles=["segment 1 holds the sequence", f"segment {reading.segments} asks for it"],
            tokens=reading.tokens,
            frames=[("write", "tokens"), (reading.answer, "read")],
        )
        figure.supxlabel(_CAPTION, fontsize=9, color="#333a45")
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=130, metadata={"Software": None})
    print(f"\nwritten: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
