"""The training loop: resumable bit for bit, logged, evaluated."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmt_kernels.models import ModelConfig, SegmentModel, build
from rmt_kernels.recurrence.randomness import RandomState
from rmt_kernels.training import runs
from rmt_kernels.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint, write
from rmt_kernels.training.config import TrainConfig
from rmt_kernels.training.evaluation import Evaluation, correct, evaluate
from rmt_kernels.training.tasks import Chance, Task

__all__ = ["Result", "load_run", "make_model", "train"]


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    config: TrainConfig
    task: Task
    model: SegmentModel
    steps: int  # done; fewer than the config's where ``until`` was reached
    log: list[dict[str, Any]]  # ``kind`` "train" or "evaluation"; the lines of log.jsonl
    evaluations: list[Evaluation]  # in the end, memory on and, with ``cut``, cut
    chance: Chance
    seconds: float  # of training, over all parts of a resumed run
    directory: Path | None

    def accuracy(self, segments: int, carry: bool = True) -> float:
        """Of the last evaluation at so many segments, by what the task is told by.

        Raises:
            ValueError: there was none.
        """
        for found in self.evaluations:
            if (found.segments, found.carry) == (segments, carry):
                return found.accuracy(self.task)
        there = [(found.segments, found.carry) for found in self.evaluations]
        raise ValueError(f"segments, carry: evaluated at {there}, got {(segments, carry)}")

    def to_dict(self) -> dict[str, Any]:
        """The summary, plain JSON values."""
        return {
            "config": self.config.to_dict(),
            "task": self.task.to_dict(),
            "unit": self.task.unit,
            "causal": self.model.causal,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.steps,
            "seconds": self.seconds,
            "chance": {"token": self.chance.token, "answer": self.chance.answer},
            "evaluations": [found.to_dict() for found in self.evaluations],
        }


def make_model(config: TrainConfig) -> SegmentModel:
    """A new model for a run, from the present random state.

    Raises:
        TypeError, ValueError: an unknown model, or options that it can't have.
    """
    options = {"vocabulary": len(config.make_task().vocabulary), "tokens": config.tokens, **config.model_options}
    return build(config.model, ModelConfig.from_dict(options))


def load_run(directory: str | Path) -> tuple[TrainConfig, SegmentModel]:
    """Config and model of a run, from its last checkpoint, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: no run, or no checkpoint.
        CheckpointError: a damaged one.
    """
    path = Path(directory) / runs.CHECKPOINT
    content = load_checkpoint(path)
    config = TrainConfig.from_dict(content["config"])
    with torch.random.fork_rng(devices=[]):
        model = make_model(config)
    _load(path, model, content["weights"])
    return config, model.eval()


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Train and evaluate.

    PyTorch's random state and number of threads are afterwards as before.

    Args:
        config: of the run.
        out: its directory: config, log, checkpoint, summary. None: nothing is written.
        resume: go on from the directory's checkpoint: the same weights, log and random numbers as without a break.
        overwrite: replace the run in the directory.
        progress: show a bar.
        say: called with lines for people. None: quiet.

    Raises:
        TypeError, ValueError: a config that is not accepted.
        FileExistsError, FileNotFoundError, CheckpointError: see :func:`rmt_kernels.training.runs.claim`.
        FloatingPointError: the loss or the gradient became NaN or infinite; the last checkpoint stays.
        ImportError: ``progress`` without tqdm.
    """
    if out is None and (resume or overwrite):
        raise ValueError("resume, overwrite: need out=, the directory of the run")
    if progress:
        _bar(0, 0)
    device = _device(config.device)
    with _surroundings(config, device):
        torch.manual_seed(config.seed)
        model = make_model(config).to(device)  # its errors come before a directory is touched
        claim = None
        if out is not None:
            claim = runs.claim(Path(out), config, resume=resume, overwrite=overwrite)
        return _Run(config, model, device, claim, say or (lambda line: None)).go(progress)


