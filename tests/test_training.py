"""Trainer, evaluation, checkpoints, the directory of a run, and the command ``train``."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmt_kernels import cli
from rmt_kernels.models import MODELS
from rmt_kernels.recurrence import RecurrentOutput, Replay
from rmt_kernels.training import (
    RECIPES,
    TASKS,
    CheckpointError,
    Evaluation,
    TrainConfig,
    configure,
    evaluate,
    load_run,
    make_task,
    train,
    trainer,
)
from rmt_kernels.training.checkpoints import FORMAT, load_checkpoint, save_checkpoint

_TIMES = ("tokens_per_second", "seconds")


def _config(**options: Any) -> TrainConfig:
    """A run of a second or less; dropout on, so that random numbers matter."""
    quick = {
        "length": 3, "tokens": 8, "segments": 3, "dropout": 0.2, "steps": 12, "checkpoint_every": 4, "threads": 1,
        "evaluate": (2, 3), "curriculum": "random",
    }  # fmt: skip
    return configure("copy", "rmt", "quick", **(quick | options))


def _untimed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in log]


def _lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def _state(directory: Path) -> dict[str, Any]:
    """A checkpoint's content without times."""
    content = load_checkpoint(directory / "checkpoint.pt")
    content["log"] = _untimed(content["log"])
    del content["seconds"]
    return content


