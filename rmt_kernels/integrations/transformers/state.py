"""The state of generation: each sample's memory, and the keys and values of its running segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

__all__ = ["RMTState", "SegmentPass", "indices"]


class RMTState(Cache):  # type: ignore[misc]
    """What generation hands from token to token, in place of a cache that grows.

    For each layer two buffers of ``[READ | TOKENS | WRITE]`` rows, whatever has been read so far; the memory that
    entered the running segment; and how many tokens each sample has in it. Samples need not be at the same place.
    """

    def __init__(self, memory: Tensor | None = None) -> None:
        super().__init__(layers=[])
        self.memory = memory  # (batch, M, width); None: the start
        self.at: list[int] = []  # tokens of the running segment; -1: it has not been opened
        self.place: Tensor | None = None  # int32 (batch,), the same on the device
        self.buffers: list[tuple[Tensor, Tensor]] = []  # (batch, kv_heads, M + T + M, head_dim) each
        self.fed = 0  # columns of input_ids that have been read
        self.order: str = ""  # why it can't be gone on with
        self.front = 0  # the model's first position
        self.of: str = ""  # the kind of model that it belongs to

    @property
    def batch(self) -> int:
        """Samples, 0 before the first token."""
        return len(self.at)

    def get_seq_length(self, layer_idx: int = 0, cache_position: Any = None) -> int:
        """Columns of ``input_ids`` that have been read, as ``generate`` counts them."""
        return self.fed

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No end: -1."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model by itself."""
        return False

    def start(self, batch: int, memory: Tensor, model: str) -> None:
        """Begin with the first tokens; or, for beams, have each sample several times. ``model`` says whose it is."""
        if self.of not in ("", model):
            raise ValueError(f"past_key_values is the state of another model: {self.of}; this one is {model}")
        self.of = model
        if not self.at:
            entering = memory.expand(batch, -1, -1) if self.memory is None else self.memory
            if entering.dim() == 3 and len(entering) != batch:
                entering = entering.repeat_interleave(self._times(batch, len(entering)), dim=0)
            if entering.shape[1:] != memory.shape or entering.dtype != memory.dtype:
                raise ValueError(
                    f"memory must be what the model returned, {memory.dtype} (batch, {memory.shape[0]}, "
                    f"{memory.shape[1]}), got {entering.dtype} {tuple(entering.shape)}"
                )
            self.memory = entering.to(memory.device, copy=True)
            self.at = [-1] * batch
            self.place = torch.zeros(batch, dtype=torch.int32, device=memory.device)
        elif len(self.at) != batch:
            times = self._times(batch, len(self.at))
            self._take(torch.arange(len(self.at), device=memory.device).repeat_interleave(times))

    def _times(self, batch: int, known: int) -> int:
        if batch % known:
            raise ValueError(f"input_ids has {batch} samples, and the memory or state is of {known}")
        return batch // known

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the samples ``beam_idx``, int64 (batch,): beams, which are not in the order of what is returned."""
        self.order = "its samples are beams; read the text again with model.read"
        self._take(beam_idx)

    def take_back(self, counts: list[int]) -> None:
        """Have each sample forget its last tokens, as far as they are in its running segment."""
        for i, count in enumerate(counts):
            if count > self.at[i]:
                self.order = (
                    f"sample {i} ended {count} tokens before the others, in a segment that is no longer there; read "
                    "the texts again with model.read, or generate for each alone"
                )
        if any(counts) and not self.order:
            self.at = [at - count for at, count in zip(self.at, counts, strict=True)]
            self.set_places()

    def _take(self, beam_idx: Tensor) -> None:
        assert self.memory is not None
        index = beam_idx.to(self.memory.device)
        self.memory = self.memory.index_select(0, index)
        self.buffers = [
            (key.index_select(0, index.to(key.device)), value.index_select(0, index.to(value.device)))
            for key, value in self.buffers
        ]
        # Samples at one place stay there, whichever they are: nothing is read back then.
        if len(set(self.at)) > 1:
            self.at = [self.at[i] for i in beam_idx.tolist()]
            self.set_places()
        else:
            self.at = self.at[:1] * len(beam_idx)
            assert self.place is not None
            self.place = self.place[:1].expand(len(beam_idx)).clone()

    def batch_select_indices(self, indices: Tensor) -> None:
        """As :meth:`reorder_cache`."""
        self.reorder_cache(indices)

    def set_places(self) -> None:
        """Bring the numbers to the device."""
        assert self.place is not None
        self.place = torch.tensor(self.at, dtype=torch.int32, device=self.place.device)

    def crop(self, max_length: int) -> None:
        """Refused: what a memory has read can't be taken back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate: what a memory has read can't be taken back, so drafts can't be; decode without them"
        )


class SegmentPass(Cache):  # type: ignore[misc]
    """The cache that a base model is given for some rows of the running segment.

    Args:
        state: where the buffers are.
        rows: of a buffer.
        at: int64 (samples, count), which rows of the buffers these are.
        keys: rows of the buffers that may be seen.
        samples: int64 (samples,), whose; None: everyone's.
    """

    def __init__(self, state: RMTState, rows: int, at: Tensor, keys: int, samples: Tensor | None) -> None:
        super().__init__(layers=[])
        self.state, self.rows, self.at, self.keys, self.samples = state, rows, at, keys, samples

    def get_seq_length(self, layer_idx: int = 0, cache_position: Any = None) -> int:
        """0: positions are given."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put (samples, kv_heads, count, head_dim) into the layer's buffers; all that may be seen."""
        buffers = self.state.buffers
        if len(buffers) <= layer_idx:
            batch = self.state.batch
            made = [x.new_zeros(batch, x.shape[1], self.rows, x.shape[3]) for x in (key_states, value_states)]
            buffers.append((made[0], made[1]))
        return self._put(buffers[layer_idx][0], key_states), self._put(buffers[layer_idx][1], value_states)

    def _put(self, buffer: Tensor, new: Tensor) -> Tensor:
        if new.dtype is not buffer.dtype:
            raise ValueError(f"past_key_values was made in {buffer.dtype}, and the model computes in {new.dtype} now")
        index = self.at.to(buffer.device)[:, None, :, None].expand_as(new)
        if self.samples is None:
            return buffer.scatter_(2, index, new)[:, :, : self.keys]
        samples = self.samples.to(buffer.device)
        some = buffer.index_select(0, samples).scatter_(2, index, new)
        buffer.index_copy_(0, samples, some)
        return some[:, :, : self.keys]


def indices(samples: Sequence[int], batch: int, device: torch.device) -> Tensor | None:
    """Samples as int64, None where they are all of the batch."""
    return None if len(samples) == batch else torch.tensor(list(samples), device=device)
