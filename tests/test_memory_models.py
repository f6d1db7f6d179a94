"""Memory Transformer, Memformer and MemBART against dense references that are written out here, sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.backends import cpu, triton
from rmt_kernels.models import MODELS, ModelConfig, SegmentModel, build
from rmt_kernels.models.membart import JointLayer, MemBART
from rmt_kernels.models.memformer import Memformer, Write
from rmt_kernels.models.memory_transformer import MemBottleneck, MemCtrl, MemCtrlShared
from rmt_kernels.recurrence import Replay, Truncate
from tests.recurrence import generator_state, gradients, largest_difference

ENCODERS = ("memory_transformer", "mem_ctrl", "mem_ctrl_shared", "mem_bottleneck")
RECURRENT = ("memformer", "membart")
ALL = (*ENCODERS, *RECURRENT)
SIZES: dict[str, Any] = {"vocabulary": 11, "tokens": 5, "memory": 3, "width": 8, "heads": 2, "layers": 2, "inner": 12}
LENGTH = 13  # segments of 5, 5 and 3 tokens
LENGTHS = (13, 7, 5, 0)  # one sample fills the last segment, one has tokens in 2, one in 1, one in none


def make(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> SegmentModel:
    """A small model with biases that are not 0, norms that are not 1, and large memory rows."""
    if name == "memformer":
        options = {"temperature": 0.3} | options
    torch.manual_seed(1)
    model = build(name, ModelConfig(**(SIZES | {"backend": "reference"} | options)))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
        elif len(parameter) == model.config.memory:
            nn.init.normal_(parameter)
    return model.to(dtype)


def batch() -> dict[str, Tensor]:
    """Token numbers, labels of some rows, lengths."""
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(11, (2, len(LENGTHS), LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
    return {"ids": ids, "labels": labels, "lengths": torch.tensor(LENGTHS)}


# -- dense references --------------------------------------------------------------------------------------------------


class Dense:
    """One sample's rows through a model's weights, in plain torch with written-out masks; no padding exists here."""

    def __init__(self, model: SegmentModel) -> None:
        self.weights: dict[str, Tensor] = dict(model.named_parameters())
        self.config, self.pre = model.config, model.config.norm == "pre"

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return x @ self[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        unit = apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * self[f"{name}.weight"] + self[f"{name}.bias"]

    def last_norm(self, name: str, x: Tensor) -> Tensor:
        return self.norm(name, x) if self.pre else x

    def projected(self, name: str, x: Tensor) -> list[Tensor]:
        """Query, key and value of one weight."""
        return list(self.linear(f"{name}.qkv", x).chunk(3, dim=-1))

    def softmax(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, by: float = 1.0
    ) -> Tensor:
        """Head by head; ``mask`` True = visible, ``by`` divides the scores once more."""
        size = self.config.width // self.config.heads
        out = []
        for head in range(self.config.heads):
            at = slice(head * size, (head + 1) * size)
            scores = query[:, at] @ key[:, at].T / (size**0.5 * by)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out.append(weights @ value[:, at])
        return torch.cat(out, dim=-1)

    def feed(self, x: Tensor, parts: str, norm: str) -> Tensor:
        def network(rows: Tensor) -> Tensor:
            return self.linear(f"{parts}.out", F.gelu(self.linear(f"{parts}.inner", rows)))

        return x + network(self.norm(norm, x)) if self.pre else self.norm(norm, x + network(x))

    def seeing(self, name: str, rows: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention from rows to others, with its residual and norm."""
        asking, given = (self.norm(f"{name}.norm", x) if self.pre else x for x in (rows, seen))
        (query, _, _), (_, key, value) = (self.projected(f"{name}.attention", x) for x in (asking, given))
        rows = rows + self.linear(f"{name}.attention.out", self.softmax(query, key, value, mask=mask))
        return rows if self.pre else self.norm(f"{name}.norm", rows)

    def layer(self, name: str, rows: Tensor, seen: Tensor) -> Tensor:
        """A transformer layer for some rows that see others."""
        rows = self.seeing(f"{name}.attend", rows, seen)
        return self.feed(rows, f"{name}.feed.feedforward", f"{name}.feed.norm")

    def decoded(self, tokens: Tensor, encoded: Tensor) -> Tensor:
        """The decoder: row i has read the tokens before i, and all encoded rows."""
        n = len(tokens)
        rows = torch.cat([self["decoder.first"][None], tokens[: n - 1]]) + self["decoder.places.places"][:n]
        before = torch.arange(n)[None, :] <= torch.arange(n)[:, None]
        for i in range(self.config.layers):
            name = f"decoder.layers.{i}"
            rows = self.seeing(f"{name}.attend", rows, rows, before)
            rows = self.seeing(f"{name}.read", rows, encoded)
            rows = self.feed(rows, f"{name}.feed.feedforward", f"{name}.feed.norm")
        return self.last_norm("decoder.norm", rows)


