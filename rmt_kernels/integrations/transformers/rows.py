"""What a base model of transformers does with the rows of a segment, in the parts that a recurrence is built of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from rmt_kernels.integrations.transformers.config import RMTConfig
from rmt_kernels.layout import SegmentLayout

__all__ = ["Backbone", "Head", "check_layers", "check_positions", "head_of", "position_table"]


class Backbone(nn.Module):
    """Rows of a segment, (batch, rows, width), to their hidden states, through a base model without a head.

    Not a part of the model that it belongs to: a view of its base model, made anew when that changes.
    """

    def __init__(self, base: PreTrainedModel, config: RMTConfig) -> None:
        super().__init__()
        self.base, self.memory, self.front = base, config.memory, config.front
        table = position_table(base)
        self.first = 0 if table is None or table.padding_idx is None else table.padding_idx + 1

    def forward(self, x: Tensor, *, layout: SegmentLayout, token_lengths: Tensor | None = None) -> Tensor:
        """See :class:`rmt_kernels.RecurrentMemory`."""
        places = {"position_ids": self.first + self._places(x, token_lengths)} if self.front else {}
        found = self.base(inputs_embeds=x, rmt_layout=layout, rmt_lengths=token_lengths, use_cache=False, **places)
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _places(self, x: Tensor, token_lengths: Tensor | None) -> Tensor:
        """(batch, rows) positions of ``[memory | CLS SEP SEP | tokens]`` as in ``[CLS | memory | SEP | tokens | SEP]``;
        the last SEP follows as many tokens as there are."""
        m, tokens = self.memory, x.shape[1] - self.memory - 3
        at = torch.arange(x.shape[1], device=x.device)
        before = torch.cat([at[1 : m + 1], at[:1], at[m + 1 : m + 2]]).expand(len(x), -1)
        closing = torch.full((len(x), 1), m + 2 + tokens, device=x.device)
        if token_lengths is not None:
            closing = (token_lengths.long() - 1 + m).clamp(min=0)[:, None]
        return torch.cat([before, closing, at[m + 2 : m + 2 + tokens].expand(len(x), -1)], dim=1)


class _Output(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """With None for whatever else a head looks for, such as the logits of a router."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Given(nn.Module):
    """In the place of a base model: what it is given is its last hidden state."""

    @property
    def decoder(self) -> _Given:
        """Where a model calls a part of its base model."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **others: Any) -> _Output:
        """``inputs_embeds``."""
        return _Output(last_hidden_state=inputs_embeds)


class Head(nn.Module):
    """Hidden rows (n, width) to logits (n, classes): all that a model does after its base model, scaling included."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        prefix = model.base_model_prefix
        if prefix not in model._modules:
            raise ValueError(
                f"{type(model).__name__} keeps its base model under no {prefix!r}, so that its head can't be told apart"
            )
        after = copy.copy(model)  # shares every other part
        after._modules = {**model._modules, prefix: _Given()}
        for name in ("forward", "_old_forward", "_hf_hook"):  # of accelerate, for the whole model
            after.__dict__.pop(name, None)
        self.after = after

    def forward(self, hidden: Tensor) -> Tensor:
        """Rows (n, width) or (batch, n, width) to logits."""
        rows = hidden if hidden.dim() == 3 else hidden[None]
        logits: Tensor = self.after(inputs_embeds=rows).logits
        return logits if hidden.dim() == 3 else logits[0]


def head_of(model: PreTrainedModel) -> nn.Module:
    """:class:`Head`; or the output layer itself where a model does nothing else, which the loss takes in chunks."""
    head, layer = Head(model), model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if type(layer) is not nn.Linear or type(weight) is not nn.Parameter or weight.device.type == "meta":
        return head
    with torch.no_grad():  # far from 0, where soft caps and factors show
        rows = torch.linspace(-1e3, 1e3, 3 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(3, -1)
        return layer if torch.equal(head(rows), layer(rows)) else head


def position_table(base: PreTrainedModel) -> nn.Embedding | None:
    """The table of trained positions of a base model, None where it has none."""
    for name, part in base.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(part, nn.Embedding) and (last in ("wpe", "embed_positions") or "position_embeddings" in last):
            return part
    return None


_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def check_layers(base: PreTrainedModel, rows: int) -> None:
    """Raise ValueError where not only attention moves what rows hold, or where positions depend on the input's length.

    ``rows``: of a segment.
    """
    name, config = type(base).__name__, base.config
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = sorted({str(kind) for kind in kinds} - _ATTENTION)
    if others:
        raise ValueError(
            f"{name} has layers of {', '.join(others)}, which hand on what padding and WRITE rows hold; take a base "
            "model whose rows meet in attention alone"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "base_config.output_router_logits: the loss of a router is not part of the segments' loss; set it to False"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type", part.get("type")) in ("dynamic", "longrope"):
            known = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            known = known or config.max_position_embeddings
            if rows > known:
                raise ValueError(
                    f"segment: {rows} rows with memory, and {name} turns positions beyond {known} otherwise than those "
                    "before, by the length of the input; take segments shorter by "
                    f"{rows - known} tokens"
                )


def check_positions(base: PreTrainedModel, rows: int, parts: str) -> None:
    """Raise ValueError where a segment has more rows than the base model has positions."""
    table = position_table(base)
    if table is None:
        return
    # Some tables begin with rows that are never a position.
    offset = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
    known = table.num_embeddings - offset
    if rows > known:
        raise ValueError(
            f"segment: {parts} are {rows} rows, and {type(base).__name__} has a table of {known} positions; take "
            f"segments shorter by {rows - known} tokens, fewer memory rows, or a base model with more "
            "positions"
        )
