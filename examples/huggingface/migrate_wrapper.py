"""From the RMT authors' wrapper, RecurrentWrapper(MemoryCell(model, num_mem_tokens), segment_size=..., ...), to a model
of transformers: same arguments, state dict converted, and the result compared with stock attention.

python examples/huggingface/migrate_wrapper.py --checkpoint model_best.pth --base gpt2 --num_mem_tokens 16 \\
    --segment_size 512 --max_n_segments 4 --vary_n_segments --k2 2 --output runs/migrated

Without --checkpoint one is made, of a small GPT-2 with random weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PretrainedConfig, set_seed

from rmt_kernels.integrations.transformers import RMTForCausalLM
from rmt_kernels.integrations.transformers.wrapper_checkpoints import (
    config_from_wrapper,
    load_wrapper_state_dict,
    segments_from_wrapper,
)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="the wrapper's state dict, a file; default: one made here")
    parser.add_argument("--base", help="name or folder of the base model, for its configuration")
    parser.add_argument("--output", default="runs/huggingface-migrated", help="where the model is saved")
    parser.add_argument("--quick", action="store_true", help="there is nothing to shorten")
    wrapper = parser.add_argument_group("the wrapper's own arguments")
    wrapper.add_argument("--num_mem_tokens", type=int, default=4)
    wrapper.add_argument("--segment_size", type=int, default=16)
    wrapper.add_argument("--segment_alignment", default=None)
    wrapper.add_argument("--max_n_segments", type=int, default=4)
    wrapper.add_argument("--vary_n_segments", action="store_true")
    wrapper.add_argument("--k2", type=int, default=-1)
    return parser.parse_args(argv)


def make_checkpoint(config: PretrainedConfig, num_mem_tokens: int) -> dict[str, Tensor]:
    """A state dict as the wrapper's: the base model's, and the memory."""
    base = AutoModelForCausalLM.from_config(config)
    embeddings = base.get_input_embeddings().weight
    memory = torch.randn(num_mem_tokens, embeddings.shape[1]) * embeddings.std()
    state = {f"memory_cell.model.{name}": tensor.detach().clone() for name, tensor in base.state_dict().items()}
    return {"memory_cell.memory": memory.detach(), **state}


@torch.no_grad()
def as_the_wrapper(model: RMTForCausalLM, ids: Tensor) -> Tensor:
    """Logits (batch, n, vocabulary) as the wrapper has them: stock attention over [memory | tokens | memory], n a
    multiple of the segment."""
    config = copy.deepcopy(model.model.config)  # which the attention implementation is kept in
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(ids.device).eval()
    stock.load_state_dict(model.model.state_dict())
    m, logits = model.config.memory, []
    memory = model.initial_memory.expand(len(ids), -1, -1)
    for segment in ids.split(model.config.segment, dim=1):
        rows = torch.cat([memory, stock.get_input_embeddings()(segment), memory], dim=1)
        out = stock(inputs_embeds=rows, output_hidden_states=True, use_cache=False)
        memory = out.hidden_states[-1][:, -m:]
        logits.append(out.logits[:, m:-m])
    return torch.cat(logits, dim=1)


def main(argv: Sequence[str] | None = None) -> float:
    """Convert, compare and save; the largest difference of a logit."""
    args = options(argv)
    set_seed(0)
    base: Any
    if args.base:
        base = AutoConfig.from_pretrained(args.base)
    else:
        base = GPT2Config(
            vocab_size=256, n_positions=args.segment_size + 2 * args.num_mem_tokens, n_embd=64, n_layer=2, n_head=4,
            initializer_range=0.1, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    config = config_from_wrapper(
        base, num_mem_tokens=args.num_mem_tokens, segment_size=args.segment_size, k2=args.k2,
        segment_alignment=args.segment_alignment, max_n_segments=args.max_n_segments,
        vary_n_segments=args.vary_n_segments,
    )  # fmt: skip
    model = RMTForCausalLM(config).eval()
    load_wrapper_state_dict(model, args.checkpoint or make_checkpoint(base, args.num_mem_tokens))
    print(f"mask {config.mask}, memory {config.memory}, segment {config.segment}, bptt {config.bptt}")
    segments = segments_from_wrapper(args.max_n_segments, args.vary_n_segments)
    print("segments of the first training steps:", *(segments(step) for step in range(8)))

    ids = torch.randint(config.vocab_size, (2, 3 * config.segment))
    with torch.no_grad():
        logits = model(ids).logits
    difference = float((logits - as_the_wrapper(model, ids)).abs().max())
    print(f"logits of 3 segments: largest difference to stock attention {difference:.1e}")
    model.save_pretrained(args.output)
    print(f"saved; RMTForCausalLM.from_pretrained({args.output!r}) reads it")
    return difference


if __name__ == "__main__":
    main()
