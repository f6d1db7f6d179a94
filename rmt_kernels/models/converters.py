"""The RMT authors' checkpoints as models of this package: a state dict in; a model, or a list of what is wrong, out.

Files are read with ``weights_only=True``: reading one never executes code.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from rmt_kernels.models.blocks import ModelConfig, SegmentModel
from rmt_kernels.models.rmt import RMT
from rmt_kernels.models.transformer_xl import RMTTransformerXL, TransformerXL

__all__ = ["load_rmt_transformer_xl", "load_rmt_wrapper"]

Source = Mapping[str, Any] | str | os.PathLike[str]


def load_rmt_transformer_xl(
    source: Source,
    *,
    tokens: int,
    cache: int = 0,
    read_cache: bool = False,
    same_length: bool = False,
    dropout: float = 0.0,
    bptt: Any = "full",
    backend: str = "auto",
) -> RMTTransformerXL | TransformerXL:
    """The authors' language model on Transformer-XL, ``MemTransformerLM`` of arXiv 2207.06881's code.

    Of its variants: the default attention (``attn_type=0``), norms after the residuals, memory at both ends, one
    softmax over the whole vocabulary (no ``--adaptive``, ``div_val=1``), embeddings as wide as the model; tied or not.
    The position biases, which it may share between layers, become each layer's own. Of whole segments outputs are the
    same; a segment with fewer tokens is padded here, and what a memory row gives the rows ahead of it depends, in the
    authors' code, on the number of rows.

    Args:
        source: its state dict, or the path of a file that holds one.
        tokens, cache: ``tgt_len`` and ``mem_len``; not in a checkpoint, and free to differ from those of its training.
        read_cache, same_length: ``read_mem_from_cache`` and ``same_length``.
        dropout, bptt, backend: as in :class:`ModelConfig`.

    Returns:
        The model, in the checkpoint's dtype; :class:`TransformerXL` for a checkpoint without memory.

    Raises:
        TypeError, ValueError: entries that are unknown, missing or of another shape (all of them are named), a variant
            that is not served, or a file that is no state dict.
    """
    entries = _Entries(source, "the Transformer-XL based RMT")
    for pattern, what, instead in (
        (r"crit\.cluster_|(word_emb\.emb|crit\.out)_layers\.[1-9]", "an adaptive softmax", "train without --adaptive"),
        (r"(word_emb\.emb|crit\.out)_projs", "embeddings projected to the width", "use d_embed = d_model, div_val = 1"),
        (r"r_emb$|r_bias$", "another attention than the default", "use attn_type = 0"),
    ):
        found = [name for name in entries.left if re.match(pattern, name)]
        if found:
            raise ValueError(f"source: the checkpoint has {what} ({found}), which is not served; {instead}")

    embed = entries.first("word_emb.emb_layers.0.weight", None, None)
    vocabulary, width = embed.shape
    head = entries.take("crit.out_layers.0.weight", vocabulary, width)
    ours = {"embed.weight": embed, "head.weight": head, "head.bias": entries.take("crit.out_layers.0.bias", vocabulary)}
    memory = 0
    if "mem_tokens" in entries.left:
        rows = entries.take("mem_tokens", None, 1, width)
        memory = len(rows)
        ours["initial_memory"] = rows.flatten(1)
    if memory and same_length:
        raise ValueError(
            "same_length: with memory tokens the authors' mask hides the memory itself from later tokens, which is not "
            "served; give same_length=False"
        )
    count = entries.count(r"layers\.(\d+)\.")
    shared = "r_w_bias" in entries.left
    heads = entries.size("r_w_bias" if shared else "layers.0.dec_attn.r_w_bias", 0, 1)
    inner = entries.size("layers.0.pos_ff.CoreNet.0.weight", 0, width)
    if not heads or width % heads:
        raise ValueError(f"source: {heads} heads do not divide the width {width}, which is not served")
    size = (heads, width // heads)

    def biases(front: str) -> tuple[Tensor, Tensor]:
        return entries.take(f"{front}r_w_bias", *size), entries.take(f"{front}r_r_bias", *size)

    each = biases("") if shared else None
    for i in range(count):
        attention, feed, mine = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff", f"layers.{i}"
        content, position = each or biases(f"{attention}.")
        ours |= {
            f"{mine}.attention.qkv.weight": entries.take(f"{attention}.qkv_net.weight", 3 * width, width),
            f"{mine}.attention.out.weight": entries.take(f"{attention}.o_net.weight", width, width),
            f"{mine}.attention.scores.key.weight": entries.take(f"{attention}.r_net.weight", width, width),
            f"{mine}.attention.scores.content_bias": content,
            f"{mine}.attention.scores.position_bias": position,
            f"{mine}.feedforward.inner.weight": entries.take(f"{feed}.CoreNet.0.weight", inner, width),
            f"{mine}.feedforward.inner.bias": entries.take(f"{feed}.CoreNet.0.bias", inner),
            f"{mine}.feedforward.out.weight": entries.take(f"{feed}.CoreNet.3.weight", width, inner),
            f"{mine}.feedforward.out.bias": entries.take(f"{feed}.CoreNet.3.bias", width),
            **entries.norm(f"{attention}.layer_norm", f"{mine}.norm1", width),
            **entries.norm(f"{feed}.layer_norm", f"{mine}.norm2", width),
        }
    entries.finish(ignored=r"pos_emb\.inv_freq$")
    config = ModelConfig(
        vocabulary=vocabulary, tokens=tokens, memory=memory, cache=cache, width=width, heads=heads, layers=count,
        inner=inner, activation="relu", dropout=dropout, norm="post", relative="shifted", same_length=same_length,
        read_cache=read_cache, tied=torch.equal(embed, head), bptt=bptt, backend=backend,
    )  # fmt: skip
    model = RMTTransformerXL(config) if memory else TransformerXL(config)
    return _filled(model, ours)


def load_rmt_wrapper(
    source: Source,
    *,
    tokens: int,
    heads: int,
    dropout: float = 0.0,
    bptt: Any = "full",
    backend: str = "auto",
) -> RMT:
    """The authors' Hugging Face wrapper, ``RecurrentWrapper(MemoryCell(...))``, around a GPT-2 language model.

    Its mask is plain causal (``config.layout="causal"``), and positions count the memory rows too. A segment with fewer
    tokens is padded, as a padded batch is there: the memory rows behind it have the positions of a whole one.

    Args:
        source: its state dict, or the path of a file that holds one.
        tokens: ``segment_size``; not in a checkpoint. Memory, tokens and memory must fit into its positions.
        heads: ``n_head``, which is not in a checkpoint either.
        dropout, bptt, backend: as in :class:`ModelConfig`.

    Returns:
        The model, in the checkpoint's dtype.

    Raises:
        TypeError, ValueError: entries that are unknown, missing or of another shape (all of them are named), a segment
            that is longer than the checkpoint's positions, or a file that is no state dict.
    """
    entries = _Entries(source, "the RMT wrapper around GPT-2", prefix="memory_cell.")
    gpt = "model.transformer"
    embed = entries.first(f"{gpt}.wte.weight", None, None)
    vocabulary, width = embed.shape
    memory = entries.take("memory", None, width)
    places = entries.take(f"{gpt}.wpe.weight", None, width)
    head = embed  # left out of files where it is tied
    if "model.lm_head.weight" in entries.left:
        head = entries.take("model.lm_head.weight", vocabulary, width)
    stack, count = "recurrence.backbone", entries.count(r"model\.transformer\.h\.(\d+)\.")
    rows = tokens + 2 * len(memory)
    inner = entries.size(f"{gpt}.h.0.mlp.c_fc.weight", 1, width)
    ours = {
        "recurrence.initial_memory": memory,
        "recurrence.embed.weight": embed,
        "recurrence.head.weight": head,
        f"{stack}.places": places[:rows],
        **entries.norm(f"{gpt}.ln_f", f"{stack}.norm", width),
    }
    for i in range(count):
        block, mine = f"{gpt}.h.{i}", f"{stack}.layers.{i}"
        for theirs, name, into, out in (
            ("attn.c_attn", "attention.qkv", width, 3 * width), ("attn.c_proj", "attention.out", width, width),
            ("mlp.c_fc", "feedforward.inner", width, inner), ("mlp.c_proj", "feedforward.out", inner, width),
        ):  # fmt: skip
            # Its weights are (in, out).
            ours[f"{mine}.{name}.weight"] = entries.take(f"{block}.{theirs}.weight", into, out).t().contiguous()
            ours[f"{mine}.{name}.bias"] = entries.take(f"{block}.{theirs}.bias", out)
        ours |= entries.norm(f"{block}.ln_1", f"{mine}.norm1", width)
        ours |= entries.norm(f"{block}.ln_2", f"{mine}.norm2", width)
    entries.finish(ignored=r"model\.transformer\.h\.\d+\.attn\.(masked_)?bias$")
    if rows > len(places):
        raise ValueError(
            f"tokens: a segment of {tokens} tokens with 2 x {len(memory)} memory rows needs {rows} positions, and the "
            f"checkpoint has {len(places)}; give at most {len(places) - 2 * len(memory)}"
        )
    config = ModelConfig(
        vocabulary=vocabulary, tokens=tokens, memory=len(memory), width=width, heads=heads, layers=count, inner=inner,
        activation="gelu_tanh", dropout=dropout, norm="pre", layout="causal", positions="learned",
        tied=torch.equal(embed, head), bptt=bptt, backend=backend,
    )  # fmt: skip
    return _filled(RMT(config), ours)


class _Entries:
    """A state dict that entries are taken from; what is wrong with it is collected, and told at the end."""

    def __init__(self, source: Source, what: str, prefix: str = "") -> None:
        state = _read(source)
        for front in ("module.", prefix):
            if front and state and all(name.startswith(front) for name in state):
                state = {name.removeprefix(front): value for name, value in state.items()}
        self.left, self.what, self.problems = state, what, list[str]()

    def take(self, name: str, *shape: int | None) -> Tensor:
        """An entry of this shape, None: any size. Zeros where there is none."""
        found = self.left.pop(name, None)
        wanted = tuple("any" if size is None else size for size in shape)
        if found is None:
            self.problems.append(f"missing: {name} {wanted}")
        elif found.dim() != len(shape) or any(
            size not in (None, has) for size, has in zip(shape, found.shape, strict=True)
        ):
            self.problems.append(f"another shape: {name} {tuple(found.shape)}, expected {wanted}")
        elif not found.is_floating_point():
            self.problems.append(f"no floating-point numbers: {name} {found.dtype}")
        else:
            return found
        return torch.zeros([size or 0 for size in shape])

    def first(self, name: str, *shape: int | None) -> Tensor:
        """An entry without which nothing else makes sense."""
        found = self.take(name, *shape)
        if self.problems:
            self.finish(ignored=".*")
        return found

    def norm(self, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
        """Weight and bias of a layer norm, under our names."""
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}", width) for part in ("weight", "bias")}

    def size(self, name: str, dim: int, default: int) -> int:
        """A size that only the shape of an entry tells; where it does not, its own ``take`` will say so."""
        found = self.left.get(name)
        return found.shape[dim] if found is not None and dim < found.dim() else default

    def count(self, pattern: str) -> int:
        """One more than the largest number in names that begin with a pattern."""
        found = [int(match[1]) for match in (re.match(pattern, name) for name in self.left) if match]
        return max(found, default=0) + 1

    def finish(self, ignored: str) -> None:
        """Raise ValueError where anything is wrong, or left over beside buffers that hold nothing learned."""
        unknown = [
            f"unknown: {name} {tuple(left.shape)}" for name, left in self.left.items() if not re.match(ignored, name)
        ]
        if self.problems or unknown:
            listed = "\n  ".join(self.problems + unknown)
            raise ValueError(f"source: not a state dict of {self.what}:\n  {listed}")


def _read(source: Source) -> dict[str, Tensor]:
    """A state dict, from a file where a path is given."""
    if isinstance(source, (str, os.PathLike)):
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise ValueError(
                f"source: {os.fspath(source)} holds no state dict of tensors alone ({str(error).splitlines()[0]}); "  # type: ignore[arg-type]
                "of a whole saved model, save state_dict() with its authors' code"
            ) from error
    if not isinstance(source, Mapping):
        raise TypeError(f"source must be a state dict or the path of one, got {type(source).__name__}")
    wrong = [name for name, value in source.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(
            f"source must map names to tensors, which {wrong[:8]} do not; give the model's state dict alone"
        )
    return dict(source)


Model = TypeVar("Model", bound=SegmentModel)


def _filled(model: Model, weights: Mapping[str, Tensor]) -> Model:
    model = model.to(reduce(torch.promote_types, (weight.dtype for weight in weights.values())))
    model.load_state_dict(weights)
    return model
