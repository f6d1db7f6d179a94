"""From the RMT authors' wrapper around decoders, ``RecurrentWrapper(MemoryCell(model, ...), ...)``: its arguments as an
:class:`RMTConfig`, its checkpoints as weights of :class:`RMTForCausalLM`.

Its mask is plain causal over ``[READ | TOKENS | WRITE]``, so ``mask="rmt_causal"``, and a memory starts as a drawn
parameter. A text that ends inside a segment gives the same logits here; the memory rows behind its last token stand at
the positions of a whole segment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from rmt_kernels.integrations.transformers.config import RMTConfig
from rmt_kernels.integrations.transformers.generation import RMTForCausalLM
from rmt_kernels.integrations.transformers.masks import CAUSAL
from rmt_kernels.models.converters import _read
from rmt_kernels.recurrence.checks import at_least
from rmt_kernels.recurrence.schedules import RandomNumber

__all__ = ["config_from_wrapper", "load_wrapper_state_dict", "segments_from_wrapper"]

# Buffers of older versions of transformers, which hold nothing learned.
_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def config_from_wrapper(
    base_config: PretrainedConfig | Mapping[str, Any],
    *,
    num_mem_tokens: int,
    segment_size: int,
    segment_alignment: str | None = None,
    max_n_segments: int | None = None,
    k2: int | None = -1,
    vary_n_segments: bool = False,
    **others: Any,
) -> RMTConfig:
    """The configuration that the wrapper's arguments stand for.

    Args:
        base_config: of the model in the memory cell.
        num_mem_tokens, segment_size: M, and the tokens of a segment without memory.
        segment_alignment: ``"left"`` or None. Under the others the short segment is not the last one.
        max_n_segments, vary_n_segments: lengths of training samples, which :func:`segments_from_wrapper` draws; no part
            of a model.
        k2: number of last segments that gradients go back through, ``bptt`` here; -1 or None: all of them. Counted from
            a sample's own last segment; the authors' code, where it cuts at all, counts from ``max_n_segments`` and
            always keeps the memory that the first segment wrote.
        others: refused by name.

    Raises:
        TypeError, ValueError: an argument that has no counterpart, or a value that is not accepted.
    """
    if others:
        raise TypeError(
            f"config_from_wrapper has no argument {', '.join(sorted(others))}; it takes num_mem_tokens, segment_size, "
            "segment_alignment, max_n_segments, k2 and vary_n_segments of RecurrentWrapper(MemoryCell(...)), whose "
            "READ and WRITE memory have one size"
        )
    if not num_mem_tokens:
        raise ValueError(
            f"num_mem_tokens={num_mem_tokens}: without memory rows nothing is handed on; use the base model itself"
        )
    if segment_alignment not in ("left", None):
        raise ValueError(
            f"segment_alignment must be 'left' or None for a decoder, got {segment_alignment!r}; samples of a multiple "
            "of segment_size tokens are cut alike by all of them, so give such samples and leave it out"
        )
    _check_segments(max_n_segments, vary_n_segments)
    if k2 is not None and k2 != -1:
        at_least("k2", k2, 1)
    return RMTConfig(
        base_config, memory=num_mem_tokens, segment=segment_size, mask=CAUSAL, bptt="full" if k2 in (-1, None) else k2
    )


def segments_from_wrapper(max_n_segments: int, vary_n_segments: bool = False, *, seed: int = 0) -> Callable[[int], int]:
    """How many segments the samples of a training step have, a function of the step.

    Args:
        max_n_segments: at most; always, where they do not vary.
        vary_n_segments: draw the number anew at each step.
        seed: of the draws, which are the same in every process.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """
    _check_segments(max_n_segments, vary_n_segments)
    return RandomNumber(1 if vary_n_segments else max_n_segments, max_n_segments, seed)


def _check_segments(max_n_segments: int | None, vary_n_segments: bool) -> None:
    if not isinstance(vary_n_segments, bool):
        raise TypeError(f"vary_n_segments must be True or False, got {type(vary_n_segments).__name__}")
    if max_n_segments is not None:
        at_least("max_n_segments", max_n_segments, 1)
    elif vary_n_segments:
        raise ValueError("vary_n_segments=True needs max_n_segments, the largest number of segments")


def load_wrapper_state_dict(model: RMTForCausalLM, source: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Give a model the weights of the wrapper around the same kind of base model, in the model's own dtype.

    Args:
        model: with ``mask="rmt_causal"``; see :func:`config_from_wrapper`.
        source: ``RecurrentWrapper(...).state_dict()``: ``memory_cell.memory`` (M, width) and ``memory_cell.model.*``,
            the base model's own names; without ``memory_cell.``, or with ``module.`` in front, too. Or the path of a
            file with it, ``.safetensors`` or written by ``torch.save``; nothing in a file is executed.

    Raises:
        TypeError, ValueError: a model with another mask; entries that are unknown, missing or of another shape (all of
            them are named, and nothing is changed); a file that is no state dict.
    """
    if not isinstance(model, RMTForCausalLM):
        raise TypeError(f"model must be an RMTForCausalLM, got {type(model).__name__}")
    if model.config.mask != CAUSAL:
        raise ValueError(
            f"model: the wrapper's checkpoints are trained with the plain causal mask, and this model has mask="
            f"{model.config.mask!r}; make it with mask={CAUSAL!r} (config_from_wrapper does)"
        )
    given = _state_dict(source)
    wanted = {"memory": model.initial_memory.data, **{f"model.{k}": v for k, v in model.model.state_dict().items()}}
    problems = [
        f"unknown: {name} {tuple(tensor.shape)}"
        for name, tensor in given.items()
        if name not in wanted and not _BUFFERS.search(name)
    ]
    same: dict[int, list[str]] = {}  # names of one tensor: tied weights
    for name, tensor in wanted.items():
        same.setdefault(tensor.data_ptr() or id(tensor), []).append(name)
    for names in same.values():
        present = [name for name in names if name in given]
        if not present:
            problems.append(f"missing: {names[0]} {tuple(wanted[names[0]].shape)}")
        for name in present:
            found, shape = given[name], wanted[name].shape
            if found.shape != shape:
                problems.append(f"another shape: {name} {tuple(found.shape)}, expected {tuple(shape)}")
            elif found.is_floating_point() != wanted[name].is_floating_point():
                problems.append(f"another kind of numbers: {name} {found.dtype}, expected {wanted[name].dtype}")
            elif given[present[0]].shape == shape and not found.equal(given[present[0]]):
                problems.append(
                    f"not the same: {present[0]} and {name}, which this model ties; give the base model's "
                    "configuration tie_word_embeddings=False"
                )
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"source: not a state dict of the RMT wrapper around this {type(model.model).__name__} with "
            f"{model.config.memory} memory rows:\n  {listed}"
        )
    for names in same.values():
        name = next(name for name in names if name in given)
        wanted[name].copy_(given[name])


def _state_dict(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Tensor]:
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = os.fspath(source)
        try:
            source = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"source: {path} is damaged, or no safetensors file ({error})") from error
    given = _read(source)
    for front in ("module.", "memory_cell."):
        if given and all(name.startswith(front) for name in given):
            given = {name.removeprefix(front): tensor for name, tensor in given.items()}
    return given
