"""What each of two processes measures of RMT around a model; the tests are in ``test_transformers_parallel.py``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rmt_kernels.integrations.transformers import RMTForCausalLM, RMTForSequenceClassification
from tests.families import make
from tests.parallel_worker import WORLD

__all__ = ["errors"]

M, T, LENGTH, BATCH = 3, 8, 21, 2  # LENGTH tokens of a process's BATCH samples, in segments of T


def model_of(name: str, kind: str, **fields: Any) -> Any:
    """Always the same weights."""
    made: Any = RMTForCausalLM if kind == "causal" else RMTForSequenceClassification
    torch.manual_seed(0)
    return made.from_base(make(name, "causal" if kind == "causal" else "base"), memory=M, segment=T, **fields).train()


def sample(rank: int, kind: str) -> dict[str, Tensor]:
    """A rank's share of the batch; one text of each is shorter."""
    generator = torch.Generator().manual_seed(7 + rank)
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    if kind == "causal":
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (BATCH,), generator=generator)}


def spread(wrapper: str, model: Any) -> Any:
    """In DistributedDataParallel; or sharded, each layer of the base model and then the whole."""
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def errors(wrapper: str, name: str, kind: str, bptt: Any, checkpointing: bool) -> dict[str, float]:
    """The largest difference of each gradient, after two steps of plain descent, to those of one process that has the
    samples of all; and of the loss, under ``""``."""
    rank = torch.distributed.get_rank()
    model = model_of(name, kind, bptt=bptt)
    alone = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    many = spread(wrapper, model)
    found: dict[str, float] = {}
    for _ in range(2):
        many.zero_grad()
        alone.zero_grad()
        loss = many(**sample(rank, kind)).loss
        loss.backward()
        wanted = [alone(**sample(other, kind)).loss for other in range(WORLD)]
        (sum(wanted) / WORLD).backward()
        found[""] = max(found.get("", 0.0), float((loss - wanted[rank]).abs()))
        names = dict(many.named_parameters())
        with torch.no_grad():
            for key, parameter in alone.named_parameters():
                mine = names.get(key, names.get(f"module.{key}"))
                assert mine is not None, key
                if parameter.grad is None:
                    assert mine.grad is None, key
                    continue
                whole = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
                assert whole is not None, key
                found[key] = max(found.get(key, 0.0), float((whole - parameter.grad).abs().max()))
                parameter -= 0.1 * parameter.grad
                mine -= 0.1 * mine.grad
    return found
