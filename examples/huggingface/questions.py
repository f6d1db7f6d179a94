"""Questions about facts hidden in text, as data for transformers: what the recipes here train on and ask.

The text is Python's documentation, which comes with Python; the facts are made up; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer

from rmt_kernels.recurrence import Curriculum, RandomNumber
from rmt_kernels.training import Task, make_task

__all__ = ["CurriculumTrainer", "Questions", "growing", "load_task", "padded", "words_of"]

OTHER = "<other>"  # what the tasks call words outside a small vocabulary


def load_task(name: str, folder: str | None) -> tuple[Task, Any]:
    """A task with a tokenizer: that of a model's name or folder; None: one with a number for each word, made here."""
    task: Task = make_task(name, words=100)
    if folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return task if tokenizer.unk_token == OTHER else make_task(name, words=20000), tokenizer
    numbers = {word: number for number, word in enumerate((*task.vocabulary, "[CLS]", "[SEP]"))}
    words = Tokenizer(WordLevel(numbers, unk_token=OTHER))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "_", "unk_token": OTHER, "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return task, PreTrainedTokenizerFast(tokenizer_object=words, **special)


def words_of(tokenizer: Any, segment: int) -> int:
    """Words that fill a segment: a word is one token of the tokenizer made here, about one and a half of others."""
    return segment if tokenizer.unk_token == OTHER else segment * 2 // 3


def growing(segments: int, steps: int) -> Callable[[int], int]:
    """The number of segments at a step: up to 1 at first, up to one more at a time, up to ``segments`` from half of the
    steps on. Drawn below that bound, so that short samples are not forgotten."""
    stages = {step * steps // (2 * segments): step + 1 for step in range(segments)}
    schedule: Callable[[int], int] = RandomNumber(1, Curriculum(list(stages.items())))
    return schedule


class Samples(Dataset[dict[str, Any]]):
    """Samples in the order of a training run.

    Sample i has as many segments as step i // per_step. It is a function of i alone: processes, workers that fetch
    ahead and resumed runs all agree, where a callback that changes the data set at a step would come too late for some.

    Args:
        task, tokenizer: of :func:`load_task`.
        words: of a segment's share of the text.
        segments: a function of the step.
        per_step: samples of an optimizer step, on all processes together.
        steps: of the run.
        held_out: text and samples for evaluation.
    """

    def __init__(
        self, task: Task, tokenizer: Any, *, words: int, segments: Callable[[int], int], per_step: int, steps: int,
        held_out: bool = False,
    ) -> None:  # fmt: skip
        self.task, self.tokenizer, self.words, self.segments = task, tokenizer, words, segments
        self.per_step, self.steps, self.held_out = per_step, steps, held_out
        self.names = task.vocabulary

    def __len__(self) -> int:
        return self.steps * self.per_step


class Questions(Samples):
    """A text, a question about it, and the answer, which alone has labels."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= len(self):
            raise IndexError(i)
        segments = self.segments(i // self.per_step)
        drawn = self.task.batch(1, segments, self.words, seed=0, step=i, held_out=self.held_out)
        *text, answer = (self.names[number] for number in drawn.ids[0].tolist())
        prompt, ending = (
            self.tokenizer(words, add_special_tokens=False)["input_ids"] for words in (" ".join(text), f" {answer}")
        )
        return {"input_ids": prompt + ending, "labels": [-100] * len(prompt) + ending}


def padded(samples: list[dict[str, Any]], fill: int) -> dict[str, torch.Tensor]:
    """A batch, int64 (batch, longest), padded on the right; labels of whole samples (batch,) are stacked."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    fills = {"input_ids": fill, "labels": -100, "attention_mask": 0}
    batch: dict[str, torch.Tensor] = {}
    for sample in samples:
        sample["attention_mask"] = [1] * len(sample["input_ids"])
    for name in samples[0]:
        rows = [sample[name] for sample in samples]
        if isinstance(rows[0], list):
            rows = [row + [fills[name]] * (longest - len(row)) for row in rows]
        batch[name] = torch.tensor(rows)
    return batch


class CurriculumTrainer(Trainer):  # type: ignore[misc]
    """Takes the training samples in their order, not shuffled."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in order; accelerate deals them out to the processes."""
        loader = DataLoader(
            self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )  # fmt: skip
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared
