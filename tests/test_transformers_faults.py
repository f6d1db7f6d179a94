"""Faults that were found in RMT around models of transformers: what was silently wrong, and what was not said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rmt_kernels import SegmentLayout
from rmt_kernels.integrations.transformers import (
    RMTConfig,
    RMTForCausalLM,
    RMTForMaskedLM,
    RMTForSequenceClassification,
    swap_in,
)
from tests.families import FAMILIES, VERSION, make
from tests.test_transformers_models import EXACT, M, T, encoders, tokens, wrapped

# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(VERSION < (5, 2), reason="ModernBERT is not on the attention interface")
@encoders
@pytest.mark.parametrize("compiled", [False, True])
def test_an_encoder_with_a_window_that_hides_nothing(compiled: bool) -> None:
    """Its local layers are no decoder's."""
    config = transformers.ModernBertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model: Any = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    ids = tokens(2, 30)
    wanted = model(ids).last_hidden_state
    swap_in(model, memory={"read": M})
    if compiled:
        torch.compiler.reset()
        model = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        assert (model(ids).last_hidden_state - wanted).abs().max() <= EXACT


@encoders
def test_positions_of_a_decoder_whose_table_begins_later() -> None:
    config = FAMILIES["roberta"].make_config(is_decoder=True)
    base = AutoModelForCausalLM.from_config(config).eval()
    model, ids = RMTForCausalLM.from_base(base, memory=M, segment=T).eval(), tokens(2, T + 3)
    found = model.generate(
        ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    whole = model(found.sequences).logits
    for i, logits in enumerate(found.logits):
        assert (logits - whole[:, T + 2 + i]).abs().max() <= EXACT


def test_trainer_shifts_labels_when_it_smooths_them() -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rmt"] == "RMTForCausalLM"


@pytest.mark.parametrize("number", [1, 2])
def test_a_state_of_beams_is_not_gone_on_with(number: int) -> None:
    model, ids = wrapped("gpt2"), tokens(2, 5)
    first = model.generate(
        ids, max_new_tokens=4, num_beams=2, num_return_sequences=number, return_dict_in_generate=True, pad_token_id=0
    )
    with pytest.raises(ValueError, match="its samples are beams"):
        model.generate(ids.repeat(number, 1), past_key_values=first.past_key_values, max_new_tokens=1)


def test_memories_are_of_all_weights(tmp_path: Path) -> None:
    model, ids = wrapped("gpt2"), tokens(1, 2 * T)
    model.save_memory(model.read(ids), tmp_path / "memory")
    assert torch.equal(model.load_memory(tmp_path / "memory"), model.read(ids))
    with torch.no_grad():
        model.model.transformer.h[1].mlp.c_fc.weight.mul_(1.01)
    with pytest.raises(ValueError, match="with other weights"):
        model.load_memory(tmp_path / "memory")


def test_samples_that_end_at_different_times_go_on_from_their_ends() -> None:
    """What was padding after an end is not part of the state: it stands before each sample's last token."""
    model, ids, end = wrapped("gpt2"), tokens(2, 3), 5
    told = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    # A number that one sample says early and the other late or never ends it.
    end = next(int(n) for n in told[0, 3:7] if n not in told[1, 3:])
    state = model.generate(
        ids, max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True
    )
    texts = []
    for row in state.sequences.tolist():
        texts.append(row[: row.index(end, 3) + 1] if end in row[3:] else row)
    assert len(texts[0]) < len(texts[1])
    more = tokens(2, 4, seed=3)
    following = torch.cat([torch.tensor([[text[-1]] for text in texts]), more], dim=1)
    found = model(following, past_key_values=state.past_key_values).logits[:, -1]
    for i, text in enumerate(texts):
        whole = model(torch.tensor([text + more[i].tolist()])).logits[0, -1]
        assert (found[i] - whole).abs().max() <= EXACT


def test_an_end_token_that_ends_nothing_is_read_like_any_other() -> None:
    model, ids = wrapped("gpt2"), tokens(2, 3)
    told = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config.eos_token_id = int(told[0, 4])
    state = model.generate(
        ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, stopping_criteria=[], pad_token_id=0,
        return_dict_in_generate=True,
    ).past_key_values  # fmt: skip
    assert state.at == [7, 7]


def test_an_end_in_a_segment_that_is_gone_is_said() -> None:
    model, ids = wrapped("gpt2"), tokens(2, T - 1)
    told = model.generate(ids, max_new_tokens=T, do_sample=False, eos_token_id=None, pad_token_id=0)
    end = next(int(n) for n in told[0, T - 1 :] if n not in told[1, T - 1 :])
    begin = told[0].tolist().index(end, T - 1)
    state = model.generate(
        ids, max_new_tokens=T + begin, do_sample=False, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True
    )
    with pytest.raises(ValueError, match=r"sample 0 ended .* in a segment that is no longer there"):
        model.generate(ids, past_key_values=state.past_key_values, max_new_tokens=1)


def test_a_base_keeps_its_types() -> None:
    base = make("llama", "causal").bfloat16()
    base.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq.float()
    base.lm_head.float()
    model = RMTForCausalLM.from_base(base, memory=M, segment=T)
    assert base.model.rotary_emb.inv_freq.dtype is torch.float32
    assert base.lm_head.weight.dtype is torch.float32
    assert model.initial_memory.dtype is torch.bfloat16


def test_parts_keep_their_mode() -> None:
    model, ids = wrapped("gpt2"), tokens(1, T)
    model(ids)
    model.train()
    model.model.eval()
    model(ids, labels=ids)
    assert not any(part.training for part in model.model.modules())
    assert model.training


def test_two_models_of_one_configuration() -> None:
    base = make("gpt2", "causal")
    config, ids = RMTConfig(base.config, memory=M, segment=T), tokens(1, T)
    wanted = base(ids).logits
    RMTForCausalLM(config)
    assert torch.equal(base(ids).logits, wanted)


def test_steps_keep_no_graph() -> None:
    model, ids = wrapped("gpt2"), tokens(1, T)
    state = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0).past_key_values
    assert model(ids[:, :1], past_key_values=state).logits.grad_fn is None


