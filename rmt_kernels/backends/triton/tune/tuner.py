"""From candidates to a row: compile, check, time, choose."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.triton import gate
from rmt_kernels.backends.triton.configs import Backward, Row
from rmt_kernels.backends.triton.resources import CHIPS
from rmt_kernels.backends.triton.tune.candidates import DTYPES, Config, Key, Trial, trials
from rmt_kernels.backends.triton.tune.problem import Case, Problem, Step, cases, run, small_case
from rmt_kernels.backends.triton.tune.report import row_source
from rmt_kernels.backends.triton.tune.timer import Timer
from rmt_kernels.backends.triton.variants import EVERYTHING, PLAIN, SINGLE, variants_of

__all__ = ["DeviceLostError", "Entry", "Tuner", "finalists", "ranked"]

_TOLERANCE = {"half": 5e-3, "tf32": 2e-3, "float32": 1e-5}  # RMS error / RMS; of gradients twice that
_GAIN = 0.01  # a present configuration stays unless another is faster by more
_UNREACHED = "not reached in the time given"


@dataclass
class Entry:
    """What is known of a trial: ``note`` is what speaks against it, ``seconds`` are medians, one for each case."""

    trial: Trial
    note: str = ""
    dropped: bool = False  # not timed, because of what the note says
    registers: int | None = None
    shared: int | None = None
    programs: int | None = None  # that one SM holds
    seconds: list[float] = field(default_factory=list)
    final: bool = False  # measured again, beside the present configuration

    @property
    def score(self) -> float:
        return math.exp(sum(map(math.log, self.seconds)) / len(self.seconds)) if self.seconds else math.inf


def ranked(entries: Iterable[Entry], part: str = "whole") -> list[Entry]:
    """Those with a time, the fastest first."""
    return sorted((e for e in entries if e.trial.part == part and e.seconds), key=lambda entry: entry.score)


def finalists(entries: Sequence[Entry]) -> list[Trial]:
    """What is worth a second measurement: the present configuration, which comes first, the fastest others, and of a
    backward pass the fastest parts put together, or the fastest joint ones taken apart."""
    fast = [entry.trial.config for entry in ranked(entries[1:])[:5]]
    found = [entries[0].trial.config, *fast]
    for copies in (False, True):
        keys, queries = (
            [
                config
                for entry in ranked(entries, part)
                if isinstance(config := entry.trial.config, Backward) and config.descriptors == copies
            ][:2]
            for part in ("keys", "queries")
        )
        found += [Backward(one.keys, other.queries, False, copies) for one, other in product(keys, queries)]
    found += [replace(config, joint=False) for config in fast[:2] if isinstance(config, Backward)]
    return [Trial("whole", config) for config in dict.fromkeys(found)]


class DeviceLostError(RuntimeError):
    """A candidate left the GPU in a state in which nothing runs any more."""


@dataclass
class Tuner:
    """One GPU. ``jobs`` compilers run at a time; none, where the architecture has no gate."""

    device: torch.device
    arch: int
    timer: Timer
    jobs: int = 1
    specialized: bool = False
    cases: Callable[[Key], list[Case]] = cases
    tick: Callable[[str], object] = lambda label: None

    def tune(self, key: Key, deadline: float) -> dict[str, Any]:
        """Measure a key until ``deadline`` (``time.monotonic``) at the latest; what was found, as JSON values.

        Raises RuntimeError where the present configuration fails or computes wrong results, and DeviceLostError.
        """
        begin = time.monotonic()
        problems = [Problem(key, case, self.device, self.arch) for case in self.cases(key)]
        small = Problem(key, small_case(key), self.device, self.arch)
        listed = trials(key, self.arch, specialized=self.specialized)
        present = listed[0]
        if found := _wrong(present, [small], [small.exact()]):
            raise RuntimeError(f"{key.name}: the present configuration, {present.label}: {found}")
        truths = [small.exact(), *(problem.results(present) for problem in problems)]
        entries: dict[Trial, Entry] = {}

        def admit(wanted: Iterable[Trial], until: float) -> None:
            new = [Entry(trial) for trial in wanted if trial not in entries]
            entries.update((entry.trial, entry) for entry in new)
            self._compile(problems[0], new, until)
            for entry in new:
                if not entry.note:
                    entry.note = _wrong(entry.trial, [small, *problems], truths) or _spilled(entry.trial, problems)
                entry.dropped = bool(entry.note) and entry.trial != present
                if entry.trial in listed:
                    self.tick(f"{key.name} {entry.trial.label}")

        def measure(some: Sequence[Entry], rounds: int, until: float) -> None:
            able = [entry for entry in some if not entry.dropped]
            for entry in able:
                entry.seconds = []
            for problem in problems:
                runs = {entry.trial.label: _bound(problem.steps(entry.trial)) for entry in able}
                times = self.timer(runs, rounds, until)
                for entry in able:
                    entry.seconds.append(median(times[entry.trial.label]))

        left = deadline - begin
        admit(listed, begin + 0.5 * left)
        measure(list(entries.values()), 5, begin + 0.75 * left)
        last = finalists(list(entries.values()))
        admit(last, begin + 0.9 * left)
        finals = [entries[trial] for trial in last if not entries[trial].dropped]
        measure(finals, 30, deadline)
        for entry in finals:
            entry.final = True
        chosen = self._chosen(key, entries[present], finals)
        row = Row(
            self.arch, key.width, key.kind, key.length, chosen.trial.config,
            _reason(chosen, entries[present], ranked(finals), problems), key.dropout,
        )  # fmt: skip
        return {
            "complete": time.monotonic() <= deadline and not any(e.note == _UNREACHED for e in entries.values()),
            "row": row_source(row), "kept": chosen.trial == present, "seconds": round(time.monotonic() - begin, 1),
            "cases": [problem.case.name for problem in problems],
            "candidates": [
                {"part": e.trial.part, "label": e.trial.label, **{k: v for k, v in asdict(e).items() if k != "trial"},
                 "rates": [p.rate(e.trial, s) for p, s in zip(problems, e.seconds, strict=False)]}
                for e in entries.values()
            ],
        }  # fmt: skip

    def _compile(self, problem: Problem, entries: Sequence[Entry], until: float) -> None:
        """Note those that do not compile, spill or do not fit."""
        if self.arch not in CHIPS:
            return
        for first in range(0, len(entries), 4 * self.jobs):
            some = entries[first : first + 4 * self.jobs]
            if first and time.monotonic() > until:
                for entry in some:
                    entry.note = _UNREACHED
                continue
            owners = [(entry, variant) for entry in some for variant in problem.variants(entry.trial)]
            for index, row in gate.run([(variant, self.arch) for _, variant in owners], self.jobs):
                entry = owners[index][0]
                entry.note = entry.note or "; ".join(row.violations)
                if row.resources and row.kernel in ("forward_kernel", "backward_kernel"):
                    used = row.resources
                    entry.registers = max(entry.registers or 0, used.registers)
                    entry.shared = max(entry.shared or 0, used.shared)
                    entry.programs = min(entry.programs or 32, used.programs(self.arch))

    def _chosen(self, key: Key, present: Entry, finals: Sequence[Entry]) -> Entry:
        """The fastest that the compile gate would let pass with every feature, if it gains enough."""
        for entry in ranked(finals):
            if entry is present or (not present.note and entry.score > present.score * (1 - _GAIN)):
                break
            broken = self._broken(key, entry.trial.config)
            if not broken:
                return entry
            entry.note = f"fast, but the compile gate refuses it: {broken}"
        return present

    def _broken(self, key: Key, config: Config) -> str:
        if self.arch not in CHIPS:
            return ""
        row = Row(self.arch, key.width, key.kind, key.length, config, "", key.dropout)
        arguments = (row, self.arch, key.length, key.width, DTYPES[key.kind])
        wanted = [
            variant
            for feature in (PLAIN, EVERYTHING, *SINGLE)
            for variant in variants_of(*arguments, feature, key.dropout)
        ]
        rows = [row for _, row in gate.run([(variant, self.arch) for variant in wanted], self.jobs) if row.violations]
        return f"{rows[0].label}: {rows[0].violations[0]}" if rows else ""


def _bound(steps: Sequence[Step]) -> Callable[[], None]:
    return lambda: run(steps)


def _wrong(trial: Trial, problems: Sequence[Problem], truths: Sequence[Mapping[str, Tensor]]) -> str:
    """Why the trial cannot be timed: it fails, or its results are off; empty where nothing is wrong."""
    for problem, truth in zip(problems, truths, strict=True):
        try:
            found = problem.results(trial)
        except Exception as error:  # one candidate must not end the run
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            try:
                if problem.query.is_cuda:
                    torch.cuda.synchronize()
            except RuntimeError:
                raise DeviceLostError(f"{trial.label} on {problem.case.name} broke the device: {said}") from error
            return said
        for name, result in found.items():
            true = truth[name].double()
            ratio = float((result.double() - true).norm() / true.norm())
            allowed = _TOLERANCE[problem.key.kind] * (2 if name.startswith("grad") else 1)
            if not ratio <= allowed:  # NaN too
                return f"WRONG on {problem.case.name}: {name}, RMS error ratio {ratio:.1e}, allowed {allowed:.1e}"
    return ""


def _spilled(trial: Trial, problems: Sequence[Problem]) -> str:
    """What the compiled kernels say, for architectures that the gate does not know."""
    kernels = [kernel for problem in problems for step, _ in problem.steps(trial) for kernel in step.compiled.values()]
    most = max((kernel.n_spills or 0 for kernel in kernels), default=0)
    return f"spills {most} registers" if most else ""


def _reason(chosen: Entry, present: Entry, finals: Sequence[Entry], problems: Sequence[Problem]) -> str:
    def said(entry: Entry) -> str:
        text = problems[0].rate(entry.trial, entry.seconds[0])
        for problem, seconds in zip(problems[1:], entry.seconds[1:], strict=True):
            text += f", {problem.case.name}: {seconds * 1e6:.1f} µs"
        return text

    text = f"measured {said(chosen)}"
    following = next((e for e in finals if e is not chosen and e is not present and not e.note), None)
    if following:
        kind = "next best" if following.score >= chosen.score else "no gain from"
        text += f"; {kind} {following.trial.label} at {said(following)}"
    return text if chosen is present else f"{text}; before {present.trial.label} at {said(present)}"
