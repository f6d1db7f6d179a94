"""``RMTAttention`` against ``nn.MultiheadAttention``, against itself dense, and layer-local against the plain loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels import Region, RMTAttention, Rule, SegmentLayout, segment_attention
from rmt_kernels.backends import cpu

WIDTH, HEADS, ROWS, LENGTHS = 48, 4, 21, [21, 5, 13]
DECODER = SegmentLayout.rmt_decoder(ROWS - 6, 3)
FULL = SegmentLayout(tokens=ROWS, rules={("tokens", "tokens"): Rule.FULL})


def pair(**options: Any) -> tuple[nn.MultiheadAttention, RMTAttention]:
    """nn.MultiheadAttention, and RMTAttention with its state dict."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases other than zero
    ours = RMTAttention(WIDTH, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padded(lengths: list[int], rows: int = ROWS) -> Tensor:
    """A key_padding_mask with padding on the right."""
    return torch.arange(rows) >= torch.tensor(lengths)[:, None]


def gradients(module: nn.Module, out: Tensor, x: Tensor, at: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [x, *module.parameters()], at))


def projected(module: RMTAttention, x: Tensor) -> list[Tensor]:
    """query, key and value of every row, (batch, heads, rows, head_dim)."""
    assert module.in_proj_weight is not None
    packed = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1)]


def check_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * (1 + float(b.detach().abs().max())))


# -- in place of nn.MultiheadAttention -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [None, padded(LENGTHS), padded(LENGTHS).flip(1)], ids=["whole", "right", "left"])
def test_gives_multihead_attentions_outputs_and_gradients(bias: bool, mask: Tensor | None) -> None:
    theirs, ours = pair(bias=bias)
    x = torch.randn(3, ROWS, WIDTH, requires_grad=True)
    real = torch.ones(3, ROWS, dtype=torch.bool) if mask is None else ~mask
    at = torch.randn(3, ROWS, WIDTH) * real[..., None]
    want, want_weights = theirs(x, x, x, key_padding_mask=mask)
    wanted = gradients(theirs, want, x, at)
    for options in ({}, {"layout": FULL}):
        got, weights = ours(x, x, x, mask, **options)
        assert weights is None
        torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)
        check_close(gradients(ours, got, x, at), wanted, 1e-5)
    if mask is not None:
        float_mask = torch.zeros(mask.shape).masked_fill(mask, float("-inf"))
        assert torch.equal(ours(x, key_padding_mask=float_mask)[0], got)
    _, weights = ours(x, key_padding_mask=mask, need_weights=True)
    torch.testing.assert_close(weights[real], want_weights[real])
    assert not weights[~real].any()


def test_same_positional_arguments_and_initialisation() -> None:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, 0.25, False, False, False, None, None, True, "cpu", torch.float64)
    torch.manual_seed(1)
    ours = RMTAttention(WIDTH, HEADS, 0.25, False, False, False, None, None, True, "cpu", torch.float64)
    assert ours.dropout == 0.25
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(ROWS, dtype=torch.float64)
    order = (None, True, causal, False)  # key_padding_mask, need_weights, attn_mask, average_attn_weights
    for a, b in zip(ours.eval()(x, x, x, *order), theirs.eval()(x, x, x, *order), strict=True):
        torch.testing.assert_close(a, b)


def test_one_sample_without_a_batch() -> None:
    theirs, ours = pair()
    x, mask = torch.randn(ROWS, WIDTH), padded([9])[0]
    want, want_weights = theirs(x, x, x, key_padding_mask=mask)
    got, weights = ours(x, x, x, key_padding_mask=mask, need_weights=True)
    torch.testing.assert_close(got[:9], want[:9])
    torch.testing.assert_close(weights[:9], want_weights[:9])


