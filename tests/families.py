"""Small models of transformers with random weights, one of each family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

__all__ = ["DECODERS", "ENCODERS", "FAMILIES", "OLD", "SERVED", "VERSION", "Family", "make"]

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
OLD = VERSION < (5, 0)
_AUTO = {
    "base": AutoModel, "causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A name, the configuration's class and its arguments."""

    name: str
    config: str
    arguments: dict[str, Any]
    decoder: bool = True

    def make_config(self, **changes: Any) -> Any:
        """A configuration; the numbers of heads give a head_dim of 16."""
        return getattr(transformers, self.config)(**{**self.arguments, **changes})


_LLAMA = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_BERT = {**_LLAMA, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    family.name: family
    for family in (
        Family("gpt2", "GPT2Config", {
            "vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        }),
        Family("llama", "LlamaConfig", {**_LLAMA, "num_key_value_heads": 2}),
        Family("qwen3", "Qwen3Config", {**_LLAMA, "num_key_value_heads": 2, "head_dim": 24}),
        Family("opt", "OPTConfig", {
            "vocab_size": 64, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0,
        }),
        Family("gpt_neox", "GPTNeoXConfig", {**_LLAMA, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
        Family("bert", "BertConfig", _BERT, decoder=False),
        Family("roberta", "RobertaConfig", {**_BERT, "pad_token_id": 1}, decoder=False),
    )
}  # fmt: skip
DECODERS = [name for name, family in FAMILIES.items() if family.decoder]
ENCODERS = [name for name, family in FAMILIES.items() if not family.decoder]
# On the attention interface with its masks too: OPT is from 5.2 on, encoders are from 5.0 on.
SERVED = [name for name in FAMILIES if not ((OLD and name in ENCODERS) or (VERSION < (5, 2) and name == "opt"))]


def make(name: str, kind: str = "base", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, on stock attention, in evaluation mode. kind: a key of ``_AUTO``."""
    family = FAMILIES[name]
    build: Callable[..., Any] = _AUTO[kind].from_config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(family.make_config(**changes), attn_implementation="sdpa").to(dtype).eval()
