"""Segment attention as an attention implementation of transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers", minversion="4.57")

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from rmt_kernels import SegmentLayout, segment_attention
from rmt_kernels.integrations.transformers import attention, masks, register, swap_in
from tests.families import DECODERS, ENCODERS, OLD, SERVED, make

M, T = 3, 10
NAMES = ["rmt", "rmt_causal"]
EXACT = 1e-5  # largest difference in float32


def layout_of(name: str, implementation: str, tokens: int = T, write: int = M) -> SegmentLayout:
    if name in ENCODERS:
        return SegmentLayout.rmt_encoder(tokens, M)
    made = (SegmentLayout.rmt_decoder if implementation == "rmt" else SegmentLayout.causal)(tokens, M)
    return replace(made, write=write)


def dense(layout: SegmentLayout, padding: Tensor | None = None, batch: int = 2) -> Tensor:
    """What stock attention takes: bool (batch, 1, queries, keys)."""
    mask = layout.dense_mask()[None, None].expand(batch, 1, -1, -1)
    return mask if padding is None else mask & padding[:, None, None].bool()


def positions(rows: int, batch: int = 2) -> dict[str, Tensor]:
    return {"position_ids": torch.arange(rows).expand(batch, -1)}


def rows(layout: SegmentLayout, width: int = 64) -> Tensor:
    return torch.randn(2, layout.num_queries, width, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor, out: Tensor, grad: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"input": x}
    found = torch.autograd.grad(out, list(named.values()), grad, allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def served(name: str) -> Any:
    """A model, and the same on stock attention."""
    if name not in SERVED:
        pytest.skip("not on the attention interface, or makes its own masks, in this transformers")
    model = make(name)
    return model, copy.deepcopy(model)


CASES = [(name, kind) for name in (*DECODERS, *ENCODERS) for kind in NAMES if kind == "rmt" or name in DECODERS]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_equals_stock_attention_with_a_dense_mask(name: str, implementation: str, padding: str) -> None:
    """Outputs of rows that are no padding, and gradients of all parameters and of the input."""
    model, stock = served(name)
    layout = layout_of(name, implementation)
    x, mask = rows(layout), torch.ones(2, layout.num_queries, dtype=torch.int64)
    if padding != "none":
        mask[0, slice(M + T - 4, M + T) if padding == "right" else slice(M, M + 3)] = 0
    swap_in(model, M, implementation)
    places = positions(layout.num_queries)
    given, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = model(inputs_embeds=given, attention_mask=mask, **places).last_hidden_state
    # A row of padding must see something, or stock attention gives NaN.
    seen = dense(layout, mask) | torch.eye(layout.num_queries, dtype=torch.bool)
    wanted = stock(inputs_embeds=own, attention_mask=seen, **places).last_hidden_state
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    assert ((found - wanted) * mask[..., None]).abs().max() <= EXACT
    exact = gradients(stock, own, wanted, grad)
    for parameter, gradient in gradients(model, given, found, grad).items():
        assert (gradient - exact[parameter]).abs().max() <= EXACT * max(1.0, float(exact[parameter].abs().max())), (
            parameter
        )


def test_in_float64_to_the_last_digits() -> None:
    model = make("llama", dtype=torch.float64)
    stock, layout = copy.deepcopy(model), layout_of("llama", "rmt")
    swap_in(model, M)
    x = rows(layout).double()
    wanted = stock(inputs_embeds=x, attention_mask=dense(layout)).last_hidden_state
    assert (model(inputs_embeds=x).last_hidden_state - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("implementation", NAMES)
def test_at_load_time(implementation: str) -> None:
    register()
    config = make("llama").config
    config.rmt_memory = M
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation)
    layout = layout_of("llama", implementation)
    x = rows(layout)
    found = model(inputs_embeds=x).last_hidden_state
    model.set_attn_implementation("sdpa")
    wanted = model(inputs_embeds=x, attention_mask=dense(layout), **positions(layout.num_queries)).last_hidden_state
    assert (found - wanted).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_layout_with_the_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask hook nothing is read back: values of fake tensors can't be."""
    model, stock = served(name)
    layout = replace(layout_of(name, "rmt"), name="one of the caller's")
    x, lengths = rows(layout), torch.tensor([T, 6], dtype=torch.int32)
    swap_in(model, None, "rmt_layout")
    monkeypatch.setattr(masks, "segment_mask", None)
    found = model(inputs_embeds=x, rmt_layout=layout, rmt_lengths=lengths).last_hidden_state
    mask = torch.ones(2, layout.num_queries, dtype=torch.int64)
    mask[1, M + 6 : M + T] = 0
    seen = dense(layout, mask) | torch.eye(layout.num_queries, dtype=torch.bool)
    wanted = stock(inputs_embeds=x, attention_mask=seen, **positions(layout.num_queries)).last_hidden_state
    assert ((found - wanted) * mask[..., None]).abs().max() <= EXACT
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(inputs_embeds=mode.from_tensor(x), rmt_layout=layout, rmt_lengths=mode.from_tensor(lengths))
    assert fake.last_hidden_state.shape == found.shape