# -- what is refused, and what is said ---------------------------------------------------------------------------------


def test_attention_that_was_set_to_something_else() -> None:
    model, ids = wrapped("gpt2"), tokens(1, T)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention was set to 'sdpa'"):
        model(ids)
    model.model.set_attn_implementation("rmt_layout")
    model(ids)


@pytest.mark.parametrize(("name", "value"), [
    ("token_type_ids", torch.ones(1, T, dtype=torch.int64)), ("position_ids", torch.arange(T)[None] + 1),
    ("logits_to_keep", 1), ("output_attentions", True), ("something", 3),
])  # fmt: skip
def test_arguments_that_would_have_an_effect(name: str, value: Any) -> None:
    model, ids = wrapped("gpt2"), tokens(1, T)
    with pytest.raises(TypeError, match=f"has no argument {name}"):
        model(ids, **{name: value})
    model(ids, token_type_ids=torch.zeros_like(ids), position_ids=torch.arange(T)[None], logits_to_keep=0)


@pytest.mark.skipif(not hasattr(transformers, "Lfm2Config"), reason="no LFM2")
def test_layers_that_are_no_attention() -> None:
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="layers of conv"):
        RMTForCausalLM.from_base(AutoModelForCausalLM.from_config(config), memory=M, segment=T)


def test_positions_that_depend_on_the_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = make("llama", "causal", max_position_embeddings=2 * M + T - 1, rope_scaling=rope)
    with pytest.raises(ValueError, match="take segments shorter by 1 tokens"):
        RMTForCausalLM.from_base(base, memory=M, segment=T)
    RMTForCausalLM.from_base(base, memory=M, segment=T - 1)


def test_attention_in_chunks_of_a_layout_that_comes_with_the_call() -> None:
    if not hasattr(transformers, "Llama4TextConfig"):
        pytest.skip("no Llama 4")
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_chunk_size=4, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    swap_in(model, memory=None, implementation="rmt_layout")
    with pytest.raises(ValueError, match="attention in chunks of 4"):
        model(tokens(1, 2 * M + T), rmt_layout=SegmentLayout.rmt_decoder(T, M))


def test_sizes_that_were_changed_later() -> None:
    model = wrapped("gpt2")
    model.config.segment = T - 1
    with pytest.raises(ValueError, match="fixed when a model is made"):
        model(tokens(1, T))