def _same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) and type(a) is type(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a break."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    train(_config(), directory)
    return directory


# -- the trainer -------------------------------------------------------------------------------------------------------


def test_remember_is_learned_through_memory_alone() -> None:
    config = configure(
        "remember", "rmt", segments=3, tokens=14, width=32, heads=2, memory=4, words=10, steps=400, batch=32,
        learning_rate=4e-3, warmup=20, curriculum="0:1,60:2,140:3", evaluate=(3,), evaluate_every=20, until=0.97,
        cut=True, threads=1,
    )  # fmt: skip
    result = train(config)
    assert result.accuracy(3) >= 0.95
    assert result.accuracy(3, carry=False) < result.chance.answer + 0.12
    assert result.steps < 400, "it stops once it knows the answers"
    assert result.log[-1]["kind"] == "evaluation"


def test_the_same_config_gives_the_same_weights_and_leaves_no_trace(whole: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    result = train(_config())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert _same(dict(result.model.state_dict()), load_checkpoint(whole / "checkpoint.pt")["weights"])
    assert _untimed(result.log) == _untimed(_lines(whole))
    other = train(_config(seed=1, steps=2))
    assert not _same(dict(result.model.state_dict()), dict(other.model.state_dict()))


@pytest.mark.parametrize("stop", [3, 7, 9])
def test_resuming_is_exact(stop: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, step = tmp_path / "run", trainer._Run._step

    def broken(self: Any, *arguments: Any) -> Any:
        if self.step == stop:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_step", broken)
        with pytest.raises(KeyboardInterrupt):
            train(_config(), out)
    assert len(_lines(out)) >= stop // 2
    torch.manual_seed(999)
    said: list[str] = []
    train(_config(), out, resume=True, say=said.append)
    assert any(f"resumed after step {stop // 4 * 4}" in line for line in said) == (stop >= 4)
    assert _same(_state(out), _state(whole))
    assert _untimed(_lines(out)) == _untimed(_lines(whole))
    summaries = [json.loads((d / "summary.json").read_text()) for d in (out, whole)]
    assert summaries[0]["evaluations"] == summaries[1]["evaluations"]


def test_an_interrupted_save_loses_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    path = out / "checkpoint.pt"
    moved, saved = os.replace, torch.save
    times = {"replace": 0, "save": 0}

    def no_replace(source: Any, target: Any) -> None:
        if Path(target) == path:
            times["replace"] += 1
            if times["replace"] == 2:
                raise OSError("the machine went down")
        moved(source, target)

    def half_a_save(content: Any, file: Any) -> None:
        times["save"] += 1
        if times["save"] == 2:
            file.write(b"PK half of it")
            raise KeyboardInterrupt
        saved(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_replace)
        with pytest.raises(OSError, match="went down"):
            train(_config(), out)
    assert load_checkpoint(path)["step"] == 4
    assert not list(out.glob("*.new"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_a_save)
        with pytest.raises(KeyboardInterrupt):
            train(_config(), out, resume=True)
    assert load_checkpoint(path)["step"] == 8
    # A process that was killed leaves what it had written.
    (out / "checkpoint.pt.new").write_bytes(b"PK half of it")
    train(_config(), out, resume=True)
    assert _same(_state(out), _state(whole))
    assert not list(out.glob("*.new"))


def test_resuming_a_finished_run_evaluates_it_again(whole: Path, tmp_path: Path) -> None:
    before, log = _state(whole), (whole / "log.jsonl").read_text()
    result = train(_config(), whole, resume=True)
    assert result.steps == 12
    assert _same(_state(whole), before)
    assert (whole / "log.jsonl").read_text() == log


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_trains(name: str) -> None:
    result = train(configure("copy", name, "quick", length=3, tokens=8, steps=2, evaluate=(1, 3), threads=1))
    assert all(math.isfinite(line["loss"]) for line in result.log)
    assert {(e.segments, e.carry) for e in result.evaluations} == {
        (n, carry) for n in (1, 3) for carry in ((True, False) if MODELS[name].recurrent else (True,))
    }
    assert result.to_dict()["causal"] is MODELS[name].causal
    assert ("memory" in result.config.model_options) == ("memory" in MODELS[name].uses)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_trains(name: str) -> None:
    result = train(configure(name, "rmt", "quick", steps=2, threads=1))
    assert all(math.isfinite(line["loss"]) for line in result.log)
    said: list[str] = []
    train(configure(name, "rmt_encoder", "quick", steps=1, threads=1, evaluate=()), say=said.append)
    assert "hidden from the inputs behind a placeholder" in said[0]


def test_replay_trains_the_same(whole: Path) -> None:
    exact = load_checkpoint(whole / "checkpoint.pt")["weights"]
    found = train(_config(bptt="replay"))
    assert isinstance(found.model.config.bptt, Replay)
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, exact[name], rtol=1e-3, atol=1e-5)
    cut = train(_config(bptt=1))
    assert not _same(dict(cut.model.state_dict()), exact)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step .*: loss .*; use a lower learning_rate"):
        train(_config(learning_rate=1e30, warmup=0, decay="constant", checkpoint_every=1), tmp_path / "run")
    weights = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["weights"]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_numbers_of_segments_and_learning_rates_are_functions_of_the_step() -> None:
    config = _config(segments=4, steps=60, curriculum="grow", warmup=10, learning_rate=1.0)
    grow = config.make_curriculum()
    assert [grow(step) for step in (0, 9, 10, 20, 30, 59)] == [1, 1, 2, 3, 4, 4]
    assert config.settled == 30
    assert [config.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.rate(10) == 1.0
    assert config.rate(35) == pytest.approx(0.05 + 0.95 / 2)
    assert config.rate(59) < 0.06
    drawn = replace(config, curriculum="random").make_curriculum()
    assert {drawn(step) for step in range(60)} == {1, 2, 3, 4}
    bound = replace(config, curriculum="random-grow").make_curriculum()
    assert all(bound(step) <= grow(step) for step in range(60))
    stages = replace(config, curriculum="0:2,5:4")
    assert [stages.make_curriculum()(step) for step in (0, 4, 5)] == [2, 2, 4]
    assert stages.settled == 5
    # From the fewest segments that hold a sample.
    assert configure("copy", size="quick", length=12, tokens=10, segments=6, evaluate=(6,)).fewest == 4


# -- evaluation --------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Knows what comes, but for every ``wrong``-th row."""

    def __init__(self, causal: bool, wrong: int = 0) -> None:
        super().__init__()
        self.causal, self.wrong = causal, wrong
        self.config = _Tokens()
        self.weight = nn.Parameter(torch.zeros(1))
        self.carried: list[bool] = []

    def forward(self, ids: Tensor, *, outputs: str, carry: bool) -> RecurrentOutput:
        self.carried.append(carry)
        assert outputs == "logits"
        assert not self.training
        truth = torch.cat([ids[:, 1:], ids[:, :1]], dim=1) if self.causal else ids
        logits = 10.0 * nn.functional.one_hot(truth, 22)
        if self.wrong:
            logits[:, :: self.wrong] = -logits[:, :: self.wrong]
        return RecurrentOutput(None, ids, logits)


class _Tokens:
    tokens = 8


def test_evaluation_counts_what_is_right() -> None:
    task = make_task("copy", length=3)
    model: Any = Oracle(causal=True)
    model.train()
    state = torch.get_rng_state()
    found = evaluate(model, task, 3, 2, batch=5)
    assert (found.token, found.answer, found.samples) == (1.0, 1.0, 10)
    assert found.loss == pytest.approx(math.log(1 + 21 * math.exp(-10)), rel=1e-6)
    assert found.bits == pytest.approx(found.loss / math.log(2))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not evaluate(model, task, 3, 1, carry=False).carry
    assert model.carried == [True, True, False]
    # Rows 21, 22 and 23 of 24 hold the answer; rows 20, 21 and 22 predict it.
    wrong: Any = Oracle(causal=True, wrong=10)
    partly = evaluate(wrong, task, 3, 2)
    assert partly.token == pytest.approx(2 / 3)
    assert partly.answer == 0.0
    blind: Any = Oracle(causal=False)
    assert evaluate(blind, task, 3, 2).token == 0.0, "it sees placeholders alone"
    with pytest.raises(ValueError, match="batches must be at least 1"):
        evaluate(model, task, 3, 0)


def test_accuracy_is_told_by_whole_answers_or_tokens() -> None:
    found = Evaluation(2, True, token=0.5, answer=0.25, loss=1.0, samples=4)
    assert found.accuracy(make_task("copy")) == 0.25
    assert found.accuracy(make_task("text")) == 0.5
    result = train(_config(steps=1))
    with pytest.raises(ValueError, match=r"evaluated at \[\(2, True\)"):
        result.accuracy(7)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_what_was_saved(tmp_path: Path) -> None:
    content = {
        "a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "e": torch.empty(0),
        "c": {"d": [1, 2.5, None, True, "x"], 3: torch.tensor(7)}, "f": torch.randn(4, 6).T,
        "g": (torch.zeros(2, dtype=torch.bool),),
    }  # fmt: skip
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, content)
    assert _same(load_checkpoint(path), content)
    with pytest.raises(TypeError, match="tensors and plain values, got PosixPath"):
        save_checkpoint(path, {"a": path})
    assert _same(load_checkpoint(path), content), "the one before stays"


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    content = {"weights": {"w": torch.randn(64)}, "step": 3}
    save_checkpoint(path, content)
    raw = path.read_bytes()
    for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(raw), (300,), generator=generator).tolist():
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :])
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert _same(found, content), f"byte {place}"
    assert refused > 100
    weights = raw.index(content["weights"]["w"].numpy().tobytes())  # type: ignore[index]
    path.write_bytes(raw[:weights] + bytes([raw[weights] ^ 1]) + raw[weights + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    path, sprung = tmp_path / "checkpoint.pt", tmp_path / "sprung"
    pickle.loads(pickle.dumps(_Trap(sprung)))
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    whole = {"format": FORMAT, "version": 1, "content": {"weights": _Trap(sprung)}, "digest": ""}
    torch.save(whole, path)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(whole, protocol=2))
    with pytest.raises(CheckpointError, match=r"refused|damaged"):
        load_checkpoint(path)
    assert not sprung.exists()


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(path)
    for foreign in ({"weights": torch.zeros(1)}, torch.zeros(3), {"format": "other"}):
        torch.save(foreign, path)
        with pytest.raises(CheckpointError, match="no checkpoint of rmt_kernels"):
            load_checkpoint(path)
    torch.save({"format": FORMAT, "version": 2, "content": {}, "digest": ""}, path)
    with pytest.raises(CheckpointError, match="of version 2; this rmt_kernels reads version 1"):
        load_checkpoint(path)
    torch.save({"format": FORMAT, "version": 1, "content": {"step": 1}, "digest": "0" * 64}, path)
    with pytest.raises(CheckpointError, match="its content is not what was saved"):
        load_checkpoint(path)


def test_a_run_is_read_back(whole: Path) -> None:
    before = torch.get_rng_state()
    config, model = load_run(whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert config == _config()
    assert not model.training
    assert _same(dict(model.state_dict()), load_checkpoint(whole / "checkpoint.pt")["weights"])
    summary = json.loads((whole / "summary.json").read_text())
    found = evaluate(model, config.make_task(), 3, 2, batch=config.batch)
    assert found.to_dict() in summary["evaluations"]


def test_weights_of_another_version_are_refused(whole: Path, tmp_path: Path) -> None:
    content = load_checkpoint(whole / "checkpoint.pt")
    name = next(iter(content["weights"]))
    content["weights"]["renamed"] = content["weights"].pop(name)
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    with pytest.raises(CheckpointError, match=r"(?s)of another version of the model: .*renamed"):
        load_run(tmp_path)


# -- the directory -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match=r"model_options\.width: 16, not 32; steps: 12, not 13 \(stored, not asked"
    ):
        train(_config(width=32, steps=13), whole, resume=True)
    out = tmp_path / "run"
    train(_config(seed=3, steps=1), out)
    (out / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: of another run: .*seed: 0, not 3"):
        train(_config(seed=3, steps=1), out, resume=True)
    # The same config, but other data: another Python.
    config = configure("remember", "rmt", "quick", steps=1, threads=1, evaluate=())
    train(config, tmp_path / "facts")
    monkeypatch.setattr(TASKS["remember"], "fingerprint", lambda self: "0" * 16)
    with pytest.raises(CheckpointError, match=r"task\.data: '[0-9a-f]{16}', not '0{16}'"):
        train(config, tmp_path / "facts", resume=True)


def test_directories_are_never_overwritten_unasked(tmp_path: Path) -> None:
    config, out = _config(steps=1, evaluate=()), tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(config, out, resume=True)
    assert not out.exists()
    out.mkdir()  # an empty one is as good as none
    train(config, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="exists already; --resume goes on with it, --overwrite replaces it"):
        train(config, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"it also holds notes\.txt; remove it yourself"):
        train(config, out, overwrite=True)
    (out / "notes.txt").unlink()
    train(replace(config, seed=4), out, overwrite=True)
    assert load_checkpoint(out / "checkpoint.pt")["config"]["seed"] == 4
    with pytest.raises(ValueError, match="give one of them"):
        train(config, out, overwrite=True, resume=True)
    with pytest.raises(ValueError, match="need out="):
        train(config, resume=True)


@pytest.mark.parametrize("name", ["run.json", "thesis.tex"])
def test_directories_of_others_are_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"format": "of another program"}')
    (tmp_path / "checkpoint.pt").write_text("precious")
    ways: list[dict[str, Any]] = [{}, {"overwrite": True}, {"resume": True}]
    for asked in ways:
        with pytest.raises((FileExistsError, FileNotFoundError, CheckpointError)):
            train(_config(steps=1), tmp_path, **asked)
    assert (tmp_path / "checkpoint.pt").read_text() == "precious"
    file = tmp_path / name
    with pytest.raises(FileExistsError, match="is a file"):
        train(_config(steps=1), file, overwrite=True)


def test_a_damaged_or_newer_marker_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(_config(steps=1, evaluate=()), out)
    marker = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(marker | {"version": 9}))
    with pytest.raises(CheckpointError, match="of version 9; this rmt_kernels reads version 1"):
        train(_config(steps=1, evaluate=()), out, resume=True)
    (out / "run.json").write_text(json.dumps(marker)[:40])
    with pytest.raises(CheckpointError, match="damaged, or not written by"):
        train(_config(steps=1, evaluate=()), out, resume=True)


