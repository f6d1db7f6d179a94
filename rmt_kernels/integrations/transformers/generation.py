"""A decoder over segments, and generation that goes on across their borders in constant memory.

A step computes one token's row against the buffers of its segment. A token that finds its segment full first has the
memory written (WRITE rows against the full segment) and the next segment opened (READ rows): so each token is predicted
from exactly what a pass over all segments would have seen.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rmt_kernels.integrations.transformers.config import RMTConfig
from rmt_kernels.integrations.transformers.modeling import (
    RMTOutput,
    RMTPreTrainedModel,
    Unpadded,
    decoder_layout,
    given_only,
    sees_both_ways,
)
from rmt_kernels.integrations.transformers.state import RMTState, SegmentPass, indices
from rmt_kernels.layout import Region, SegmentLayout

__all__ = ["RMTForCausalLM"]

_FORMAT = "rmt_kernels memory"
_SAMPLED = 1024  # numbers of a parameter that tell whether it is the same
# Arguments of ``generate`` that can't work across segments, and what to do.
_REFUSED = {
    "assistant_model": "drafts of an assistant are taken back in part, and a memory can't be",
    "prompt_lookup_num_tokens": "drafts are taken back in part, and a memory can't be",
    "assistant_early_exit": "drafts are taken back in part, and a memory can't be",
    "penalty_alpha": "contrastive search looks at several continuations of the cache",
    "cache_implementation": "the cache of a segment is the model's own",
    "cache_config": "the cache of a segment is the model's own",
    "inputs_embeds": "segments are cut from token numbers; give input_ids",
    "prefill_chunk_size": "the prompt is read segment by segment anyway",
    "guidance_scale": "the text without a prompt would need a memory of its own",
    "output_attentions": "attention is not kept; rmt_kernels.maps recomputes it",
    "output_hidden_states": "hidden states are not kept",
    "low_memory": "the memory of generation is constant anyway",
}


class RMTForCausalLM(RMTPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A decoder over segments; see :class:`RMTPreTrainedModel` and :meth:`generate`."""

    _auto = AutoModelForCausalLM
    _supports_cache_class: ClassVar[bool] = True
    accepts_loss_kwargs = True

    def __init__(self, config: RMTConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config, base)
        if config.align != "left":
            raise ValueError("align: a decoder's last segment is the short one; use align='left'")
        base_generation = getattr(self.model, "generation_config", None)
        if base_generation is not None:
            self.generation_config = base_generation

    def _make_layout(self, config: RMTConfig, is_decoder: bool) -> SegmentLayout:
        if sees_both_ways(self._decoder):
            raise ValueError(f"{type(self.model).__name__} is an encoder; use RMTForMaskedLM")
        return decoder_layout(config)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        memory: Tensor | None = None, past_key_values: RMTState | None = None, num_items_in_batch: Any = None,
        **others: Any,
    ) -> RMTOutput:  # fmt: skip
        """Read whole samples; or, with ``past_key_values``, go on where they are.

        Args:
            input_ids: int64 (batch, n), any n.
            attention_mask: (batch, n), 0 at padding, on either side; with ``past_key_values`` also (batch, n + what has
                been read).
            labels: int64 (batch, n), those of the inputs' own positions (shifted here, over the borders of segments
                too), -100 where none counts.
            memory: what an earlier call returned, (batch, M, width). None: the start.
            past_key_values: the state of generation, which goes on.
            num_items_in_batch: of Trainer: what the loss is divided by in place of the number of labels.

        Returns:
            RMTOutput; logits (batch, n, vocabulary) are left out in training, and of the last token alone with
            ``past_key_values``.

        Raises:
            TypeError, ValueError: an argument that is not accepted.
        """
        given_only(type(self).__name__, others)
        if past_key_values is not None:
            if not isinstance(past_key_values, RMTState):
                raise TypeError(f"past_key_values must be an RMTState, got {type(past_key_values).__name__}")
            if labels is not None or memory is not None:
                raise ValueError(
                    "past_key_values holds the memory, and steps have no loss; leave memory and labels out"
                )
            return self._go_on(input_ids, attention_mask, past_key_values)
        outputs = None if labels is not None and self.training else "logits"
        return self._segments(input_ids, attention_mask, labels, memory, outputs, num_items_in_batch)

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:  # fmt: skip
        """The memory after a text, (batch, M, width), to be asked with :meth:`generate` or saved; nothing else of it
        is kept.

        Args:
            input_ids, attention_mask, memory: as in :meth:`forward`.
            progress: show a progress bar of segments.
        """
        unpadded = Unpadded.of(input_ids, attention_mask)
        found = self.recurrence(
            unpadded.front(input_ids), lengths=unpadded.lengths, memory=memory, progress=progress
        )  # fmt: skip
        after: Tensor = found.memory
        return after

    def save_memory(self, memory: Tensor, path: str | Path) -> None:
        """Write a memory, (batch, M, width), to a file that this model, with these weights, reads again."""
        from safetensors.torch import save_file

        save_file(
            {"memory": memory.detach().cpu().contiguous()}, str(path),
            metadata={"format": _FORMAT, "model": self._described(), "weights": self._digest()},
        )  # fmt: skip

    def load_memory(self, path: str | Path) -> Tensor:
        """What :meth:`save_memory` wrote. Nothing in the file is executed.

        Raises:
            ValueError: not such a file, or of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                memory: Tensor | None = file.get_tensor("memory") if "memory" in file.keys() else None  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: no memory file, or damaged ({error})") from error
        if about.get("format") != _FORMAT or memory is None:
            raise ValueError(f"{path}: not a memory file; model.save_memory writes them")
        if about.get("model") != self._described():
            raise ValueError(
                f"{path}: the memory of another model: {about.get('model')}; this one is {self._described()}"
            )
        if about.get("weights") != self._digest():
            raise ValueError(
                f"{path}: the memory of the same kind of model with other weights; read the text again with this one"
            )
        return memory.to(self.initial_memory)

    def _described(self) -> str:
        config, base = self.config, self.config.base_config
        return (
            f"{base.model_type}, width {self.initial_memory.shape[1]}, {base.num_hidden_layers} layers, memory "
            f"{config.memory}, segment {config.segment}, mask {config.mask}"
        )

    def _digest(self) -> str:
        """Of some numbers of every parameter."""
        found = hashlib.sha256()
        for name, parameter in sorted(self.named_parameters()):
            flat = parameter.detach().flatten()
            if flat.device.type != "meta":  # elsewhere, as accelerate leaves them
                some = flat[:: max(1, len(flat) // _SAMPLED)].float().cpu().numpy()
                found.update(name.encode() + some.tobytes())
        return found.hexdigest()

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, *args: Any, memory: Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers: greedy, sampling, beams, streamers, stopping criteria. The cost of a token and the memory
        taken do not depend on how many segments lie behind.

        Args:
            inputs: the prompt, int64 (batch, n), padded on either side with an ``attention_mask``.
            memory: (batch, M, width) of :meth:`read`, to begin with. None: the start.
            past_key_values: an :class:`RMTState`, to go on from; the prompt is then what comes after what it has read.
            args, kwargs: of ``GenerationMixin.generate``.

        Raises:
            ValueError: an argument that can't work across segments.
        """
        config = kwargs.get("generation_config", next((a for a in args if isinstance(a, GenerationConfig)), None))
        config = self.generation_config if config is None else config
        for name, why in _REFUSED.items():
            asked = kwargs.get(name, getattr(config, name, None))
            if asked is not None and asked is not False and not (name == "guidance_scale" and asked == 1):
                raise ValueError(f"generate: {name} can't be used across segments: {why}")
        if kwargs.get("use_cache", config.use_cache) is False:
            raise ValueError("generate: use_cache=False would read everything again for each token; leave it out")
        if self.training and any(getattr(part, "gradient_checkpointing", False) for part in self.modules()):
            raise ValueError(
                "generate: gradient checkpointing keeps no cache in training mode; call model.eval() first"
            )
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if memory is not None and prompt is not None and memory.dim() == 3 and len(memory) not in (1, len(prompt)):
            raise ValueError(f"generate: memory is of {len(memory)} samples, and the prompt has {len(prompt)}")
        state = kwargs.pop("past_key_values", None)
        if state is None:
            state = RMTState(memory)
        elif not isinstance(state, RMTState):
            raise ValueError(
                f"generate: past_key_values must be an RMTState, the state of an earlier call, got "
                f"{type(state).__name__}"
            )
        elif memory is not None:
            raise ValueError("generate: past_key_values has its memory; leave memory out")
        if state.order:
            raise ValueError(f"generate: past_key_values can't be gone on with: {state.order}")
        if state.batch and prompt is not None and state.batch != len(prompt):
            raise ValueError(f"generate: past_key_values is of {state.batch} samples, and the prompt has {len(prompt)}")
        state.fed = 0
        found = super().generate(inputs, *args, past_key_values=state, use_cache=True, **kwargs)
        sequences = found if isinstance(found, Tensor) else found.sequences

        def resolved(name: str) -> Any:
            asked = (kwargs.get(name), getattr(config, name), getattr(self.generation_config, name))
            return next((value for value in asked if value is not None), None)

        ends, padding = resolved("eos_token_id"), resolved("pad_token_id")
        if ends is not None and not state.order and len(sequences) == state.batch:
            begin = 1 if prompt is None else prompt.shape[1]
            state.take_back(_after_the_end(sequences[:, begin:], ends, padding, state.fed - begin))
        return found

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: RMTState | None = None, attention_mask: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The columns that have not been read."""
        assert past_key_values is not None
        return {
            "input_ids": input_ids[:, past_key_values.fed :], "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }  # fmt: skip

    @torch.no_grad()
    def _go_on(self, input_ids: Tensor, mask: Tensor | None, state: RMTState) -> RMTOutput:
        """Read more tokens of each sample; logits of its last one."""
        batch, new = input_ids.shape
        if new < 1:
            raise ValueError("input_ids must hold at least one token that the state has not read")
        recurrence, first = self.recurrence, not state.at
        state.front = recurrence.backbone.first  # type: ignore[assignment]
        state.start(batch, self.initial_memory.detach(), self._described())
        if new == 1 and not first and (mask is None or mask.shape[1] > 1):
            counts = [1] * batch
        else:
            if mask is not None and mask.shape[1] > new:
                mask = mask[:, -new:]
            unpadded = Unpadded.of(input_ids, mask)
            input_ids = unpadded.front(input_ids)
            counts = [new] * batch if unpadded.lengths is None else unpadded.lengths.tolist()
            if min(counts) < 1:
                raise ValueError("attention_mask: every sample needs at least one token to go on from")
        hidden = self._feed(input_ids, counts, state)
        state.fed += new
        logits = recurrence.head(hidden[:, None])  # type: ignore[misc]
        return RMTOutput(logits=logits, memory=state.memory, past_key_values=state)

    def _feed(self, ids: Tensor, counts: list[int], state: RMTState) -> Tensor:
        """Read counts[i] tokens of each sample; the hidden row of the last, (batch, width)."""
        size, batch, done = self.config.segment, len(counts), [0] * len(counts)
        if counts == [1] * batch and -1 not in state.at and size not in state.at:
            return self._extend(state, ids, counts, None)[:, 0]
        last: Tensor | None = None
        while True:
            left = [i for i in range(batch) if done[i] < counts[i]]
            if not left:
                assert last is not None
                return last
            self._close(state, [i for i in left if state.at[i] == size])
            fresh = [i for i in left if state.at[i] < 0]
            self._skip(state, ids, counts, done, fresh)
            self._open(state, fresh)
            room = min(size - state.at[i] for i in left)  # in every segment, for rows of padding too
            taken = [min(room, counts[i] - done[i]) for i in left]
            some = indices(left, batch, ids.device)
            hidden = self._extend(state, _tokens(ids, left, done, max(taken)), taken, some)
            ends = torch.tensor([count - 1 for count in taken], device=ids.device)
            found = hidden[torch.arange(len(left), device=ids.device), ends]
            if some is None:
                last = found
            else:
                last = hidden.new_zeros(batch, hidden.shape[2]) if last is None else last
                last[some] = found
            for i, count in zip(left, taken, strict=True):
                done[i] += count

    def _skip(self, state: RMTState, ids: Tensor, counts: list[int], done: list[int], fresh: list[int]) -> None:
        """Read the segments that will be full before the last token, memory by memory."""
        size = self.config.segment
        whole = {i: (math.ceil((counts[i] - done[i]) / size) - 1) * size for i in fresh}
        some = [i for i in fresh if whole[i]]
        if not some:
            return
        assert state.memory is not None
        longest, samples = max(whole.values()), torch.tensor(some, device=ids.device)
        lengths = None
        if any(whole[i] != longest for i in some):
            lengths = torch.tensor([whole[i] for i in some], device=ids.device)
        found = self.recurrence(_tokens(ids, some, done, longest), lengths=lengths, memory=state.memory[samples])
        state.memory.index_copy_(0, samples, found.memory.detach())
        for i in some:
            done[i] += whole[i]

    def _open(self, state: RMTState, samples: list[int]) -> None:
        """READ rows of the next segment."""
        if not samples:
            return
        rule = self.layout.rule(Region.READ, Region.READ)
        layout = SegmentLayout(read=self.config.memory, rules={("read", "read"): rule})
        self._pass_memory(state, samples, 0, layout)
        for i in samples:
            state.at[i] = 0
        state.set_places()

    def _close(self, state: RMTState, samples: list[int]) -> None:
        """WRITE rows of full segments: their memory."""
        if not samples:
            return
        m = self.config.memory
        hidden = self._pass_memory(state, samples, m + self.config.segment, self.layout.last(m))
        assert state.memory is not None
        some = torch.tensor(samples, device=state.memory.device)
        state.memory.index_copy_(0, some, hidden.to(state.memory))
        for i in samples:
            state.at[i] = -1

    def _pass_memory(self, state: RMTState, samples: list[int], first: int, layout: SegmentLayout) -> Tensor:
        assert state.memory is not None
        some = indices(samples, state.batch, state.memory.device)
        rows = state.memory if some is None else state.memory[some]
        at = first + torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        return self._rows(state, rows.to(self.get_input_embeddings().weight.dtype), at, layout, None, some)

    def _extend(self, state: RMTState, ids: Tensor, counts: list[int], some: Tensor | None) -> Tensor:
        """Tokens (samples, count) of the running segments: their hidden rows."""
        assert state.place is not None
        place = state.place if some is None else state.place[some]
        at = self.config.memory + place.long()[:, None] + torch.arange(ids.shape[1], device=ids.device)
        layout = _tokens_layout(self.layout, ids.shape[1])
        hidden = self._rows(state, self.get_input_embeddings()(ids), at, layout, place, some)
        samples = range(state.batch) if some is None else some.tolist()
        for i, count in zip(samples, counts, strict=True):
            state.at[i] += count
        if len(set(counts)) == 1 and some is None:
            state.place += counts[0]
        else:
            state.set_places()
        return hidden

    def _rows(
        self, state: RMTState, x: Tensor, at: Tensor, layout: SegmentLayout, start: Tensor | None, some: Tensor | None
    ) -> Tensor:
        """Rows (samples, count, width) of the running segments through the base model, with the buffers."""
        rows = 2 * self.config.memory + self.config.segment
        found = self._decoder(
            inputs_embeds=x, position_ids=state.front + at, use_cache=True, rmt_layout=layout, rmt_query_start=start,
            past_key_values=SegmentPass(state, rows, at, layout.num_keys, some),
        )  # fmt: skip
        hidden: Tensor = found.last_hidden_state
        return hidden


def _after_the_end(new: Tensor, ends: Any, padding: int | None, fed: int) -> list[int]:
    """How many of the first ``fed`` generated tokens, (batch, n), of each sample are its end or padding after it."""
    ends = torch.as_tensor(ends, device=new.device).flatten()
    over = torch.isin(new, ends).cumsum(dim=1) > 0
    after = over.roll(1, dims=1)
    after[:, :1] = False
    # An end token that did not end it is followed by something else.
    ended = ((new == (ends[0] if padding is None else padding)) | ~after).all(dim=1)
    return (over[:, : max(fed, 0)].sum(dim=1) * ended).tolist()  # type: ignore[no-any-return]


def _tokens(ids: Tensor, samples: list[int], done: list[int], count: int) -> Tensor:
    """The next ``count`` tokens of some samples, (samples, count); behind a sample's last, whatever."""
    at = torch.tensor([done[i] for i in samples], device=ids.device)[:, None]
    at = (at + torch.arange(count, device=ids.device)).clamp(max=ids.shape[1] - 1)
    some = indices(samples, len(ids), ids.device)
    return (ids if some is None else ids[some]).gather(1, at)


@lru_cache(maxsize=256)
def _tokens_layout(whole: SegmentLayout, rows: int) -> SegmentLayout:
    return replace(whole, write=0).decoding(rows)


AutoModelForCausalLM.register(RMTConfig, RMTForCausalLM, exist_ok=True)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RMTConfig.model_type] = RMTForCausalLM.__name__  # whose labels Trainer shifts
