"""A small recurrent-memory language model on real text: the same training run with naive attention and with ours.

Run ``python -m benchmarks.language_model``. It reads bytes of the English text that ships with Python
(``pydoc_data.topics``), a few segments a sample, memory handed from each to the next and gradients through all of them.
Both runs start from the same weights and see the same batches, so their loss curves must coincide; they take turns of a
few steps each, so that their speeds compare on a machine that is doing other things too.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.environment import environment
from rmt_kernels import SegmentLayout, segment_attention

__all__ = ["FULL", "QUICK", "STANDARD", "Config", "RecurrentLM", "naive_attention", "our_attention", "text", "train"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training."""

    steps: int = 500
    batch: int = 2
    segments: int = 4
    tokens: int = 256  # of a segment, one byte each
    memory: int = 16
    width: int = 128
    heads: int = 4
    layers: int = 4
    learning_rate: float = 2e-3
    turn: int = 5  # steps of one run before it is the other's turn
    seed: int = 0
    seconds: float | None = None  # training stops after the turn in which they have passed

    @property
    def layout(self) -> SegmentLayout:
        """The paper's decoder mask over ``[memory | tokens | memory]``."""
        return SegmentLayout.rmt_decoder(self.tokens, self.memory)


STANDARD = Config()
QUICK = Config(steps=60, turn=2, seconds=30.0)
FULL = Config(batch=4, tokens=512)


# -- the model -------------------------------------------------------------------------------------------------------


def naive_attention(layout: SegmentLayout) -> Attention:
    """Two products, a dense additive mask and a softmax between them."""
    bias = torch.zeros(layout.num_queries, layout.num_keys).masked_fill(~layout.dense_mask(), float("-inf"))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
        return torch.softmax(scores, dim=-1) @ value

    return attend


