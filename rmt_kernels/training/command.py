"""The command ``rmt-kernels train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rmt_kernels.models import MODELS
from rmt_kernels.training import runs
from rmt_kernels.training.catalogue import TASKS
from rmt_kernels.training.checkpoints import CheckpointError, differences
from rmt_kernels.training.config import TrainConfig
from rmt_kernels.training.curve import draw_curve, need_matplotlib
from rmt_kernels.training.recipes import SIZES, configure
from rmt_kernels.training.trainer import train

__all__ = ["main"]


def _bptt(text: str) -> Any:
    """``full``, ``replay``, the number of segments, or ``replay:`` and the number."""
    name, _, number = text.partition(":")
    if text in ("full", "replay"):
        return text
    if text.isdecimal() and int(text):
        return int(text)
    if name == "replay" and number.isdecimal() and int(number):
        return {"replay": {"truncate": {"segments": int(number)}}}
    raise argparse.ArgumentTypeError(f"must be 'full', 'replay', a number of segments or 'replay:NUMBER', got {text!r}")


def _truth(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"must be 'yes' or 'no', got {text!r}")
    return text == "yes"


_MODEL: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("memory", int, "memory rows"),
    ("cache", int, "rows that each layer of Transformer-XL keeps of the segment before"),
    ("width", int, "of the rows"),
    ("layers", int, "number of them"),
    ("heads", int, "of the attention"),
    ("inner", int, "width inside the feed-forward"),
    ("dropout", float, "probability"),
    ("norm", str, "pre or post"),
    ("activation", str, "gelu, gelu_tanh or relu"),
    ("layout", str, "the decoder's mask: rmt_decoder or causal"),
    ("positions", str, "learned, relative, alibi, bias or none"),
    ("relative", str, "clean or shifted"),
    ("temperature", float, "of Memformer's write"),
    ("bptt", _bptt, "how gradients go back: full, K (through the last K segments), replay, replay:K"),
    ("backend", str, "of the attention"),
)
_RUN: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("segments", int, "the largest number of segments trained on"),
    ("tokens", int, "of a segment"),
    ("steps", int, "of the optimizer"),
    ("batch", int, "samples of a step"),
    ("learning-rate", float, "the highest"),
    ("warmup", int, "steps in which the learning rate grows"),
    ("decay", str, "of the learning rate: cosine or constant"),
    ("weight-decay", float, "of AdamW"),
    ("clip", float, "largest norm of the gradient; 0: any"),
    ("curriculum", str, "of the number of segments: constant, grow, random, random-grow, or step:number,step:number…"),
    ("evaluate-every", int, "steps between evaluations while training; 0: none"),
    ("samples", int, "of an evaluation"),
    ("until", float, "stop at this accuracy"),
    ("seed", int, "of weights, samples and dropout"),
    ("device", str, "such as cpu or cuda"),
    ("threads", int, "of PyTorch; 0: as they are"),
    ("log-every", int, "steps between lines of the log"),
    ("checkpoint-every", int, "steps between checkpoints; 0: only at the end"),
)

_TASK = {
    "length": "tokens of the sequence",
    "alphabet": "number of symbols in it",
    "noise": "number of symbols of the noise",
    "pairs": "of key and value",
    "queries": "how many keys are asked for; 0: all",
    "keys": "number of symbols for keys",
    "values": "number of symbols for values",
    "roots": "largest absolute value of a root",
    "leading": "largest absolute value of the leading coefficient",
    "working": "solutions with discriminant and formula, yes or no",
    "words": "how many words the noise keeps",
    "masked": "percentage of bytes hidden from models that are not causal",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmt-kernels train", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Train a recurrent-memory model on a task and evaluate it at several numbers of segments. What is "
        "not given comes from the task's recipe.",
    )  # fmt: skip
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)} (default: copy)")
    parser.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: rmt)")
    parser.add_argument("--size", default=None, help=f"one of {', '.join(SIZES)} (default: small)")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size", help="--size quick")
    where = parser.add_argument_group("the run's directory")
    where.add_argument("--out", type=Path, default=None, help="default: runs/TASK-MODEL-SEED")
    where.add_argument("--resume", action="store_true", default=False, help="go on with the run that is there")
    where.add_argument("--overwrite", action="store_true", default=False, help="replace the run that is there")
    where.add_argument("--no-picture", action="store_true", default=False, help="draw no curve.png")
    where.add_argument("--quiet", action="store_true", default=False, help="print only errors, and no progress bar")
    run = parser.add_argument_group("training")
    for name, kind, text in _RUN:
        run.add_argument(f"--{name}", type=kind, help=text)
    run.add_argument("--evaluate", type=int, nargs="+", metavar="N", help="numbers of segments to evaluate at")
    run.add_argument("--cut", type=_truth, nargs="?", const=True, help="evaluate with the memory cut too: yes or no")
    model = parser.add_argument_group("the model")
    for name, kind, text in _MODEL:
        model.add_argument(f"--{name}", type=kind, help=text)
    task = parser.add_argument_group("the task")
    options: dict[str, list[str]] = {}
    for name, kind_of_task in TASKS.items():
        for field in fields(kind_of_task):
            options.setdefault(field.name, []).append(name)
    for name, tasks in options.items():
        takes = _truth if name == "working" else int
        task.add_argument(f"--{name}", type=takes, help=f"{', '.join(tasks)}: {_TASK[name]}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and train; returns the exit status: 2 where something given is not accepted."""
    given = vars(_parser().parse_args(arguments))
    plain = {name: given.pop(name) for name in ("out", "resume", "overwrite", "no_picture", "quiet", "size")}
    quiet = plain["quiet"]
    try:
        if not plain["no_picture"]:
            need_matplotlib()
        config, out = _config(given, plain)
        result = train(
            config, out, resume=plain["resume"], overwrite=plain["overwrite"], progress=not quiet,
            say=None if quiet else _say,
        )  # fmt: skip
        if not plain["no_picture"]:
            draw_curve(result, out / runs.CURVE)
    except KeyboardInterrupt:
        print("\nrmt-kernels train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (TypeError, ValueError, OSError, ImportError) as error:
        print(f"rmt-kernels train: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"rmt-kernels train: {error}", file=sys.stderr)
        return 1
    if not quiet:
        what = "tokens" if result.task.unit == "token" else "whole answers"
        chance = result.chance.token if result.task.unit == "token" else result.chance.answer
        print(f"best guess without memory, {what}: {chance:.3g}\n{result.seconds:.0f} s of training; see {out}/")
    return 0


def _config(given: dict[str, Any], plain: dict[str, Any]) -> tuple[TrainConfig, Path]:
    """The run that is asked for, and its directory. A resumed one is taken as it was, and must be what is given."""
    task, model, seed = (
        given.get(name, default) for name, default in (("task", "copy"), ("model", "rmt"), ("seed", 0))
    )
    out = plain["out"] or Path("runs", f"{task}-{model}-{seed}")
    if not plain["resume"]:
        size = plain["size"] or "small"
        return configure(task, model, size, **{k: v for k, v in given.items() if k not in ("task", "model")}), out
    if plain["size"] is not None:
        raise ValueError("--size, --quick: a resumed run keeps its own; leave them out with --resume")
    stored = runs.read_config(out)
    flat = {**stored, **stored.get("task_options", {}), **stored.get("model_options", {})}
    found = differences({name: flat.get(name) for name in given}, given)
    if found:
        raise CheckpointError(f"{out / runs.RUN}: of another run: {'; '.join(found)} (stored, not asked for)")
    return TrainConfig.from_dict(stored), out


def _say(line: str) -> None:
    print(line, flush=True)
