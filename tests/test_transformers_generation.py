"""Generation across segments, token by token, against reading everything again for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

pytest.importorskip("transformers", minversion="4.57")

from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from rmt_kernels.integrations.transformers import RMTForCausalLM, RMTState, generation
from tests.families import make
from tests.test_transformers_models import CASES, M, T, by_hand, on_stock, tokens, wrapped

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def again_for_every_token(model: RMTForCausalLM, ids: Tensor, count: int, memory: Tensor | None = None) -> Tensor:
    """Greedy, from stock attention over the whole history, segment by segment."""
    stock = on_stock(model)
    with torch.no_grad():
        for _ in range(count):
            logits, _ = by_hand(model, stock, ids, model.initial_memory, memory)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("prompt", [1, T - 1, T, T + 1, 3 * T])
@pytest.mark.parametrize(("name", "mask"), CASES)
def test_as_if_all_were_read_again(name: str, mask: str, prompt: int) -> None:
    """Over two borders of segments, from prompts that end before, at and behind one."""
    model, ids = wrapped(name, mask), tokens(2, prompt)
    found = model.generate(ids, max_new_tokens=2 * T + 1, **GREEDY)
    assert torch.equal(found, again_for_every_token(model, ids, 2 * T + 1))


def test_the_logits_of_every_token() -> None:
    model, ids = wrapped("llama"), tokens(1, 5)
    found = model.generate(ids, max_new_tokens=2 * T, output_logits=True, return_dict_in_generate=True, **GREEDY)
    with torch.no_grad():
        wanted, _ = by_hand(model, on_stock(model), found.sequences[:, :-1], model.initial_memory)
    assert (torch.stack(found.logits, dim=1) - wanted[:, 4:]).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths(side: str) -> None:
    """Each sample's segments begin at its own first token, whoever is beside it."""
    model, lengths = wrapped("gpt2"), (2 * T + 3, 1, T, T + 5)
    ids, mask = tokens(4, 2 * T + 3), torch.zeros(4, 2 * T + 3).long()
    for i, length in enumerate(lengths):
        mask[i, (slice(-length, None) if side == "left" else slice(length))] = 1
    found = model.generate(ids, attention_mask=mask, max_new_tokens=3 * T, **GREEDY)
    for i in range(4):
        alone = again_for_every_token(model, ids[i][mask[i] == 1][None], 3 * T)
        assert torch.equal(found[i, 2 * T + 3 :], alone[0, lengths[i] :]), i


def test_beams() -> None:
    """Beams change places within a segment and at its borders: each has the score that reading it again gives it."""
    model, ids = wrapped("llama"), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=2 * T, num_beams=4, num_return_sequences=4, output_scores=True,
        return_dict_in_generate=True, length_penalty=0.0, **GREEDY,
    )  # fmt: skip
    stock = on_stock(model)
    for i, sequence in enumerate(found.sequences):
        text = sequence[None, 2:] if i >= 4 else sequence[None]
        with torch.no_grad():
            logits, _ = by_hand(model, stock, text[:, :-1], model.initial_memory)
        new = 2 * T
        each = logits.log_softmax(-1)[0, -new:].gather(-1, text[0, -new:, None])
        assert float(each.sum()) == pytest.approx(float(found.sequences_scores[i]), abs=1e-4)


def test_sampling_repeats_with_its_seed() -> None:
    model, ids = wrapped("gpt2"), tokens(2, 6)
    options: dict[str, Any] = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 2.0, "max_new_tokens": 2 * T}
    torch.manual_seed(3)
    first = model.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, **options), first)
    assert not torch.equal(model.generate(ids, **options), first)


def test_a_streamer_and_a_stop() -> None:
    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.found: list[int] = []

        def put(self, value: Tensor) -> None:
            self.found += value.flatten().tolist()

        def end(self) -> None:
            self.found.append(-1)

    class Enough(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 5 + T + 2)

    model, streamer = wrapped("gpt2"), Streamer()
    found = model.generate(
        tokens(1, 5), streamer=streamer, stopping_criteria=StoppingCriteriaList([Enough()]), max_new_tokens=99, **GREEDY
    )
    assert found.shape == (1, 5 + T + 2)
    assert streamer.found == [*found[0].tolist(), -1]


def test_an_end_of_text_token() -> None:
    model, ids = wrapped("llama"), tokens(2, 6)
    free = model.generate(ids, max_new_tokens=2 * T, **GREEDY)
    end = int(free[0, 6 + 4])
    found = model.generate(ids, max_new_tokens=2 * T, **{**GREEDY, "eos_token_id": end})
    for row, wanted in zip(found[:, 6:].tolist(), free[:, 6:].tolist(), strict=True):
        cut = wanted[: wanted.index(end) + 1] if end in wanted else wanted
        assert row[: len(cut)] == cut
        assert not any(row[len(cut) :])


def test_a_book_read_once_and_asked_often(tmp_path: Path) -> None:
    model, book = wrapped("llama"), tokens(1, 3 * T + 5)
    model.save_memory(model.read(book), tmp_path / "book.safetensors")
    memory = model.load_memory(tmp_path / "book.safetensors")
    assert torch.equal(memory, model(book).memory)
    for seed in range(2):
        question = tokens(1, 4, seed=seed)
        found = model.generate(question, memory=memory, max_new_tokens=2 * T, **GREEDY)
        assert torch.equal(found, again_for_every_token(model, question, 2 * T, memory))
    assert torch.equal(memory, model.load_memory(tmp_path / "book.safetensors"))  # nobody wrote to it
    several = model.generate(tokens(4, 3), memory=memory, max_new_tokens=3, **GREEDY)
    assert several.shape == (4, 6)