def dense_encoder(dense: Dense, name: str, ids: Tensor) -> Tensor:
    """Hidden rows of one segment of one sample."""
    memory, tokens = dense["memory"], dense["embed.weight"][ids] + dense["places"][: len(ids)]
    slots, layers = len(memory), dense.config.layers
    for i in range(layers):
        both = torch.cat([memory, tokens])
        if name == "memory_transformer":
            at = f"layers.{i}"
            x = dense.norm(f"{at}.norm1", both) if dense.pre else both
            mixed = dense.linear(f"{at}.attention.out", dense.softmax(*dense.projected(f"{at}.attention", x)))
            x = both + mixed if dense.pre else dense.norm(f"{at}.norm1", both + mixed)
            both = dense.feed(x, f"{at}.feedforward", f"{at}.norm2")
            memory, tokens = both[:slots], both[slots:]
        elif name == "mem_bottleneck":
            memory = dense.layer(f"memory_layers.{i}", memory, both)
            tokens = dense.layer(f"token_layers.{i}", tokens, memory)
        else:
            tokens = dense.layer(f"token_layers.{i}", tokens, both)
            if i < layers - 1:
                memory = dense.layer(f"memory_layers.{0 if name == 'mem_ctrl_shared' else i}", memory, both)
    return dense.last_norm("norm", tokens)


