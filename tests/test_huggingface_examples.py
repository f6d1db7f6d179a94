"""The recipes for transformers, run here on tiny models, and the conversion of the authors' wrapper."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", "4.57", reason="transformers is not installed: pip install transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")

from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, PreTrainedTokenizerFast

from rmt_kernels.integrations.transformers import RMTConfig, RMTForCausalLM, RMTForSequenceClassification
from rmt_kernels.integrations.transformers.wrapper_checkpoints import (
    config_from_wrapper,
    load_wrapper_state_dict,
    segments_from_wrapper,
)
from rmt_kernels.recurrence.policies import from_plain
from rmt_kernels.training import make_task
from tests.families import DECODERS, FAMILIES, OLD, SERVED, make
from tests.test_converters import HEADS, INNER, LAYERS, MEMORY, TOKENS, VOCABULARY, WIDTH, dense_wrapper, wrapper

RECIPES = Path(__file__).parent.parent / "examples" / "huggingface"
needs_encoders = pytest.mark.skipif(OLD, reason="BERT uses the attention interface from transformers 5.0 on")


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Their folder on the path, as when they are run; nothing of accelerate's state stays."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def recipe(name: str) -> Any:
    return importlib.import_module(name)


def test_a_decoder_is_fine_tuned_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = recipe("finetune_decoder").main(["--quick", "--output", "model"])
    assert list(trained) == [1, 2, 3]
    rows = [line.split() for line in capsys.readouterr().out.split("accuracy")[-1].splitlines()[1:]]
    assert [row[:2] for row in rows] == [["1", "20"], ["2", "40"], ["3", "60"]]
    assert [float(row[2]) for row in rows] == pytest.approx(list(trained.values()), abs=5e-4)

    model = RMTForCausalLM.from_pretrained("model")
    assert (model.config.memory, model.config.segment) == (8, 20)
    assert from_plain(model.config.bptt) == from_plain("replay")
    assert float(model.initial_memory.detach().std()) > 0

    # The same questions, the text read into memory and the answers generated: what the logits of a whole pass say.
    asked = recipe("evaluate_long_context").main(["--model", "model", "--segments", "1", "2", "3", "--samples", "8"])
    assert asked == trained
    assert recipe("evaluate_long_context").main(["--quick", "--task", "detect"]).keys() == {1, 2, 4}


def test_two_processes_of_trainer_train_what_one_does() -> None:
    """DistributedDataParallel, with half a batch each, and texts of different lengths: the mean over all tokens."""
    options = ["--steps", "4", "--segments", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(RECIPES / "finetune_decoder.py"), *options, "--batch", "4", "--output", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "find_unused_parameters" not in done.stderr
    recipe("finetune_decoder").main([*options, "--batch", "8", "--output", "one"])
    one, two = (RMTForCausalLM.from_pretrained(name) for name in ("one", "two"))
    apart = torch.cat([(a - b).detach().flatten() for a, b in zip(one.parameters(), two.parameters(), strict=True)])
    assert float(apart.square().mean().sqrt()) < 1e-5  # each of Adam's steps is up to 2e-3


def test_answers_are_those_of_a_whole_pass() -> None:
    # Several tokens each, after prompts of other lengths: less than a segment, exactly one, some.
    model = RMTForCausalLM.from_base(make("gpt2", "causal", initializer_range=0.3), memory=4, segment=10)
    prompts = [torch.randint(3, 64, (n,)).tolist() for n in (7, 10, 11, 34)]
    said = recipe("evaluate_long_context").answers(model, prompts, 13, 0)
    assert said.shape == (4, 13)
    for prompt, answer in zip(prompts, said.tolist(), strict=True):
        whole = list(prompt)
        for _ in range(13):
            whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
        assert answer == whole[len(prompt) :]


def test_a_decoder_and_a_tokenizer_from_a_folder(tmp_path: Path) -> None:
    # Letters are its tokens: answers have several, samples differ in length. It has no token for padding.
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate([*ByteLevel.alphabet(), "<end>"])}, []))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "base")
    make("gpt2", "causal", vocab_size=257).save_pretrained(tmp_path / "base")
    sizes = ["--quick", "--bf16", "--accumulate", "2", "--segment", "30", "--task", "reasoning", "--output", "tuned"]
    assert len(recipe("finetune_decoder").main(["--base", str(tmp_path / "base"), *sizes])) == 3
    assert RMTForCausalLM.from_pretrained("tuned").config.base_config.vocab_size == 257
    asked = recipe("evaluate_long_context").main(
        ["--model", "tuned", "--task", "reasoning", "--segments", "1", "2", "--samples", "8"]
    )  # fmt: skip
    assert asked.keys() == {1, 2}


def test_questions_grow_and_are_the_same_everywhere() -> None:
    questions = recipe("questions")
    task, tokenizer = questions.load_task("detect", None)
    segments = questions.growing(4, 80)
    numbers = [segments(step) for step in range(80)]
    assert [max(numbers[:10]), max(numbers[:20]), max(numbers[:30]), max(numbers)] == [1, 2, 3, 4]
    assert set(numbers[40:]) == {1, 2, 3, 4}
    make_data = partial(questions.Questions, task, tokenizer, words=20, segments=segments, per_step=4, steps=80)
    data = make_data()
    assert len(data) == 320
    assert [len(data[4 * step]["input_ids"]) for step in range(80)] == [20 * number for number in numbers]
    sample = data[319]
    assert sample == make_data()[319] != data[318]
    assert sample["input_ids"] != make_data(held_out=True)[319]["input_ids"]
    assert [label for label in sample["labels"] if label != -100] == sample["input_ids"][-1:]
    drawn = task.batch(1, numbers[79], 20, seed=0, step=319)
    assert tokenizer.decode(sample["input_ids"]) == " ".join(task.decode(drawn.ids[0]))
    with pytest.raises(IndexError):
        data[320]
    batch = questions.padded([data[0], data[319]], fill=0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "labels", "attention_mask"], (2, 20 * numbers[79])
    )
    assert batch["attention_mask"].sum(dim=1).tolist() == [20, 20 * numbers[79]]
    assert batch["labels"][0, 20:].eq(-100).all()


@needs_encoders
def test_an_encoder_is_fine_tuned(tmp_path: Path) -> None:
    found = recipe("finetune_encoder").main(["--quick", "--output", "model"])
    assert list(found) == [1, 2, 3, 6]
    model = RMTForSequenceClassification.from_pretrained("model")
    assert (model.config.memory, model.config.align, model.config.num_labels) == (10, "right", 2)
    questions = recipe("questions")
    task, tokenizer = questions.load_task("detect", None)
    data = recipe("finetune_encoder").Texts(
        task, tokenizer, words=32, segments=lambda _: 6, per_step=8, steps=1, held_out=True
    )  # fmt: skip
    inputs = questions.padded([data[i] for i in range(8)], fill=0)
    labels = inputs.pop("labels")
    with torch.no_grad():
        guesses = model(**inputs).logits.argmax(dim=-1)
    assert float((guesses == labels).float().mean()) == found[6]


def test_texts_of_the_encoder_need_memory() -> None:
    task, tokenizer = recipe("questions").load_task("detect", None)
    module = recipe("finetune_encoder")
    data = module.Texts(task, tokenizer, words=32, segments=lambda step: step + 1, per_step=16, steps=4)
    lengths, labels = set(), []
    for i in range(16, len(data)):
        ids = data[i]["input_ids"]
        facts = [fact in tokenizer.decode(ids) for fact in module.FACTS]
        assert facts == [data[i]["labels"] == 0, data[i]["labels"] == 1]
        assert not any(fact.split()[-1] in tokenizer.decode(ids[-32:]).split() for fact in module.FACTS)
        assert -(-len(ids) // 32) == i // 16 + 1
        lengths.add(len(ids))
        labels.append(data[i]["labels"])
    assert len(lengths) > 20
    assert 12 < sum(labels) < 36


@pytest.mark.slow
def test_a_decoder_learns() -> None:
    found = recipe("finetune_decoder").main(["--steps", "300", "--segments", "3"])
    assert min(found.values()) > 0.9


@pytest.mark.slow
@needs_encoders
def test_an_encoder_learns() -> None:
    found = recipe("finetune_encoder").main(["--steps", "400", "--segments", "3"])
    assert min(found.values()) > 0.9


def test_with_accelerate() -> None:
    sizes = ["--segments", "2", "--segment", "24", "--memory", "4", "--steps", "4"]
    run = recipe("with_accelerate").main
    losses = run([*sizes, "--batch", "4"])
    assert len(losses) == 4
    assert 4 < losses[-1] < losses[0] < 6.5
    AcceleratorState._reset_state(True)
    assert run([*sizes, "--batch", "2", "--accumulate", "2"]) == pytest.approx(losses, abs=2e-4)
    AcceleratorState._reset_state(True)
    narrow = run([*sizes, "--batch", "4", "--bf16"])
    assert narrow == pytest.approx(losses, abs=0.05)
    assert narrow != losses


def test_migration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    difference = recipe("migrate_wrapper").main(["--output", "model", "--k2", "2", "--vary_n_segments"])
    assert difference <= 1e-5
    said = capsys.readouterr().out
    assert "mask rmt_causal, memory 4, segment 16, bptt 2" in said
    model = RMTForCausalLM.from_pretrained("model")
    assert (model.config.mask, model.config.bptt) == ("rmt_causal", 2)
    state = {"memory_cell.memory": model.initial_memory.detach()}
    state |= {f"memory_cell.model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    torch.save(state, "wrapper.pth")
    model.model.config.save_pretrained("base")
    assert (
        recipe("migrate_wrapper").main(["--checkpoint", "wrapper.pth", "--base", "base", "--output", "again"]) <= 1e-5
    )
    again = RMTForCausalLM.from_pretrained("again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# -- the authors' wrapper ----------------------------------------------------------------------------------------------


def model_for(state: dict[str, Tensor], dtype: torch.dtype = torch.float64, **changes: Any) -> RMTForCausalLM:
    """With new weights, around the kind of GPT-2 that ``wrapper()`` holds."""
    base = GPT2Config(**{
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_inner": INNER, "n_layer": LAYERS,
        "n_positions": len(state["memory_cell.model.transformer.wpe.weight"]), "bos_token_id": None,
        "eos_token_id": None, **changes,
    })  # fmt: skip
    config = config_from_wrapper(base, num_mem_tokens=MEMORY, segment_size=TOKENS)
    config.rmt_backend = "reference"
    model: RMTForCausalLM = RMTForCausalLM(config).eval()
    model.to(dtype=dtype)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_wrapper_computes_what_the_authors_does(tied: bool) -> None:
    state = wrapper(tied)
    model = model_for(state, tie_word_embeddings=tied)
    load_wrapper_state_dict(model, state)
    ids = torch.randint(VOCABULARY, (2, 3 * TOKENS))
    with torch.no_grad():
        out = model(ids)
        short = model(ids[:1, :-2]).logits
    for b in range(2):
        logits, memory = dense_wrapper(state, ids[b])
        torch.testing.assert_close(out.logits[b], logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(out.memory[b], memory, rtol=0, atol=1e-9)
    torch.testing.assert_close(short[0], dense_wrapper(state, ids[0, :-2])[0], rtol=0, atol=1e-9)


def test_a_wrapper_is_saved_in_several_ways(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = wrapper(buffers=False, dtype=torch.float32)
    del state["memory_cell.model.lm_head.weight"]  # tied weights are left out of some files
    torch.save({f"module.{name}": tensor for name, tensor in wrapper().items()} | {}, tmp_path / "parallel.pth")
    save_file(state, tmp_path / "model.safetensors")
    for source, atol in (
        (state, 0.0),
        ({name.removeprefix("memory_cell."): tensor for name, tensor in state.items()}, 0.0),
        (tmp_path / "model.safetensors", 0.0),
    ):
        model = model_for(state, torch.float32)
        load_wrapper_state_dict(model, source)
        assert model.initial_memory.dtype is torch.float32
        torch.testing.assert_close(model.initial_memory.detach(), state["memory_cell.memory"], rtol=0, atol=atol)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[comparison-overlap]
    load_wrapper_state_dict(model, tmp_path / "parallel.pth")  # float64, into the model's dtype
    assert model.initial_memory.dtype is torch.float32
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken.safetensors is damaged"):
        load_wrapper_state_dict(model, tmp_path / "broken.safetensors")


@pytest.mark.parametrize("name", [name for name in DECODERS if name in SERVED])
def test_wrappers_around_every_family(name: str) -> None:
    config = FAMILIES[name].make_config(initializer_range=0.1)
    state = recipe("migrate_wrapper").make_checkpoint(config, 4)
    prefix = "memory_cell.model.gpt_neox.layers.0.attention"
    old = {f"{prefix}.bias": torch.ones(1, 1, 4, 4).bool(), f"{prefix}.rotary_emb.inv_freq": torch.ones(8)}
    model = RMTForCausalLM(config_from_wrapper(config, num_mem_tokens=4, segment_size=16)).eval()
    load_wrapper_state_dict(model, state | (old if name == "gpt_neox" else {}))
    ids = torch.randint(3, 64, (2, 48))
    with torch.no_grad():
        logits = model(ids).logits
    stock = recipe("migrate_wrapper").as_the_wrapper(model, ids)
    assert float(stock.abs().max()) > 0.1
    assert float((logits - stock).abs().max()) <= 1e-5
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)  # comparing has left the model as it was


def test_everything_that_is_wrong_is_told_at_once() -> None:
    state = wrapper()
    model = model_for(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gpt = "memory_cell.model.transformer"
    del state[f"{gpt}.h.1.ln_1.bias"]
    state[f"{gpt}.h.0.attn.c_attn.weight"] = state[f"{gpt}.h.0.attn.c_attn.weight"].T
    state[f"{gpt}.h.0.crossattention.bias"] = torch.zeros(2)
    state[f"{gpt}.ln_f.weight"] = state[f"{gpt}.ln_f.weight"].long()
    state["memory_cell.memory"] = torch.zeros(5, WIDTH)
    state["memory_cell.model.lm_head.weight"] = torch.zeros(VOCABULARY, WIDTH)
    with pytest.raises(ValueError) as error:
        load_wrapper_state_dict(model, state)
    for line in (
        "not a state dict of the RMT wrapper around this GPT2LMHeadModel with 3 memory rows",
        "missing: model.transformer.h.1.ln_1.bias (12,)",
        "another shape: model.transformer.h.0.attn.c_attn.weight (36, 12), expected (12, 36)",
        "unknown: model.transformer.h.0.crossattention.bias (2,)",
        "another kind of numbers: model.transformer.ln_f.weight torch.int64, expected torch.float64",
        "another shape: memory (5, 12), expected (3, 12)",
        "not the same: model.transformer.wte.weight and model.lm_head.weight, which this model ties",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 7
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_sources_that_are_no_wrapper(tmp_path: Path) -> None:
    model = model_for(wrapper())
    with pytest.raises(ValueError, match=r"missing: memory \(3, 12\)"):
        load_wrapper_state_dict(model, {})
    with pytest.raises(ValueError, match=r"unknown: initial_memory \(3, 12\)"):
        load_wrapper_state_dict(model, model.state_dict())
    with pytest.raises(TypeError, match="state dict or the path of one, got int"):
        load_wrapper_state_dict(model, 5)  # type: ignore[arg-type]
    torch.save({"step": 5, "model": wrapper()}, tmp_path / "run.pth")
    with pytest.raises(TypeError, match="give the model's state dict alone"):
        load_wrapper_state_dict(model, tmp_path / "run.pth")
    with pytest.raises(FileNotFoundError):
        load_wrapper_state_dict(model, tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="must be an RMTForCausalLM, got GPT2LMHeadModel"):
        load_wrapper_state_dict(model.model, wrapper())
    paper = RMTForCausalLM(RMTConfig(model.config.base_config, memory=MEMORY, segment=TOKENS))
    with pytest.raises(ValueError, match=r"plain causal mask, and this model has mask='rmt'; .*config_from_wrapper"):
        load_wrapper_state_dict(paper, wrapper())


def test_the_wrappers_arguments() -> None:
    base = FAMILIES["gpt2"].make_config()
    given: dict[str, Any] = {"num_mem_tokens": 4, "segment_size": 16}
    config = config_from_wrapper(base, **given, segment_alignment="left", max_n_segments=4, k2=2)
    assert (config.memory, config.segment, config.mask, config.bptt, config.align) == (4, 16, "rmt_causal", 2, "left")
    assert config_from_wrapper(base, **given).bptt == config_from_wrapper(base, **given, k2=None).bptt == "full"
    for wrong, error, message in (
        ({"num_read_mem_tokens": 2}, TypeError, "no argument num_read_mem_tokens; it takes num_mem_tokens"),
        ({"num_mem_tokens": 0}, ValueError, "without memory rows nothing is handed on; use the base model"),
        ({"segment_alignment": "right"}, ValueError, "'left' or None for a decoder, got 'right'; samples of a mult"),
        ({"segment_alignment": "center"}, ValueError, "got 'center'"),
        ({"k2": 0}, ValueError, "k2 must be at least 1, got 0"),
        ({"vary_n_segments": True}, ValueError, "vary_n_segments=True needs max_n_segments"),
        ({"vary_n_segments": 1, "max_n_segments": 2}, TypeError, "vary_n_segments must be True or False, got int"),
        ({"max_n_segments": 0}, ValueError, "max_n_segments must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            config_from_wrapper(base, **{**given, **wrong})  # type: ignore[arg-type]

    assert {segments_from_wrapper(4)(step) for step in range(50)} == {4}
    varied = [segments_from_wrapper(4, True)(step) for step in range(50)]
    assert set(varied) == {1, 2, 3, 4}
    assert varied == [segments_from_wrapper(4, True)(step) for step in range(50)]
    assert varied != [segments_from_wrapper(4, True, seed=1)(step) for step in range(50)]


def test_gradients_go_back_through_k2_segments() -> None:
    config = FAMILIES["gpt2"].make_config(tie_word_embeddings=False)
    state = recipe("migrate_wrapper").make_checkpoint(config, 4)
    ids = torch.arange(64).view(1, 64)  # every token once, so its embedding's gradient is its segment's
    labels = torch.where(ids <= 48, -100, ids)  # what the last segment predicts
    for k2, reached in ((1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (-1, [0, 1, 2, 3])):
        model = RMTForCausalLM(config_from_wrapper(config, num_mem_tokens=4, segment_size=16, k2=k2))
        load_wrapper_state_dict(model, state)
        model(ids, labels=labels).loss.backward()
        grad: Any = model.get_input_embeddings().weight.grad
        assert [s for s in range(4) if bool(grad[16 * s : 16 * s + 16].any())] == reached


def test_the_task_is_one_of_the_packages() -> None:
    task, tokenizer = recipe("questions").load_task("remember", None)
    assert task == make_task("remember", words=100)
    assert tokenizer.decode(tokenizer("? where is mary")["input_ids"]) == "? where is mary"
    assert tokenizer.pad_token_id == 0
    assert len({tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id}) == 3
