"""Train a recurrent language model on one process or many.

python examples/train_torchrun.py
torchrun --nproc-per-node 2 examples/train_torchrun.py --steps 20 --wrap fsdp2 --policy driver
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from byte_model import make_model, samples, text
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rmt_kernels import RecurrentMemory, replay_step


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--policy", choices=["replay", "driver", "full"], default="replay")
    parser.add_argument("--wrap", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--autocast", choices=["bf16", "none"], default="none")
    parser.add_argument("--segments", type=int, default=8, help="of a sample")
    parser.add_argument("--segment", type=int, default=128, help="bytes of a segment")
    parser.add_argument("--memory", type=int, default=16, help="memory rows")
    parser.add_argument("--batch", type=int, default=4, help="samples of a process")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    return parser.parse_args()


def wrap(model: RecurrentMemory, how: str) -> Any:
    """The model for several processes."""
    if how == "ddp":
        return DistributedDataParallel(model)
    for layer in model.backbone.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)  # the whole RecurrentMemory is the root: see README.md
    return model


def train(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    """Print loss and speed of every step."""
    model: Any = make_model(
        segment=args.segment, memory=args.memory, width=args.width, layers=args.layers, full=args.policy == "full"
    ).to(device)
    if world > 1:
        model = wrap(model, args.wrap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(rank)  # dropout differs from process to process
    data, length = text(), args.segments * args.segment

    for step in range(args.steps):
        start = time.perf_counter()
        batch = samples(data, args.batch, length, step * world + rank).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast == "bf16"):
            if args.policy == "driver":  # forward and backward; gathered: the fewest all-gathers
                out = replay_step(model, batch, labels=batch, gathered=world > 1 and args.wrap == "fsdp2")
            else:
                out = model(batch, labels=batch)
        assert out.loss is not None
        if args.policy != "driver":
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

        loss = out.loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        seconds = time.perf_counter() - start
        if rank == 0:
            tokens = world * args.batch * length / seconds
            print(f"step {step + 1:4d}   loss {loss / world:.4f}   {tokens:,.0f} tokens/s", flush=True)


def main() -> None:
    args = options()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device, rank, world)
    if world > 1:
        gc.collect()  # gloo can hang or abort where the model outlives the process group
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
