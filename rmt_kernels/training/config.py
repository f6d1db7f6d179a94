"""What a training run is made of, as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rmt_kernels.recurrence.checks import at_least
from rmt_kernels.recurrence.schedules import Curriculum, RandomNumber
from rmt_kernels.training.catalogue import make_task
from rmt_kernels.training.tasks import Task

__all__ = ["TrainConfig"]

_CURRICULA = ("constant", "grow", "random", "random-grow")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The same config and number of threads give the same weights, bit for bit, on one machine.

    Args:
        task, model: names, see ``TASKS`` and ``rmt_kernels.models.MODELS``.
        task_options: of the task, by name.
        model_options: fields of ``ModelConfig`` but ``vocabulary`` and ``tokens``, as ``ModelConfig.from_dict`` takes
            them.
        segments: the largest number of segments trained on.
        tokens: of a segment.
        steps: of the optimizer.
        batch: samples of a step.
        learning_rate: the highest, of AdamW (betas 0.9 and 0.98).
        warmup: steps in which it grows to that from 0.
        decay: ``"cosine"``, down to a twentieth at the last step, or ``"constant"``.
        weight_decay: on all parameters of two dimensions and more.
        clip: largest norm of the gradient. 0: any.
        curriculum: of the number of segments. ``"constant"``; ``"grow"``: from the fewest that hold a sample, one more
            at a time, over the first half of the steps; ``"random"``: drawn anew each step, from the fewest to
            ``segments``; ``"random-grow"``: to a bound that grows; or stages ``"0:1,300:2,600:4"``, step and number.
        evaluate: numbers of segments to evaluate at, in the end.
        evaluate_every: steps between evaluations at ``segments``, while training. 0: none.
        samples: of an evaluation, held out.
        cut: evaluate with the memory cut, too: every segment read from the start.
        until: stop once an evaluation while training has this accuracy (of whole answers, where the task has them).
            0: never.
        seed: of the weights, the samples and dropout.
        device: such as ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        threads: of PyTorch on the CPU. 0: as they are.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints, of a run with a directory. 0: only at the end.

    Raises:
        TypeError, ValueError: a value that is not accepted, or sizes that can't hold the task.
    """

    task: str = "copy"
    model: str = "rmt"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    segments: int = 4
    tokens: int = 24
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    curriculum: str = "grow"
    evaluate: tuple[int, ...] = (1, 2, 4, 8)
    evaluate_every: int = 100
    samples: int = 256
    cut: bool = False
    until: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name, least in (
            ("segments", 1), ("tokens", 1), ("steps", 1), ("batch", 1), ("warmup", 0), ("evaluate_every", 0),
            ("samples", 1), ("seed", 0), ("threads", 0), ("log_every", 1), ("checkpoint_every", 0),
        ):  # fmt: skip
            at_least(name, getattr(self, name), least)
        for name in ("learning_rate", "weight_decay", "clip", "until"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or value < 0 or (name == "learning_rate" and value == 0):
                above = "above 0" if name == "learning_rate" else "at least 0"
                raise ValueError(f"{name} must be finite and {above}, got {value}")
        if self.until > 1:
            raise ValueError(f"until must be an accuracy from 0 to 1, got {self.until}")
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"decay must be 'cosine' or 'constant', got {self.decay!r}")
        if not isinstance(self.cut, bool):
            raise TypeError(f"cut must be True or False, got {self.cut!r}")
        object.__setattr__(self, "evaluate", tuple(self.evaluate))
        for number in self.evaluate:
            at_least("evaluate", number, 1)
        for name in ("task_options", "model_options"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        taken = sorted({"vocabulary", "tokens"} & set(self.model_options))
        if taken:
            raise ValueError(f"model_options: {taken} come from the task and tokens=, leave them out")
        task = self.make_task()
        task.check(self.segments, self.tokens)
        for number in self.evaluate:
            task.check(number, self.tokens)
        curriculum = self.make_curriculum()
        if isinstance(curriculum, Curriculum):
            for _, number in curriculum.stages:
                task.check(number, self.tokens)

    def make_task(self) -> Task:
        """The task."""
        return make_task(self.task, **self.task_options)

    @property
    def fewest(self) -> int:
        """The smallest number of segments that holds a sample."""
        task = self.make_task()
        for number in range(1, self.segments):
            try:
                task.check(number, self.tokens)
            except ValueError:
                continue
            return number
        return self.segments

    @property
    def settled(self) -> int:
        """The step from which the curriculum grows no more."""
        if self.curriculum in ("grow", "random-grow"):
            return self._stages()[-1][0]
        if self.curriculum in _CURRICULA:
            return 0
        return self._parsed()[-1][0]

    def make_curriculum(self) -> Callable[[int], int]:
        """The number of segments as a function of the step, from 0."""
        if self.curriculum == "constant":
            return Curriculum([(0, self.segments)])
        if self.curriculum == "grow":
            return Curriculum(self._stages())
        if self.curriculum == "random":
            return RandomNumber(self.fewest, self.segments, self.seed)
        if self.curriculum == "random-grow":
            return RandomNumber(self.fewest, Curriculum(self._stages()), self.seed)
        return Curriculum(self._parsed())

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"evaluate": list(self.evaluate)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: values that are not accepted.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"unknown fields {unknown} of a training config; accepted: {known}")
        return cls(**values)

    def _stages(self) -> list[tuple[int, int]]:
        numbers = range(self.fewest, self.segments + 1)
        each = max(1, self.steps // 2 // max(1, len(numbers) - 1))
        return [(i * each, number) for i, number in enumerate(numbers)]

    def _parsed(self) -> list[tuple[int, int]]:
        try:
            stages = [(int(step), int(number)) for step, number in (s.split(":") for s in self.curriculum.split(","))]
            Curriculum(stages)
        except ValueError as error:
            raise ValueError(
                f"curriculum must be one of {list(_CURRICULA)} or stages such as '0:1,300:2,600:4' (step:segments, the "
                f"first at step 0, steps growing), got {self.curriculum!r}"
            ) from error
        if max(number for _, number in stages) > self.segments:
            raise ValueError(f"curriculum: {self.curriculum!r} goes beyond segments={self.segments}")
        return stages