def test_a_mixture_of_experts() -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    model, ids = RMTForCausalLM.from_base(base, memory=M, segment=T), tokens(2, T + 3)
    model(ids, labels=ids).loss.backward()
    config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        RMTForCausalLM.from_base(AutoModelForCausalLM.from_config(config), memory=M, segment=T)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_larger_vocabulary_is_saved(name: str, tmp_path: Path) -> None:
    model = wrapped(name)
    model.resize_token_embeddings(70)
    ids = torch.tensor([[69, 3, 68]])
    model.save_pretrained(tmp_path)
    loaded = RMTForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.base_config.vocab_size == loaded.config.vocab_size == 70
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@encoders
def test_a_larger_vocabulary_of_an_encoder() -> None:
    model = RMTForMaskedLM.from_base(make("bert", "masked"), memory=M, segment=T)
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)


def test_hooks_around_the_base() -> None:
    """As accelerate puts them around a whole model."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, ids = wrapped("gpt2"), tokens(1, T)
    wanted = model(ids).logits
    again = wrapped("gpt2")
    add_hook_to_module(again.model, ModelHook())
    assert torch.equal(again(ids).logits, wanted)


@pytest.mark.parametrize(("how", "reason"), [
    ({"guidance_scale": 2.0}, "guidance_scale can't be used"),
    ({"output_attentions": True}, "output_attentions can't be used"),
    ({"generation_config": GenerationConfig(penalty_alpha=0.5)}, "penalty_alpha can't be used"),
    ({"memory": torch.zeros(2, M, 64)}, "memory is of 2 samples, and the prompt has 4"),
])  # fmt: skip
def test_what_generate_refuses(how: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        wrapped("gpt2").generate(tokens(4, 3), max_new_tokens=2, pad_token_id=0, **how)


def test_a_configuration_in_its_place_is_looked_at_too() -> None:
    with pytest.raises(ValueError, match="use_cache"):
        wrapped("gpt2").generate(tokens(1, 3), GenerationConfig(max_new_tokens=2, use_cache=False))


def test_generation_while_layers_are_checkpointed() -> None:
    model = wrapped("gpt2")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train().generate(tokens(1, 3), max_new_tokens=2, pad_token_id=0)
    model.eval().generate(tokens(1, 3), max_new_tokens=2, pad_token_id=0)


def test_states_of_another_model_or_type() -> None:
    model, ids = wrapped("gpt2"), tokens(1, 3)
    state = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0).past_key_values
    with pytest.raises(ValueError, match="of another model: gpt2"):
        wrapped("llama")(ids, past_key_values=state)
    with pytest.raises(ValueError, match=r"was made in torch\.float32"):
        model.bfloat16()(ids, past_key_values=state)


def test_labels_of_a_regression_as_columns() -> None:
    model = RMTForSequenceClassification.from_base(make("llama"), memory=M, segment=T, num_labels=1).eval()
    ids, labels = tokens(3, T), torch.tensor([0.5, 1.0, -1.0])
    assert torch.equal(model(ids, labels=labels[:, None]).loss, model(ids, labels=labels).loss)


@pytest.mark.parametrize(("given", "reason"), [
    ({"bppt": "replay"}, "no argument bppt"), ({"bptt": "reply"}, "bptt must be 'full', 'replay'"),
])  # fmt: skip
def test_misspelled_arguments(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        RMTForCausalLM.from_base(make("gpt2", "causal"), memory=M, segment=T, **given)


def test_a_configuration_in_place_of_a_model(tmp_path: Path) -> None:
    base = make("gpt2", "causal")
    with pytest.raises(TypeError, match="base must be a model or a name"):
        RMTForCausalLM.from_base(base.config, memory=M, segment=T)
    base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_base"):
        RMTForCausalLM.from_pretrained(tmp_path)


def test_decoding_with_write_rows_says_one_thing() -> None:
    model = make("gpt2", "causal")
    swap_in(model, memory=M)
    with pytest.raises(ValueError, match=r"for decoding set config.rmt_memory") as caught:
        model.generate(tokens(1, 2 * M + T), max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert "nothing says" not in str(caught.value)
