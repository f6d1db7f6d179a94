"""Two processes that train one small model on the CPU, and what each of them measures of it.

The tests are in ``test_recurrence_parallel.py``; what is here runs in the processes. They are started once and given
one task after another, since importing PyTorch takes seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rmt_kernels import RecurrentMemory, Replay, ReplayError, replay_step, segment_attention
from rmt_kernels.recurrence import TokenLoss

__all__ = ["WORLD", "Ranks", "Way"]

WORLD = 2  # processes
BATCH, LENGTH, SEGMENT, MEMORY, WIDTH, CLASSES = 2, 14, 4, 3, 16, 11  # of a process; the last segment is short
SEGMENTS = -(-LENGTH // SEGMENT)
GROUPS = 3  # of FSDP2's parameters: two blocks, and the root with all the rest

Gradients = dict[str, Tensor]


# -- the processes -----------------------------------------------------------------------------------------------------


class Ranks:
    """The processes, started when first needed and again after one of them has failed or hung."""

    def __init__(self) -> None:
        self._running: list[tuple[Any, Any]] = []  # (process, its connection)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, task: Callable[..., Any], *arguments: Any, seconds: float = 60.0, **keywords: Any) -> list[Any]:
        """``task(*arguments, **keywords)`` in every process at once: what each returns, by rank.

        Raises:
            AssertionError: one of them raised, ended, or took longer than ``seconds``.
        """
        if not self._running:
            self._start()
        for pipe in self._pipes():
            pipe.send((task, arguments, keywords))
        found: dict[int, Any] = {}
        end = time.monotonic() + seconds
        try:
            while len(found) < WORLD:
                waiting: dict[Any, int] = {
                    pipe: rank for rank, (_, pipe) in enumerate(self._running) if rank not in found
                }
                ready: list[Any] = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
                assert ready, f"ranks {sorted(waiting.values())} hung: nothing from them in {seconds:.0f} s"
                for pipe in ready:
                    fine, value = pipe.recv()
                    assert fine, f"rank {waiting[pipe]}:\n{value}"
                    found[waiting[pipe]] = value
        except EOFError:
            self.stop()
            raise AssertionError("a process ended without an answer") from None
        except BaseException:
            self.stop()
            raise
        return [found[rank] for rank in range(WORLD)]

    def _pipes(self) -> list[Any]:
        return [pipe for _, pipe in self._running]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = get_context("spawn")
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, f"{self._folder.name}/store", there), daemon=True)
            with patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
                process.start()
            there.close()
            self._running.append((process, here))

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in self._running:
            pipe.close()
            process.kill()
            process.join()
        self._running.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    while True:
        try:
            task, arguments, keywords = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone; gloo's threads do not survive Python's own way out
        try:
            torch.manual_seed(0)
            pipe.send((True, task(*arguments, **keywords)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


# -- the model ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer layer with dropout on the attention and after it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor, layout: Any, token_lengths: Tensor | None) -> Tensor:
        """(batch, rows, width) to the same."""
        packed = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = segment_attention(query, key, value, layout, token_lengths=token_lengths, dropout_p=dropout)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), dropout)
        return x + torch.tanh(self.mlp(x))


class Backbone(nn.Module):
    """Two blocks; ``spare`` is a parameter that nothing uses."""

    def __init__(self, dropout: float, spare: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.spare = nn.Parameter(torch.ones(3)) if spare else None

    def forward(self, x: Tensor, *, layout: Any, token_lengths: Tensor | None = None) -> Tensor:
        """(batch, rows, width) to the same."""
        for block in self.blocks:
            x = block(x, layout, token_lengths)
        return self.norm(x)  # type: ignore[no-any-return]


def make(
    *, bptt: Any = "full", dtype: torch.dtype = torch.float64, weights: str = "tokens", rows: int | None = None,
    dropout: float = 0.1, spare: bool = False,
) -> RecurrentMemory:  # fmt: skip
    """The model; always the same weights."""
    torch.manual_seed(0)
    return RecurrentMemory(
        Backbone(dropout, spare), memory=MEMORY, segment=SEGMENT, bptt=bptt, embed=nn.Embedding(CLASSES, WIDTH),
        head=nn.Linear(WIDTH, CLASSES), loss=TokenLoss(weights=weights, rows=rows),
    ).to(dtype)  # fmt: skip


def wrapped(kind: str, model: RecurrentMemory, **options: Any) -> Any:
    """``model`` in DistributedDataParallel, or sharded: each block, then the whole as the root."""
    if kind == "ddp":
        return DistributedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def inner(model: Any) -> RecurrentMemory:
    """What a wrapper holds."""
    found: RecurrentMemory = model.module if isinstance(model, DistributedDataParallel) else model
    return found


def arguments(rank: int, dtype: torch.dtype = torch.float64, *, padded: bool = False, memory: bool = False) -> Any:
    """A rank's share of the batch, as keywords."""
    generator = torch.Generator().manual_seed(7 + rank)
    inputs = torch.randint(CLASSES, (BATCH, LENGTH), generator=generator)
    found: dict[str, Any] = {"inputs": inputs, "labels": inputs}
    if padded:
        found["lengths"] = torch.tensor([[LENGTH, 7], [3, 10]][rank])
    if memory:
        drawn = torch.randn(BATCH, MEMORY, WIDTH, generator=generator, dtype=torch.float64)
        found["memory"] = drawn.to(dtype).requires_grad_()
    return found