# -- configs and the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "paper", "quick"])
def test_recipes_are_accepted_by_every_model(size: str) -> None:
    assert set(RECIPES) == set(TASKS)
    for task in TASKS:
        for model in MODELS:
            config = configure(task, model, size)
            assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    torch.manual_seed(0)
    for model in MODELS:
        with torch.device("meta"):
            trainer.make_model(configure("copy", model, size))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": "sort"}, ValueError, r"task must be one of \['copy', 'reverse'"),
        ({"model": "lstm"}, ValueError, r"model must be one of \['none', 'rmt'"),
        ({"size": "huge"}, ValueError, "size must be one of"),
        ({"depth": 3}, ValueError, "depth: no option of the task 'copy', a model or a run"),
        ({"pairs": 3}, ValueError, "pairs: no option of the task 'copy'"),
        ({"tokens": 8}, ValueError, "1 segment of 8 tokens can't hold copy"),
        ({"tokens": 12, "curriculum": "constant", "evaluate": (1,)}, ValueError, "use at least 13 tokens"),
        ({"evaluate": (0,)}, ValueError, "evaluate must be at least 1"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be finite and above 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number"),
        ({"until": 2}, ValueError, "until must be an accuracy"),
        ({"decay": "linear"}, ValueError, "decay must be 'cosine' or 'constant'"),
        ({"curriculum": "fast"}, ValueError, r"curriculum must be one of \['constant', .* or stages such as"),
        ({"curriculum": "0:1,3:9"}, ValueError, "goes beyond segments=5"),
        ({"curriculum": "5:1"}, ValueError, "the first at step 0"),
        ({"cut": 1}, TypeError, "cut must be True or False"),
    ],
)
def test_configs_that_are_not_accepted(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        configure(**({"task": "copy", "model": "rmt"} | options))


def test_configs_that_a_model_cannot_have(tmp_path: Path) -> None:
    for options, words in (
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"memory": 0}, "memory must be at least 1 for rmt"),
        ({"cache": 4}, "cache: rmt has no use for it"),
        ({"device": "abacus"}, "device must be such as"),
    ):
        with pytest.raises(ValueError, match=words):
            train(_config(**options), tmp_path / "run")
    with pytest.raises(ValueError, match="come from the task and tokens="):
        TrainConfig(model_options={"vocabulary": 3})
    with pytest.raises(ValueError, match=r"unknown fields \['speed'\]"):
        TrainConfig.from_dict({"speed": 3})
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA GPU here"):
        train(_config(device="cuda"))


