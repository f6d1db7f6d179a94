"""The language-model run, at a size that takes a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import language_model
from benchmarks.language_model import Config, RecurrentLM, naive_attention, our_attention, text, train

TINY = Config(steps=12, batch=2, segments=3, tokens=48, memory=5, width=32, heads=2, layers=2, turn=4)


def test_the_text_is_english_and_long_enough() -> None:
    data = text()
    assert len(data) > 300_000
    assert 0 <= int(data.min()) <= int(data.max()) < 256
    assert "assert statement" in bytes(data[:1000].tolist()).decode().lower().replace('"', "")


@pytest.mark.parametrize("backend", ["auto", "stock", "reference"])
def test_loss_falls_and_the_curves_coincide(backend: str) -> None:
    result = train(TINY, backend, progress=False)
    naive, ours = result["naive"]["losses"], result["ours"]["losses"]
    assert len(naive) == len(ours) == TINY.steps == result["steps"]
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(a - b) for a, b in zip(naive, ours, strict=True)) == result["max_loss_difference"] < 4e-6
    assert result["ours"]["tokens_per_second"] > 0
    assert result["config"]["tokens"] == TINY.tokens


def test_a_run_stops_when_its_time_is_over() -> None:
    result = train(replace(TINY, seconds=0.0), progress=False)
    assert result["steps"] == len(result["ours"]["losses"]) == TINY.turn


def test_memory_carries_text_and_gradients_across_segments() -> None:
    torch.manual_seed(0)
    model = RecurrentLM(TINY, our_attention(TINY.layout)).double()
    for block in model.blocks:
        block.attend = our_attention(TINY.layout, "reference")  # type: ignore[assignment]
    sample = text()[: TINY.segments * TINY.tokens + 1].repeat(2, 1)
    sample[1, 3] = (sample[1, 3] + 1) % 256  # only the first segment differs
    losses = model(sample)
    assert losses.shape == (2, TINY.segments, TINY.tokens)
    assert not torch.equal(losses[0, -1], losses[1, -1])
    alone = model(sample, keep_memory=False)
    torch.testing.assert_close(alone[0, 1:], alone[1, 1:], rtol=0, atol=0)
    torch.testing.assert_close(alone[:, 0], losses[:, 0])

    # The last segment's loss reaches the embedding of a byte that the first segment alone holds.
    sample = sample % 128
    sample[:, 3] = 255
    model(sample)[:, -1].sum().backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad[255].abs().sum() > 0


def test_a_token_sees_no_later_one() -> None:
    model = RecurrentLM(TINY, naive_attention(TINY.layout))
    sample = text()[: TINY.segments * TINY.tokens + 1][None]
    changed = sample.clone()
    changed[0, 60:-1] = 65
    torch.testing.assert_close(model(sample)[0].flatten()[:59], model(changed)[0].flatten()[:59])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(language_model, "QUICK", replace(TINY, steps=3))
    language_model.main(["--quick", "--out", str(tmp_path / "new")])
    result = json.loads((tmp_path / "new" / "language_model.json").read_text())
    described = {"config", "device", "versions", "commit", "date", "command"}
    assert {"naive", "ours", "steps", "max_loss_difference"} | described <= set(result)
    assert (tmp_path / "new" / "language_model.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert f"{result['ours']['tokens_per_second']:,.0f}" in shown
