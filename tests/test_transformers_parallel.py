"""RMT around models of transformers under DistributedDataParallel and FSDP2: two processes find what one finds."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from rmt_kernels import Replay
from tests import transformers_worker as worker
from tests.families import OLD
from tests.parallel_worker import Ranks

EXACT = 1e-5


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bptt", ["full", 2, Replay(), Replay(keep=2)], ids=["full", "truncated", "replay", "keep 2"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(
    ranks: Ranks, wrapper: str, name: str, bptt: Any, checkpointing: bool
) -> None:
    check(ranks, wrapper, name, "causal", bptt, checkpointing)


@pytest.mark.skipif(OLD, reason="encoders of transformers 4 are not on the attention interface")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_classifier_too(ranks: Ranks, wrapper: str) -> None:
    check(ranks, wrapper, "bert", "classes", "full", False)


def check(ranks: Ranks, *task: Any) -> None:
    for rank, errors in enumerate(ranks.run(worker.errors, *task)):
        assert len(errors) > 10
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= EXACT, f"rank {rank}: {worst} {errors[worst]:.1e}"