def test_going_on_from_a_state() -> None:
    """The state has read all but the last token of an answer; what comes after begins with it."""
    model, ids = wrapped("gpt2"), tokens(1, T + 3)
    first = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    more = torch.cat([first.sequences[:, -1:], tokens(1, 4, seed=7)], dim=1)
    second = model.generate(more, past_key_values=first.past_key_values, max_new_tokens=T, **GREEDY)
    whole = torch.cat([first.sequences, more[:, 1:]], dim=1)
    assert torch.equal(second[:, 5:], again_for_every_token(model, whole, T)[:, whole.shape[1] :])


def test_nothing_grows() -> None:
    """The state, and the rows that a step computes, whatever lies behind."""
    model = wrapped("llama")
    sizes = []
    for length in (3, 5 * T + 3):
        out = model.generate(tokens(1, length), max_new_tokens=2 * T, return_dict_in_generate=True, **GREEDY)
        state = out.past_key_values
        assert isinstance(state, RMTState)
        assert state.memory is not None
        sizes.append([tuple(buffer.shape) for layer in state.buffers for buffer in layer] + [tuple(state.memory.shape)])
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == (1, 2, 2 * M + T, 16)


def test_a_step_is_one_graph_for_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled anew from token to token and from segment to segment."""
    model, ids = wrapped("llama"), tokens(1, 3)
    wanted = model.generate(ids, max_new_tokens=3 * T, **GREEDY)
    torch.compiler.reset()
    counts = torch._dynamo.testing.CompileCounter()
    real = RMTForCausalLM._rows
    compiled = torch.compile(model.model.base_model, backend=counts, dynamic=False)

    def rows(self: RMTForCausalLM, state: RMTState, x: Tensor, *others: Any) -> Tensor:
        if x.shape[1] > 1:
            return real(self, state, x, *others)
        monkeypatch.setattr(RMTForCausalLM, "_decoder", property(lambda self: compiled))
        try:
            return real(self, state, x, *others)
        finally:
            monkeypatch.setattr(RMTForCausalLM, "_decoder", decoder)

    decoder = RMTForCausalLM._decoder
    monkeypatch.setattr(RMTForCausalLM, "_rows", rows)
    after_first = []
    real_extend = RMTForCausalLM._extend

    def extend(*arguments: Any) -> Tensor:
        out = real_extend(*arguments)
        after_first.append(counts.frame_count)
        return out

    monkeypatch.setattr(RMTForCausalLM, "_extend", extend)
    assert torch.equal(model.generate(ids, max_new_tokens=3 * T, **GREEDY), wanted)
    assert counts.frame_count > 0
    assert after_first[-1] == after_first[2]


@pytest.mark.parametrize(
    ("option", "error"),
    [({"assistant_model": object()}, "assistant_model"), ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
     ({"cache_implementation": "static"}, "the model's own"), ({"use_cache": False}, "read everything again"),
     ({"penalty_alpha": 0.6}, "contrastive"), ({"inputs_embeds": torch.zeros(1, 2, 64)}, "input_ids"),
     ({"past_key_values": object()}, "RMTState"), ({"past_key_values": RMTState(), "memory": torch.zeros(1)}, "leave")],
)  # fmt: skip
def test_what_can_not_work_across_segments(option: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        wrapped("gpt2").generate(tokens(1, 3), max_new_tokens=2, **option)


def test_beams_are_not_gone_on_with() -> None:
    model, ids = wrapped("gpt2"), tokens(1, 3)
    out = model.generate(ids, max_new_tokens=2, num_beams=2, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="its samples are beams"):
        model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=2, **GREEDY)


def test_memories_of_others(tmp_path: Path) -> None:
    model = wrapped("llama")
    model.save_memory(model.read(tokens(1, 9)), tmp_path / "memory")
    with pytest.raises(ValueError, match=r"another model: llama, .* memory 3.*; this one is gpt2"):
        wrapped("gpt2").load_memory(tmp_path / "memory")
    with pytest.raises(ValueError, match="other weights"):
        RMTForCausalLM.from_base(make("llama", "causal", seed=1), memory=M, segment=T).load_memory(tmp_path / "memory")
    (tmp_path / "broken").write_bytes((tmp_path / "memory").read_bytes()[:40])
    with pytest.raises(ValueError, match="no memory file, or damaged"):
        model.load_memory(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"memory must be what the model returned"):
        model.generate(tokens(1, 3), memory=torch.zeros(1, M + 1, 64), max_new_tokens=2, **GREEDY)


def test_refused_arguments_are_all_known() -> None:
    """A name that ``generate`` has no more would be refused for nothing."""
    from transformers import GenerationConfig

    known = set(vars(GenerationConfig())) | {"assistant_model", "inputs_embeds", "low_memory", "penalty_alpha"}
    assert set(generation._REFUSED) - known <= {"cache_config", "prefill_chunk_size", "assistant_early_exit"}