def test_the_command_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--task", "reverse", "--model", "none", "--quick", "--seed", "3", "--threads", "1"]
    assert cli.main([*arguments, "--evaluate", "1", "2", "--steps", "6"]) == 0
    out = tmp_path / "runs" / "reverse-none-3"
    assert {path.name for path in out.iterdir()} == {
        "run.json", "log.jsonl", "checkpoint.pt", "summary.json", "curve.png",
    }  # fmt: skip
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert [found["segments"] for found in summary["evaluations"]] == [1, 2]
    steps = [line["step"] for line in _lines(out) if line["kind"] == "train"]
    assert steps == [2, 4, 6]
    said = capsys.readouterr()
    assert "reverse, none" in said.out
    assert "answers are inputs too" in said.out
    assert "step 6:" in said.out
    # Again: only where that is asked for.
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(out), "--resume", "--quiet", "--no-picture", "--task", "reverse"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["train", "--out", str(out), "--resume", "--width", "99", "--task", "copy"]) == 2
    assert "width: 16, not 99; task: 'reverse', not 'copy'" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(out), "--resume", "--quick"]) == 2
    assert "leave them out with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "sort"], "task must be one of ['copy'"),
        (["--model", "lstm"], "model must be one of ['none'"),
        (["--size", "huge"], "size must be one of"),
        (["--quick", "--tokens", "4"], "can't hold copy"),
        (["--quick", "--heads", "3"], "width must be a multiple of heads"),
        (["--quick", "--memory", "0"], "memory must be at least 1 for rmt"),
        (["--resume"], "there is no run to resume"),
        (["--quick", "--pairs", "3"], "pairs: no option of the task 'copy'"),
    ],
)
def test_the_command_tells_what_is_wrong(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--no-picture", "--quiet", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize(
    ("text", "found"), [("full", "full"), ("3", 3), ("replay", Replay()), ("replay:2", Replay(truncate=2))]
)
def test_the_command_takes_every_way_back(text: str, found: Any, tmp_path: Path) -> None:
    arguments = [
        "train",
        "--quick",
        "--steps",
        "1",
        "--no-picture",
        "--quiet",
        "--bptt",
        text,
        "--out",
        str(tmp_path / "a"),
    ]
    assert cli.main(arguments) == 0
    assert load_run(tmp_path / "a")[1].config.bptt == found
    for wrong in ("0", "some", "replay:x"):
        with pytest.raises(SystemExit):
            cli.main(["train", "--bptt", wrong])


@pytest.mark.parametrize(("module", "flag"), [("matplotlib.figure", "--no-picture"), ("tqdm.auto", "--quiet")])
def test_what_is_not_installed_is_told_before_training(
    module: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "run"
    arguments = ["train", "--quick", "--steps", "1", "--evaluate", "2", "--out", str(out)]
    assert cli.main(arguments) == 2
    assert f"pip install {module.split('.')[0]}" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*arguments, flag, "--no-picture"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["copy", "associative"])
def test_recipes_learn_to_remember(task: str) -> None:
    result = train(configure(task, "rmt", threads=1))
    assert result.accuracy(4) >= 0.99
    assert result.accuracy(8) >= 0.95
    cut = [found for found in result.evaluations if not found.carry and found.segments > 1]
    assert cut
    assert all(found.token < result.chance.token + 0.03 for found in cut)
