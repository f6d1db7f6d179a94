"""RMT around models of transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", minversion="4.57")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.activations import FastGELUActivation, NewGELUActivation

from rmt_kernels import Replay, SegmentLayout, Truncate
from rmt_kernels.integrations.transformers import (
    RMTConfig,
    RMTForCausalLM,
    RMTForMaskedLM,
    RMTForSequenceClassification,
    marks_of,
)
from tests.families import DECODERS, OLD, SERVED, make

M, T = 3, 8
EXACT = 1e-5
CASES = [(name, mask) for name in DECODERS if name in SERVED for mask in ("rmt", "rmt_causal")]
encoders = pytest.mark.skipif(OLD, reason="encoders of transformers 4 are not on the attention interface")


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def wrapped(name: str, mask: str = "rmt", **fields: Any) -> RMTForCausalLM:
    torch.manual_seed(0)
    made: RMTForCausalLM = RMTForCausalLM.from_base(
        make(name, "causal"), memory=M, segment=T, mask=mask, **fields
    ).eval()
    return made


def by_hand(
    model: RMTForCausalLM, stock: Any, ids: Tensor, start: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (batch, n, vocabulary) and memory: stock attention with a dense mask, segment by segment.

    ``stock`` is a copy of the base model, ``start`` its memory to begin with.
    """
    batch, embed = len(ids), stock.get_input_embeddings()
    make_layout: Any = SegmentLayout.causal if model.config.mask == "rmt_causal" else SegmentLayout.rmt_decoder
    memory = start.expand(batch, -1, -1) if memory is None else memory
    pieces = []
    for part in ids.split(T, dim=1):
        n = part.shape[1]
        mask = make_layout(n, M).dense_mask()[None, None].expand(batch, 1, -1, -1)
        at = torch.cat([torch.arange(M + n), M + T + torch.arange(M)]).expand(batch, -1)
        x = torch.cat([memory, embed(part), memory], dim=1)
        hidden = stock.base_model(inputs_embeds=x, attention_mask=mask, position_ids=at).last_hidden_state
        memory = hidden[:, -M:]
        pieces.append(stock.get_output_embeddings()(hidden[:, M : M + n]))
    return torch.cat(pieces, dim=1), memory


def on_stock(model: RMTForCausalLM) -> Any:
    stock = copy.deepcopy(model.model)
    stock.set_attn_implementation("sdpa")
    return stock


@pytest.mark.parametrize("bptt", ["full", "replay"])
@pytest.mark.parametrize(("name", "mask"), CASES)
def test_equals_stock_attention_segment_by_segment(name: str, mask: str, bptt: str) -> None:
    """Logits, memory, the loss over the borders of segments, and the gradient of every parameter."""
    model = wrapped(name, mask, bptt=bptt)
    stock, start = on_stock(model), model.initial_memory.detach().clone().requires_grad_()
    ids = tokens(2, 3 * T + 5)
    wanted, memory = by_hand(model, stock, ids, start)
    loss = F.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    found = model(ids, labels=ids)
    found.loss.backward()
    assert (found.logits - wanted).abs().max() <= EXACT
    assert (found.memory - memory).abs().max() <= EXACT
    assert (found.loss - loss).abs() <= EXACT
    exact = {f"model.{key}": parameter.grad for key, parameter in stock.named_parameters()}
    exact["initial_memory"] = start.grad
    for key, parameter in model.named_parameters():
        assert (parameter.grad - exact[key]).abs().max() <= EXACT, key


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_is_as_if_it_were_not_there(side: str) -> None:
    model, ids = wrapped("llama"), tokens(3, 2 * T + 3)
    mask = torch.ones_like(ids)
    hidden = {"left": slice(0, 9), "right": slice(9, None), "holes": slice(4, 9)}[side]
    mask[1, hidden] = 0
    found = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    for i in range(3):
        alone = ids[i][mask[i] == 1][None]
        one = model(alone)
        assert (found.logits[i][mask[i] == 1] - one.logits[0]).abs().max() <= EXACT
        assert (found.memory[i] - one.memory[0]).abs().max() <= EXACT
    assert not found.logits[1][mask[1] == 0].any()
    few = ids[1][mask[1] == 1][None]
    counts = [2 * (ids.shape[1] - 1), few.shape[1] - 1]
    losses = [model(part, labels=part).loss for part in (ids[[0, 2]], few)]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert (found.loss - mean).abs() <= EXACT


