"""The runs of a table, side by side, each resumable: what was done is not done again."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.systems.studies import Results, Study
from rmt_kernels.training import CheckpointError, TrainConfig, train
from rmt_kernels.training import runs as stored

__all__ = ["Job", "carry_out", "jobs", "perform"]


@dataclass(frozen=True)
class Job:
    """One entry with one seed, and the directory of its run."""

    key: str
    label: str
    config: TrainConfig
    directory: Path


def jobs(
    study: Study, size: str, seeds: Sequence[int], work: Path, device: str = "cpu", only: str = ""
) -> list[Job]:  # fmt: skip
    """Seed after seed, so that a table that is cut off has all systems.

    Raises:
        ValueError: no entry's key has ``only`` in it.
    """
    entries = study.entries(size)
    chosen = [entry for entry in entries if only in entry.key]
    if not chosen:
        raise ValueError(f"only must be a part of {[entry.key for entry in entries]}, got {only!r}")
    return [
        Job(entry.key, entry.label, entry.config(size, seed, device), work / f"{entry.key}-{seed}")
        for seed in seeds for entry in chosen
    ]  # fmt: skip


def finished(job: Job) -> dict[str, Any] | None:
    """The summary of a run that was carried out to its end."""
    try:
        found: dict[str, Any] = json.loads((job.directory / stored.SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("config") == json.loads(json.dumps(job.config.to_dict())) else None


def carry_out(job: Job, overwrite: bool = False) -> dict[str, Any]:
    """Train, or go on, or only read what there is. A run of other settings is replaced only with ``overwrite``.

    Raises:
        CheckpointError: the directory has such a run, or a damaged one.
        FloatingPointError: the training failed.
    """
    summary = finished(job)
    if summary is None:
        there = (job.directory / stored.RUN).exists()
        try:
            train(job.config, job.directory, resume=there)
        except CheckpointError as error:
            if not overwrite:
                raise CheckpointError(f"{error}; --overwrite replaces it") from error
            train(job.config, job.directory, overwrite=True)
        summary = finished(job)
        assert summary is not None
    written = (job.directory / stored.SUMMARY).stat().st_mtime
    return {
        **summary,
        "entry": job.key,
        "label": job.label,
        "task": job.config.task,
        "model": job.config.model,
        "seed": job.config.seed,
        "data": summary["task"],
        "date": datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat(timespec="seconds"),
    }


def perform(
    study: Study, planned: Sequence[Job], *, processes: int = 2, overwrite: bool = False, progress: bool = True,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:  # fmt: skip
    """Carry out all jobs, ``processes`` at a time; 0: in this process.

    Args:
        study, planned: of one table.
        overwrite: replace runs of other settings.
        progress: show a bar of steps.
        keep: called with the results so far after each run.

    Returns:
        Plain JSON values: the records of all runs in the order planned, and what failed, in words.
    """
    records: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}

    def results() -> Results:
        names = [job.directory.name for job in planned]
        return {
            "table": study.name,
            "seeds": sorted({job.config.seed for job in planned}),
            "planned": names,
            "runs": [records[name] for name in names if name in records],
            "failed": [f"{name}: {failed[name]}" for name in names if name in failed],
        }

    with tqdm(total=sum(job.config.steps for job in planned), unit="step", disable=not progress) as bar:
        for job, outcome in _outcomes(planned, processes, overwrite, bar):
            name = job.directory.name
            if isinstance(outcome, Exception):
                failed[name] = f"{type(outcome).__name__}: {outcome}"
            else:
                records[name] = outcome
            bar.set_postfix(done=f"{len(records)} of {len(planned)}", last=name)
            keep(results())
    return results()


def _outcomes(
    planned: Sequence[Job], processes: int, overwrite: bool, bar: tqdm[Any]
) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    done = 0
    if not processes:
        for job in planned:
            try:
                outcome: dict[str, Any] | Exception = carry_out(job, overwrite)
            except (RuntimeError, ArithmeticError, OSError, ValueError) as error:
                outcome = error
            done += job.config.steps
            _move(bar, done)
            yield job, outcome
        return
    # Not forked: torch's threads would not survive it.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        waiting: dict[Future[dict[str, Any]], Job] = {pool.submit(carry_out, job, overwrite): job for job in planned}
        while waiting:
            ready, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ready:
                job = waiting.pop(future)
                done += job.config.steps
                failure = future.exception()
                if failure is not None and not isinstance(failure, Exception):
                    raise failure
                yield job, future.result() if failure is None else failure
            _move(bar, done + sum(_steps(job) for future, job in waiting.items() if future.running()))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _move(bar: tqdm[Any], steps: int) -> None:
    bar.n = max(bar.n, steps)
    bar.refresh()


def _steps(job: Job) -> int:
    """Steps that a run in progress has logged."""
    try:
        with open(job.directory / stored.LOG, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
            return int(json.loads(file.read().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0