def test_the_hook_makes_no_tensor_of_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def spy(**arguments: Any) -> masks.SegmentMask:
        mask = masks.segment_mask(**arguments)
        made.append(mask)
        return mask

    model = make("llama")
    swap_in(model, M)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "rmt", spy)
    layout = layout_of("llama", "rmt")
    mask = torch.ones(2, layout.num_queries, dtype=torch.int64)
    mask[0, M + T - 2 : M + T] = 0
    model(inputs_embeds=rows(layout), attention_mask=mask)
    assert len(made) == 1
    assert made[0].layout == layout
    assert max(part.numel() for part in made[0] if isinstance(part, Tensor)) == 2 * layout.num_keys


def test_heads_are_not_repeated_and_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = segment_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Any:
        seen.append((query.shape, key.shape, value.is_contiguous()))
        return real(query, key, value, *others, **options)

    monkeypatch.setattr(attention, "segment_attention", spy)
    model = make("llama")
    swap_in(model, M)
    model(inputs_embeds=rows(layout_of("llama", "rmt")), use_cache=False)
    assert seen == [((2, 4, 16, 16), (2, 2, 16, 16), False)] * 2  # a view of the projection


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize(("name", "implementation"), [("llama", "rmt"), ("gpt2", "rmt_causal")])
def test_cached_decoding(name: str, implementation: str, padded: bool, cache: str) -> None:
    """Greedy tokens are those of stock attention given all rows again, with a dense mask, for every token."""
    model = make(name, "causal")
    stock = copy.deepcopy(model)
    swap_in(model, {"read": M, "write": 0}, implementation)
    x, mask = torch.randn(2, M + 6, 64, generator=torch.Generator().manual_seed(3)), torch.ones(2, M + 6).long()
    if padded:
        mask[1, M : M + 2] = 0
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with torch.no_grad():
        found = model.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0,
            **options,
        )  # fmt: skip
        for step in range(7):
            layout = layout_of(name, implementation, x.shape[1] - M, 0)
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = stock(inputs_embeds=x, attention_mask=dense(layout, mask), position_ids=places).logits
            token = logits[:, -1].argmax(-1)
            assert torch.equal(found[:, step], token), step
            x = torch.cat([x, stock.get_input_embeddings()(token)[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones(2, 1).long()], dim=1)


def test_a_prompt_in_pieces() -> None:
    model = make("llama")
    stock = copy.deepcopy(model)
    swap_in(model, {"read": M, "write": 0})
    x, layout = rows(layout_of("llama", "rmt", T, 0)), layout_of("llama", "rmt", T, 0)
    cache = DynamicCache()
    pieces = [model(inputs_embeds=part, past_key_values=cache, use_cache=True) for part in x.split([7, 5, 1], dim=1)]
    found = torch.cat([piece.last_hidden_state for piece in pieces], dim=1)
    wanted = stock(inputs_embeds=x, attention_mask=dense(layout), **positions(layout.num_queries)).last_hidden_state
    assert (found - wanted).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = make(name).train()
    swap_in(model, M)
    layout = layout_of(name, "rmt")
    given = rows(layout).requires_grad_()
    out = model(inputs_embeds=given).last_hidden_state
    grad = torch.randn_like(out)
    plain = gradients(model, given, out, grad)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model(inputs_embeds=given, use_cache=False).last_hidden_state
    out.backward(grad)
    found = {parameter: p.grad for parameter, p in model.named_parameters() if p.grad is not None} | {
        "input": given.grad
    }
    assert found.keys() == plain.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, plain[parameter], rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(name: str) -> None:
    model = make(name)
    swap_in(model, M)
    x = rows(layout_of(name, "rmt"))
    wanted = model(inputs_embeds=x, use_cache=False).last_hidden_state
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not OLD, dynamic=False)
    assert (compiled(inputs_embeds=x, use_cache=False).last_hidden_state - wanted).abs().max() <= EXACT