@pytest.mark.parametrize("layout", [DECODER, SegmentLayout.causal(ROWS - 6, 3), SegmentLayout.rmt_encoder(ROWS - 6, 6)])
def test_a_layout_is_multihead_attention_with_its_mask(layout: SegmentLayout) -> None:
    theirs, ours = pair()
    x = torch.randn(2, ROWS, WIDTH, requires_grad=True)
    mask, at = ~layout.dense_mask(), torch.randn(2, ROWS, WIDTH)
    want, want_weights = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    got, weights = ours(x, layout=layout, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, want_weights)
    check_close(gradients(ours, got, x, at), gradients(theirs, want, x, at), 1e-5)
    ours.layout = layout
    for given in (mask, torch.zeros(mask.shape).masked_fill(mask, float("-inf")), mask.expand(2 * HEADS, -1, -1)):
        assert torch.equal(ours(x, attn_mask=given)[0], got)
    assert torch.equal(ours(x)[0], got)


def test_is_causal_without_a_layout() -> None:
    theirs, ours = pair()
    x = torch.randn(2, ROWS, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(ROWS)
    want, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    for options in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask, "is_causal": True}):
        torch.testing.assert_close(ours(x, **options)[0], want)
    torch.testing.assert_close(ours(x, layout=SegmentLayout.causal(ROWS - 6, 3), is_causal=True)[0], want)


