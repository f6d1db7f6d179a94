"""What is measured: one plan, so that a small one can run the same code in a test."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import Case
from rmt_kernels import SegmentLayout

__all__ = ["FULL", "Plan", "decode_case", "filling", "short"]


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that is measured.

    Two backends of ours are: ``backend``, as contestant "ours", and ``cuda``, as contestant "cuda".
    """

    backend: str = "triton"
    cuda: str = "cuda"
    # Batch x tokens and heads x head_dim are constant, 16,384 tokens of width 2,048, as in the published comparisons of
    # attention kernels: every length has the same amount of linear work around it, and even 512 tokens at head_dim 128
    # make 2,560 tiles of 128 query rows, about 20 for each multiprocessor.
    rows: int = 16384
    width: int = 2048
    tokens: tuple[int, ...] = (1024, 2048, 4096, 512)
    memory: tuple[int, ...] = (16, 128)
    head_dims: tuple[int, ...] = (128, 64)
    short_tokens: tuple[int, ...] = (512, 1024, 128, 256, 2048)
    short_wide_tokens: tuple[int, ...] = (512, 128, 256)  # at head_dim 128
    short_heads: int = 16
    decode_tokens: int = 8192
    decode_batch: int = 16
    decode_heads: int = 8  # of keys and values
    decode_group: int = 4
    copy_bytes: int = 2**30
    product: int = 8192  # rows of the square matrices that measure the bf16 rate
    long_tokens: int = 16384
    repeats: int = 1000
    rounds: int = 30
    seconds: float = 1.2  # of timed rounds for each case and pass
    # Training through many segments: GPT-2 small, and the small encoder of the long evaluation.
    recurrence_width: int = 768
    recurrence_heads: int = 12
    recurrence_layers: int = 12
    recurrence_vocabulary: int = 50257
    recurrence_tokens: int = 512
    recurrence_memory: int = 16
    recurrence_checked: int = 5  # segments of the gradients that are compared
    recurrence_segments: tuple[int, ...] = (4, 8, 16, 32, 64, 256)
    recurrence_time_segments: int = 16
    recurrence_rounds: int = 15
    recurrence_seconds: float = 60.0  # of timed rounds
    recurrence_reader_width: int = 128
    recurrence_reader_tokens: int = 499
    recurrence_evaluated: tuple[int, ...] = (512, 1024, 4096)
    huggingface_models: tuple[str, ...] = ("gpt2-small", "llama-1b")


FULL = Plan()


def filling(plan: Plan) -> list[Case]:
    """Cases that fill the chip, those that the targets name first."""
    return [
        Case(
            f"rmt_decoder T={tokens} M={memory} D={head_dim}", SegmentLayout.rmt_decoder(tokens, memory),
            max(1, plan.rows // tokens), plan.width // head_dim, plan.width // head_dim, head_dim, "speed targets",
        )
        for memory in plan.memory
        for head_dim in plan.head_dims
        for tokens in plan.tokens
    ]  # fmt: skip


def short(plan: Plan) -> list[Case]:
    """Batch 1: where launches and small grids decide."""
    heads = plan.short_heads
    return [
        Case(
            f"rmt_decoder T={tokens} M=16 D={head_dim} batch 1", SegmentLayout.rmt_decoder(tokens, 16), 1, heads, heads,
            head_dim, "short segments",
        )
        for head_dim, lengths in ((64, plan.short_tokens), (128, plan.short_wide_tokens))
        for tokens in lengths
    ]  # fmt: skip


def decode_case(plan: Plan, head_dim: int) -> Case:
    """One row per sample, the last of TOKENS, against all keys before it."""
    layout = SegmentLayout.rmt_decoder(plan.decode_tokens, 16).decoding()
    heads = plan.decode_heads * plan.decode_group
    name = f"decode {plan.decode_tokens} keys D={head_dim}"
    return Case(name, layout, plan.decode_batch, heads, plan.decode_heads, head_dim, "a decoding step")
