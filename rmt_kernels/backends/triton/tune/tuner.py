"""From candidates to a row: compile, check, time, choose."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch

from rmt_kernels.backends.triton import gate
from rmt_kernels.backends.triton.configs import Backward, Row
from rmt_kernels.backends.triton.resources import CHIPS
from rmt_kernels.backends.triton.tune.candidates import DTYPES, Config, Key, candidates, label
from rmt_kernels.backends.triton.tune.problem import Case, Problem, cases
from rmt_kernels.backends.triton.tune.report import row_source
from rmt_kernels.backends.triton.tune.timer import Timer
from rmt_kernels.backends.triton.variants import FEATURES, variants_of

__all__ = ["DeviceLostError", "Entry", "Tuner", "finalists", "ranked"]

_GAIN = 0.01  # a present configuration stays unless another is faster by more
_UNREACHED = "not reached in the time given"


@dataclass
class Entry:
    """What is known of a candidate: ``note`` is what speaks against it, ``seconds`` are medians, one for each case."""

    config: Config
    note: str = ""
    able: bool = True  # to be timed
    registers: int | None = None
    programs: int | None = None  # that one SM holds
    seconds: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The geometric mean over cases; infinite without a time."""
        return math.exp(sum(map(math.log, self.seconds)) / len(self.seconds)) if self.seconds else math.inf


def ranked(entries: Iterable[Entry]) -> list[Entry]:
    """Those with a time, the fastest first."""
    return sorted((entry for entry in entries if entry.seconds), key=lambda entry: entry.score)


def finalists(entries: Sequence[Entry]) -> list[Config]:
    """What is worth a second measurement: the present configuration, which comes first, the fastest others, and of a
    backward pass the tiles of the fastest put together anew, in two launches."""
    fast = [entry.config for entry in ranked(entries)]
    found = {label(config): config for config in (entries[0].config, *fast[:5])}
    passes = [config for config in fast if isinstance(config, Backward)]
    keys, queries, copies = (
        list(dict.fromkeys(getattr(config, name) for config in passes))[:3]
        for name in ("keys", "queries", "descriptors")
    )
    anew = [Backward(one, other) for one, other in product(keys, queries)]
    for config, copy in product([*passes[:2], *anew], copies):
        found.setdefault(label(changed := replace(config, descriptors=copy)), changed)
    return list(found.values())


class DeviceLostError(RuntimeError):
    """A candidate left the GPU in a state in which nothing runs any more."""


