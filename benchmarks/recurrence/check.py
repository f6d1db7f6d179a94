"""Whether a contestant's gradients are right, before it is weighed or timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Check
from benchmarks.recurrence.contestants import TRUNCATION, Contestant, plain_loss
from benchmarks.recurrence.model import Subject, Weights

__all__ = ["Truth", "check", "truth"]

_FACTOR = 3.0  # of the plain loop's own error in the same precision
_SMALL = 1e-3  # of all gradients' norm: a parameter with less is measured against that


@dataclass(frozen=True)
class Truth:
    """Loss and gradients by a plain loop in float64, and the same loop's error in the subject's precision."""

    ids: Tensor
    loss: float
    gradients: dict[str, Tensor]
    error: float
    precision: torch.dtype

    @property
    def allowed(self) -> float:
        """The largest relative error of a parameter's gradient that passes."""
        return _FACTOR * self.error + torch.finfo(self.precision).eps


def _sweep(subject: Subject, ids: Tensor, cut: int | None) -> tuple[float, dict[str, Tensor]]:
    subject.forget_gradients()
    with subject.precision():
        loss = plain_loss(subject, ids, cut=cut)
    loss.backward()
    found = subject.gradients()
    subject.forget_gradients()
    return float(loss.detach()), found


def _worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and whose it is."""
    norms = {name: float(gradient.norm()) for name, gradient in exact.items()}
    least = _SMALL * sum(norm**2 for norm in norms.values()) ** 0.5
    errors = [
        (float((found[name].double() - exact[name]).norm()) / max(norms[name], least, 1e-300), name) for name in exact
    ]
    return max(errors, key=lambda error: error[0] if error[0] == error[0] else float("inf"))


def truth(subject: Subject, segments: int, *, truncated: bool = False) -> Truth:
    """What is right on that many segments: of full back-propagation, or truncated as the contestants truncate."""
    cut = TRUNCATION if truncated else None
    ids = subject.inputs(segments)
    exact_subject = Subject(subject.sizes, subject.device, weights=_double(subject.weights))
    loss, exact = _sweep(exact_subject, ids, cut)
    _, plain = _sweep(subject, ids, cut)
    return Truth(ids, loss, exact, _worst(plain, exact)[0], subject.autocast or torch.float32)


def _double(weights: Weights) -> Weights:
    return copy.deepcopy(weights).double()


def check(contestant: Contestant, subject: Subject, exact: Truth) -> Check:
    """Run one step and compare loss and every parameter's gradient with the truth."""
    subject.forget_gradients()
    loss = float(contestant.build(subject)(exact.ids))
    found = subject.gradients()
    subject.forget_gradients()
    reasons = []
    error, name = _worst(found, exact.gradients)
    if not error <= exact.allowed:  # NaN is wrong too
        reasons.append(f"gradient of {name}: relative error {error:.2e}, allowed {exact.allowed:.2e}")
    off = abs(loss - exact.loss) / abs(exact.loss)
    if not off <= exact.allowed:
        reasons.append(f"loss: relative error {off:.2e}, allowed {exact.allowed:.2e}")
    errors = {
        "gradients": {"relative": error, "plain_loop": exact.error, "allowed": exact.allowed},
        "loss": {"relative": off, "allowed": exact.allowed},
    }
    return Check(not reasons, "; ".join(reasons), errors)
