"""RMT, Transformer-XL and the model without memory, against networks written out here.

The dense networks read one sample at a time, in segments of their true lengths, with masks and scores as matrices. They
take their weights from a model by name, and nothing else from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels import Replay, Truncate
from rmt_kernels.backends import cpu, triton
from rmt_kernels.models import MODELS, ModelConfig, SegmentModel, build
from rmt_kernels.models.blocks import Attention

T, M, WIDTH, HEADS, VOCABULARY = 5, 2, 8, 2, 7
SMALL = ModelConfig(
    vocabulary=VOCABULARY, tokens=T, width=WIDTH, heads=HEADS, layers=2, inner=12, backend="reference", norm="post"
)
RMT = replace(SMALL, memory=M)
LENGTHS = (13, 4, 10)  # three segments at most; the second sample has one, the third two full ones


# -- the networks, dense -----------------------------------------------------------------------------------------------


def told(positions: str, slopes: Tensor | None, w: Mapping[str, Tensor], name: str, head: int, distance: int) -> Tensor:
    """What a score of a head gains after scaling, of "bias" and "alibi"."""
    if positions == "bias":
        return w[f"{name}.scores.bias"][head, distance]
    assert slopes is not None
    return -slopes[head] * distance


def sinusoids(distance: int) -> Tensor:
    angles = torch.tensor([distance / 10000 ** (2 * i / WIDTH) for i in range(WIDTH // 2)], dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()])


def dense_attention(
    w: Mapping[str, Tensor],
    name: str,
    rows: Tensor,
    keys: Tensor,
    seen: Tensor,
    at: list[int],
    of: list[int],
    kind: str,
) -> Tensor:
    """Rows (n, width) to keys (m, width) with a mask (n, m); row i stands at ``at[i]``, key j at ``of[j]``."""
    bias = w.get(f"{name}.qkv.bias", torch.zeros(3 * WIDTH, dtype=torch.float64))
    parts = zip(w[f"{name}.qkv.weight"].split(WIDTH), bias.split(WIDTH), (rows, keys, keys), strict=True)
    query, key, value = (x @ weight.T + part for weight, part, x in parts)
    outs, size = [], WIDTH // HEADS
    for head in range(HEADS):
        mine = slice(head * size, (head + 1) * size)
        q, k, v = query[:, mine], key[:, mine], value[:, mine]
        if kind == "relative":
            table = w[f"{name}.scores.key.weight"][mine]
            r = torch.stack([torch.stack([table @ sinusoids(abs(i - j)) for j in of]) for i in at])  # (n, m, size)
            scores = (q + w[f"{name}.scores.content_bias"][head]) @ k.T
            scores = scores + torch.einsum("id,ijd->ij", q + w[f"{name}.scores.position_bias"][head], r)
            scores = scores / math.sqrt(size)
        else:
            scores = q @ k.T / math.sqrt(size)
            if kind in ("bias", "alibi"):
                slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)  # of two heads
                added = [[told(kind, slopes, w, name, head, abs(i - j)) for j in of] for i in at]
                scores = scores + torch.stack([torch.stack(line) for line in added])
        outs.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v)
    found: Tensor = torch.cat(outs, dim=1) @ w[f"{name}.out.weight"].T
    return found + w.get(f"{name}.out.bias", torch.zeros(WIDTH, dtype=torch.float64))


def normed(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])


def dense_layer(
    w: Mapping[str, Tensor], name: str, norm: str, x: Tensor, cache: Tensor, seen: Tensor, at: list[int], of: list[int],
    kind: str,
) -> Tensor:  # fmt: skip
    inside = "attention", "feedforward.inner", "feedforward.out"
    attention, inner, outer = (f"{name}.{part}" for part in inside)

    def feed(x: Tensor) -> Tensor:
        hidden = F.gelu(x @ w[f"{inner}.weight"].T + w[f"{inner}.bias"])
        return hidden @ w[f"{outer}.weight"].T + w[f"{outer}.bias"]

    if norm == "pre":
        rows, old = normed(w, f"{name}.norm1", x), normed(w, f"{name}.norm1", cache)
        x = x + dense_attention(w, attention, rows, torch.cat([old, rows]), seen, at, of, kind)
        return x + feed(normed(w, f"{name}.norm2", x))
    x = normed(w, f"{name}.norm1", x + dense_attention(w, attention, x, torch.cat([cache, x]), seen, at, of, kind))
    return normed(w, f"{name}.norm2", x + feed(x))


def visible(config: ModelConfig, name: str, tokens: int, held: int) -> Tensor:
    """The mask of a segment with its true number of tokens: from the words of the papers, entry by entry."""
    m = config.memory
    kinds = ["read"] * m + ["token"] * tokens + ["write"] * (m if name != "rmt_encoder" else 0)
    plain = config.layout == "causal"
    seen = torch.zeros(len(kinds), held + len(kinds), dtype=torch.bool)
    for i, mine in enumerate(kinds):
        for j in range(held + len(kinds)):
            other = "cache" if j < held else kinds[j - held]
            if name == "rmt_encoder":
                can = True
            elif plain:
                can = j <= held + i
            elif other == "cache":
                can = mine == "token" or config.read_cache
            elif mine == "token":
                can = other == "read" or (other == "token" and j - held <= i)
            else:
                can = other == "read" or mine == "write"
            if config.same_length and mine == "token" and other in ("cache", "token"):
                # Its own place, and the key's, among caches and tokens.
                here, there = held + i - m, j if other == "cache" else j - m
                can = can and here - config.cache < there
            seen[i, j] = can
    return seen


@dataclass
class State:
    memory: Tensor
    caches: list[Tensor] = field(default_factory=list)


def first_state(model: SegmentModel, w: Mapping[str, Tensor]) -> State:
    start = next((value for key, value in w.items() if key.endswith("initial_memory")), None)
    if start is None:
        start = torch.zeros(0, WIDTH, dtype=torch.float64)
    return State(start, [torch.zeros(0, WIDTH, dtype=torch.float64)] * model.config.layers)


def dense_segment(model: SegmentModel, w: Mapping[str, Tensor], ids: Tensor, state: State) -> tuple[Tensor, State]:
    """Hidden rows of the tokens of one segment of one sample, and the next state."""
    config, name = model.config, model.name
    m, tokens, last = config.memory, len(ids), config.norm == "pre"
    if name in ("transformer_xl", "rmt_transformer_xl"):
        x = torch.cat([state.memory, w["embed.weight"][ids] * math.sqrt(WIDTH), state.memory])
        held, kind = len(state.caches[0]), config.positions or "relative"
        # A short segment leaves the places of its missing tokens empty.
        places = [*range(held + m + tokens), *range(held + m + T, held + m + T + m)]
        seen, inputs = visible(config, name, tokens, held), []
        for i, cache in enumerate(state.caches):
            inputs.append(x)
            x = dense_layer(w, f"layers.{i}", config.norm, x, cache, seen, places[held:], places, kind)
        x = normed(w, "norm", x) if last else x
        caches = [
            torch.cat([old, new.detach()])[len(old) + len(new) - min(config.cache, len(old) + len(new)) :]
            for old, new in zip(state.caches, inputs, strict=True)
        ]
        return x[m : m + tokens], State(x[len(x) - m :], caches)

    part = "" if name == "none" else "recurrence."
    stack, kind = f"{part}backbone", config.positions or "learned"
    rows = w[f"{part}embed.weight"][ids]
    if name == "rmt_encoder":  # in the paper's order
        cls, sep = w[f"{stack}.marks"]
        x = torch.cat([cls[None], state.memory, sep[None], rows, sep[None]])
        x = x + w[f"{stack}.places"][: len(x)] if kind == "learned" else x
        seen, places = torch.ones(len(x), len(x), dtype=torch.bool), list(range(len(x)))
        memory, texts = slice(1, m + 1), slice(m + 2, m + 2 + tokens)
    else:
        x = torch.cat([state.memory, rows, state.memory])
        places = [*range(m + tokens), *range(m + T, m + T + m)]
        x = x + w[f"{stack}.places"][places] if kind == "learned" else x
        seen = visible(config, name, tokens, 0)
        memory, texts = slice(len(x) - m, len(x)), slice(m, m + tokens)
    for i in range(config.layers):
        x = dense_layer(w, f"{stack}.layers.{i}", config.norm, x, x[:0], seen, places, places, kind)
    x = normed(w, f"{stack}.norm", x) if last else x
    return x[texts], State(x[memory])


@dataclass
class Dense:
    """What the dense network makes of a batch."""

    loss: Tensor
    states: list[State]
    logits: list[Tensor]  # (tokens of the sample, vocabulary)


def dense(
    model: SegmentModel, ids: Tensor, labels: Tensor, lengths: Any = LENGTHS, carry: bool = True, states: Any = None
) -> Dense:
    w, config = dict(model.named_parameters()), model.config
    part = "" if "recurrence.initial_memory" not in w else "recurrence."
    head = w[f"{part}embed.weight"] if config.tied else w[f"{part}head.weight"]
    bias = w.get("head.bias", torch.zeros(VOCABULARY, dtype=torch.float64))
    ends, logits, losses = [], [], []
    for b, length in enumerate(lengths):
        state = first_state(model, w) if states is None else states[b]
        borders = [*range(0, length, T), length]
        if model.name == "rmt_encoder":
            borders = [0, *range(length - (length - 1) // T * T, length + 1, T)]
        pieces = []
        for begin, end in pairwise(borders):
            hidden, new = dense_segment(model, w, ids[b, begin:end], state if carry else first_state(model, w))
            pieces.append(hidden @ head.T + bias)
            if model.recurrent:
                state = new
        ends.append(state)
        logits.append(torch.cat(pieces))
        ahead = 1 if model.causal else 0
        for i in range(length - ahead):
            if labels[b, i + ahead] != -100:
                losses.append(-logits[b][i].log_softmax(0)[labels[b, i + ahead]])
    return Dense(torch.stack(losses).mean(), ends, logits)


# -- comparisons -------------------------------------------------------------------------------------------------------


def made(name: str, config: ModelConfig) -> SegmentModel:
    """A model in float64 whose every parameter matters: none is left at 0 or 1."""
    model = build(name, config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def numbers(n: int = max(LENGTHS)) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (len(LENGTHS), n))
    labels = torch.randint(VOCABULARY, ids.shape).masked_fill(torch.rand(ids.shape) < 0.2, -100)
    return ids, labels


def tensors_of(memory: Any) -> Tensor:
    """The memory rows, of a state or of a tensor."""
    return memory if isinstance(memory, Tensor) else memory[0]


def close(found: Tensor, wanted: Tensor, limit: float) -> None:
    assert found.shape == wanted.shape
    if found.numel():
        worst = float(((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).detach())
        assert worst <= limit, worst


def compare(
    model: SegmentModel,
    carry: bool = True,
    limit: float = 1e-9,
    wanted: SegmentModel | None = None,
    whole: bool = False,
) -> None:
    """Loss, logits, memory and every gradient of a model are those of the dense network in float64."""
    truth = model if wanted is None else wanted
    spans = (2 * T,) * len(LENGTHS) if whole else LENGTHS
    ids, labels = numbers(max(spans))
    # What padding holds must not matter.
    for b, length in enumerate(spans):
        labels[b, length:] = 3
    found = model(ids, labels=labels, lengths=None if whole else torch.tensor(spans), outputs="logits", carry=carry)
    right = dense(truth, ids, labels, spans, carry=carry)
    assert found.loss is not None
    assert found.outputs is not None
    close(found.loss.double(), right.loss, limit)
    for b, length in enumerate(spans):
        close(found.outputs[b, :length].double(), right.logits[b], limit)
        assert not found.outputs[b, length:].any()
    # A loss that sees the memory too, where there is any.
    total, expected = found.loss.double(), right.loss
    if truth.recurrent and carry and truth.config.memory:
        memory = tensors_of(found.memory).double()
        close(memory, torch.stack([state.memory for state in right.states]), limit)
        weight = torch.randn(memory.shape, dtype=torch.float64)
        total = total + (memory * weight).mean()
        expected = expected + (torch.stack([s.memory for s in right.states]) * weight).mean()
    if not (truth.recurrent and carry):
        assert found.memory is None
    gradients = torch.autograd.grad(total, list(model.parameters()))
    for (name, _), gradient, other in zip(
        truth.named_parameters(), gradients, torch.autograd.grad(expected, list(truth.parameters())), strict=True
    ):
        assert bool(other.any()), f"{name} has no part in this"
        close(gradient.double(), other, limit)


XL = replace(SMALL, cache=4, norm="pre")
CASES = {
    "none": ("none", SMALL),
    "none, pre, untied": ("none", replace(SMALL, norm="pre", tied=False)),
    "none, alibi": ("none", replace(SMALL, positions="alibi")),
    "rmt": ("rmt", RMT),
    "rmt, pre, untied": ("rmt", replace(RMT, norm="pre", tied=False)),
    "rmt, causal": ("rmt", replace(RMT, layout="causal")),
    "rmt, causal, pre": ("rmt", replace(RMT, layout="causal", norm="pre", positions="none")),
    "rmt, relative": ("rmt", replace(RMT, positions="relative")),
    "rmt, bias": ("rmt", replace(RMT, positions="bias")),
    "encoder": ("rmt_encoder", RMT),
    "encoder, pre": ("rmt_encoder", replace(RMT, norm="pre")),
    "encoder, no positions": ("rmt_encoder", replace(RMT, positions="none")),
    "xl": ("transformer_xl", replace(XL, norm="post")),
    "xl, pre": ("transformer_xl", XL),
    "xl, cache of two segments": ("transformer_xl", replace(XL, cache=8)),
    "xl, same length": ("transformer_xl", replace(XL, same_length=True)),
    "xl, alibi": ("transformer_xl", replace(XL, positions="alibi")),
    "xl, bias": ("transformer_xl", replace(XL, positions="bias")),
    "rmt on xl": ("rmt_transformer_xl", replace(XL, memory=M)),
    "rmt on xl, post, reads the cache": (
        "rmt_transformer_xl", replace(XL, memory=M, norm="post", read_cache=True, same_length=True)
    ),
    "rmt on xl, long cache": ("rmt_transformer_xl", replace(XL, memory=M, cache=12)),
    "rmt on xl, no cache": ("rmt_transformer_xl", replace(XL, memory=M, cache=0)),
    "rmt on xl, alibi": ("rmt_transformer_xl", replace(XL, memory=M, positions="alibi", read_cache=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_result_is_the_dense_networks(case: str) -> None:
    compare(made(*CASES[case]))


@pytest.mark.parametrize("case", ["none", "rmt, causal", "encoder", "xl", "rmt on xl", "rmt on xl, long cache"])
def test_and_so_it_is_where_no_sample_has_padding(case: str) -> None:
    compare(made(*CASES[case]), whole=True)


@pytest.mark.parametrize("case", ["rmt", "encoder", "xl", "rmt on xl"])
def test_with_the_memory_cut_every_segment_is_read_from_the_start(case: str) -> None:
    model = made(*CASES[case])
    compare(model, carry=False)
    ids, labels = numbers(10)
    whole = model(ids, labels=labels, outputs="logits", carry=False)
    alone = [model(ids[:, s : s + T], outputs="logits").outputs for s in (0, T)]
    torch.testing.assert_close(whole.outputs, torch.cat([x for x in alone if x is not None], dim=1))
    carried = model(ids, outputs="logits").outputs
    assert whole.outputs is not None
    assert carried is not None
    assert not torch.allclose(whole.outputs[:, T:], carried[:, T:])


@pytest.mark.parametrize("case", ["rmt", "rmt, causal", "encoder", "none", "xl, alibi", "rmt on xl", "xl, same length"])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow), "stock"])
def test_every_backend_that_serves_a_model_computes_the_same(case: str, backend: str) -> None:
    missing = {"cpu": cpu.why_missing, "triton": triton.why_missing}.get(backend)
    if missing:
        pytest.skip(missing)
    name, config = CASES[case]
    relative = name in ("transformer_xl", "rmt_transformer_xl")
    if backend == "stock" and relative:
        with pytest.raises(ValueError, match="distance-dependent"):
            build(name, replace(config, backend=backend))(numbers()[0])
        return
    wanted = made(name, config)
    model = build(name, replace(config, backend=backend))
    model.load_state_dict(wanted.state_dict())
    compare(model, wanted=wanted, limit=2e-5)


def test_the_two_masks_of_the_decoder_differ() -> None:
    paper = made("rmt", RMT)
    wrapper = build("rmt", replace(RMT, layout="causal")).double()
    wrapper.load_state_dict(paper.state_dict())
    ids, _ = numbers(10)
    one, other = (model(ids, outputs="logits") for model in (paper, wrapper))
    assert not torch.allclose(one.memory, other.memory)
    # READ rows see one another in the one and not in the other, so even the first segment's tokens differ.
    assert not torch.allclose(one.outputs[:, :T], other.outputs[:, :T])


@pytest.mark.parametrize("case", ["rmt", "xl", "rmt on xl", "rmt on xl, long cache"])
def test_reading_on_is_reading_all_at_once(case: str) -> None:
    model = made(*CASES[case])
    ids, _ = numbers(15)
    whole = model(ids, outputs="logits")
    first = model(ids[:, :10], outputs="logits")
    rest = model(ids[:, 10:], memory=first.memory, outputs="logits")
    assert whole.outputs is not None
    assert first.outputs is not None
    assert rest.outputs is not None
    close(torch.cat([first.outputs, rest.outputs], dim=1), whole.outputs, 1e-12)
    close(tensors_of_all(rest.memory), tensors_of_all(whole.memory), 1e-12)


def tensors_of_all(memory: Any) -> Tensor:
    if isinstance(memory, Tensor):
        return memory.double().flatten()
    return torch.cat([tensors_of_all(part) for part in memory] or [torch.zeros(0, dtype=torch.float64)])


@pytest.mark.parametrize("case", ["xl", "rmt on xl", "rmt on xl, long cache", "xl, cache of two segments"])
def test_samples_that_end_early_read_on_from_their_own_last_rows(case: str) -> None:
    model = made(*CASES[case])
    ids, labels = numbers()
    more, marks = numbers()
    lengths = torch.tensor(LENGTHS)
    before = model(ids, lengths=lengths)
    found = model(more, labels=marks, lengths=lengths.flip(0), memory=before.memory, outputs="logits")
    states = dense(model, ids, labels).states
    right = dense(model, more, marks, LENGTHS[::-1], states=states)
    assert found.loss is not None
    assert found.outputs is not None
    close(found.loss, right.loss, 1e-9)
    for b, length in enumerate(LENGTHS[::-1]):
        close(found.outputs[b, :length], right.logits[b], 1e-9)
    # The caches, right-aligned, hold exactly the rows that they should.
    for kept, wanted in zip(found.memory[1], zip(*(s.caches for s in right.states), strict=True), strict=True):
        for b, rows in enumerate(wanted):
            assert found.memory[2][b] == kept.shape[1] - len(rows)
            close(kept[b, kept.shape[1] - len(rows) :], rows, 1e-9)


@pytest.mark.parametrize("case", ["rmt on xl, long cache", "xl, cache of two segments"])
def test_padding_of_caches_is_pushed_out_by_whole_segments(case: str) -> None:
    model = made(*CASES[case])
    ids, labels = numbers()
    more, marks = numbers(2 * T)
    memory = model(ids, lengths=torch.tensor(LENGTHS)).memory
    assert bool(memory[2].any())  # the second sample's are short
    found = model(more, labels=marks, memory=memory)
    states = dense(model, ids, labels).states
    close(found.loss, dense(model, more, marks, (2 * T,) * len(LENGTHS), states=states).loss, 1e-9)
    assert not found.memory[2].any()


def test_a_cache_is_not_gone_back_through() -> None:
    model = made("transformer_xl", XL)
    ids, _ = numbers(10)
    memory = model(ids).memory
    assert not any(cache.requires_grad for cache in memory[1])
    memory = made("rmt_transformer_xl", replace(XL, memory=M))(ids).memory
    assert memory[0].requires_grad
    assert not any(cache.requires_grad for cache in memory[1])


def test_keys_and_values_alone_are_computed_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("transformer_xl", XL)
    shapes = []
    real = Attention._part

    def watched(self: Attention, x: Tensor, rows: slice) -> Tensor:
        found = real(self, x, rows)
        shapes.append((x.shape[1], found.shape[2]))
        return found

    monkeypatch.setattr(Attention, "_part", watched)
    model(numbers(15)[0])
    assert shapes == [(4, 2 * WIDTH)] * 4  # two layers, two segments that have a cache


@pytest.mark.parametrize("name", ["rmt", "rmt_encoder", "transformer_xl", "rmt_transformer_xl"])
@pytest.mark.parametrize("bptt", [Replay(), Replay(keep=0), Replay(budget_bytes=10**9)])
def test_replay_gives_the_same_gradients_with_dropout_too(name: str, bptt: Replay) -> None:
    config = replace(SMALL, memory=0 if name == "transformer_xl" else M, cache=4 if "xl" in name else 0, dropout=0.2)
    full = made(name, config)
    again = build(name, replace(config, bptt=bptt)).double()
    again.load_state_dict(full.state_dict())
    ids, labels = numbers()
    results = []
    for model in (full, again):
        torch.manual_seed(5)
        loss = model(ids, labels=labels, lengths=torch.tensor(LENGTHS)).loss
        assert loss is not None
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        close(one, other, 1e-10)


@pytest.mark.parametrize("name", ["rmt", "rmt_transformer_xl"])
def test_truncation_cuts_the_memory(name: str) -> None:
    config = replace(RMT, cache=4 if "xl" in name else 0, bptt=1)
    model = made(name, config)
    ids, labels = numbers(15)
    labels[:, :11] = -100  # rows of the last segment alone: the first label of one is the last row's of the one before
    loss = model(ids, labels=labels).loss
    assert loss is not None
    loss.backward()
    start = next(p for key, p in model.named_parameters() if key.endswith("initial_memory"))
    assert start.grad is None or not start.grad.any()
    model = made(name, replace(config, bptt="full"))
    loss = model(ids, labels=labels).loss
    assert loss is not None
    loss.backward()
    start = next(p for key, p in model.named_parameters() if key.endswith("initial_memory"))
    assert start.grad is not None
    assert start.grad.any()


def test_no_labels_no_loss_and_hidden_rows_on_demand() -> None:
    model = made("transformer_xl", XL)
    ids, _ = numbers()
    out = model(ids, outputs="hidden")
    assert out.loss is None
    assert out.outputs is not None
    assert out.outputs.shape == (*ids.shape, WIDTH)
    assert model(ids).outputs is None


@pytest.mark.parametrize("name", ["rmt", "rmt_transformer_xl"])
def test_autocast_keeps_memory_and_caches_wide(name: str) -> None:
    model = build(name, replace(RMT, cache=4 if "xl" in name else 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(numbers(15)[0], labels=numbers(15)[1])
    assert out.loss is not None
    assert out.loss.dtype is torch.float32
    assert out.loss.isfinite()
    assert tensors_of_all(out.memory).isfinite().all()
    assert tensors_of(out.memory).dtype is torch.float32


# -- configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bptt", ["full", 3, Truncate(2, every=True), Replay(), Replay(keep=0, truncate=2, recompute="except_attention")]
)
def test_a_configuration_goes_through_json_and_back(bptt: Any) -> None:
    config = replace(RMT, bptt=bptt, dropout=0.1, layout="causal", backend="auto")
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.bptt, type(config.bptt))


def test_replay_has_a_short_name() -> None:
    assert replace(RMT, bptt="replay").bptt == Replay()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulary": 7}, "needs .'tokens'."),
        ({"vocabulary": 7, "tokens": 5, "colour": 1}, "unknown fields .'colour'.*accepted"),
        ({"vocabulary": 7, "tokens": 0}, "tokens must be at least 1, got 0"),
        ({"vocabulary": 7, "tokens": 5, "memory": -1}, "memory must be at least 0"),
        ({"vocabulary": 7, "tokens": 5, "inner": 0}, "inner must be at least 1"),
        ({"vocabulary": 7, "tokens": 5, "width": 10, "heads": 4}, "multiple of heads, got 10 and 4"),
        ({"vocabulary": 7, "tokens": 5, "norm": "mid"}, "norm must be one of .*'mid'"),
        ({"vocabulary": 7, "tokens": 5, "layout": "rmt"}, "layout must be one of .*'rmt'"),
        ({"vocabulary": 7, "tokens": 5, "positions": "rotary"}, "positions must be one of"),
        ({"vocabulary": 7, "tokens": 5, "relative": "x"}, "relative must be one of"),
        ({"vocabulary": 7, "tokens": 5, "activation": "x"}, "activation must be one of"),
        ({"vocabulary": 7, "tokens": 5, "dropout": 1.0}, "0 <= dropout < 1, got 1.0"),
        ({"vocabulary": 7, "tokens": 5, "temperature": 0.0}, "temperature must be"),
        ({"vocabulary": 7, "tokens": 5, "bptt": 0}, "bptt must be at least 1"),
        ({"vocabulary": 7, "tokens": 5, "bptt": {"steps": {}}}, "bptt: a mapping must be"),
    ],
)
def test_values_that_no_model_can_have(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 5.0}, "tokens must be an int, got float"),
        ({"heads": True}, "heads must be an int, got bool"),
        ({"dropout": "0"}, "dropout must be a float"),
        ({"tied": 1}, "tied must be True or False"),
        ({"backend": None}, "backend must be a str"),
        ({"bptt": None}, "bptt must be"),
    ],
)
def test_types_that_no_model_can_have(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        replace(SMALL, **values)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gpt", SMALL, "model must be one of .*'gpt'"),
        ("rmt", SMALL, "memory must be at least 1 for rmt, got 0"),
        ("rmt_encoder", SMALL, "memory must be at least 1 for rmt_encoder"),
        ("rmt_transformer_xl", XL, "memory must be at least 1"),
        ("transformer_xl", SMALL, "cache must be at least 1 for transformer_xl"),
        ("none", RMT, "memory: none has no use for it; leave it at 0"),
        ("none", replace(SMALL, bptt=2), "bptt: none has no use for it"),
        ("rmt", replace(RMT, cache=3), "cache: rmt has no use for it"),
        ("rmt", replace(RMT, temperature=0.5), "temperature: rmt has no use"),
        ("rmt_encoder", replace(RMT, layout="causal"), "layout: rmt_encoder has no use"),
        ("rmt_encoder", replace(RMT, positions="alibi"), "positions must be one of .* for rmt_encoder, got 'alibi'"),
        ("transformer_xl", replace(XL, memory=1), "memory: transformer_xl has no use"),
        ("transformer_xl", replace(XL, read_cache=True), "read_cache: transformer_xl has no use"),
        ("transformer_xl", replace(XL, positions="learned"), "positions must be one of"),
        ("rmt", replace(RMT, relative="shifted"), "relative='shifted' is about .*positions='learned' here"),
        ("transformer_xl", replace(XL, width=9, heads=3), "width must be even"),
        ("rmt_transformer_xl", replace(RMT, same_length=True), "same_length: .*cache is 0"),
    ],
)
def test_a_configuration_that_a_system_cannot_have(name: str, config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, config)


@pytest.mark.parametrize("name", ["none", "rmt", "transformer_xl"])
def test_bad_arguments_of_a_call(name: str) -> None:
    model = build(name, replace(SMALL, memory=M if name == "rmt" else 0, cache=4 if "xl" in name else 0))
    ids, labels = numbers()
    with pytest.raises(TypeError, match=r"ids must be an int64 tensor of shape \(batch, n\), got torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match="labels must have shape"):
        model(ids, labels=labels[:, 1:])
    with pytest.raises(ValueError, match="ids must have shape"):
        model(ids[0])
    with pytest.raises(ValueError, match="outputs must be None, 'hidden' or 'logits', got 'all'"):
        model(ids, outputs="all")
    with pytest.raises(ValueError, match="lengths must be between 0 and 13"):
        model(ids, lengths=torch.tensor([14, 1, 1]))
    with pytest.raises(ValueError, match="hands nothing on" if name == "none" else "carry=False reads each segment"):
        model(ids, memory=torch.zeros(3, M, WIDTH), carry=False)
    if name == "none":
        return
    memory = model(ids).memory
    with pytest.raises(ValueError, match="memory must"):
        model(ids[:2], memory=memory)
    with pytest.raises(TypeError, match="memory must"):
        build(name, model.config).double()(ids, memory=memory)
    with pytest.raises((TypeError, ValueError), match="memory must"):
        model(ids, memory=(torch.zeros(1),))


def test_a_cache_of_another_size_is_refused() -> None:
    ids, _ = numbers()
    memory = made("transformer_xl", replace(XL, cache=5))(ids).memory
    with pytest.raises(ValueError, match="caches of at most 4 rows, got 5"):
        made("transformer_xl", XL)(ids, memory=memory)


def test_every_system_has_its_name() -> None:
    assert list(MODELS) == [
        "none", "rmt", "rmt_encoder", "transformer_xl", "rmt_transformer_xl", "memory_transformer", "mem_ctrl",
        "mem_ctrl_shared", "mem_bottleneck", "memformer", "membart",
    ]  # fmt: skip