def test_padding_is_found_inside_tokens() -> None:
    ours = RMTAttention(WIDTH, HEADS, layout=DECODER)
    x = torch.randn(2, ROWS, WIDTH)
    right, left = torch.zeros(2, ROWS, dtype=torch.bool), torch.zeros(2, ROWS, dtype=torch.bool)
    right[1, -5:-3], left[1, 3:5] = True, True
    lengths, starts = torch.tensor([15, 13], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    plain = ours(x)[0]
    for mask, given in ((right, {"token_lengths": lengths}), (left, {"token_starts": starts})):
        got = ours(x, key_padding_mask=mask)[0]
        assert torch.equal(got, ours(x, **given)[0])
        assert not torch.equal(got, plain)
    assert torch.equal(ours(x, key_padding_mask=torch.zeros(2, ROWS, dtype=torch.bool))[0], plain)


@pytest.mark.parametrize(
    "layout",
    [
        SegmentLayout.transformer_xl(10, 7, memory=2),
        SegmentLayout.memformer_read(14, 7),
        SegmentLayout.memformer_write(14, 7),
        DECODER.last(4),
        SegmentLayout(read=3, tokens=15, write=3, queries=("read", "write"), keys=("tokens",),
                      rules={("read", "tokens"): Rule.FULL, ("write", "tokens"): Rule.FULL}),
    ],
    ids=["cache", "read", "write", "last", "between"],
)  # fmt: skip
def test_layouts_in_which_some_rows_do_not_ask_or_are_not_asked(layout: SegmentLayout) -> None:
    ours = RMTAttention(WIDTH, HEADS, dtype=torch.float64)
    x = torch.randn(2, ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    got, weights = ours(x, layout=layout, need_weights=True)
    assert got.shape == (2, layout.num_queries, WIDTH)
    assert weights.shape == (2, layout.num_queries, layout.num_keys)
    # All rows projected, then picked one by one.
    owner = [name for name in ("cache", "read", "tokens", "write") for _ in range(layout.size(name))]
    asking = [i for i, name in enumerate(owner) if Region[name.upper()] in layout.queries][layout.skip :]
    asked = [i for i, name in enumerate(owner) if Region[name.upper()] in layout.keys]
    q, k, v = projected(ours, x)
    heads = segment_attention(q[:, :, asking], k[:, :, asked], v[:, :, asked], layout, backend="reference")
    want = ours.out_proj(heads.transpose(1, 2).flatten(2))
    at = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    check_close(gradients(ours, got, x, at), gradients(ours, want, x, at), 1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query(kv_heads: int) -> None:
    ours = RMTAttention(WIDTH, HEADS, num_kv_heads=kv_heads, layout=DECODER, dtype=torch.float64)
    assert set(ours.state_dict()) == {f"{n}_proj.{p}" for n in ("q", "k", "v", "out") for p in ("weight", "bias")}
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)

    def repeated(parameter: Tensor) -> Tensor:
        """Each key/value head once for every query head that shares it."""
        heads: Tensor = parameter.unflatten(0, (kv_heads, -1))
        return heads.repeat_interleave(HEADS // kv_heads, dim=0).flatten(0, 1)

    for linear in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj):
        nn.init.normal_(linear.bias)
    packed = {}
    for p in ("weight", "bias"):
        query, key, value = (linear.get_parameter(p) for linear in (ours.q_proj, ours.k_proj, ours.v_proj))
        packed[f"in_proj_{p}"] = torch.cat([query, repeated(key), repeated(value)])
    theirs.load_state_dict(packed | {f"out_proj.{n}": p for n, p in ours.out_proj.named_parameters()})
    x = torch.randn(2, ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    want, want_weights = theirs(x, x, x, attn_mask=~DECODER.dense_mask())
    got, weights = ours(x, need_weights=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(weights, want_weights)
    at = torch.randn_like(got)
    check_close([torch.autograd.grad(got, x, at)[0]], [torch.autograd.grad(want, x, at)[0]], 1e-12)
    assert set(RMTAttention(WIDTH, HEADS, num_kv_heads=HEADS).state_dict()) == set(theirs.state_dict())
    assert RMTAttention(WIDTH, HEADS, num_kv_heads=kv_heads, bias=False).q_proj.bias is None


def test_dropout_is_decided_by_the_seed_and_only_in_training() -> None:
    ours = RMTAttention(WIDTH, HEADS, dropout=0.4, layout=DECODER)
    x = torch.randn(2, ROWS, WIDTH)
    torch.manual_seed(5)
    first, weights = ours(x, need_weights=True, average_attn_weights=False)
    torch.manual_seed(5)
    again, _ = ours(x)
    other, _ = ours(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = weights[DECODER.dense_mask().expand(2, HEADS, -1, -1)] != 0
    assert abs(float(kept.float().mean()) - 0.6) < 0.05
    value = projected(ours, x)[2]
    want = ours.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)
    ours.eval()
    still, weights = ours(x, need_weights=True)
    assert torch.equal(still, ours(x)[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, ROWS))


# -- inside nn.TransformerEncoder ------------------------------------------------------------------------------------


def encoder_layer(norm_first: bool = False) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True, norm_first=norm_first)


def with_ours(layer: nn.TransformerEncoderLayer, layout: SegmentLayout | None = None) -> nn.TransformerEncoderLayer:
    """A copy in which self_attn is an RMTAttention with the same weights."""
    layer = copy.deepcopy(layer)
    ours = RMTAttention(WIDTH, HEADS, layout=layout)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("layout", [None, DECODER], ids=["full", "decoder"])
def test_inside_an_encoder_layer(training: bool, norm_first: bool, layout: SegmentLayout | None) -> None:
    theirs = encoder_layer(norm_first)
    ours = with_ours(theirs, layout)
    mask = None if layout is None else ~layout.dense_mask()
    x = torch.randn(3, ROWS, WIDTH, requires_grad=True)
    theirs.train(training)
    ours.train(training)
    want, got = theirs(x, src_mask=mask), ours(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    at = torch.randn_like(want)
    mine = dict(zip([n for n, _ in ours.named_parameters()], gradients(ours, got, x, at)[1:], strict=True))
    check_close([mine[n] for n, _ in theirs.named_parameters()], gradients(theirs, want, x, at)[1:], 1e-4)
    with torch.no_grad():  # in evaluation, nn.MultiheadAttention's layer takes its fused path here
        torch.testing.assert_close(ours(x), theirs(x, src_mask=mask), rtol=1e-5, atol=1e-5)
    if mask is not None:
        torch.testing.assert_close(ours(x, src_mask=mask), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("replaced", ["before", "after"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_inside_an_encoder(training: bool, replaced: str, grad: bool) -> None:
    """With a padded batch; in evaluation nn.TransformerEncoder would make it a nested tensor."""
    layer = encoder_layer()
    theirs = nn.TransformerEncoder(layer, 2)
    if replaced == "before":
        ours = nn.TransformerEncoder(with_ours(layer), 2)
    else:
        ours = copy.deepcopy(theirs)
        ours.layers = nn.ModuleList(with_ours(block) for block in theirs.layers)  # type: ignore[arg-type]
    theirs.train(training)
    ours.train(training)
    x, mask = torch.randn(3, ROWS, WIDTH), padded([ROWS - 2, 5, 13])
    with torch.set_grad_enabled(grad):
        want, got = theirs(x, src_key_padding_mask=mask), ours(x, src_key_padding_mask=mask)
    assert got.shape == want.shape
    torch.testing.assert_close(got[~mask], want[~mask], rtol=1e-5, atol=1e-5)
    causal = nn.Transformer.generate_square_subsequent_mask(ROWS)
    torch.testing.assert_close(ours(x, mask=causal), theirs(x, mask=causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inside_a_decoder_layer(training: bool) -> None:
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True).train(training)
    ours = copy.deepcopy(theirs)
    ours.self_attn = RMTAttention(WIDTH, HEADS)  # type: ignore[assignment]
    ours.load_state_dict(theirs.state_dict())
    x, encoded = torch.randn(2, ROWS, WIDTH), torch.randn(2, 9, WIDTH)
    options: dict[str, Any] = {
        "tgt_mask": torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1), "tgt_is_causal": True,
        "tgt_key_padding_mask": padded([ROWS, 8]),
    }  # fmt: skip
    want, got = theirs(x, encoded, **options), ours(x, encoded, **options)
    real = ~options["tgt_key_padding_mask"]
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor() -> None:
    layout = SegmentLayout.rmt_encoder(ROWS - 4, 4)
    ours = RMTAttention(WIDTH, HEADS, layout=layout).eval()
    x, lengths = torch.randn(3, ROWS, WIDTH), [12, 4, 18]
    nested = torch.nested.nested_tensor([row[:n] for row, n in zip(x, lengths, strict=True)])
    want = ours(x, key_padding_mask=padded(lengths))[0]
    got = ours(nested)[0]
    assert got.is_nested
    for part, row, n in zip(got.unbind(), want, lengths, strict=True):
        torch.testing.assert_close(part, row[:n])
    with pytest.raises(ValueError, match="nested"):
        ours(nested, need_weights=True)
    with pytest.raises(ValueError, match="at most the layout's 5 rows"):
        ours(nested, layout=SegmentLayout.rmt_encoder(4, 1))


# -- copies, precision, compilation ----------------------------------------------------------------------------------


def test_copies_and_state_dicts() -> None:
    ours = RMTAttention(WIDTH, HEADS, dropout=0.1, layout=DECODER).eval()
    x = torch.randn(2, ROWS, WIDTH)
    loaded = RMTAttention(WIDTH, HEADS, layout=DECODER).eval()
    loaded.load_state_dict(ours.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert torch.equal(other(x)[0], ours(x)[0])
        assert other.layout == DECODER
    assert "rmt_decoder" in repr(ours)


def test_autocast() -> None:
    ours = RMTAttention(WIDTH, HEADS, layout=DECODER)
    x, memory = torch.randn(2, ROWS, WIDTH, requires_grad=True), torch.randn(2, 3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        got, weights = ours(x, need_weights=True)
        out, after = ours(torch.randn(2, 30, WIDTH), memory=memory)
    assert got.dtype is weights.dtype is out.dtype is after.dtype is torch.bfloat16
    want, want_weights = ours(x, need_weights=True)
    for narrow, wide in ((got.detach(), want.detach()), (weights.detach(), want_weights.detach())):
        assert float((narrow - wide).norm() / wide.norm()) < 1e-2
    got.float().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# The stock compositions build masks of padded calls in a way that torch.compile does not trace.
needs_kernels = pytest.mark.skipif(bool(cpu.why_missing), reason="needs the compiled CPU kernels")


@pytest.mark.parametrize(
    "options",
    [
        {}, {"is_causal": True}, {"layout": DECODER},
        pytest.param({"key_padding_mask": padded([4, 13])}, marks=needs_kernels),
        pytest.param({"layout": SegmentLayout.rmt_decoder(8, 3), "memory": True}, marks=needs_kernels),
        pytest.param({"layout": DECODER, "token_starts": torch.tensor([3, 0], dtype=torch.int32)}, marks=needs_kernels),
    ],
    ids=["full", "causal", "layout", "padding", "memory", "left"],
)  # fmt: skip
def test_compiles_without_graph_breaks(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    ours = RMTAttention(WIDTH, HEADS)
    x, memory = torch.randn(2, ROWS, WIDTH, requires_grad=True), torch.randn(2, 3, WIDTH)
    options = options | ({"memory": memory} if "memory" in options else {})
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got, want = compiled(x, **options), ours(x, **options)
    at = torch.randn_like(want[0])
    check_close(gradients(ours, got[0], x, at), gradients(ours, want[0], x, at), 1e-6)
    torch.testing.assert_close(got, want)


def test_compiles_for_several_numbers_of_rows() -> None:
    torch._dynamo.reset()
    ours = RMTAttention(WIDTH, HEADS)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for rows in (ROWS, ROWS + 1, ROWS + 2):
        x = torch.randn(2, rows, WIDTH)
        torch.testing.assert_close(compiled(x), ours(x))


@needs_kernels
def test_a_mask_that_compilation_cannot_look_at_is_never_taken_wrongly() -> None:
    torch._dynamo.reset()
    ours = RMTAttention(WIDTH, HEADS)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, ROWS, WIDTH)
    with pytest.raises(RuntimeError, match="padding must be on the right"):
        compiled(x, key_padding_mask=padded([4, 13]).flip(1))
    with pytest.raises(Exception, match="attn_mask cannot be compared"):
        compiled(x, attn_mask=torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1))


# -- layer-local recurrence ------------------------------------------------------------------------------------------

WINDOWED = SegmentLayout.rmt_decoder(7, 3, window=4)
MEMORY_LAYOUTS = {
    "rmt_decoder": SegmentLayout.rmt_decoder(7, 3),
    "window": WINDOWED,
    "causal": SegmentLayout.causal(7, 3),
    "rmt_encoder": SegmentLayout.rmt_encoder(7, 3),
    "membart": SegmentLayout.membart(7, 3),
    "one token, one row": SegmentLayout.rmt_decoder(1, 1),
}


def by_segments(
    module: RMTAttention, tokens: Tensor, memory: Tensor, layout: SegmentLayout, lengths: Tensor, left: bool
) -> tuple[Tensor, Tensor]:
    """What ``memory=`` must give: one call per segment, and each sample's own last memory."""
    outs, carried = [], layout.write or layout.read
    for first in range(0, tokens.shape[1], layout.tokens):
        here = tokens[:, first : first + layout.tokens]
        short = layout.tokens - here.shape[1]
        here = torch.cat([here, here.new_zeros(here.shape[0], short, here.shape[2])], dim=1)
        inside = (lengths - first).clamp(0, layout.tokens - (0 if left else short)).to(torch.int32)
        padding = {"token_starts": inside} if left else {"token_lengths": inside}
        segment = torch.cat([memory, here, memory] if layout.write else [memory, here], dim=1)
        out, _ = module(segment, layout=layout, **padding)
        outs.append(out[:, layout.read : layout.read + layout.tokens - short])
        new = out[:, -carried:] if layout.write else out[:, :carried]
        present = inside < layout.tokens if left else inside > 0
        memory = torch.stack([n if there else old for n, old, there in zip(new, memory, present, strict=True)])
    return torch.cat(outs, dim=1), memory


@pytest.mark.parametrize("name", MEMORY_LAYOUTS)
@pytest.mark.parametrize("padding", ["", "short", "right", "left", "mask"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_memory_equals_the_loop_over_segments(name: str, padding: str, kv_heads: int) -> None:
    layout = MEMORY_LAYOUTS[name]
    rows, left = 4 * layout.tokens - (3 if padding == "short" and layout.tokens > 3 else 0), padding == "left"
    tokens = torch.randn(3, rows, WIDTH, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(3, layout.read, WIDTH, dtype=torch.float64, requires_grad=True)
    lengths, options = torch.tensor([0 if left else rows] * 3, dtype=torch.int32), {}
    if padding in ("right", "left", "mask"):
        lengths = torch.tensor([0, layout.tokens + layout.tokens // 2, rows], dtype=torch.int32)
        options = {"right": {"token_lengths": lengths}, "left": {"token_starts": lengths}}.get(
            padding, {"key_padding_mask": padded(lengths.tolist(), rows)}
        )
    at = torch.randn_like(tokens), torch.randn_like(memory)
    weights = RMTAttention(WIDTH, HEADS, num_kv_heads=kv_heads, dtype=torch.float64)

    def run(compute: Callable[[RMTAttention], tuple[Tensor, Tensor]], backend: str, dtype: torch.dtype) -> list[Tensor]:
        module = copy.deepcopy(weights).to(dtype)
        module.backend = backend
        found = compute(module)
        leaves = (tokens, memory, *module.parameters())
        grads = torch.autograd.grad(found, leaves, [g.to(dtype) for g in at])
        return [*found, *grads]

    exact = run(lambda m: by_segments(m, tokens, memory, layout, lengths, left), "reference", torch.float64)
    scan = run(lambda m: m(tokens, layout=layout, memory=memory, **options), "reference", torch.float64)
    check_close(scan, exact, 1e-12)
    single = run(lambda m: m(tokens.float(), layout=layout, memory=memory.float(), **options), "auto", torch.float32)
    check_close([tensor.double() for tensor in single], exact, 2e-5)


def test_memory_is_handed_on_between_calls() -> None:
    """Eight segments at once are five and then three."""
    ours = RMTAttention(WIDTH, HEADS, layout=SegmentLayout.rmt_decoder(7, 3))
    tokens, memory = torch.randn(2, 56, WIDTH), torch.randn(2, 3, WIDTH)
    want, last = ours(tokens, memory=memory)
    first, between = ours(tokens[:, :35], memory=memory)
    second, end = ours(tokens[:, 35:], memory=between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), want)
    torch.testing.assert_close(end, last)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"embed_dim": 50}, ValueError, "embed_dim must be a positive multiple of 4, got 50"),
        ({"embed_dim": 0}, ValueError, "embed_dim must be"),
        ({"embed_dim": 48.0}, TypeError, "embed_dim must be an int"),
        ({"num_heads": 0}, ValueError, "num_heads must be positive"),
        ({"num_heads": "4"}, TypeError, "num_heads must be an int"),
        ({"num_kv_heads": 3}, ValueError, "num_heads must be a positive multiple of 3"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads must be positive"),
        ({"dropout": 1.0}, ValueError, "dropout must satisfy"),
        ({"dropout": float("nan")}, ValueError, "dropout must satisfy"),
        ({"dropout": True}, TypeError, "dropout must be a float"),
        ({"kdim": 16}, ValueError, "kdim=16 is not supported"),
        ({"vdim": 16}, ValueError, "vdim=16 is not supported"),
        ({"add_bias_kv": True}, ValueError, "add_bias_kv=True is not supported"),
        ({"add_zero_attn": True}, ValueError, "add_zero_attn=True is not supported"),
        ({"batch_first": False}, ValueError, "batch_first=False is not supported"),
        ({"layout": "rmt_decoder"}, TypeError, "layout must be a SegmentLayout"),
    ],
)  # fmt: skip
def test_constructor_refuses(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RMTAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, **kwargs})


X = torch.randn(2, ROWS, WIDTH)
HOLE = torch.zeros(2, ROWS, dtype=torch.bool)
HOLE[0, 8] = True
MIXED = torch.zeros(2, ROWS, dtype=torch.bool)
MIXED[0, 0] = MIXED[1, -1] = True
ENDS = torch.tensor([3, 3], dtype=torch.int32)
MEMORY = torch.randn(2, 3, WIDTH)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"key": X.clone()}, ValueError, "segment_attention"),
        ({"value": X.clone()}, ValueError, "same object as query"),
        ({"query": X[..., :40]}, ValueError, "query must have shape"),
        ({"query": X[None]}, ValueError, "query must have shape"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor"),
        ({"layout": "full"}, TypeError, "layout must be a SegmentLayout"),
        ({"layout": SegmentLayout.rmt_decoder(16, 3)}, ValueError, "READ 3, TOKENS 16, WRITE 3"),
        ({"key_padding_mask": HOLE}, ValueError, "one run at one end"),
        ({"key_padding_mask": MIXED}, ValueError, "same end in the whole batch"),
        ({"key_padding_mask": MIXED, "layout": DECODER}, ValueError, "only TOKENS rows"),
        ({"key_padding_mask": HOLE[:, :5]}, ValueError, "key_padding_mask must have shape"),
        ({"key_padding_mask": HOLE.long()}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"key_padding_mask": HOLE * -1e9}, ValueError, "0 and -inf only"),
        ({"key_padding_mask": HOLE, "token_lengths": ENDS}, ValueError, "already given by key_padding_mask"),
        ({"token_starts": ENDS, "token_lengths": ENDS}, ValueError, "already given by token_lengths"),
        ({"attn_mask": torch.eye(ROWS, dtype=torch.bool)}, ValueError, "attn_mask .* is not the mask of the layout"),
        ({"attn_mask": ~FULL.dense_mask(), "layout": DECODER}, ValueError, "is not the mask of the layout"),
        ({"attn_mask": torch.randn(ROWS, ROWS)}, ValueError, "0 and -inf only"),
        ({"attn_mask": HOLE}, ValueError, "is not the mask"),
        ({"attn_mask": "causal"}, TypeError, "attn_mask must be a bool tensor"),
        ({"is_causal": True, "layout": DECODER}, ValueError, "is_causal=True contradicts the layout"),
        ({"is_causal": True, "layout": FULL}, ValueError, "is_causal=True contradicts the layout"),
        ({"memory": MEMORY}, ValueError, "memory= needs one"),
        ({"memory": MEMORY[:, :2], "layout": DECODER}, ValueError, r"memory must have shape \(2, 3, 48\)"),
        ({"memory": MEMORY[:1], "layout": DECODER}, ValueError, "memory must have shape"),
        ({"memory": 0, "layout": DECODER}, TypeError, "memory must be a torch.Tensor"),
        ({"memory": MEMORY, "layout": SegmentLayout.transformer_xl(9, 9, memory=3)}, ValueError, "no cache"),
        ({"memory": MEMORY, "layout": SegmentLayout.memformer_write(9, 3)}, ValueError, "needs queries in TOKENS"),
        ({"memory": MEMORY, "layout": DECODER.last(2)}, ValueError, "no skipped"),
        ({"memory": MEMORY, "layout": SegmentLayout(read=2, tokens=7, write=3)}, ValueError, "hold the same memory"),
        ({"memory": MEMORY, "layout": DECODER, "need_weights": True}, ValueError, "need_weights cannot be combined"),
        ({"memory": MEMORY, "layout": DECODER, "is_causal": True}, ValueError, "is_causal cannot be combined"),
        ({"memory": MEMORY, "layout": DECODER, "token_starts": ENDS}, ValueError, "whole segments of 15"),
        ({"memory": MEMORY, "layout": DECODER, "token_lengths": 10 * ENDS}, ValueError, "between 0 and 21"),
        ({"memory": MEMORY, "layout": DECODER, "token_lengths": ENDS[:1]}, ValueError, "token_lengths must be"),
        ({"memory": MEMORY, "layout": DECODER, "query": X[:, :0]}, ValueError, "at least one token"),
    ],
)  # fmt: skip
def test_forward_refuses(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    ours = RMTAttention(WIDTH, HEADS)
    with pytest.raises(error, match=message):
        ours(**{"query": X, **kwargs})
