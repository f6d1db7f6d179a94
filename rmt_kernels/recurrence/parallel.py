"""What ``replay_step`` has to arrange under data parallelism: gradients are averaged once, in the last traversal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rmt_kernels.recurrence.policies import ReplayError
from rmt_kernels.recurrence.wrapper import RecurrentMemory

__all__ = ["Alone", "unwrap"]


class Alone:
    """One process: nothing to arrange. Entered for the whole step."""

    synchronises = False
    sharded = False

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Undo what was arranged."""

    def segment(self, synchronise: bool) -> AbstractContextManager[Any]:
        """Around a forward pass with a graph, and around the traversal of that graph."""
        return nullcontext()

    def roller(self, model: nn.Module, inner: RecurrentMemory) -> Callable[..., Any]:
        """What is called for a segment without a graph."""
        return inner


class _Replicated(Alone):
    """DistributedDataParallel. Without a graph the module inside is called: there is nothing to prepare for."""

    synchronises = True

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model

    def segment(self, synchronise: bool) -> AbstractContextManager[Any]:
        """See :class:`Alone`."""
        return nullcontext() if synchronise else self._model.no_sync()


class _Sharded(Alone):
    """FSDP2. Every call goes through the root, whose hooks gather the parameters."""

    synchronises = sharded = True

    def __init__(self, model: Any, gathered: bool) -> None:
        self._model, self._gathered = model, gathered

    def __enter__(self) -> Alone:
        if self._gathered:
            self._model.set_reshard_after_forward(False)
            self._model.set_reshard_after_backward(False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error FSDP2 stands in the middle of an iteration. Older PyTorch can't be told to leave it.
        if kind is not None and hasattr(self._model, "reset_iter_state"):
            self._model.reset_iter_state()
        if kind is not None and issubclass(kind, ReplayError):
            _forget_unsharded_gradients(self._model)
        self._model.set_requires_gradient_sync(True)
        if self._gathered:
            self._model.set_reshard_after_backward(True)
            for module in self._model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    @contextmanager
    def segment(self, synchronise: bool) -> Iterator[None]:
        """See :class:`Alone`."""
        self._model.set_requires_gradient_sync(synchronise)
        yield

    def roller(self, model: nn.Module, inner: RecurrentMemory) -> Callable[..., Any]:
        """See :class:`Alone`."""
        return model


def _forget_unsharded_gradients(model: nn.Module) -> None:
    """Drop what segments have added up before the averaging that did not come: ``zero_grad`` does not reach it.

    FSDP2 has no public way to it.
    """
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        get_state: Any = module._get_fsdp_state
        state = get_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (p for group in groups if group is not None for p in group.fsdp_params):
            parameter.unsharded_accumulated_grad = None
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is not None:
                gathered.grad = None


def unwrap(model: nn.Module, gathered: bool) -> tuple[RecurrentMemory, Alone]:
    """The RecurrentMemory in a model, and what its wrapper needs.

    Raises:
        TypeError: there is none.
        ValueError: a wrapper that the driver can't work with, with the reason.
    """
    if isinstance(model, DistributedDataParallel):
        if not isinstance(model.module, RecurrentMemory):
            raise TypeError(f"model: DistributedDataParallel must hold a RecurrentMemory, got {_name(model.module)}")
        if model.static_graph:
            raise ValueError(
                "model: DistributedDataParallel(static_graph=True) expects the same number of backward traversals in "
                "every iteration, one, and replay_step makes one a segment; leave static_graph out, or use "
                "bptt=Replay() and loss.backward(), which works with it"
            )
        if gathered:
            raise ValueError("gathered=True is for fully_shard; DistributedDataParallel shards nothing")
        return model.module, _Replicated(model)
    if not isinstance(model, RecurrentMemory):
        if isinstance(getattr(model, "_orig_mod", None), RecurrentMemory):
            raise TypeError("model: compile the segment, not the loop: model.backbone.compile() in place of the whole")
        raise TypeError(
            "model must be a RecurrentMemory, DistributedDataParallel around one, or one that fully_shard was called "
            f"on, got {_name(model)}"
        )
    if model.sharded():
        return model, _Sharded(model, gathered)
    if gathered:
        raise ValueError("gathered=True is for a model that fully_shard was called on")
    return model, Alone()


def _name(module: object) -> str:
    return type(module).__name__
