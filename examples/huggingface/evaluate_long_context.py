"""Ask a decoder about facts hidden in longer and longer texts, in the manner of BABILong (arXiv 2406.10149).

A text is read once, memory by memory; then the question and what is left of the text are the prompt of ``generate``,
which begins from that memory. Both take as much activation memory for the longest text as for the shortest.

python examples/huggingface/finetune_decoder.py                     # trains runs/huggingface-decoder
python examples/huggingface/evaluate_long_context.py --model runs/huggingface-decoder --segments 1 2 4 8 16 32
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from questions import Questions, load_task, padded, words_of
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from rmt_kernels.integrations.transformers import RMTForCausalLM
from rmt_kernels.recurrence import Curriculum


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an RMTForCausalLM and its tokenizer")
    parser.add_argument("--base", help="without --model: RMT around this pretrained decoder, not fine-tuned")
    parser.add_argument("--memory", type=int, default=8, help="memory rows, without --model")
    parser.add_argument("--segment", type=int, default=20, help="tokens of a segment, without --model")
    parser.add_argument("--task", choices=["remember", "detect", "reasoning"], default="remember")
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="lengths of the texts")
    parser.add_argument("--samples", type=int, default=128, help="of each length")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="seconds: a few short texts")
    args = parser.parse_args(argv)
    if args.quick:
        args.segments, args.samples = args.segments[:3], 8
    return args


def load(args: argparse.Namespace) -> tuple[RMTForCausalLM, Any, Any]:
    """Model, tokenizer and task."""
    task, tokenizer = load_task(args.task, args.model or args.base)
    if args.model:
        return RMTForCausalLM.from_pretrained(args.model), tokenizer, task
    print("no --model: the memory is not trained, so answers are guesses")
    base: Any = args.base
    if not base:
        base = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_positions=args.segment + 2 * args.memory, n_embd=64, n_layer=2, n_head=4,
            bos_token_id=None, eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
    return RMTForCausalLM.from_base(base, memory=args.memory, segment=args.segment), tokenizer, task


@torch.no_grad()
def answers(model: RMTForCausalLM, prompts: list[list[int]], tokens: int, fill: int) -> Tensor:
    """What the model says after each prompt, int64 (batch, tokens), greedily."""
    segment = model.config.segment
    # Whole segments are read; the last one, whole or not, is the prompt, so that its borders are those of training.
    borders = [(len(prompt) - 1) // segment * segment for prompt in prompts]
    memory = None
    if any(borders):
        text = padded([{"input_ids": prompt[:border]} for prompt, border in zip(prompts, borders, strict=True)], fill)
        memory = model.read(text["input_ids"].to(model.device), text["attention_mask"].to(model.device))
    asked = padded([{"input_ids": prompt[border:]} for prompt, border in zip(prompts, borders, strict=True)], fill)
    asked = {name: tensor.to(model.device) for name, tensor in asked.items()}
    said: Tensor = model.generate(
        asked["input_ids"], attention_mask=asked["attention_mask"], memory=memory, max_new_tokens=tokens,
        do_sample=False, eos_token_id=None, pad_token_id=fill,
    )  # fmt: skip
    return said[:, asked["input_ids"].shape[1] :]


def main(argv: Sequence[str] | None = None) -> dict[int, float]:
    """Accuracies by the number of segments."""
    args = options(argv)
    set_seed(0)
    model, tokenizer, task = load(args)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    fill = tokenizer.pad_token_id
    found = {}
    print(f"segments   tokens   accuracy (chance {task.chance().answer:.2f})")
    for segments in args.segments:
        data = Questions(
            task, tokenizer, words=words_of(tokenizer, model.config.segment), segments=Curriculum([(0, segments)]),
            per_step=args.samples, steps=1, held_out=True,
        )  # fmt: skip
        right = 0
        for first in range(0, args.samples, args.batch):
            samples = [data[i] for i in range(first, min(first + args.batch, args.samples))]
            counts = [sum(label != -100 for label in sample["labels"]) for sample in samples]
            prompts = [sample["input_ids"][:-count] for sample, count in zip(samples, counts, strict=True)]
            said = answers(model, prompts, max(counts), fill)
            right += sum(
                said[i, :count].tolist() == sample["input_ids"][-count:]
                for i, (sample, count) in enumerate(zip(samples, counts, strict=True))
            )
        found[segments] = right / args.samples
        print(f"{segments:8d}   {len(prompts[0]):6d}   {found[segments]:8.3f}", flush=True)
    return found


if __name__ == "__main__":
    main()