def dense_memformer(dense: Dense, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden rows and the next slots, one slot at a time."""
    embedded = dense["embed.weight"][ids]
    tokens = embedded + dense["places.places"][: len(ids)]
    for i in range(dense.config.layers):
        tokens = dense.seeing(f"layers.{i}.attend", tokens, tokens)
        tokens = dense.seeing(f"layers.{i}.read", tokens, memory)
        tokens = dense.feed(tokens, f"layers.{i}.feed.feedforward", f"layers.{i}.feed.norm")
    tokens = dense.last_norm("norm", tokens)
    slots = []
    for i, slot in enumerate(memory):
        query = dense.linear("write.query", slot[None])
        key = torch.cat([dense.linear("write.key", tokens), dense.linear("write.key", slot[None])])
        value = torch.cat([dense.linear("write.value", tokens), slot[None]])
        new = dense.softmax(query, key, value, by=dense.config.temperature)[0] + dense["bias"][i]
        slots.append(new / new.square().sum().sqrt())
    return dense.decoded(embedded, tokens), torch.stack(slots)


def dense_membart(dense: Dense, ids: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden rows and the next memory."""
    embedded = dense["embed.weight"][ids]
    entering = dense.norm("entry", memory + dense["bias"])
    rows = {"memory": entering, "tokens": embedded + dense["places.places"][: len(ids)]}
    slots, n = len(memory), len(ids)
    mask = torch.ones(slots + n, slots + n, dtype=torch.bool)
    mask[:slots, :slots] = torch.eye(slots, dtype=torch.bool)
    for i in range(dense.config.layers):
        names = {kind: f"layers.{i}.{kind}" for kind in rows}
        asking = {kind: dense.norm(f"{names[kind]}.norm", x) if dense.pre else x for kind, x in rows.items()}
        projected = [dense.projected(f"{names[kind]}.attention", x) for kind, x in asking.items()]
        mixed = dense.softmax(*(torch.cat(part) for part in zip(*projected, strict=True)), mask=mask)
        for kind, part in (("memory", mixed[:slots]), ("tokens", mixed[slots:])):
            x = rows[kind] + dense.linear(f"{names[kind]}.attention.out", part)
            x = x if dense.pre else dense.norm(f"{names[kind]}.norm", x)
            rows[kind] = dense.feed(x, f"{names[kind]}.feed.feedforward", f"{names[kind]}.feed.norm")
    new, tokens = dense.last_norm("memory_norm", rows["memory"]), dense.last_norm("norm", rows["tokens"])
    alpha = 1 / (1 + (-dense.linear("gate.out", F.gelu(dense.linear("gate.inner", new)))).exp())
    new = alpha * new + (1 - alpha) * entering
    return dense.decoded(embedded, torch.cat([new, tokens])), new


STEPS: dict[str, Callable[[Dense, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "memformer": dense_memformer,
    "membart": dense_membart,
}


def reference(
    model: SegmentModel, data: dict[str, Tensor], *, memory: Tensor | None = None,
    cuts: Callable[[int, int], bool] = lambda s, count: False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Loss, logits (0 at padding) and the last memory (None: there is none) of whole samples."""
    ids, labels, lengths = data["ids"], data["labels"], data["lengths"]
    dense, size = Dense(model), model.config.tokens
    count = -(-ids.shape[1] // size)
    logits, memories = [], []
    for b, length in enumerate(lengths.tolist()):
        state: Tensor | None = None
        if model.name == "memformer":
            state = dense["bias"] / dense["bias"].square().sum(-1, keepdim=True).sqrt()
        elif model.name == "membart":
            state = torch.zeros_like(dense["bias"])
        if memory is not None:
            state = memory[b]
        hidden = []
        for s in range(count):
            part = ids[b, s * size : min((s + 1) * size, length)]
            if state is not None and cuts(s, count):
                state = state.detach()
            if not len(part):
                continue
            if state is None:
                hidden.append(dense_encoder(dense, model.name, part))
            else:
                rows, state = STEPS[model.name](dense, part, state)
                hidden.append(rows)
        rows = torch.cat(hidden) @ dense["embed.weight"].T if hidden else dense["embed.weight"].new_zeros(0, 11)
        logits.append(F.pad(rows, (0, 0, 0, ids.shape[1] - length)))
        memories.append(state)
    every = torch.stack(logits)
    counted = (labels != -100) & (torch.arange(ids.shape[1]) < lengths[:, None])
    losses = every.logsumexp(-1) - every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    last = None if memories[0] is None else torch.stack([m for m in memories if m is not None])
    return losses[counted].mean(), every, last


def differentiated(
    model: SegmentModel, loss: Tensor, logits: Tensor, memory: Tensor | None, given: Tensor | None = None
) -> dict[str, Tensor]:
    """All that was computed, and the gradients of a sum in which everything has its weight."""
    generator = torch.Generator().manual_seed(3)
    found = {"loss": loss, "logits": logits} | ({} if memory is None else {"memory": memory})
    weights = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in found.items()}
    total = sum((x * weights[name].to(x.device)).sum() for name, x in found.items())
    model.zero_grad()
    assert isinstance(total, Tensor)
    total.backward()
    grads = {f"gradient of {name}": grad for name, grad in gradients(model).items()}
    if given is not None:
        assert given.grad is not None
        grads["gradient of the memory"], given.grad = given.grad, None
    return {name: x.detach().double().cpu() for name, x in (found | grads).items()}


# -- against the references --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", ALL)
def test_outputs_memories_and_gradients_are_those_of_the_dense_reference(name: str, norm: str) -> None:
    model = make(name, norm=norm)
    out = model(**batch(), outputs="logits")
    found = differentiated(model, out.loss, out.outputs, out.memory)
    wanted = differentiated(model, *reference(model, batch()))
    assert largest_difference(found, wanted) <= 1e-9
    assert (out.memory is None) == (name in ENCODERS)
    assert all(float(grad.abs().max()) > 0 for grad in wanted.values())


@pytest.mark.parametrize("name", RECURRENT)
def test_a_given_memory_and_its_gradient(name: str) -> None:
    model = make(name)
    memory = torch.randn(len(LENGTHS), 3, 8, dtype=torch.float64, requires_grad=True)
    out = model(**batch(), outputs="logits", memory=memory)
    found = differentiated(model, out.loss, out.outputs, out.memory, memory)
    wanted = differentiated(model, *reference(model, batch(), memory=memory), memory)
    assert largest_difference(found, wanted) <= 1e-9


BACKENDS = ("cpu", "stock", pytest.param("triton", marks=pytest.mark.slow))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_backends_in_float32(name: str, backend: str) -> None:
    missing = {"cpu": cpu.why_missing, "triton": triton.why_missing}.get(backend)
    if missing:
        pytest.skip(missing)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model = make(name, torch.float32, backend=backend)
    exact = copy.deepcopy(model).double()
    model.to(device)
    out = model(**{key: x.to(device) for key, x in batch().items()}, outputs="logits")
    found = differentiated(model, out.loss, out.outputs, out.memory)
    wanted = differentiated(exact, *reference(exact, batch()))
    assert largest_difference(found, wanted) <= 2e-5


# -- gradients through segments ----------------------------------------------------------------------------------------


def trained(model: SegmentModel, bptt: Any) -> dict[str, Tensor]:
    """Loss, memory and gradients of a training step, and the random state it leaves."""
    model.config = replace(model.config, bptt=bptt)
    model.zero_grad()
    torch.manual_seed(7)
    out = model(**batch())
    (out.loss + out.memory.square().sum() / 3 + out.memory.sum()).backward()
    return {
        "loss": out.loss.detach(), "memory": out.memory.detach(), "state": generator_state().double(),
        **gradients(model),
    }  # fmt: skip


@pytest.mark.parametrize("bptt", [Replay(), Replay(keep=0), Replay(budget_bytes=10**9)])
@pytest.mark.parametrize("name", RECURRENT)
def test_replay_gives_the_gradients_of_full_back_propagation(name: str, bptt: Replay) -> None:
    model = make(name, dropout=0.3, backend="auto").train()
    wanted, found = trained(model, "full"), trained(model, bptt)
    assert largest_difference(found, wanted) <= 1e-10
    assert torch.equal(found["state"], wanted["state"])
    assert largest_difference(trained(model, Replay(truncate=1)), trained(model, 1)) <= 1e-10


@pytest.mark.parametrize("name", RECURRENT)
def test_truncation_cuts_what_the_reference_cuts(name: str) -> None:
    model = make(name, bptt=2)
    out = model(**batch(), outputs="logits")
    found = differentiated(model, out.loss, out.outputs, out.memory)
    wanted = differentiated(model, *reference(model, batch(), cuts=Truncate(2).cuts))
    whole = differentiated(model, *reference(model, batch()))
    assert largest_difference(found, wanted) <= 1e-9
    assert largest_difference(found, whole) > 1e-3


@pytest.mark.parametrize("name", RECURRENT)
def test_replay_goes_back_through_each_segment_once(name: str) -> None:
    model = make(name, bptt=Replay())
    last = model.get_submodule("decoder.layers.1.feed")
    calls = {"forward": 0, "backward": 0}

    def count(module: nn.Module, given: Any, out: Tensor) -> None:
        calls["forward"] += 1
        if out.requires_grad:
            out.register_hook(lambda grad: calls.update(backward=calls["backward"] + 1))

    last.register_forward_hook(count)
    out = model(**batch())
    (out.loss + out.memory.sum()).backward()
    assert calls == {"forward": 3 + 2, "backward": 3}


# -- who sees whom -----------------------------------------------------------------------------------------------------


def influence(of: Tensor, on: Tensor) -> Tensor:
    """Which rows of ``of`` (rows, width) depend on which rows of ``on`` (1, rows, width): bool."""
    found = [[0.0] * on.shape[1] for _ in of]
    for i, row in enumerate(of):
        weights = torch.linspace(0.3, 1.1, row.numel(), dtype=row.dtype)
        (grad,) = torch.autograd.grad((row * weights).sum(), on, retain_graph=True)
        found[i] = grad[0].abs().amax(-1).tolist()
    return torch.tensor(found) > 0


def leaves() -> tuple[Tensor, Tensor]:
    """Memory and token rows of one sample."""
    memory, tokens = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 5, 8, dtype=torch.float64)
    return memory.requires_grad_(), tokens.requires_grad_()


def test_memformers_slots_see_themselves_and_the_tokens() -> None:
    memory, tokens = leaves()
    write = make("memformer").get_submodule("write")
    assert isinstance(write, Write)
    (new,) = write(memory, tokens, torch.tensor([4], dtype=torch.int32))
    assert torch.equal(influence(new, memory), torch.eye(3, dtype=torch.bool))
    assert torch.equal(influence(new, tokens), torch.tensor([[True] * 4 + [False]] * 3))


def test_membarts_memory_rows_see_themselves_and_the_tokens_and_tokens_see_all() -> None:
    memory, tokens = leaves()
    layer = make("membart").get_submodule("layers.0")
    assert isinstance(layer, JointLayer)
    (new,), (hidden,) = layer(memory, tokens, None)
    assert torch.equal(influence(new, memory), torch.eye(3, dtype=torch.bool))
    assert bool(influence(new, tokens).all())
    assert bool(influence(hidden, memory).all())
    assert bool(influence(hidden, tokens).all())


def test_membottleneck_tokens_see_one_another_through_the_memory_only() -> None:
    model = make("mem_bottleneck")
    assert isinstance(model, MemBottleneck)
    ids = torch.arange(5)[None]
    other = ids.clone()
    other[0, 2] = 9

    def changed() -> list[bool]:
        """Rows whose logits differ where token 2 does."""
        one, two = (model(x, outputs="logits").outputs for x in (ids, other))
        return (one != two).any(-1)[0].tolist()  # type: ignore[no-any-return]

    with torch.no_grad():
        assert changed() == [True] * 5
        for layer in model.memory_layers:  # the memory no longer hears of the tokens
            layer.get_parameter("attend.attention.out.weight").zero_()
        assert changed() == [False, False, True, False, False]


def test_shared_memory_layer_is_one_layer() -> None:
    own, shared = make("mem_ctrl", layers=4), make("mem_ctrl_shared", layers=4)
    assert isinstance(own, MemCtrl)
    assert isinstance(shared, MemCtrlShared)
    assert len(own.memory_layers) == 3
    assert len(shared.memory_layers) == 1


# -- the recurrence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT)
def test_reading_on_is_reading_all_at_once(name: str) -> None:
    model = make(name)
    ids = batch()["ids"]
    whole = model(ids, outputs="logits")
    first = model(ids[:, :10], outputs="logits")
    again = model(ids[:, 10:], outputs="logits", memory=first.memory)
    torch.testing.assert_close(torch.cat([first.outputs, again.outputs], dim=1), whole.outputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.memory, whole.memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_segment_without_tokens_leaves_a_samples_memory_as_it_was(name: str) -> None:
    model = make(name)
    memory = torch.randn(2, 3, 8, dtype=torch.float64)
    out = model(batch()["ids"][:2], lengths=torch.tensor([0, 13]), memory=memory)
    assert torch.equal(out.memory[0], memory[0])
    assert not torch.equal(out.memory[1], memory[1])
    short = model(batch()["ids"][:2, :5], lengths=torch.tensor([5, 5]), memory=memory)
    long = model(batch()["ids"][:2], lengths=torch.tensor([5, 13]), memory=memory)
    assert torch.equal(short.memory[0], long.memory[0])


def test_memformers_slots_have_norm_1_and_begin_as_their_biases() -> None:
    model = make("memformer")
    assert isinstance(model, Memformer)
    start = model(batch()["ids"], lengths=torch.zeros(4, dtype=torch.int64)).memory
    torch.testing.assert_close(start[0], F.normalize(model.bias, dim=-1), rtol=0, atol=1e-15)
    norms = model(batch()["ids"]).memory.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)


def test_without_news_memformer_forgets_towards_its_bias() -> None:
    model = make("memformer")
    assert isinstance(model, Memformer)
    with torch.no_grad():
        model.write.value.weight.zero_()
        model.write.query.weight.zero_()
    goal = F.normalize(model.bias, dim=-1)
    state, apart = F.normalize(torch.randn(1, 3, 8, dtype=torch.float64), dim=-1), []
    for _ in range(6):
        state = model(torch.zeros(1, 5, dtype=torch.int64), memory=state).memory
        apart.append(float((state[0] - goal).norm().detach()))
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 1e-3


@pytest.mark.parametrize("name", RECURRENT)
def test_carry_false_reads_each_segment_from_the_start(name: str) -> None:
    model = make(name)
    arguments = batch()
    out = model(**arguments, outputs="logits", carry=False)
    pieces = [model(arguments["ids"][:, s : s + 5], outputs="logits").outputs for s in (0, 5, 10)]
    padding = torch.arange(LENGTH) >= arguments["lengths"][:, None]
    alone = torch.cat(pieces, dim=1)
    torch.testing.assert_close(out.outputs[0], alone[0], rtol=0, atol=1e-12)
    assert bool((out.outputs[padding] == 0).all())
    counted = (arguments["labels"] != -100) & ~padding
    losses = F.cross_entropy(out.outputs[counted], arguments["labels"][counted])
    torch.testing.assert_close(out.loss, losses, rtol=0, atol=1e-12)
    assert out.memory is None
    carried = model(**arguments, outputs="logits")
    assert float((carried.outputs - out.outputs).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_hand_nothing_on(name: str) -> None:
    model = make(name)
    out, cut = (model(**batch(), outputs="logits", carry=carry) for carry in (True, False))
    assert torch.equal(out.outputs, cut.outputs)
    assert torch.equal(out.loss, cut.loss)
    assert out.memory is None
    assert cut.memory is None
    ids = batch()["ids"]
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    one, two = (model(x, outputs="logits").outputs for x in (ids, changed))
    assert not torch.equal(one[:, :5], two[:, :5])
    assert torch.equal(one[:, 5:], two[:, 5:])


@pytest.mark.parametrize("name", ALL)
def test_labels_are_no_input(name: str) -> None:
    model = make(name)
    arguments = batch()
    labels = arguments.pop("labels")
    with_labels = model(**arguments, labels=labels, outputs="logits").outputs
    assert torch.equal(with_labels, model(**arguments, outputs="logits").outputs)
    assert not model.causal


@pytest.mark.parametrize("name", RECURRENT)
def test_autocast_keeps_the_state_wide(name: str) -> None:
    model = make(name, torch.float32, backend="auto", bptt=Replay())
    wide = model(**batch(), outputs="logits")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch(), outputs="logits")
    (out.loss + out.memory.sum()).backward()
    assert out.memory.dtype is torch.float32
    assert float((out.outputs.float() - wide.outputs).detach().norm() / wide.outputs.detach().norm()) < 0.05
    assert all(bool(grad.isfinite().all()) for grad in gradients(model).values())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_names_and_configurations(name: str) -> None:
    model = make(name)
    assert type(model) is MODELS[name]
    assert type(model).name == name
    config = ModelConfig(**SIZES)
    with pytest.raises(ValueError, match=f"memory must be at least 1 for {name}, got 0"):
        build(name, replace(config, memory=0))
    with pytest.raises(ValueError, match=f"cache: {name} has no use for it"):
        build(name, replace(config, cache=4))
    if name != "memformer":
        with pytest.raises(ValueError, match=f"temperature: {name} has no use for it"):
            build(name, replace(config, temperature=0.5))
    if name in ENCODERS:
        with pytest.raises(ValueError, match=f"bptt: {name} has no use for it"):
            build(name, replace(config, bptt="replay"))


@pytest.mark.parametrize("name", ["mem_ctrl", "mem_ctrl_shared"])
def test_one_layer_has_no_memory_layer(name: str) -> None:
    with pytest.raises(ValueError, match=r"layers must be at least 2 .* use memory_transformer"):
        build(name, ModelConfig(**(SIZES | {"layers": 1})))


def test_memories_that_are_not_accepted() -> None:
    ids = batch()["ids"]
    with pytest.raises(ValueError, match="memory is given, and memory_transformer hands nothing on"):
        make("memory_transformer")(ids, memory=torch.zeros(4, 3, 8, dtype=torch.float64))
    for name in RECURRENT:
        model = make(name)
        assert isinstance(model, (Memformer, MemBART))
        with pytest.raises(ValueError, match=r"memory must be what .* shape \(4, 3, 8\), got \(3, 3, 8\)"):
            model(ids, memory=torch.zeros(3, 3, 8, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"memory must hold tensors of torch.float64"):
            model(ids, memory=torch.zeros(4, 3, 8))
        with pytest.raises(ValueError, match="carry=False reads each segment from the start"):
            model(ids, memory=torch.zeros(4, 3, 8, dtype=torch.float64), carry=False)
