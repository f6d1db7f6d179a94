"""Fine-tune an encoder to classify long texts: the recipe of arXiv 2304.11062.

Every segment is [CLS | memory | SEP | tokens | SEP]; segments are aligned to the right, so the first is the short one;
the class is read from CLS of the last; the number of segments grows while training. Which of two facts stands in the
text is to be told, and it never stands in the last segment: only memory can carry it there.

python examples/huggingface/finetune_encoder.py             # a small BERT, random weights, minutes on a CPU
python examples/huggingface/finetune_encoder.py --base bert-base-cased --segment 499 --memory 10 --batch 8 --bf16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from questions import CurriculumTrainer, Samples, growing, load_task, padded, words_of
from transformers import BertConfig, BertModel, TrainingArguments, set_seed

from rmt_kernels.integrations.transformers import RMTForSequenceClassification, marks_of
from rmt_kernels.recurrence import Curriculum

FACTS = ("mary went to the kitchen", "mary went to the garden")


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="name or folder of a pretrained encoder; default: a small BERT, random weights")
    parser.add_argument("--segments", type=int, default=4, help="the most that are trained on")
    parser.add_argument("--segment", type=int, default=32, help="tokens of a segment; with 10 memory rows 499 fill 512")
    parser.add_argument("--memory", type=int, default=10, help="memory rows")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32, help="samples of a process, at once")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3, with --base 2e-5")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", default="runs/huggingface-encoder", help="where the model is saved")
    parser.add_argument("--quick", action="store_true", help="seconds: everything runs, nothing is learned")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch, args.segments = 6, 4, 3
    return args


class Texts(Samples):
    """Texts with one of two facts, and which.

    Lengths differ, by up to half a segment: the first segment is short by as much.
    """

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= len(self):
            raise IndexError(i)
        random = np.random.default_rng([i, self.held_out])
        segments, label = self.segments(i // self.per_step), int(random.integers(2))
        length = segments * self.words - int(random.integers(self.words // 2))
        text = [self.names[number] for number in self.task.between(random, 1, length, self.held_out)[0]]
        fact = FACTS[label].split()
        free = length - self.words if segments > 1 else length  # words before the last segment
        start = int(random.integers(free - len(fact) + 1))
        text[start : start + len(fact)] = fact
        ids = self.tokenizer(" ".join(text), add_special_tokens=False)["input_ids"]
        return {"input_ids": ids, "labels": label}


def make_model(args: argparse.Namespace, tokenizer: Any) -> RMTForSequenceClassification:
    """RMT around the base model, with a new output layer."""
    base: Any = args.base
    if not base:
        base = BertModel(BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=args.segment + args.memory + 3, initializer_range=0.1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
    model: RMTForSequenceClassification = RMTForSequenceClassification.from_base(
        base, memory=args.memory, segment=args.segment, marks=marks_of(tokenizer), align="right", bptt="replay",
        num_labels=len(FACTS),
    )  # fmt: skip
    return model


def main(argv: Sequence[str] | None = None) -> dict[int, float]:
    """Train, save and evaluate; accuracies by the number of segments."""
    args = options(argv)
    set_seed(0)
    task, tokenizer = load_task("detect", args.base)
    model = make_model(args, tokenizer)
    settings = TrainingArguments(
        output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch, learning_rate=args.learning_rate or (2e-5 if args.base else 1e-3),
        weight_decay=0.01, warmup_steps=min(50, args.steps // 4), bf16=args.bf16,
        logging_steps=max(1, args.steps // 20), save_strategy="no", report_to="none", remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=torch.accelerator.is_available(),
    )  # fmt: skip
    data = partial(Texts, task, tokenizer, words=words_of(tokenizer, args.segment))
    trainer = CurriculumTrainer(
        model, settings, data_collator=partial(padded, fill=tokenizer.pad_token_id),
        train_dataset=data(
            segments=growing(args.segments, args.steps), steps=args.steps, per_step=args.batch * settings.world_size
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()  # RMTForSequenceClassification.from_pretrained reads it again
    first = trainer.is_world_process_zero()
    if first:
        tokenizer.save_pretrained(args.output)

    found = {}
    if first:
        print(f"\nsegments   accuracy (chance {1 / len(FACTS):.2f})")
    for segments in (*range(1, args.segments + 1), 2 * args.segments):
        always = Curriculum([(0, segments)])
        asked = data(segments=always, per_step=8 if args.quick else 256, steps=1, held_out=True)
        # Trainer would gather the memories too, were they not left out.
        guessed = trainer.predict(asked, ignore_keys=["memory"])
        found[segments] = float((guessed.predictions.argmax(axis=-1) == guessed.label_ids).mean())
        if first:
            print(f"{segments:8d}   {found[segments]:8.3f}", flush=True)
    return found


if __name__ == "__main__":
    main()
