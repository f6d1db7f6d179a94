"""The experiments: a training step, reading a long input, generation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.huggingface.check import Checker, message
from benchmarks.huggingface.contestants import READERS, TRAINERS, Contestant
from benchmarks.huggingface.generation import check_cached, check_tokens, measure
from benchmarks.huggingface.models import OURS, SHAPES, Shape, Subject
from benchmarks.measure import Check, interleave, spread
from benchmarks.recurrence.memory import weigh

__all__ = ["CPU", "CUDA", "PARTS", "QUICK", "Bench", "Plan", "about", "run"]

Record = dict[str, Any]
PARTS = ("train", "prefill", "generate")


@dataclass(frozen=True)
class Plan:
    """How much is measured of each model, in ``dtype``. Budgets are seconds of timed rounds."""

    name: str
    models: tuple[str, ...]
    dtype: torch.dtype = torch.bfloat16
    checked_segments: int = 2
    segments: int = 4  # of a training step
    rounds: int = 6
    budget: float = 120.0
    read: tuple[int, ...] = (4, 8)  # segments
    read_rounds: int = 4
    read_budget: float = 60.0
    behind: tuple[int, ...] = (0, 4, 16)  # segments, where generation begins
    turns: int = 32  # so many that what else the machine does hits all alike
    samples: int = 1  # of recomputation, a turn


QUICK = Plan("quick", ("gpt2-tiny", "llama-tiny"), rounds=3, budget=4.0, read_rounds=3, read_budget=3.0, turns=16)
CPU = Plan("cpu", ("gpt2-small",))
CUDA = Plan("cuda", ("gpt2-small", "llama-1b"), rounds=15, budget=40.0, read=(64, 256), read_rounds=5, read_budget=90.0)


class Bench:
    """One model's measurements, each of which returns records: plain JSON values.

    Args:
        shape: of the model.
        plan, device: see :class:`Plan`.
        trainers, readers: contestants by name. Those with CUDA graphs are left out away from GPUs.
        say: is told what is done next.
        tick: called after each step of a part, of which there are :meth:`steps`.
    """

    def __init__(
        self, shape: Shape, plan: Plan, device: torch.device, *, trainers: Mapping[str, Contestant] = TRAINERS,
        readers: Mapping[str, Contestant] = READERS, say: Callable[[str], object] = lambda what: None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.shape, self.plan, self.device, self.say, self.tick = shape, plan, device, say, tick
        self.trainers, self.readers = (
            {
                name: c
                for name, c in every.items()
                if (device.type == "cuda" or not c.graphs) and (shape.gelu or not c.gelu)
            }
            for every in (trainers, readers)
        )
        self._subjects: dict[tuple[str, bool, bool], Subject] = {}

    def subject(self, attention: str, gelu: bool = False, compiled: bool = False) -> Subject:
        """The model with that attention; made once."""
        key = (attention, gelu, compiled)
        if key not in self._subjects:
            self._subjects[key] = Subject(
                self.shape, attention, self.plan.dtype, self.device, gelu=gelu, compiled=compiled
            )
        return self._subjects[key]

    def _subject_of(self, contestant: Contestant) -> Subject:
        return self.subject(contestant.attention, contestant.gelu, contestant.compiled)

    def described(self) -> Record:
        """The model's sizes."""
        parameters = self.subject("sdpa").parameters.values()
        return asdict(self.shape) | {
            "parameters": sum(p.numel() for p in parameters), "parameter_bytes": sum(p.nbytes for p in parameters),
        }  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def steps(self, part: str) -> int:
        """How often ``tick`` is called in a part."""
        plan = self.plan
        return {
            "train": 2 * len(self.trainers) + plan.rounds,
            "prefill": len(self.readers) * (1 + len(plan.read)) + plan.read_rounds,
            "generate": 2 + len(plan.behind) + plan.turns,
        }[part]

    def run(self, part: str) -> list[Record]:
        """The records of a part."""
        made: dict[str, Callable[[], list[Record]]] = {
            "train": self.train, "prefill": self.prefill, "generate": self.generate,
        }  # fmt: skip
        records = made[part]()
        for record in records:
            record |= {"part": part, "model": self.shape.name}
        return records

    # -- parts ---------------------------------------------------------------------------------------------------------

    def train(self) -> list[Record]:
        """A step through ``plan.segments`` segments, forward and backward, no optimizer."""
        plan = self.plan
        ids = self.subject("sdpa").inputs(plan.segments)
        records = self._checked(self.trainers, plan.segments, backward=True)
        steps = {name: self._step(self.trainers[name], ids) for name, record in records.items() if record["match"]}
        self._weigh(records, steps, self.trainers, backward=True)
        self._time(records, steps, ids.numel(), plan.rounds, plan.budget)
        return list(records.values())

    def prefill(self) -> list[Record]:
        """Reading inputs of several lengths for the sake of their memory."""
        checked = self._checked(self.readers, self.plan.read[0], backward=False)
        found: list[Record] = []
        ids, longest = self.subject("sdpa").inputs(1), dict[str, Callable[[], object]]()
        for number in self.plan.read:
            ids = self.subject("sdpa").inputs(number)
            records = {name: {**record, **_size(ids, number)} for name, record in checked.items()}
            longest = {name: self._step(self.readers[name], ids) for name, r in records.items() if r["match"]}
            self._weigh(records, longest, self.readers, backward=False)
            found += records.values()
        last = {record["contestant"]: record for record in found[-len(checked) :]}
        self._time(last, longest, ids.numel(), self.plan.read_rounds, self.plan.read_budget)
        return found

    def generate(self) -> list[Record]:
        """Tokens of a whole segment, cached and recomputed."""
        plan, tokens = self.plan, self.shape.segment
        base: Record = {"segments": 0, "tokens": tokens, "peak_bytes": None, "rounds": [], "seconds": None}
        self.say("generation: tokens and logits")
        checked = self._guarded(lambda: check_tokens(self.shape, self.device))
        self.tick()
        if checked.ok:
            checked = self._guarded(lambda: check_cached(self.subject(OURS), self.subject("sdpa")))
        self.tick()
        labels = {f"cached_{n}": f"ours, cached, {n} segments behind" for n in plan.behind}
        labels["recompute"] = "loop, segment recomputed for each token"
        records = [base | _record(name, label, checked) for name, label in labels.items()]
        if not checked.ok:
            return records[:-1]
        self.say("generation: time")
        try:
            found = measure(
                self.subject(OURS), self.subject("sdpa"), plan.behind, turns=plan.turns, samples=plan.samples,
                synchronize=self.synchronize, tick=self.tick,
            )  # fmt: skip
        except Exception as error:
            return [record | {"note": f"failed: {message(error)}"} for record in records]
        for record, number in zip(records, plan.behind, strict=False):
            rounds = found["cached"][str(number)]
            record |= {"behind": number, "rounds": rounds, "tokens_per_second": tokens / sum(rounds)}
        records[-1] |= {
            "places": found["places"], "border": found["border"],
            "tokens_per_second": tokens / found["recompute_seconds"],
        }  # fmt: skip
        return records

    # -- what parts share ----------------------------------------------------------------------------------------------

    def _guarded(self, check: Callable[[], Check]) -> Check:
        try:
            return check()
        except Exception as error:
            return Check(False, f"failed: {message(error)}")

    def _checked(self, contestants: Mapping[str, Contestant], segments: int, *, backward: bool) -> dict[str, Record]:
        """A record for each contestant, which says whether it is right."""
        checker = Checker(
            self.shape, self.plan.dtype, self.device, contestants, segments=self.plan.checked_segments,
            backward=backward,
        )  # fmt: skip
        ids, records = self.subject("sdpa").inputs(segments), {}
        for name, contestant in contestants.items():
            self.say(f"{'gradients' if backward else 'memory'} of {contestant.label}")
            checked = checker(name, self._subject_of(contestant))
            records[name] = _record(name, contestant.label, checked) | _size(ids, segments)
            self._release()
            self.tick()
        return records

    def _step(self, contestant: Contestant, ids: Tensor) -> Callable[[], object]:
        subject = self._subject_of(contestant)
        step = contestant.build(subject)

        def run() -> object:
            subject.forget_gradients()
            found = step(ids)
            self.synchronize()
            return found

        return run

    def _weigh(
        self, records: dict[str, Record], steps: dict[str, Callable[[], object]], contestants: Mapping[str, Contestant],
        *, backward: bool,
    ) -> None:  # fmt: skip
        """The most bytes that a step allocates, gradients included."""
        for name, record in records.items():
            if name in steps:
                self.say(f"peak memory of {record['label']}, {record['segments']} segments")
                subject = self._subject_of(contestants[name])
                step = steps[name]
                if self.device.type != "cpu" and not contestants[name].keeps:
                    step()  # libraries allocate on their first call
                parameters = subject.parameters.values() if backward else ()
                with _left_out(record, steps):
                    peak = weigh(step, parameters, self.device)
                    record |= {"peak_bytes": peak.total, "gradient_bytes": peak.gradients}
                subject.forget_gradients()
                self._release()
            self.tick()

    def _time(
        self, records: dict[str, Record], steps: dict[str, Callable[[], object]], tokens: int, rounds: int,
        budget: float,
    ) -> None:  # fmt: skip
        def guarded(name: str, step: Callable[[], object]) -> Callable[[], object]:
            def run() -> None:
                if name in steps:
                    with _left_out(records[name], steps):
                        step()

            return run

        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            gc.collect(1)  # off within a round
            self.tick()

        self.say("time")
        turns = {name: guarded(name, step) for name, step in steps.items()}
        found = interleave(turns, rounds=rounds, warmup=0.0, budget=budget, least=2, tick=tick)
        for _ in range(rounds - done):
            self.tick()
        for name, seconds in found.items():
            if name in steps:
                middle = spread(seconds)
                records[name] |= {
                    "rounds": seconds, "seconds": middle, "tokens_per_second": tokens / middle["median"],
                }  # fmt: skip
        for subject in self._subjects.values():
            subject.forget_gradients()

    def _release(self) -> None:
        """Give back what a GPU's allocator keeps."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def _left_out(record: Record, steps: dict[str, Callable[[], object]]) -> Iterator[None]:
    """A contestant that fails must not end the run: it is left out from there on, and its record says why."""
    try:
        yield
    except torch.OutOfMemoryError:
        record["note"] = "out of memory"
        steps.pop(record["contestant"], None)
    except Exception as error:
        record["note"] = f"failed: {message(error)}"
        steps.pop(record["contestant"], None)


def _record(name: str, label: str, checked: Check) -> Record:
    note = checked.reason if checked.ok or checked.reason.startswith("failed") else f"WRONG: {checked.reason}"
    return {
        "contestant": name, "label": label, "match": checked.ok, "errors": checked.errors, "note": note,
        "peak_bytes": None, "gradient_bytes": None, "rounds": [], "seconds": None, "tokens_per_second": None,
    }  # fmt: skip


def _size(ids: Tensor, segments: int) -> Record:
    return {"segments": segments, "tokens": ids.numel(), "input_bytes": ids.nbytes}


def about(plan: Plan, device: torch.device) -> Record:
    """What a result says of itself, without the environment."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "plan": plan.name, "device": device.type, "dtype": str(plan.dtype).removeprefix("torch."),
        "transformers": transformers.__version__, **gpu,
    }  # fmt: skip


def run(
    plan: Plan, device: torch.device, *, parts: Sequence[str] = PARTS, models: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Measure a plan: plain JSON values, without the environment."""
    from tqdm import tqdm

    begin = time.perf_counter()
    shapes = [SHAPES[name] for name in models or plan.models]
    results = about(plan, device) | {"models": {}, "records": []}
    total = sum(Bench(shape, plan, device).steps(part) for shape in shapes for part in parts)
    with tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True) as bar:
        for shape in shapes:
            bench = Bench(
                shape, plan, device, tick=bar.update,
                say=lambda what, shape=shape: bar.set_description(f"{shape.name}: {what:<48}"),  # type: ignore[misc]
            )  # fmt: skip
            results["models"][shape.name] = bench.described()
            for part in parts:
                results["records"] += bench.run(part)
    results["took_seconds"] = time.perf_counter() - begin
    return results
