"""Each composition of stock PyTorch computes the op where it says it does, and says why where not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from rmt_kernels import SegmentLayout, segment_attention
from tests.draws import PRESETS, preset_layout
from tests.suite import BF16, F32, Case, check, make, on_backend, refusal, results

DECODER = SegmentLayout.rmt_decoder(65, 8, cache=33)
PLAIN = Case(DECODER, batch=2, kv_heads=2, group=2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("composition", ["stock", "stock_dense", "stock_split"])
def test_equals_the_reference(composition: str, name: str, dtype: torch.dtype) -> None:
    case = Case(PRESETS[name](lambda most: min(most, 33)), dtype=dtype, group=2)
    reason = refusal(composition, make(case), False)
    if reason is not None:
        assert composition == "stock_split"
        assert "window" in name or "same length" in name or name in ("memformer_write", "membart")
        assert "window" in reason
        return
    check(case, results(make(case), on_backend(composition, False), None, False), False, factor=5.0)


@pytest.mark.parametrize("number", range(12))
def test_split_at_any_size(number: int) -> None:
    """Regions of no or one row, a cache longer or shorter than the rows before it."""
    layout = preset_layout(random.Random(number))
    case = Case(layout, batch=1, group=2, head_dim=16, apart=layout.key_size("cache") > 0)
    if refusal("stock_split", make(case), False) is None:
        check(case, results(make(case), on_backend("stock_split", False), None, False), False, factor=5.0)


REFUSED: list[tuple[str, Case, str]] = [
    ("stock_split", Case(DECODER, padding="right"), "padding"),
    ("stock_split", Case(DECODER, padding="left"), "padding"),
    ("stock_split", Case(DECODER, stale=True), "padding"),
    ("stock_split", Case(DECODER.decoding(3), start=True), "query_start"),
    ("stock_split", Case(DECODER.last(9)), "skipped"),
    ("stock_split", Case(SegmentLayout.membart(9, 3)), "SELF"),
    ("stock_flex", Case(DECODER, padding="right"), "batch row"),
    ("stock_flex", PLAIN, "no backward"),
    *((name, Case(DECODER, dropout_p=0.1), "seed") for name in ("stock", "stock_split", "stock_dense", "stock_flex")),
    *((name, Case(DECODER, batch=0), "at least one") for name in ("stock", "stock_split", "stock_dense")),
]


@pytest.mark.parametrize(("composition", "case", "word"), REFUSED, ids=lambda value: getattr(value, "label", value))
def test_says_why_not(composition: str, case: Case, word: str) -> None:
    problem = make(case)
    reason = refusal(composition, problem, False)
    assert reason is not None
    assert word in reason
    with pytest.raises(ValueError, match=f"{composition}.*does not serve"):
        results(problem, on_backend(composition, False), None, False)


@pytest.mark.parametrize("composition", ["stock", "stock_split", "stock_dense", "stock_flex"])
def test_no_lse(composition: str) -> None:
    assert "lse" in str(refusal(composition, make(PLAIN), True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_flex_forward(name: str) -> None:
    layout = PRESETS[name](lambda most: min(most, 33))
    query, key, value = (tensor.detach() for tensor in make(Case(layout, group=2)).inputs.values())
    options: dict[str, Any] = {"backend": "stock_flex"}
    with torch.no_grad():
        out = segment_attention(query, key, value, layout, **options)
        expected = segment_attention(query.double(), key.double(), value.double(), layout, backend="reference")
    assert (out.double() - expected).abs().max() < 5e-6


def test_flex_serves_inference() -> None:
    with torch.no_grad():
        assert refusal("stock_flex", make(PLAIN), False) is None


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("composition", ["stock", "stock_dense", "stock_split"])
def test_any_scale(composition: str, scale: float) -> None:
    """PyTorch's fused causal attention multiplies its -inf by the scale: NaN where that is not positive."""
    case = Case(DECODER, scale=scale)
    if refusal(composition, make(case), False) is None:
        check(case, results(make(case), on_backend(composition, False), None, False), False, factor=5.0)
    else:
        assert composition == "stock_split"
        assert scale <= 0


@pytest.mark.parametrize("composition", ["stock", "stock_dense"])
def test_gradients_where_nothing_is_seen(composition: str) -> None:
    case = Case(SegmentLayout(read=3, tokens=9))
    check(case, results(make(case), on_backend(composition, False), None, False), False)