def test_dropout_is_drawn_here() -> None:
    model = make("llama", attention_dropout=0.5).train()
    swap_in(model, M)
    x = rows(layout_of("llama", "rmt"))
    first, second = (model(inputs_embeds=x).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    once = model(inputs_embeds=x).last_hidden_state
    torch.manual_seed(5)
    assert torch.equal(model(inputs_embeds=x).last_hidden_state, once)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_memory_that_nobody_tells() -> None:
    model = make("llama")
    swap_in(model, None)
    with pytest.raises(ValueError, match=r"which rows are memory.*config\.rmt_memory.*rmt_layout="):
        model(inputs_embeds=rows(layout_of("llama", "rmt")))
    swap_in(model, None, "rmt_layout")
    with pytest.raises(ValueError, match="rmt_layout="):
        model(inputs_embeds=rows(layout_of("llama", "rmt")))


@pytest.mark.parametrize(
    ("memory", "error"),
    [(0.5, "config.rmt_memory"), (-1, "negative"), ({"rows": 3}, "read"), (8, "leave no tokens"), (True, "rmt_memory")],
)
def test_memory_that_can_not_be(memory: Any, error: str) -> None:
    model = make("llama")
    swap_in(model, memory)
    with pytest.raises((TypeError, ValueError), match=error):
        model(inputs_embeds=rows(layout_of("llama", "rmt")))


def test_decoding_with_rows_to_write() -> None:
    model = make("llama")
    swap_in(model, M)
    cache, x = DynamicCache(), rows(layout_of("llama", "rmt"))
    model(inputs_embeds=x, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"'write': 0"):
        model(inputs_embeds=x[:, :1], past_key_values=cache, use_cache=True)


def test_packed_documents() -> None:
    """position_ids that are not consecutive would cut attention to the memory."""
    model = make("llama")
    swap_in(model, M)
    layout = layout_of("llama", "rmt")
    places = torch.tensor([0, 1, 2, *range(T), 0, 1, 2]).expand(2, -1)
    with pytest.raises(ValueError, match="packed documents"):
        model(inputs_embeds=rows(layout), position_ids=places, use_cache=False)
    # A layout says who sees whom, whatever the positions are; so does a mask of padding.
    mask = torch.ones(2, layout.num_queries).long()
    found = model(inputs_embeds=rows(layout), position_ids=places, rmt_layout=layout, use_cache=False).last_hidden_state
    other = model(inputs_embeds=rows(layout), position_ids=places, attention_mask=mask).last_hidden_state
    assert torch.equal(found, other)


@pytest.mark.parametrize("window", [8, 4096])
def test_sliding_windows(window: int) -> None:
    config = transformers.MistralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=8, sliding_window=window,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config)
    swap_in(model, M)
    x = rows(layout_of("llama", "rmt"))
    if window == 4096:  # longer than the segment: hides nothing
        assert model(inputs_embeds=x, use_cache=False).last_hidden_state.isfinite().all()
        return
    with pytest.raises(ValueError, match="sliding window"):
        model(inputs_embeds=x, use_cache=False)


@pytest.mark.parametrize(
    ("option", "error"),
    [({"softcap": 50.0}, "soft cap"), ({"s_aux": torch.zeros(4)}, "sinks"), ({"sliding_window": 8}, "window of 8"),
     ({"head_mask": torch.ones(4)}, "head_mask"), ({"output_attentions": True}, "output_attentions"),
     ({"position_bias": torch.ones(4)}, "position_bias")],
)  # fmt: skip
def test_features_of_a_layer(option: dict[str, Any], error: str) -> None:
    query = torch.randn(1, 4, 16, 16)
    with pytest.raises(ValueError, match=error):
        attention.attend(nn.Module(), query, query, query, rmt_layout=layout_of("llama", "rmt"), **option)


def test_masks_that_are_no_padding() -> None:
    model = make("llama")
    swap_in(model, M)
    layout = layout_of("llama", "rmt")
    x, mask = rows(layout), torch.ones(2, layout.num_queries).long()
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 1, 16, 16\)"):
        model(inputs_embeds=x, attention_mask=dense(layout))
    mask[0, M + 4] = 0
    with pytest.raises(ValueError, match="one run at one end of TOKENS"):
        model(inputs_embeds=x, attention_mask=mask)
    mask[0, M + 4], mask[0, 0] = 1, 0
    with pytest.raises(ValueError, match="only TOKENS rows"):
        model(inputs_embeds=x, attention_mask=mask)


def test_models_that_are_not_on_the_interface() -> None:
    class Own(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.LlamaConfig

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return False

    with pytest.raises(ValueError, match=r"Own of transformers .* does not use the attention interface"):
        swap_in(Own(transformers.LlamaConfig()), M)
    with pytest.raises(ValueError, match="implementation must be"):
        swap_in(make("llama"), M, "rmt_paper")


@pytest.mark.skipif(OLD, reason="BERT of transformers 4 is not on the interface")
def test_encoders_have_one_mask() -> None:
    model = make("bert")
    swap_in(model, M, "rmt_causal")
    with pytest.raises(ValueError, match="rows see both ways"):
        model(inputs_embeds=rows(layout_of("bert", "rmt")))


def test_both_spellings_of_the_hook() -> None:
    config = make("llama").config
    config.rmt_memory = {"read": M, "write": 0}
    config._attn_implementation = "rmt"
    new = masks.segment_mask(batch_size=2, q_length=4, q_offset=9, kv_length=13, config=config)
    old = masks.segment_mask(batch_size=2, cache_position=torch.arange(9, 13), kv_length=13, config=config)
    assert new == old
    assert new.layout == layout_of("llama", "rmt", 10, 0).last(4)
    with pytest.raises(TypeError, match="q_length or cache_position"):
        masks.segment_mask(batch_size=2, kv_length=13, config=config)


def test_registering_twice_changes_nothing() -> None:
    register()
    register()
    assert {"rmt", "rmt_causal", "rmt_layout"} <= set(AttentionInterface._global_mapping)
    assert "rmt_layout" not in AttentionMaskInterface._global_mapping