def test_reading_in_two_calls() -> None:
    model, ids = wrapped("gpt2"), tokens(2, 4 * T)
    first = model(ids[:, : 2 * T])
    second = model(ids[:, 2 * T :], memory=first.memory)
    whole = model(ids)
    assert (torch.cat([first.logits, second.logits], dim=1) - whole.logits).abs().max() <= EXACT
    assert (model.read(ids) - whole.memory).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """With the Auto classes; tied weights stay tied, others apart."""
    model, ids = wrapped(name, bptt=Replay(truncate=Truncate(2))), tokens(2, 20)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, RMTConfig)
    assert config.to_dict() == RMTConfig.from_dict(config.to_dict()).to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is RMTForCausalLM
    assert loaded.recurrence.bptt == Replay(truncate=Truncate(2))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied is (name == "gpt2")


def test_a_base_keeps_its_weights() -> None:
    base = make("llama", "causal")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = RMTForCausalLM.from_base(base, memory=M, segment=T)
    after = model.model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    spread = float(base.get_input_embeddings().weight.std())
    assert 0.5 * spread < float(model.initial_memory.std()) < 2 * spread
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"model", "initial_memory"}


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_a_gelu_that_is_written_out_becomes_one_kernel(kind: type[torch.nn.Module]) -> None:
    """The same function and gradient; its input is all that is kept; nothing else is touched."""
    base = make("gpt2", "causal")
    block = base.transformer.h[0].mlp
    block.act = kind()
    x = torch.linspace(-9, 9, 1001, requires_grad=True)
    wanted, hooked = block.act(x), kind()
    hooked.forward = hooked.forward  # type: ignore[method-assign]  # as accelerate's hooks leave it
    base.transformer.h[1].mlp.act = hooked
    RMTForCausalLM.from_base(base, memory=M, segment=T)
    assert type(block.act) is torch.nn.GELU
    assert base.transformer.h[1].mlp.act is hooked
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        found = block.act(x)
    assert len(kept) == 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    (a,), (b,) = (torch.autograd.grad(y.sum(), x) for y in (found, wanted))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_the_output_layer_and_what_else_a_head_does() -> None:
    """A plain output layer is taken in chunks by the loss; whatever else a model does to its logits is kept."""
    assert type(wrapped("gpt2").recurrence.head) is torch.nn.Linear
    config = transformers.GraniteConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=3.0, embedding_multiplier=1.0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    hidden = torch.randn(5, 64)
    wanted = base.lm_head(hidden) / 3.0
    model = RMTForCausalLM.from_base(base, memory=M, segment=T)
    assert type(model.recurrence.head) is not torch.nn.Linear
    assert torch.equal(model.recurrence.head(hidden), wanted)
    ids = tokens(2, 2 * T)
    model(ids, labels=ids).loss.backward()
    assert base.lm_head.weight.grad.abs().max() > 0


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = tokens(2 * T + i, seed=i)
        padded = F.pad(ids, (0, 7 - i))
        mask = torch.arange(2 * T + 7) < len(ids)
        return {"input_ids": padded, "attention_mask": mask.long(), "labels": padded.masked_fill(~mask, -100)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing: bool, tmp_path: Path) -> None:
    """Its loss is that of the whole batch, however it is cut; a run goes on from its checkpoint."""

    def run(folder: str, batch: int, steps: int, resume: bool = False) -> tuple[list[float], dict[str, Tensor]]:
        model = wrapped("gpt2", bptt="replay").train()
        arguments = TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch,
            max_steps=steps, save_steps=1, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            gradient_checkpointing=checkpointing, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())
        trainer.train(resume_from_checkpoint=resume or None)
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
        return losses, {key: p.detach().clone() for key, p in model.named_parameters()}

    whole, parameters = run("whole", 4, 2)
    cut, others = run("cut", 2, 2)
    assert cut == pytest.approx(whole, abs=2e-3)
    for key, parameter in parameters.items():
        # Adam turns tiny differences of gradients into steps: few of them are seen.
        assert (parameter - others[key]).abs().mean() <= 1e-4, key
    run("resumed", 4, 1)
    again, resumed = run("resumed", 4, 2, resume=True)
    assert again[-1] == pytest.approx(whole[-1], abs=1e-4)
    for key, parameter in parameters.items():
        assert (parameter - resumed[key]).abs().max() <= 1e-5, key


