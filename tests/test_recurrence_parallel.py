"""The recurrence under DistributedDataParallel and FSDP2: two processes find what one finds from both their batches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rmt_kernels import Replay, replay_step
from rmt_kernels.backends import cpu
from tests import parallel_worker as worker
from tests.parallel_worker import DRIVER, ENGINE, GATHERED, GROUPS, SEGMENTS, Ranks, Way

KINDS = ["ddp", "fsdp2"]
EXACT = 1e-10


def only(kind: str, *ways: Way) -> list[Way]:
    """Those of the ways that this kind of wrapper has."""
    return [way for way in ways if kind == "fsdp2" or not way.gathered]


def check(found: list[list[dict[str, float]]], ways: list[Way], tolerance: float) -> None:
    for rank, errors in enumerate(found):
        for i, error in enumerate(errors):
            worst = max(error, key=lambda name: error[name])
            assert error[worst] <= tolerance, f"rank {rank}, step {i} of {ways}: {worst} {error[worst]:.1e}"


# -- gradients ---------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked head": {"rows": 3},
    "loss of the last segment": {"weights": "last"},
    "padded": {"padded": True},
    "memory given": {"memory": True},
    "all of it": {"weights": "last", "padded": True, "memory": True, "rows": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(ranks: Ranks, kind: str, variant: str) -> None:
    ways = only(kind, ENGINE, Way(Replay(keep=2)), DRIVER, Way(Replay(keep=2), driver=True), GATHERED)
    if variant == "whole":
        ways += only(
            kind, Way("full"), Way(Replay(keep=0)), Way(Replay(keep=0), driver=True), DRIVER,
            Way(Replay(keep=SEGMENTS), driver=True), Way(Replay(keep=3), driver=True, gathered=True),
        )  # fmt: skip
    check(ranks.run(worker.errors, kind, ways, **VARIANTS[variant]), ways, EXACT)


@pytest.mark.parametrize("variant", ["whole", "loss of the last segment", "all of it"])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_gradients_are_those_of_one_process(ranks: Ranks, kind: str, variant: str) -> None:
    cut = Replay(truncate=2)
    ways = only(
        kind, Way(2), Way(cut), Way(Replay(truncate=2, keep=3)), Way(cut, driver=True),
        Way(Replay(truncate=2, keep=3), driver=True), Way(cut, driver=True, gathered=True),
    )  # fmt: skip
    options = dict(VARIANTS[variant])
    check(ranks.run(worker.errors, kind, ways, reference=2, **options), ways, EXACT)


@pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_the_attention_kept(ranks: Ranks, kind: str) -> None:
    kept = Replay(recompute="except_attention")
    ways = only(
        kind, Way("full"), Way(kept), Way(kept, driver=True), Way(kept, driver=True, gathered=True),
        Way(Replay(recompute="except_attention", keep=0, truncate=None), driver=True),
    )  # fmt: skip
    # float32: the reference, which alone takes float64, has no kernel whose results could be kept.
    for padded in (False, True):
        check(ranks.run(worker.errors, kind, ways, dtype=torch.float32, padded=padded), ways, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_measured_in_a_wrapped_model(ranks: Ranks, kind: str) -> None:
    ways = only(kind, *(Way(Replay(budget_bytes=10**6), *way) for way in ((), (True,), (True, True))))
    check(ranks.run(worker.errors, kind, ways, steps=2), ways, EXACT)


def test_unused_parameters_are_found(ranks: Ranks) -> None:
    ways = [Way("full"), ENGINE, DRIVER]
    check(ranks.run(worker.errors, "ddp", ways, steps=2, find_unused_parameters=True), ways, EXACT)


def test_a_static_graph_serves_the_checkpoints(ranks: Ranks) -> None:
    check(ranks.run(worker.errors, "ddp", [ENGINE], steps=3, static_graph=True), [ENGINE], EXACT)


@pytest.mark.parametrize("fail", [False, True], ids=["", "with a failure between"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_accumulated_samples_equal_a_batch_of_two(ranks: Ranks, kind: str, fail: bool) -> None:
    for way in only(kind, *([] if fail else [ENGINE]), DRIVER, Way(Replay(keep=0), driver=True), GATHERED):
        found = ranks.run(worker.accumulated, kind, way, fail)
        assert max(found) <= EXACT, f"{way}: {found}"


# -- narrow types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_scaler_under_autocast(ranks: Ranks, kind: str, narrow: torch.dtype) -> None:
    ways = only(kind, ENGINE, DRIVER, GATHERED)
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 8e-3}[narrow]
    for errors in ranks.run(worker.scaled, kind, narrow, ways):
        for way, error in zip(ways, errors, strict=True):
            assert error["exact"] <= tolerance, way
            # Scaling by a power of two is exact but for numbers too small for float16.
            assert error["unscaled"] <= (1e-6 if narrow is torch.bfloat16 else tolerance), way
            assert error["first"] <= 1e-5, f"{way} is not scaler.scale(loss).backward()"
            assert error["update"] <= 1e-4, way
            assert narrow is torch.bfloat16 or error["overflow skipped"], way


def test_mixed_precision_of_fsdp2(ranks: Ranks) -> None:
    ways = [Way("full"), ENGINE, DRIVER, GATHERED, Way(Replay(keep=0), driver=True)]
    for errors in ranks.run(worker.mixed, ways):
        for way, error in zip(ways, errors, strict=True):
            assert error["gradients"] <= 5e-2, way
            assert error["loss"] == pytest.approx(errors[0]["loss"], abs=1e-5), f"{way}: not the loss of {ways[0]}"


# -- communication -----------------------------------------------------------------------------------------------------


def test_fsdp2_gathers_and_averages(ranks: Ranks) -> None:
    full, engine, driver, gathered = ranks.run(worker.traffic, "fsdp2", [Way("full"), ENGINE, DRIVER, GATHERED])[0]
    assert {way["averaged"] for way in (full, engine, driver, gathered)} == {GROUPS}
    assert gathered["gathered"] == GROUPS
    # Each block of each segment: forward and backward; the driver also recomputes. The root stays whole.
    assert full["gathered"] == engine["gathered"] == 2 * (GROUPS - 1) * SEGMENTS + 1
    assert engine["gathered"] < driver["gathered"] <= 3 * GROUPS * SEGMENTS


def test_ddp_averages_each_bucket_once(ranks: Ranks) -> None:
    full, engine, driver = ranks.run(worker.traffic, "ddp", [Way("full"), ENGINE, DRIVER], bucket_cap_mb=0.002)[0]
    assert full["averaged"] > 3
    assert full == engine == driver


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_used_on(ranks: Ranks, kind: str) -> None:
    for found in ranks.run(worker.used_on, kind, only(kind, ENGINE, GATHERED, DRIVER, GATHERED)):
        for state in found:
            assert state["loss"] < EXACT
            assert state["memory"] < EXACT
            assert kind == "ddp" or not state["whole"], "parameters left unsharded after the step"


# -- failures and refusals ---------------------------------------------------------------------------------------------


def skip_where_fsdp2_stays_broken(kind: str) -> None:
    if kind == "fsdp2" and not hasattr(FSDPModule, "reset_iter_state"):
        pytest.skip("this PyTorch can't reset FSDP2 after an error")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_forward_pass_changes_nothing(ranks: Ranks, kind: str) -> None:
    skip_where_fsdp2_stays_broken(kind)
    # After an error in model(...) itself, FSDP2 has to be told: model.reset_iter_state().
    for way in [ENGINE, DRIVER] if kind == "ddp" else [DRIVER, GATHERED]:
        for found in ranks.run(worker.recovery, kind, way, 3):
            assert found["raised"] == "OnPurposeError"
            assert found["gradients kept"]
            assert found["random state kept"]
            assert found["next"] <= EXACT
            assert found["next but one"] <= EXACT


@pytest.mark.parametrize("where", ["recomputing", "going back"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_sweep_leaves_the_wrapper_usable(ranks: Ranks, kind: str, where: str) -> None:
    skip_where_fsdp2_stays_broken(kind)
    backward = where == "going back"
    # A reduction that was cut short is the end of DistributedDataParallel; see the next test.
    failures = (2, SEGMENTS - int(kind == "ddp")) if backward else (SEGMENTS + 2, 2 * SEGMENTS - 1)
    for way in only(kind, DRIVER, GATHERED):
        for call in failures:
            for found in ranks.run(worker.recovery, kind, way, call, backward):
                assert (found["raised"], found["cause"]) == ("ReplayError", "OnPurposeError")
                assert found["random state kept"]
                assert found["next"] <= EXACT
                assert found["next but one"] <= EXACT


def test_ddp_tells_of_a_failed_reduction(ranks: Ranks) -> None:
    for found in ranks.run(worker.recovery, "ddp", DRIVER, SEGMENTS, backward=True):
        assert found["raised"] == "ReplayError"
        assert "finished reduction in the prior iteration" in found["next"]


@pytest.mark.parametrize(("what", "way", "reason"), [
    ("static graph", DRIVER, r"ValueError: model: .*static_graph=True.*bptt=Replay\(\)"),
    ("ddp", GATHERED, "ValueError: gathered=True is for fully_shard"),
    ("sharded head", Way("full"), "ValueError: head: .*sharded"),
    ("sharded head", DRIVER, "head: .*sharded"),
    ("labels", DRIVER, "TypeError: labels must be int64"),
    ("labels", GATHERED, "TypeError: labels must be int64"),
])  # fmt: skip
def test_what_can_not_work_is_refused(ranks: Ranks, what: str, way: Way, reason: str) -> None:
    for found in ranks.run(worker.refusal, what, way):
        assert "gradients in" not in found
        assert re.search(reason, found), found


@pytest.mark.parametrize("way", [Way("full"), ENGINE, DRIVER], ids=["full", "engine", "driver"])
@pytest.mark.parametrize("what", ["fsdp2 of the blocks", "fsdp2 of the backbone", "ddp of the backbone"])
def test_a_wrapper_around_a_part_is_refused(ranks: Ranks, what: str, way: Way) -> None:
    for found in ranks.run(worker.refusal, what, way):
        assert found.startswith("ValueError")
        assert "backbone" in found
        assert "RecurrentMemory" in found
        assert "initial_memory" in found


# -- autocast, in one process ------------------------------------------------------------------------------------------


def bf16_errors(segments: int) -> dict[str, float]:
    """Relative errors of all gradients together, against float64: of full BPTT, and of the driver."""
    inputs = torch.randint(worker.CLASSES, (4, segments * worker.SEGMENT), generator=torch.Generator().manual_seed(1))

    def grads(dtype: torch.dtype, policy: Any) -> Tensor:
        model = worker.make(dtype=dtype, dropout=0.0, bptt=policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            if isinstance(policy, Replay):
                replay_step(model, inputs, labels=inputs)
            else:
                out = model(inputs, labels=inputs)
        if not isinstance(policy, Replay):
            out.loss.backward()
        return torch.cat([grad.double().flatten() for grad in worker.gradients(model).values()])

    exact = grads(torch.float64, "full")
    found = {name: grads(torch.float32, policy) for name, policy in {"full": "full", "driver": Replay()}.items()}
    return {name: float((grad - exact).norm() / exact.norm()) for name, grad in found.items()}


@pytest.mark.parametrize("segments", [4, pytest.param(512, marks=pytest.mark.slow)])
def test_autocast_error_of_the_driver(segments: int) -> None:
    errors = bf16_errors(segments)
    assert 1e-4 < errors["full"] < 2e-2, "full BPTT was not run in bfloat16 with steady weights"
    assert errors["driver"] <= 1.2 * errors["full"]
