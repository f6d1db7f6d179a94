"""Fine-tune a decoder to answer questions about long texts, with transformers.Trainer, on more and more segments.

python examples/huggingface/finetune_decoder.py             # a small GPT-2, random weights, minutes on a CPU
torchrun --nproc-per-node 2 examples/huggingface/finetune_decoder.py   # DistributedDataParallel
python examples/huggingface/finetune_decoder.py --base gpt2 --segment 512 --memory 16 --batch 4 --bf16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from questions import CurriculumTrainer, Questions, growing, load_task, padded, words_of
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from rmt_kernels.integrations.transformers import RMTForCausalLM
from rmt_kernels.recurrence import Curriculum


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="name or folder of a pretrained decoder; default: a small GPT-2, random weights")
    parser.add_argument("--task", choices=["remember", "detect", "reasoning"], default="remember")
    parser.add_argument("--segments", type=int, default=5, help="the most that are trained on")
    parser.add_argument("--segment", type=int, default=20, help="tokens of a segment")
    parser.add_argument("--memory", type=int, default=8, help="memory rows")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="samples of a process, at once")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-3, with --base 5e-5")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", default="runs/huggingface-decoder", help="where the model is saved")
    parser.add_argument("--quick", action="store_true", help="seconds: everything runs, nothing is learned")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch, args.segments = 6, 4, 3
    return args


def make_model(args: argparse.Namespace, tokenizer: Any) -> RMTForCausalLM:
    """RMT around the base model; gradients go back through all segments, in the activation memory of one."""
    base: Any = args.base
    if not base:
        rows = args.segment + 2 * args.memory
        # Wide random weights: at a width of 64 the usual 0.02 learns slowly.
        base = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_positions=rows, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
    model: RMTForCausalLM = RMTForCausalLM.from_base(base, memory=args.memory, segment=args.segment, bptt="replay")
    return model


@torch.no_grad()
def accuracy(model: RMTForCausalLM, data: Questions, batch: int, fill: int) -> float:
    """How many answers would be given right, of tokens predicted each after the true ones before it."""
    model.eval()
    right = 0
    for inputs in DataLoader(data, batch, collate_fn=partial(padded, fill=fill)):
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        guesses = model(**inputs).logits[:, :-1].argmax(dim=-1)
        right += int(((guesses == labels) | (labels == -100)).all(dim=1).sum())
    return right / len(data)


def main(argv: Sequence[str] | None = None) -> dict[int, float]:
    """Train, save and evaluate; accuracies by the number of segments."""
    args = options(argv)
    set_seed(0)
    task, tokenizer = load_task(args.task, args.base)
    model = make_model(args, tokenizer)
    settings = TrainingArguments(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate, learning_rate=args.learning_rate or (5e-5 if args.base else 2e-3),
        weight_decay=0.01 if args.base else 1.0, adam_beta2=0.98, warmup_steps=min(50, args.steps // 4),
        lr_scheduler_type="cosine", bf16=args.bf16, logging_steps=max(1, args.steps // 20), save_strategy="no",
        report_to="none", remove_unused_columns=False, ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=torch.accelerator.is_available(),
    )  # fmt: skip
    data = partial(Questions, task, tokenizer, words=words_of(tokenizer, args.segment))
    trainer = CurriculumTrainer(
        model, settings, data_collator=partial(padded, fill=tokenizer.pad_token_id),
        train_dataset=data(
            segments=growing(args.segments, args.steps), steps=args.steps,
            per_step=args.batch * args.accumulate * settings.world_size,
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()  # tied weights too; RMTForCausalLM.from_pretrained reads it again
    first = trainer.is_world_process_zero()
    if first:
        tokenizer.save_pretrained(args.output)

    found = {}
    if first:
        print(f"\nsegments   tokens   accuracy (chance {task.chance().answer:.2f})")
    for segments in range(1, args.segments + 1):
        always = Curriculum([(0, segments)])
        asked = data(segments=always, per_step=8 if args.quick else 128, steps=1, held_out=True)
        found[segments] = accuracy(model, asked, args.batch, tokenizer.pad_token_id)
        if first:
            print(f"{segments:8d}   {len(asked[0]['input_ids']):6d}   {found[segments]:8.3f}", flush=True)
    return found


if __name__ == "__main__":
    main()
