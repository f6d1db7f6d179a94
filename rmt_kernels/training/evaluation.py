"""How well a model does a task on samples that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.models import SegmentModel
from rmt_kernels.recurrence.checks import at_least
from rmt_kernels.recurrence.randomness import RandomState
from rmt_kernels.training.tasks import IGNORE, Task

__all__ = ["Evaluation", "correct", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies from 0 to 1 on held-out samples."""

    segments: int
    carry: bool  # False: with the memory cut
    token: float  # labels predicted, given the true ones before them where the model is causal
    answer: float  # samples all of whose labels are
    loss: float  # natural logarithm, the mean over labels
    samples: int

    @property
    def bits(self) -> float:
        """The loss in bits a label: bits per byte in language modelling."""
        return self.loss / math.log(2)

    def accuracy(self, task: Task) -> float:
        """Of what the task is told by: whole answers or tokens."""
        return self.token if task.unit == "token" else self.answer

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"bits": self.bits}


def evaluate(
    model: SegmentModel, task: Task, segments: int, batches: int, carry: bool = True, *, batch: int = 32, seed: int = 0
) -> Evaluation:
    """Evaluate a model on held-out samples, the same ones for every model and both values of ``carry``.

    Args:
        model: any of ``rmt_kernels.models``; segments have its ``config.tokens`` tokens.
        task: whose vocabulary the model has.
        segments: of a sample, whatever the model was trained on.
        batches, batch: batches, and samples of each.
        carry: False: every segment is read from the start (memory cut).
        seed: of the held-out samples.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """
    at_least("batches", batches, 1)
    device = next(model.parameters()).device
    training, right, count, whole, loss = model.training, 0, 0, 0, 0.0
    state = RandomState.now(device)
    model.eval()
    try:
        with torch.no_grad():
            for step in range(batches):
                drawn = task.batch(
                    batch, segments, model.config.tokens, seed=seed, step=step, causal=model.causal, held_out=True
                ).to(device)  # fmt: skip
                out = model(drawn.ids, outputs="logits", carry=carry)
                assert out.outputs is not None
                found = correct(out.outputs, drawn.labels, model.causal)
                right += int(found.right.sum())
                count += int(found.counts.sum())
                whole += int((found.right == found.counts).all(dim=1).sum())
                loss += float(found.loss)
    finally:
        model.train(training)
        state.restore()
    return Evaluation(segments, carry, right / count, whole / (batches * batch), loss / count, batches * batch)


@dataclass(frozen=True)
class Correct:
    """Bool (batch, n): the labels that count, and those of them predicted; the sum of the losses, float64."""

    counts: Tensor
    right: Tensor
    loss: Tensor


def correct(logits: Tensor, labels: Tensor, causal: bool) -> Correct:
    """Hold logits (batch, length, vocabulary) against labels (batch, length) of the same positions."""
    logits = logits.detach()
    if causal:  # a row predicts the next position
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != IGNORE
    loss = F.cross_entropy(logits[counts].double(), labels[counts], reduction="sum")
    return Correct(counts, counts & (logits.argmax(dim=-1) == labels), loss)