def our_attention(layout: SegmentLayout, backend: str = "auto") -> Attention:
    """The same without a mask or scores in memory."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return segment_attention(query, key, value, layout, backend=backend)

    return attend


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, rows, width) to the same."""
        packed = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # (batch, heads, rows, head_dim), nothing copied
        x = x + self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def sinusoids(rows: int, width: int) -> Tensor:
    """Sines and cosines of the position, wavelengths from 2 pi to 2 pi * 1000: (rows, width)."""
    angles = torch.arange(rows)[:, None] * torch.logspace(0, -3, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class RecurrentLM(nn.Module):
    """A byte-level Recurrent Memory Transformer (arXiv 2207.06881)."""

    def __init__(self, config: Config, attend: Attention) -> None:
        super().__init__()
        self.layout, width = config.layout, config.width
        self.embed = nn.Embedding(256, width)
        nn.init.normal_(self.embed.weight, std=0.5)
        self.positions = nn.Parameter(0.5 * sinusoids(self.layout.num_queries, width))
        self.first_memory = nn.Parameter(torch.randn(config.memory, width))
        self.blocks = nn.Sequential(*(Block(width, config.heads, attend) for _ in range(config.layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def segment(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, tokens, 256) of one segment, and the memory (batch, memory, width) that leaves it."""
        rows = torch.cat([memory, self.embed(tokens), memory], dim=1)
        hidden = self.norm(self.blocks(rows + self.positions))
        _, tokens_out, memory_out = hidden.split([self.layout.read, self.layout.tokens, self.layout.write], dim=1)
        return self.head(tokens_out), memory_out

    def forward(self, sample: Tensor, keep_memory: bool = True) -> Tensor:
        """Loss of every predicted byte, (batch, segments, tokens), of (batch, segments * tokens + 1) bytes.

        Gradients flow through the memory of all segments. ``keep_memory=False`` starts each segment anew.
        """
        start = memory = self.first_memory.expand(len(sample), -1, -1)
        losses = []
        inputs, targets = (part.split(self.layout.tokens, dim=1) for part in (sample[:, :-1], sample[:, 1:]))
        for tokens, wanted in zip(inputs, targets, strict=True):
            logits, memory = self.segment(tokens, memory if keep_memory else start)
            losses.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
        return torch.stack(losses, dim=1)


# -- data and training -----------------------------------------------------------------------------------------------


def text() -> Tensor:
    """Python's language documentation, as bytes: int64 (length,)."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


class Run:
    """One model in training."""

    def __init__(self, config: Config, attend: Attention) -> None:
        torch.manual_seed(config.seed)
        self.model = RecurrentLM(config, attend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
        warm_up = min(20, config.steps // 5 + 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / config.steps)),
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, sample: Tensor) -> None:
        """One update, timed."""
        began = time.perf_counter()
        loss = self.model(sample).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)


def train(config: Config, backend: str = "auto", progress: bool = True) -> dict[str, Any]:
    """Both runs, in turns, and what the memory is worth on held-out text; a dictionary for JSON."""
    data = text()
    length = config.segments * config.tokens + 1
    train_data, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    runs = {
        "naive": Run(config, naive_attention(config.layout)),
        "ours": Run(config, our_attention(config.layout, backend)),
    }
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(total=config.steps, desc="language model", unit="step", disable=not progress)
    began = time.perf_counter()
    for first in range(0, config.steps, config.turn):
        count = min(config.turn, config.steps - first)
        starts = torch.randint(len(train_data) - length, (count, config.batch), generator=generator)
        samples = train_data[starts[..., None] + torch.arange(length)]
        order = list(runs.values())
        for run in order if first // config.turn % 2 == 0 else reversed(order):
            for sample in samples:
                run.step(sample)
        bar.update(count)
        bar.set_postfix({name: f"{run.losses[-1]:.3f}" for name, run in runs.items()})
        if config.seconds is not None and time.perf_counter() - began > config.seconds:
            break
    bar.close()

    result: dict[str, Any] = {}
    for name, run in runs.items():
        # The first steps of all pay for memory and threads that the others find ready.
        step = statistics.median(run.seconds[min(3, len(run.seconds) - 1) :])
        result[name] = {
            "losses": run.losses,
            "step_seconds": step,
            "tokens_per_second": config.batch * (length - 1) / step,
        }
    differences = [abs(a - b) for a, b in zip(runs["naive"].losses, runs["ours"].losses, strict=True)]
    return result | {
        "steps": len(differences),
        "max_loss_difference": max(differences),
        "held_out": evaluate(runs["ours"].model, held_out, length),
        "config": asdict(config) | {"backend": backend, "parameters": sum(p.numel() for p in run.model.parameters())},
        **environment(),
    }


@torch.no_grad()
def evaluate(model: RecurrentLM, data: Tensor, length: int, samples: int = 16) -> dict[str, Any]:
    """Loss on held-out text, with the memory handed on and with each segment starting anew.

    ``by_position`` is the mean loss of each byte of a segment, over all segments but the first.
    """
    starts = torch.linspace(0, len(data) - length, samples).long()
    sample = data[starts[:, None] + torch.arange(length)]
    found = {}
    for name, keep in (("kept", True), ("reset", False)):
        losses = model(sample, keep_memory=keep)
        later = losses[:, 1:].mean(dim=(0, 1))
        found[name] = {"loss": losses.mean().item(), "by_position": later.tolist()}
    return found


# -- report ----------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    naive, ours, held_out = result["naive"], result["ours"], result["held_out"]
    lines = [f"{'':8}{'first loss':>12}{'last loss':>12}{'ms a step':>12}{'tokens/s':>12}"]
    for name, run in (("naive", naive), ("ours", ours)):
        lines.append(
            f"{name:8}{run['losses'][0]:12.4f}{run['losses'][-1]:12.4f}{1e3 * run['step_seconds']:12.1f}"
            f"{run['tokens_per_second']:12,.0f}"
        )
    ratio = ours["tokens_per_second"] / naive["tokens_per_second"]
    kept, reset = held_out["kept"], held_out["reset"]
    return "\n".join(
        [
            *lines,
            f"ours trains {ratio:.2f}x as fast; over {result['steps']} steps the losses differ by at most "
            f"{result['max_loss_difference']:.1e}",
            f"held-out loss with memory {kept['loss']:.4f}, without {reset['loss']:.4f}; in the first {_NEAR} bytes of "
            f"a segment {_near(kept):.4f} and {_near(reset):.4f}",
        ]
    )


_NEAR = 16  # bytes at the start of a segment, which the memory of the one before should help most


def _near(found: dict[str, Any]) -> float:
    near: list[float] = found["by_position"][:_NEAR]
    return statistics.mean(near)


def plot(result: dict[str, Any], path: Path) -> None:
    """Both loss curves, their difference, the speeds, and what memory does along a segment, as one picture."""
    import matplotlib
    from matplotlib.figure import Figure

    naive, ours = result["naive"], result["ours"]
    config, steps = result["config"], range(1, result["steps"] + 1)
    grey, blue = "#9aa5b1", "#1f6feb"
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1), height_ratios=(2.2, 1))

        curves = figure.add_subplot(grid[0, 0])
        curves.plot(steps, naive["losses"], color=grey, linewidth=5, alpha=0.7, label="naive attention")
        curves.plot(steps, ours["losses"], color=blue, linewidth=1.2, label="segment_attention")
        curves.set(ylabel="training loss (nats a byte)", title="The two runs learn the same")
        curves.legend(frameon=False)

        apart = figure.add_subplot(grid[1, 0], sharex=curves)
        differences = [abs(a - b) for a, b in zip(naive["losses"], ours["losses"], strict=True)]
        apart.semilogy(steps, [max(d, 1e-8) for d in differences], color=blue, linewidth=0.9)
        apart.set(xlabel="step", ylabel="difference", ylim=(0.5e-8, 1))
        apart.grid(axis="y", alpha=0.25)
        apart.annotate(f"largest {max(differences):.1e}", (0.99, 0.85), xycoords="axes fraction", ha="right")

        speeds = figure.add_subplot(grid[0, 1])
        rates = [naive["tokens_per_second"], ours["tokens_per_second"]]
        bars = speeds.bar(["naive\nattention", "segment_\nattention"], rates, color=[grey, blue], width=0.6)
        labels = [f"{rates[0]:,.0f}", f"{rates[1]:,.0f}\n{rates[1] / rates[0]:.2f}x"]
        speeds.bar_label(bars, labels, padding=3, fontweight="bold")
        speeds.set(ylabel="tokens/s", ylim=(0, 1.25 * max(rates)), title="Training speed, the whole model")

        memory = figure.add_subplot(grid[1, 1])
        reset, kept = (result["held_out"][name]["by_position"] for name in ("reset", "kept"))
        width = max(1, len(kept) // 16)
        places = range(0, len(kept), width)
        gains = [statistics.mean(reset[i : i + width]) - statistics.mean(kept[i : i + width]) for i in places]
        colors = [blue if gain > 0 else grey for gain in gains]
        memory.bar(places, gains, width=0.85 * width, align="edge", color=colors)
        memory.axhline(0, color="black", linewidth=0.8)
        memory.set(xlabel="byte of the segment", ylabel="nats a byte", title="What memory saves on held-out text")

        figure.suptitle(
            f"{config['layers']}-layer Recurrent Memory Transformer on Python's documentation: "
            f"{config['segments']} segments of {config['tokens']} bytes, {config['memory']} memory rows, "
            f"width {config['width']}, float32, {result['device']['cpu']}",
            fontsize=9,
        )
        figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_model", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a minute at most")
    size.add_argument("--full", action="store_true", help="longer segments and larger batches")
    parser.add_argument("--backend", default="auto", help="of segment_attention (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest"), metavar="DIR")
    given = parser.parse_args(arguments)

    config = QUICK if given.quick else FULL if given.full else STANDARD
    result = train(config, given.backend)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "language_model.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, given.out / "language_model.png")
    print(table(result))
    print(f"written: {given.out / 'language_model.json'} and language_model.png")


if __name__ == "__main__":
    main()
