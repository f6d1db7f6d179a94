"""The random numbers of dropout: Philox4x32-10 and what is made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmt_kernels import SegmentLayout, segment_attention
from rmt_kernels.philox import dropout_keep, philox4x32, threshold
from tests.suite import BACKENDS, BF16, F16, F32, Backend, Case, make, refusal

# kat_vectors of Random123 (Salmon et al., SC'11): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    c, k = words(counter), words(key)
    assert [f"{int(word):08x}" for word in philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))] == answer.split()


def test_counter_and_key_of_an_entry() -> None:
    """Key = seed's low and high word, counter = (key // 4, query, query head, batch), word = key % 4."""
    low, high = 0x89ABCDEF, 0xF1234567  # a negative seed
    seed = torch.tensor([(high << 32 | low) - 2**64])
    keep = dropout_keep(seed, 3, 2, torch.tensor([[4, 9]]), 11, 0.4)
    assert keep.shape == (3, 2, 2, 11)
    for batch, head, row, key in [(0, 0, 0, 0), (2, 1, 1, 10), (1, 0, 1, 7), (2, 0, 0, 5)]:
        counter = tuple(torch.tensor(n) for n in (key // 4, (4, 9)[row], head, batch))
        drawn = philox4x32(counter, (torch.tensor(low), torch.tensor(high)))[key % 4]  # type: ignore[arg-type]
        assert bool(keep[batch, head, row, key]) == (int(drawn) >= int(0.4 * 2**32))


@pytest.mark.parametrize("dropout_p", [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(dropout_p: float) -> None:
    keep = dropout_keep(torch.tensor([7]), 4, 8, torch.arange(128)[None], 256, dropout_p)
    deviation = (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - dropout_p)) <= 4 * deviation
    for dim in range(4):  # no batch row, head, query or key is special
        rates = keep.double().mean(dim=[d for d in range(4) if d != dim])
        spread = deviation * keep.shape[dim] ** 0.5
        assert (rates - (1 - dropout_p)).abs().max() <= 5 * spread


def test_threshold() -> None:
    assert [threshold(p) for p in (0.0, 0.5, 0.25)] == [0, 2**31, 2**30]
    assert threshold(1 - 2**-40) < 2**32


def test_an_entry_does_not_depend_on_the_others() -> None:
    seed, rows = torch.tensor([-3]), torch.arange(40)[None]
    whole = dropout_keep(seed, 5, 4, rows, 37, 0.3)
    assert torch.equal(dropout_keep(seed, 2, 4, rows, 37, 0.3), whole[:2])
    assert torch.equal(dropout_keep(seed, 5, 1, rows, 37, 0.3), whole[:, :1])
    assert torch.equal(dropout_keep(seed, 5, 4, rows[:, 11:], 37, 0.3), whole[:, :, 11:])
    assert torch.equal(dropout_keep(seed, 5, 4, rows, 5, 0.3), whole[..., :5])
    assert not torch.equal(dropout_keep(seed + 1, 5, 4, rows, 37, 0.3), whole)
    assert not torch.equal(dropout_keep(seed + 2**32, 5, 4, rows, 37, 0.3), whole)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    "layout",
    [
        SegmentLayout.rmt_encoder(150, 20),
        SegmentLayout.memformer_read(70, 131),
        SegmentLayout.rmt_encoder(99, 2).last(30),
    ],
    ids=["encoder", "cross", "last rows"],
)
def test_backends_draw_the_same_mask(layout: SegmentLayout, dtype: torch.dtype, backend: Backend) -> None:
    """With equal scores and one-hot values the result shows which entries were kept."""
    keys, head_dim = layout.num_keys, 256
    problem = make(Case(layout, batch=2, kv_heads=2, group=2, head_dim=head_dim, dtype=dtype, dropout_p=0.3))
    reason = refusal(backend.name, problem, False)
    if reason is not None:
        pytest.skip(reason)
    query = torch.zeros(2, 4, layout.num_queries, head_dim, dtype=dtype, device=backend.device)
    key = torch.zeros(2, 2, keys, head_dim, dtype=dtype, device=backend.device)
    value = torch.eye(keys, head_dim, dtype=dtype, device=backend.device).expand(2, 2, keys, head_dim)
    for number in (0, 12345678901234567, -1):
        seed = torch.tensor([number], device=backend.device)
        out = segment_attention(query, key, value, layout, dropout_p=0.3, seed=seed, backend=backend.name)
        rows = torch.arange(layout.num_queries)[None] + layout.skip
        keep = dropout_keep(seed.cpu(), 2, 4, rows, keys, 0.3)
        assert torch.equal(out[..., :keys].cpu() != 0, keep)
        assert torch.allclose(out[..., :keys].cpu().float()[keep], torch.tensor(1 / keys / 0.7), rtol=1e-2)


def test_the_default_seed_follows_the_generator() -> None:
    layout = SegmentLayout.rmt_encoder(20, 3)
    query, key, value = torch.randn(3, 1, 2, 23, 8).unbind()

    def draw() -> Tensor:
        return segment_attention(query, key, value, layout, dropout_p=0.5, backend="reference")

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
