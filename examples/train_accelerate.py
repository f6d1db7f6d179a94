"""Train a recurrent language model with Accelerate.

accelerate launch examples/train_accelerate.py
accelerate launch --cpu --num_processes 2 examples/train_accelerate.py --steps 20 --driver
"""

from __future__ import annotations

import argparse
import time

import torch
from accelerate import Accelerator
from byte_model import make_model, samples, text

from rmt_kernels import replay_step


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--driver", action="store_true", help="replay_step in place of the checkpoint engine")
    parser.add_argument("--segments", type=int, default=8, help="of a sample")
    parser.add_argument("--segment", type=int, default=128, help="bytes of a segment")
    parser.add_argument("--memory", type=int, default=16, help="memory rows")
    parser.add_argument("--batch", type=int, default=4, help="samples of a process")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    return parser.parse_args()


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Print loss and speed of every step."""
    rank, world = accelerator.process_index, accelerator.num_processes
    model = make_model(segment=args.segment, memory=args.memory, width=args.width, layers=args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(rank)  # dropout differs from process to process
    data, length = text(), args.segments * args.segment

    for step in range(args.steps):
        start = time.perf_counter()
        batch = samples(data, args.batch, length, step * world + rank).to(accelerator.device)
        if args.driver:
            with accelerator.autocast():
                out = replay_step(model, batch, labels=batch, scaler=accelerator.scaler)
        else:
            out = model(batch, labels=batch)
            accelerator.backward(out.loss)
        assert out.loss is not None
        optimizer.step()
        optimizer.zero_grad()

        loss = accelerator.reduce(out.loss.detach(), "mean")
        tokens = world * args.batch * length / (time.perf_counter() - start)
        accelerator.print(f"step {step + 1:4d}   loss {loss:.4f}   {tokens:,.0f} tokens/s", flush=True)


def main() -> None:
    args = options()
    accelerator = Accelerator()
    train(args, accelerator)
    accelerator.free_memory()  # gloo can hang or abort where the model outlives the process group
    accelerator.end_training()


if __name__ == "__main__":
    main()
