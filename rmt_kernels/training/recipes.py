"""Sizes and settings for each task: small ones for minutes on two cores, and the papers' sizes.

With the small ones RMT, trained on up to 5 segments, tells copy, reverse, associative and remember right at 4 and at 8
segments, detect at 4, and most answers of quadratic. Reasoning and the two texts run in the same time and are not
learned to the end in it. The papers' sizes are theirs; the steps are a guess.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rmt_kernels.models import MODELS, ModelConfig
from rmt_kernels.training.catalogue import TASKS
from rmt_kernels.training.config import TrainConfig

__all__ = ["RECIPES", "SIZES", "configure", "model_fields"]

SIZES = ("small", "paper", "quick")

_SMALL: dict[str, Any] = {
    "width": 64, "heads": 4, "layers": 2, "memory": 8, "segments": 5, "batch": 32, "steps": 1200,
    "learning_rate": 2e-3, "warmup": 50, "decay": "cosine", "curriculum": "random-grow", "evaluate": (1, 2, 4, 8, 16),
    "evaluate_every": 200, "cut": True,
}  # fmt: skip
# Strong weight decay is what lets memory outlive more segments than it was trained on.
_SEQUENCE: dict[str, Any] = {**_SMALL, "length": 6, "tokens": 14, "steps": 1000, "weight_decay": 1.0}
# A token has to find the one before it, which ALiBi gives the first layer and learned positions give it late.
_PAIRS: dict[str, Any] = {
    **_SMALL, "pairs": 3, "keys": 8, "values": 8, "tokens": 16, "positions": "alibi", "steps": 1500,
    "weight_decay": 1.0,
}  # fmt: skip
_FACTS: dict[str, Any] = {**_SMALL, "tokens": 20, "steps": 1000, "weight_decay": 1.0}
# arXiv 2207.06881, section 4.1: 4 layers of width 128 with 4 heads.
_PAPER: dict[str, Any] = {
    **_SMALL, "width": 128, "heads": 4, "layers": 4, "memory": 10, "batch": 64, "steps": 20000, "learning_rate": 3e-4,
    "warmup": 1000, "evaluate": (1, 2, 4, 8, 16, 32), "evaluate_every": 1000,
}  # fmt: skip
# The same paper's WikiText-103: 16 layers of width 410 with 10 heads of 41, segments of 150 tokens.
_PAPER_LANGUAGE: dict[str, Any] = {
    **_PAPER, "width": 410, "heads": 10, "layers": 16, "inner": 2100, "dropout": 0.1, "tokens": 150, "segments": 4,
    "batch": 60, "steps": 200000, "learning_rate": 2.5e-4, "curriculum": "constant", "evaluate_every": 2000,
}  # fmt: skip
_LANGUAGE: dict[str, Any] = {**_SMALL, "segments": 4, "tokens": 64, "curriculum": "constant"}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "copy": {"small": _SEQUENCE, "paper": {**_PAPER, "length": 24, "tokens": 50}},
    "reverse": {"small": _SEQUENCE, "paper": {**_PAPER, "length": 24, "tokens": 50}},
    "associative": {"small": _PAIRS, "paper": {**_PAPER, "pairs": 4, "tokens": 50, "positions": "alibi"}},
    "quadratic": {
        "small": {**_SMALL, "tokens": 28},
        "paper": {**_PAPER, "roots": 40, "leading": 4, "working": True, "tokens": 120},
    },
    "remember": {"small": _FACTS, "paper": {**_PAPER, "tokens": 499}},
    "detect": {"small": _FACTS, "paper": {**_PAPER, "tokens": 499}},
    "reasoning": {"small": _FACTS, "paper": {**_PAPER, "tokens": 499}},
    "text": {"small": _LANGUAGE, "paper": _PAPER_LANGUAGE},
    "source": {"small": _LANGUAGE, "paper": _PAPER_LANGUAGE},
}

# Everything runs, nothing is learned.
_QUICK: dict[str, Any] = {
    "width": 16, "heads": 2, "layers": 2, "batch": 4, "steps": 12, "warmup": 2, "samples": 8, "evaluate_every": 6,
    "log_every": 2, "checkpoint_every": 6,
}  # fmt: skip


def configure(task: str, model: str = "rmt", size: str = "small", **options: Any) -> TrainConfig:
    """The config of a run: a recipe, with options by name in place of its own.

    What a recipe says of a model's options is left out where the model has no use for it; what ``options`` says is not.

    Args:
        task, model: names, see ``TASKS`` and ``MODELS``.
        size: ``"small"``: minutes on two cores; ``"paper"``: the papers' sizes; ``"quick"``: seconds, learns nothing.
        options: of the task, fields of ``ModelConfig``, fields of :class:`TrainConfig`.

    Raises:
        TypeError, ValueError: an unknown name, or a value that is not accepted.
    """
    for name, value, accepted in (("task", task, list(TASKS)), ("model", model, list(MODELS)), ("size", size, SIZES)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {list(accepted)}, got {value!r}")
    recipe = {**RECIPES[task]["small" if size == "quick" else size], **(_QUICK if size == "quick" else {})}
    recipe.setdefault("cache", recipe["tokens"])
    of_task = {field.name for field in fields(TASKS[task])}
    of_model = model_fields()
    of_run = {field.name for field in fields(TrainConfig)} - {"task", "model", "task_options", "model_options"}
    unknown = [name for name in options if name not in of_task | of_model | of_run]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no option of the task {task!r}, a model or a run; the task takes {sorted(of_task)}"
            f", models take {sorted(of_model)}, runs {sorted(of_run)}"
        )
    if "cache" not in options and "tokens" in options:
        recipe["cache"] = options["tokens"]
    kind = MODELS[model]  # of a recipe's options, some are not every system's
    for name in {"memory", "cache"} - set(kind.uses):
        del recipe[name]
    if recipe.get("positions") not in kind.choices.get("positions", ()):
        recipe.pop("positions", None)
    chosen = recipe | options

    def part(names: set[str]) -> dict[str, Any]:
        return {name: value for name, value in chosen.items() if name in names}

    return TrainConfig(
        task=task, model=model, task_options=part(of_task), model_options=part(of_model), **part(of_run)
    )  # fmt: skip


def model_fields() -> set[str]:
    """Names of a model's options: the fields of ``ModelConfig`` that don't come from the task and the run."""
    return {field.name for field in fields(ModelConfig)} - {"vocabulary", "tokens"}