class _Run:
    """The state of a run; what a checkpoint holds of it is all that its future depends on."""

    def __init__(
        self, config: TrainConfig, model: SegmentModel, device: torch.device, claim: runs.Claim | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.model, self.device, self.tell = config, model, device, say
        self.bar: Any = None
        self.task = config.make_task()
        self.directory = None if claim is None else claim.directory
        self.optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=1.0, betas=(0.9, 0.98))
        self.step, self.done, self.seconds = 0, False, 0.0
        self.log: list[dict[str, Any]] = []
        if claim is not None and claim.checkpoint is not None:
            self._restore(claim.directory / runs.CHECKPOINT, claim.checkpoint)
        self.began = time.perf_counter() - self.seconds

    def go(self, progress: bool) -> Result:
        config, model, task = self.config, self.model, self.task
        curriculum = config.make_curriculum()
        self._rewrite_log()
        rendered = (
            "answers are inputs too, one place after the row that predicts them"
            if model.causal
            else "answers are hidden from the inputs behind a placeholder"
        )
        self.say(f"{task.name}, {config.model} ({sum(p.numel() for p in model.parameters()):,} parameters): {rendered}")
        if self.step:
            self.say(f"resumed after step {self.step}")
        model.train()
        bar = self.bar = _bar(config.steps, self.step) if progress else None
        tokens, since = 0, time.perf_counter()
        try:
            while self.step < config.steps and not self.done:
                number = curriculum(self.step)
                line = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
                found = self._step(number, line)
                tokens += config.batch * number * config.tokens
                if line:
                    now = time.perf_counter()
                    speed = {"tokens_per_second": tokens / (now - since), "seconds": now - self.began}
                    self._write_line({"kind": "train", "step": self.step, "segments": number, **found, **speed})
                    tokens, since = 0, now
                if bar is not None:
                    bar.update()
                    if line:
                        bar.set_postfix(
                            segments=number, loss=f"{found['loss']:.3f}", accuracy=f"{found['accuracy']:.3f}"
                        )
                if config.evaluate_every and self.step % config.evaluate_every == 0:
                    self._evaluate()
                    since = time.perf_counter()
                if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                    self._save()
        finally:
            if bar is not None:
                bar.close()
            self.bar = None
        self.seconds = time.perf_counter() - self.began
        self._save()
        return self._finish()

    def say(self, line: str) -> None:
        if self.bar is None:
            self.tell(line)
        else:  # above the bar
            self.bar.clear()
            self.tell(line)
            self.bar.refresh()

    def _step(self, number: int, measured: bool) -> dict[str, Any]:
        config, model = self.config, self.model
        batch = self.task.batch(
            config.batch, number, config.tokens, seed=config.seed, step=self.step, causal=model.causal
        ).to(self.device)  # fmt: skip
        rate = config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        out = model(batch.ids, labels=batch.labels, outputs="logits" if measured else None)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        # Not at every step: it waits for a GPU.
        if measured or (config.checkpoint_every and (self.step + 1) % config.checkpoint_every == 0):
            loss = float(out.loss.detach())
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                raise FloatingPointError(
                    f"step {self.step}: loss {loss}, norm of the gradient {float(norm)}; use a lower learning_rate, a "
                    "longer warmup or a smaller clip"
                )
        self.optimizer.step()
        self.step += 1
        if not measured:
            return {}
        found = correct(out.outputs, batch.labels, model.causal)
        return {
            "loss": loss,
            "accuracy": int(found.right.sum()) / int(found.counts.sum()),
            "gradient_norm": float(norm),
            "learning_rate": rate,
        }

    def _evaluate(self) -> None:
        config = self.config
        found = evaluate(
            self.model, self.task, config.segments, -(-config.samples // config.batch), batch=config.batch
        )  # fmt: skip
        self._write_line({"kind": "evaluation", "step": self.step, **found.to_dict()})
        self.say(f"step {self.step}: {_told(found)}")
        if config.until and self.step >= config.settled and found.accuracy(self.task) >= config.until:
            self.done = True

    def _finish(self) -> Result:
        config = self.config
        evaluations = []
        for carry in (True, False) if config.cut and self.model.recurrent else (True,):
            for number in config.evaluate:
                found = evaluate(
                    self.model, self.task, number, -(-config.samples // config.batch), carry, batch=config.batch
                )
                evaluations.append(found)
                self.say(f"{'memory on, ' if carry else 'memory cut,'} {_told(found)}")
        result = Result(
            config, self.task, self.model, self.step, self.log, evaluations, self.task.chance(self.model.causal),
            self.seconds, self.directory,
        )  # fmt: skip
        if self.directory is not None:
            runs.write_json(self.directory / runs.SUMMARY, result.to_dict())
        return result

    # -- what is on the disk -------------------------------------------------------------------------------------------

    def _write_line(self, line: dict[str, Any]) -> None:
        self.log.append(line)
        if self.directory is not None:
            with open(self.directory / runs.LOG, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _rewrite_log(self) -> None:
        """The file may have lines of steps that a resumed run does again."""
        if self.directory is not None:
            text = "".join(json.dumps(line) + "\n" for line in self.log)
            write(self.directory / runs.LOG, lambda file: file.write(text.encode()))

    def _save(self) -> None:
        if self.directory is None:
            return
        state = RandomState.now(self.device)
        save_checkpoint(
            self.directory / runs.CHECKPOINT,
            {
                "config": self.config.to_dict(),
                "identity": self._identity(),
                "step": self.step,
                "done": self.done,
                "seconds": time.perf_counter() - self.began,
                "weights": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "random": list(state.tensors()),
                "log": self.log,
                "torch": str(torch.__version__),
            },
        )

    def _identity(self) -> dict[str, Any]:
        """What the model and the task came to: the config leaves defaults open, and data differ between Pythons."""
        return {"task": self.task.to_dict(), "model": self.model.config.to_dict()}

    def _restore(self, path: Path, content: dict[str, Any]) -> None:
        runs.check_same(path, content["config"], self.config.to_dict())
        runs.check_same(path, content["identity"], self._identity())
        _load(path, self.model, content["weights"])
        self.optimizer.load_state_dict(content["optimizer"])
        RandomState.of(tuple(content["random"]), self.device).restore()
        self.step, self.done, self.seconds = content["step"], content["done"], content["seconds"]
        self.log = content["log"]


def _load(path: Path, model: nn.Module, weights: dict[str, Any]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: of another version of the model: {error}") from error


def _told(found: Evaluation) -> str:
    whole = f"whole answers {found.answer:.3f}, " if found.answer else ""
    many = "s" if found.segments > 1 else " "
    return f"{found.segments:>3} segment{many}: {whole}tokens {found.token:.3f}, {found.bits:.3f} bits a token"


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Norms' and linear layers' vectors are not decayed."""
    wide = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    narrow = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": wide, "weight_decay": decay}, {"params": narrow, "weight_decay": 0.0}]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch sees no CUDA GPU here, got {name!r}; use 'cpu'")
    return device


@contextmanager
def _surroundings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _bar(steps: int, first: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("a progress bar needs tqdm: pip install tqdm") from None
    return tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=None if steps else True)
