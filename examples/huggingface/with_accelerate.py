"""Train a recurrent language model of transformers in a plain loop with accelerate.

accelerate launch examples/huggingface/with_accelerate.py --accumulate 2
accelerate launch --cpu --num_processes 1 examples/huggingface/with_accelerate.py --bf16
ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/huggingface/with_accelerate.py   # without a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from rmt_kernels.integrations.transformers import RMTForCausalLM
from rmt_kernels.training.corpora import documentation


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="name or folder of a pretrained decoder; default: a small GPT-2, random weights")
    parser.add_argument("--segments", type=int, default=8, help="of a sample")
    parser.add_argument("--segment", type=int, default=128, help="bytes of a segment")
    parser.add_argument("--memory", type=int, default=16, help="memory rows")
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer")
    parser.add_argument("--batch", type=int, default=4, help="samples of a process, at once")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--quick", action="store_true", help="seconds: three steps on short samples")
    args = parser.parse_args(argv)
    if args.quick:
        args.segments, args.segment, args.memory, args.steps, args.batch = 3, 32, 4, 3, 2
    return args


class Passages(Dataset[Tensor]):
    """Passages of Python's documentation as bytes, which are the token numbers, int64 (length,)."""

    def __init__(self, length: int, number: int) -> None:
        self.text = torch.from_numpy(documentation(held_out=False).copy())
        self.length, self.number = length, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        start = int(torch.randint(len(self.text) - self.length, (1,), generator=generator))
        return self.text[start : start + self.length].long()


def make_model(args: argparse.Namespace) -> RMTForCausalLM:
    """RMT around the base model. A byte is below every pretrained vocabulary's size; a real run would tokenize."""
    base: Any = args.base
    if not base:
        base = GPT2LMHeadModel(GPT2Config(
            vocab_size=256, n_positions=args.segment + 2 * args.memory, n_embd=128, n_layer=4, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
    model: RMTForCausalLM = RMTForCausalLM.from_base(base, memory=args.memory, segment=args.segment, bptt="replay")
    return model


def main(argv: Sequence[str] | None = None) -> list[float]:
    """The loss of every step, of all processes."""
    args = options(argv)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate, mixed_precision="bf16" if args.bf16 else "no"
    )  # fmt: skip
    set_seed(0)
    model = make_model(args)
    number = args.steps * args.accumulate * args.batch * accelerator.num_processes
    loader = DataLoader(Passages(args.segments * args.segment, number), args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5 if args.base else 1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()

    losses: list[float] = []
    total = torch.zeros((), device=accelerator.device)
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # through all segments, in the activation memory of one
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        total += accelerator.reduce(loss.detach(), "mean") / args.accumulate
        if accelerator.sync_gradients:
            losses.append(float(total))
            total.zero_()
            accelerator.print(f"step {len(losses):4d}   loss {losses[-1]:.4f}", flush=True)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