def gradients(model: Any) -> Gradients:
    """All parameters' gradients, whole, by name; zeros where there is none."""
    found = {}
    for name, parameter in inner(model).named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name] = whole.detach().clone()
    return found


def relative(found: Gradients, wanted: Gradients) -> float:
    """The largest difference, relative to that parameter's largest gradient."""
    assert found.keys() == wanted.keys()
    # Some gradients, such as that of the keys' bias, are zero but for rounding.
    floor = 1e-3 * max(float(grad.abs().max()) for grad in wanted.values())
    return max(
        float((found[name].double() - wanted[name].double()).abs().max()) / max(float(wanted[name].abs().max()), floor)
        for name in wanted
    )


def seed(rank: int) -> None:
    """Each process draws its own numbers."""
    torch.manual_seed(1000 + rank)


# -- gradients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a step is made: the policy, and whether by the driver."""

    policy: Any
    driver: bool = False
    gathered: bool = False

    def step(self, model: Any, call: dict[str, Any], scaler: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Forward and backward; returns loss and memory."""
        if self.driver:
            out = replay_step(model, **call, policy=self.policy, gathered=self.gathered, scaler=scaler, **options)
        else:
            inner(model).bptt = self.policy
            out = model(**call)
            (out.loss if scaler is None else scaler.scale(out.loss)).backward()
        assert out.loss is not None
        return out.loss.detach(), out.memory.detach()


ENGINE, DRIVER, GATHERED = Way(Replay()), Way(Replay(), driver=True), Way(Replay(), driver=True, gathered=True)


@dataclass(frozen=True)
class Truth:
    """Back-propagation through both halves of the batch in one process: what the two together must find."""

    gradients: Gradients
    loss: Tensor  # of this rank's half, as everything below
    memory: Tensor
    grad_memory: Tensor | None  # of the memory that was given
    random: Tensor  # state afterwards


def truth(bptt: Any = "full", call: Callable[[int], dict[str, Any]] = arguments, **options: Any) -> Truth:
    """Each half with its rank's random numbers, one after the other; the mean of their gradients."""
    model, mine = make(bptt=bptt, **options), None
    for rank in range(WORLD):
        seed(rank)
        given = call(rank)
        out = model(**given)
        assert out.loss is not None
        out.loss.backward()
        if rank == dist.get_rank():
            memory = given.get("memory")
            grad_memory = None if memory is None else memory.grad
            mine = (out.loss.detach(), out.memory.detach(), grad_memory, torch.get_rng_state())
    assert mine is not None
    return Truth({name: grad / WORLD for name, grad in gradients(model).items()}, *mine)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


def errors(
    kind: str, ways: Sequence[Way], *, reference: Any = "full", dtype: torch.dtype = torch.float64,
    weights: str = "tokens", rows: int | None = None, padded: bool = False, memory: bool = False, steps: int = 1,
    **options: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """For each way in turn, on one wrapped model, how far all that a step yields is from what it should be."""
    rank = dist.get_rank()
    call = partial(arguments, dtype=dtype, padded=padded, memory=memory)
    made: dict[str, Any] = {"dtype": dtype, "weights": weights, "rows": rows}
    if options.get("find_unused_parameters"):
        made["spare"] = True
    wanted = truth(reference, call, **made)
    model, found = wrapped(kind, make(**made), **options), []
    for way in ways:
        for _ in range(steps):
            model.zero_grad()
            given = call(rank)
            seed(rank)
            loss, handed_on = way.step(model, given)
            error = {
                "gradients": relative(gradients(model), wanted.gradients),
                "loss": apart(loss, wanted.loss),
                "memory": apart(handed_on, wanted.memory),
                "random state": float(not torch.equal(torch.get_rng_state(), wanted.random)),
            }
            if wanted.grad_memory is not None:
                grad = given["memory"].grad
                error["gradient of memory"] = float("inf") if grad is None else apart(grad, wanted.grad_memory)
            found.append(error)
    return found


def accumulated(kind: str, way: Way, fail: bool) -> float:
    """Error of a batch of two, given one sample after the other; with a failed forward pass between them, or not."""
    call = arguments(dist.get_rank())
    wanted = truth(dropout=0.0)
    model = wrapped(kind, make(dropout=0.0))
    for last in (False, True):
        part = {name: value[-1:] if last else value[:-1] for name, value in call.items()}
        if fail and last:
            with failing_at(model, 3), contextlib.suppress(OnPurposeError):
                way.step(model, part)
        if way.driver:
            way.step(model, part, sync=last, loss_scale=1 / 2)
            continue
        inner(model).bptt = way.policy
        if kind == "fsdp2":
            model.set_requires_gradient_sync(last)
        with model.no_sync() if kind == "ddp" and not last else nullcontext():
            (model(**part).loss / 2).backward()
    return relative(gradients(model), wanted.gradients)


def mixed(ways: Sequence[Way]) -> list[dict[str, float]]:
    """Errors under FSDP2's mixed precision: computed in bfloat16, gradients averaged in float32."""
    rank, wide = dist.get_rank(), torch.float32
    wanted, found = truth(), []
    for way in ways:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=wide)
        model = wrapped("fsdp2", make(dtype=wide), mp_policy=policy)
        seed(rank)
        loss, _ = way.step(model, arguments(rank, wide))
        found.append({"gradients": relative(gradients(model), wanted.gradients), "loss": apart(loss, wanted.loss)})
    return found


def scaled(kind: str, narrow: torch.dtype, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Steps under autocast with a gradient scaler, the first of ``ways`` being what the others must equal."""
    rank, wide = dist.get_rank(), torch.float32
    exact, first = truth().gradients, None
    found: list[dict[str, Any]] = []
    for way in ways:
        model = wrapped(kind, make(dtype=wide))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def step(scaler: Any = None, model: Any = model, way: Way = way) -> Gradients:
            model.zero_grad()
            seed(rank)
            with torch.autocast("cpu", narrow):
                way.step(model, arguments(rank, wide), scaler)
            return gradients(model)

        unscaled = step()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        step(scaler)
        scaler.unscale_(optimizer)
        grads, before = gradients(model), weights(model)
        scaler.step(optimizer)
        scaler.update()
        after = weights(model)
        first = first or grads
        error: dict[str, Any] = {
            "exact": relative(grads, exact),
            "unscaled": relative(grads, unscaled),
            "first": relative(grads, first),
            "update": relative({name: before[name] - after[name] for name in before}, grads),
        }
        if narrow is torch.float16:
            huge = torch.amp.GradScaler("cpu", init_scale=2.0**60)
            step(huge)
            huge.step(optimizer)
            huge.update()
            error["overflow skipped"] = huge.get_scale() == 2.0**59 and relative(weights(model), after) == 0
        found.append(error)
    return found


# -- communication, failures, refusals ---------------------------------------------------------------------------------


class Communication(TorchDispatchMode):
    """Counts collective operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def traffic(kind: str, ways: Sequence[Way], **options: Any) -> list[dict[str, int]]:
    """How often a step of each way gathers parameters and averages gradients."""
    call, found = arguments(dist.get_rank()), []
    for way in ways:
        model = wrapped(kind, make(), **options)
        for _ in range(2):  # then DistributedDataParallel has made its buckets
            way.step(model, call)
        with Communication() as communication:
            way.step(model, call)
        counts = communication.counts
        gathered = counts["_allgather_base_"]
        found.append({"gathered": gathered, "averaged": counts["_reduce_scatter_base_"] + counts["allreduce_"]})
    return found


def used_on(kind: str, ways: Sequence[Way]) -> list[dict[str, Any]]:
    """A model that has made a step in each way: its evaluation, and whether its parameters were left whole."""
    call, found = arguments(dist.get_rank()), []
    model, plain = wrapped(kind, make()), make().eval()
    wanted = plain(**call)
    for way in ways:
        way.step(model.train(), call)
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        with torch.no_grad():
            out = model.eval()(**call)
        found.append({"whole": whole, "loss": apart(out.loss, wanted.loss), "memory": apart(out.memory, wanted.memory)})
    return found


class OnPurposeError(RuntimeError):
    """What a test lets happen."""


@contextmanager
def failing_at(model: Any, call: int, backward: bool = False) -> Iterator[None]:
    """The backbone raises in its ``call``-th forward pass from here on, or in its backward pass."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OnPurposeError("on purpose")

    def on_gradient(grad: Tensor) -> None:
        count()

    def on_forward(module: nn.Module, args: Any, output: Tensor) -> None:
        if not backward:
            count()
        elif output.requires_grad:
            output.register_hook(on_gradient)

    handle = inner(model).backbone.norm.register_forward_hook(on_forward)  # type: ignore[union-attr, arg-type]
    try:
        yield
    finally:
        handle.remove()


def recovery(kind: str, way: Way, call: int, backward: bool = False) -> dict[str, Any]:
    """What a failed step raises and leaves behind, and the errors of two steps after it."""
    rank = dist.get_rank()
    given, wanted = arguments(rank), truth()
    model = wrapped(kind, make())
    way.step(model, given)
    before = gradients(model)
    seed(rank)
    state, raised = torch.get_rng_state(), None
    with failing_at(model, call, backward):
        try:
            way.step(model, given)
        except (OnPurposeError, ReplayError) as error:
            raised = error
    found: dict[str, Any] = {
        "raised": type(raised).__name__,
        "cause": type(None if raised is None else raised.__cause__).__name__,
        "gradients kept": relative(gradients(model), before) == 0,
        "random state kept": torch.equal(torch.get_rng_state(), state),
    }
    for after in ("next", "next but one"):
        model.zero_grad()
        seed(rank)
        try:
            way.step(model, given)
            found[after] = relative(gradients(model), wanted.gradients)
        except RuntimeError as error:
            found[after] = str(error)
    return found


def refusal(what: str, way: Way) -> str:
    """The error of a step that can't work; afterwards, where that is asked for, one that can."""
    call = arguments(dist.get_rank())
    mesh = init_device_mesh("cpu", (WORLD,))
    model: Any = make(rows=3 if what == "sharded head" else None)
    backbone: Any = model.backbone
    if what == "static graph":
        model = wrapped("ddp", model, static_graph=True)
    elif what == "ddp":
        model = wrapped("ddp", model)
    elif what == "ddp of the backbone":
        model.backbone = DistributedDataParallel(backbone)
    elif what == "fsdp2 of the blocks":
        for block in backbone.blocks:
            fully_shard(block, mesh=mesh)
    elif what == "fsdp2 of the backbone":
        fully_shard(backbone, mesh=mesh)
    elif what == "sharded head":
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif what == "labels":
        model, call["labels"] = wrapped("fsdp2", model), call["labels"].int()
    try:
        way.step(model, call)
    except (TypeError, ValueError) as error:
        grads = [name for name, parameter in inner(model).named_parameters() if parameter.grad is not None]
        return f"{type(error).__name__}: {error}" + (f" (gradients in {grads})" if grads else "")
    return ""


def weights(model: Any) -> Gradients:
    """All parameters, whole, by name."""
    whole = {}
    for name, parameter in inner(model).named_parameters():
        whole[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
    return whole