@dataclass
class Tuner:
    """One GPU, by name. ``jobs`` compilers run at once; none, where the compile gate lacks the architecture."""

    name: str
    device: torch.device
    arch: int
    timer: Timer
    jobs: int = 1
    specialized: bool = False
    cases: Callable[[Key], list[Case]] = cases

    def tune(self, key: Key, deadline: float) -> dict[str, Any]:
        """Measure a key until ``deadline`` (``time.monotonic``) or a little later; what was found, as JSON values.

        "failed" is among them where the present configuration fails or is wrong. Raises DeviceLostError.
        """
        begin = time.monotonic()
        left = deadline - begin
        problems = [Problem(key, case, self.device, self.arch) for case in self.cases(key)]
        entries = {label(c): Entry(c) for c in candidates(key, self.arch, specialized=self.specialized)}
        present, *_ = entries.values()
        self._admit(problems, list(entries.values()), present, begin + 0.5 * left)
        self._measure(problems, entries.values(), 5, begin + 0.75 * left)
        last = finalists(list(entries.values()))
        new = {label(config): Entry(config) for config in last if label(config) not in entries}
        self._admit(problems, list(new.values()), present, begin + 0.9 * left)
        entries |= new
        finals = [entry for config in last if (entry := entries[label(config)]).able]
        self._measure(problems, finals, 30, deadline)
        in_time = time.monotonic() <= deadline and all(entry.note != _UNREACHED for entry in entries.values())
        record: dict[str, Any] = {"complete": in_time, "cases": [problem.case.name for problem in problems]}
        if not present.able:
            record["failed"] = f"the present configuration, {label(present.config)}: {present.note}"
        if chosen := self._chosen(key, present, finals):
            row = Row(
                arch=self.arch, width=key.width, kind=key.kind, length=key.length, config=chosen.config,
                reason=self._reason(problems, chosen, present, finals), calls=key.calls,
            )  # fmt: skip
            hidden = replace(key.row(self.arch), reason="…")
            record |= {"row": row_source(row), "before": row_source(hidden)}
        record["candidates"] = [
            {
                "label": name, "note": entry.note, "registers": entry.registers, "programs": entry.programs,
                "seconds": entry.seconds, "final": entry in finals,
                "rate": problems[0].rate(entry.seconds[0]) if entry.seconds else "",
            }
            for name, entry in sorted(entries.items(), key=lambda item: (item[1] not in finals, item[1].score))
        ]  # fmt: skip
        return record

    def _admit(self, problems: Sequence[Problem], entries: Sequence[Entry], present: Entry, until: float) -> None:
        """Compile in parallel, some at a time, and check; note what speaks against an entry, also that time ran out."""
        for first in range(0, len(entries), 4 * self.jobs):
            some = entries[first : first + 4 * self.jobs]
            if some[0] is not present and time.monotonic() > until:
                for entry in some:
                    entry.note, entry.able = _UNREACHED, False
                continue
            if self.arch in CHIPS:
                self._compile(problems, some)
            for entry in some:
                if entry.able or entry is present:
                    complaint = self._complaint(problems, entry.config)
                    entry.note, entry.able = complaint or entry.note, not complaint

    def _compile(self, problems: Sequence[Problem], entries: Sequence[Entry]) -> None:
        """Note those that do not compile, spill or do not fit."""
        tasks = {
            (index, variant.fn, repr((variant.signature, variant.constexprs, variant.attrs))): variant
            for index, entry in enumerate(entries)
            for problem in problems
            for variant in problem.variants(entry.config)
        }
        owners = [entries[index] for index, *_ in tasks]
        for task, row in gate.run([(variant, self.arch) for variant in tasks.values()], self.jobs):
            entry = owners[task]
            if row.violations:
                entry.note, entry.able = entry.note or "; ".join(row.violations), False
            if row.resources and row.kernel in ("forward", "backward"):
                entry.registers = max(entry.registers or 0, row.resources.registers)
                entry.programs = min(entry.programs or 32, row.resources.programs(self.arch))

    def _complaint(self, problems: Sequence[Problem], config: Config) -> str:
        """Why a configuration cannot be timed: it fails, or its results are off; empty where nothing is wrong."""
        for problem in problems:
            try:
                if found := problem.wrong(config):
                    return f"WRONG: {found}"
            except Exception as error:  # one candidate must not end the run
                said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                if self.device.type == "cuda":
                    try:
                        torch.cuda.synchronize(self.device)
                    except RuntimeError:
                        raise DeviceLostError(f"{label(config)} on {problem.case.name}: {said}") from error
                return f"fails on {problem.case.name}: {said}"
        return ""

    def _measure(self, problems: Sequence[Problem], entries: Iterable[Entry], rounds: int, until: float) -> None:
        able = {label(entry.config): entry for entry in entries if entry.able}
        times = [
            self.timer({name: partial(problem.run, entry.config) for name, entry in able.items()}, rounds, until)
            for problem in problems
        ]
        for name, entry in able.items():
            entry.seconds = [median(found[name]) for found in times]

    def _chosen(self, key: Key, present: Entry, finals: Sequence[Entry]) -> Entry | None:
        """The fastest that the compile gate lets pass with every feature, if it gains enough; None where all fail."""
        for entry in ranked(finals):
            enough = not present.able or present.note or entry.score < present.score * (1 - _GAIN)
            if entry is present or not enough:
                break
            broken = self._broken(key, entry.config)
            if not broken:
                return entry
            entry.note = f"the compile gate refuses it: {broken}"
        return present if present.able else None

    def _broken(self, key: Key, config: Config) -> str:
        if self.arch not in CHIPS:
            return ""
        row = Row(self.arch, key.width, key.kind, key.length, config, "", key.calls)
        wanted = [
            (variant, self.arch)
            for feature in FEATURES[key.calls]
            for variant in variants_of(row, self.arch, key.length, key.width, DTYPES[key.kind], feature)
        ]
        found = [row for _, row in gate.run(wanted, self.jobs) if row.violations]
        return f"{found[0].label}: {found[0].violations[0]}" if found else ""

    def _reason(self, problems: Sequence[Problem], chosen: Entry, present: Entry, finals: Sequence[Entry]) -> str:
        def said(entry: Entry) -> str:
            times = ", ".join(f"{seconds * 1e6:.1f}" for seconds in entry.seconds)
            return f"{times} µs ({problems[0].rate(entry.seconds[0])})"

        words = [f"{self.name}, {'; '.join(problem.case.name for problem in problems)}: {said(chosen)}"]
        others = (entry for entry in ranked(finals) if entry is not chosen and entry is not present and not entry.note)
        words += [f"next {label(entry.config)}: {said(entry)}" for entry in list(others)[:1]]
        if present is not chosen:
            words.append(f"before, {label(present.config)}: {said(present) if present.able else present.note}")
        return "; ".join(words)