def test_lora_on_the_base() -> None:
    peft = pytest.importorskip("peft")
    model, ids = wrapped("llama", bptt="replay").train(), tokens(2, 3 * T)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    before = model(ids, labels=ids).loss
    tuned = peft.get_peft_model(model, lora)
    assert (tuned(input_ids=ids, labels=ids).loss - before).abs() <= EXACT
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = wrapped("gpt2").train(), tokens(2, 2 * T + 3)
    model(ids, labels=ids).loss.backward()
    plain = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-5, atol=1e-6, msg=key)


def test_a_compiled_base() -> None:
    model, ids = wrapped("llama"), tokens(2, 3 * T)
    wanted = model(ids).logits
    torch.compiler.reset()
    model.model.base_model.compile(backend="aot_eager", fullgraph=not OLD, dynamic=False)
    with torch.no_grad():
        assert (model(ids).logits - wanted).abs().max() <= EXACT


def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, ids = wrapped("gpt2"), tokens(2, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_bf16_weights() -> None:
    model = RMTForCausalLM.from_base(make("llama", "causal").bfloat16(), memory=M, segment=T).eval()
    assert model.initial_memory.dtype is torch.bfloat16
    found = model(tokens(2, 20), labels=tokens(2, 20))
    assert found.logits.dtype is torch.bfloat16
    assert found.loss.dtype is torch.float32


# -- encoders ----------------------------------------------------------------------------------------------------------


@encoders
@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("marks", [None, (1, 2)])
def test_an_encoder(name: str, marks: tuple[int, int] | None) -> None:
    """Right-aligned segments, with marks at the paper's positions, against stock attention."""
    torch.manual_seed(0)
    model = RMTForMaskedLM.from_base(make(name, "masked"), memory=M, segment=T, align="right", marks=marks).eval()
    stock = copy.deepcopy(model.model)
    stock.set_attn_implementation("sdpa")
    ids, embed = tokens(2, 2 * T + 5), stock.get_input_embeddings()
    offset = 2 if name == "roberta" else 0
    memory, pieces = model.initial_memory.expand(2, -1, -1), []
    for part in (ids[:, :5], ids[:, 5 : 5 + T], ids[:, 5 + T :]):
        n = part.shape[1]
        if marks is None:
            order, x = torch.arange(M + n), torch.cat([memory, embed(part)], dim=1)
        else:  # as in the paper: CLS, memory, SEP, tokens, SEP
            x = torch.cat([embed(torch.tensor([[1]] * 2)), memory, embed(torch.tensor([[2]] * 2)), embed(part),
                           embed(torch.tensor([[2]] * 2))], dim=1)  # fmt: skip
            order = torch.arange(M + n + 3)
        hidden = stock.base_model(
            inputs_embeds=x, attention_mask=torch.ones(2, x.shape[1]), position_ids=offset + order.expand(2, -1)
        ).last_hidden_state
        first = 0 if marks is None else 1
        memory = hidden[:, first : first + M]
        rows = hidden[:, M:] if marks is None else hidden[:, M + 2 : M + 2 + n]
        head = stock.cls if name == "bert" else stock.lm_head
        pieces.append(head(rows))
    found = model(ids, labels=ids)
    assert (found.logits - torch.cat(pieces, dim=1)).abs().max() <= EXACT
    assert (found.memory - memory).abs().max() <= EXACT
    wanted = F.cross_entropy(torch.cat(pieces, dim=1).flatten(0, 1), ids.flatten())
    assert (found.loss - wanted).abs() <= EXACT


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=encoders)])
@pytest.mark.parametrize("classes", [1, 4])
def test_classification(name: str, classes: int, tmp_path: Path) -> None:
    """From the last token of a decoder and the first row of an encoder, in each sample's last segment."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"align": "right", "marks": (1, 2)} if name == "bert" else {}
    model = RMTForSequenceClassification.from_base(
        make(name), memory=M, segment=T, num_labels=classes, **options
    ).eval()
    ids, mask = tokens(3, 2 * T + 5), torch.ones(3, 2 * T + 5).long()
    mask[1, 6:] = 0
    labels = torch.tensor([0, 3, 1]) if classes > 1 else torch.tensor([0.5, -1.0, 2.0])
    found = model(ids, attention_mask=mask, labels=labels)
    assert found.logits.shape == (3, classes)
    loss = F.cross_entropy(found.logits, labels) if classes > 1 else F.mse_loss(found.logits[:, 0], labels)
    assert (found.loss - loss).abs() <= EXACT
    for i, length in enumerate((2 * T + 5, 6, 2 * T + 5)):
        assert (model(ids[i : i + 1, :length]).logits[0] - found.logits[i]).abs().max() <= EXACT
    found.loss.backward()
    assert model.initial_memory.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert (loaded(ids, attention_mask=mask).logits - found.logits).abs().max() <= EXACT


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"memory": 0}, "memory must be at least 1"), ({"segment": "8"}, "segment must be an int"),
     ({"mask": "causal"}, r"mask must be one of \['rmt', 'rmt_causal'\]"), ({"align": "right"}, "align='left'"),
     ({"bptt": 0}, "bptt must be at least 1"), ({"marks": (1, 2)}, "marks"), ({"marks": (1,)}, "CLS and SEP"),
     ({"segment": 60}, "66 rows.* table of 64 positions.*shorter by 2 tokens")],
)  # fmt: skip
def test_fields_that_can_not_be(fields: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        RMTForCausalLM.from_base(make("gpt2", "causal"), **{"memory": M, "segment": T, **fields})


@encoders
def test_encoders_and_decoders_are_told_apart() -> None:
    with pytest.raises(ValueError, match="is an encoder; use RMTForMaskedLM"):
        RMTForCausalLM.from_base(make("bert", "causal"), memory=M, segment=T)
    with pytest.raises(ValueError, match="use mask='rmt'"):
        RMTForMaskedLM.from_base(make("bert", "masked"), memory=M, segment=T, mask="rmt_causal")
    with pytest.raises(ValueError, match="position"):
        RMTForMaskedLM.from_base(make("roberta", "masked"), memory=M, segment=61)


def test_arguments_that_would_be_without_effect() -> None:
    model, ids = wrapped("gpt2"), tokens(2, 9)
    with pytest.raises(TypeError, match="inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 9, 64))
    with pytest.raises(TypeError, match="output_hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        model(ids, attention_mask=torch.ones(2, M + 9))
    with pytest.raises(ValueError, match="memory must have shape"):
        model(ids, memory=torch.zeros(1, M, 64))


def test_a_tokenizer_without_marks() -> None:
    class Tokenizer:
        cls_token_id, sep_token_id = 5, None

    with pytest.raises(ValueError, match="Tokenizer has no sep_token"):
        marks_of(Tokenizer())
    Tokenizer.sep_token_id = 6  # type: ignore[assignment]
    assert marks_of(Tokenizer()) == (5, 6)
