"""``RecurrentMemory`` against a plain loop in float64 with dropout; padding, outputs, state, backbones, refusals."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmt_kernels import RecurrentMemory, Replay, SegmentLayout, replay_step
from rmt_kernels.backends import cpu
from rmt_kernels.recurrence import TokenLoss
from tests.recurrence import (
    LAYOUTS,
    MEMORY,
    SEGMENT,
    VOCABULARY,
    WIDTH,
    Tiny,
    around,
    check_step,
    generator_state,
    gradients,
    largest_difference,
    numbers,
    plain_loop,
    plain_step,
    span,
    step,
    tiny,
)

F64 = torch.float64
IDS = numbers(2, 18)  # 4 segments, the last one short
needs_kernels = pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)


# -- the recurrence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("lengths", [None, [18, 6], [0, 18], [3, 11]], ids=str)
@pytest.mark.parametrize("prefix", [None, [7, 9]], ids=["", "prefix"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_is_the_plain_loop(layout: str, prefix: list[int] | None, lengths: list[int] | None, align: str) -> None:
    """Loss, memory and every gradient. SYSTEMS.md, fault 5: padding changes no shape and no memory."""
    model = tiny(layout, prefix=prefix, align=align, loss=TokenLoss(shift=True, rows=4), layers=1)
    mask = torch.rand(2, 18) < 0.8
    given = None if lengths is None else torch.tensor(lengths)
    wanted = plain_step(
        model, IDS, labels=IDS, lengths=lengths, label_mask=mask, align=align, layout=layout, shift=True
    )
    assert all(float(grad.norm()) > 0 for grad in wanted.gradients.values())
    check_step(step(model, IDS, labels=IDS, lengths=given, label_mask=mask), wanted, 1e-12)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10])
def test_short_inputs(length: int) -> None:
    """One token, less than a segment, a segment, a token more."""
    model, ids = tiny(), numbers(3, length)
    wanted = plain_step(model, ids, labels=ids)
    check_step(step(model, ids, labels=ids), wanted, 1e-12)
    check_step(step(model, ids.int(), labels=ids), wanted, 1e-12)
    for policy in (1, Replay(), Replay(keep=0, check=True)):
        for driver in (False, True) if isinstance(policy, Replay) and length <= SEGMENT else ():
            check_step(step(model, ids, policy, driver=driver, labels=ids), wanted)
    assert (wanted.loss == 0) == (length == 1), "nothing to predict"


def test_rows_in_place_of_token_numbers() -> None:
    model = tiny(embed=None, width=WIDTH, prefix=torch.randn(2, WIDTH))
    rows = torch.randn(2, 13, WIDTH, dtype=F64, requires_grad=True)
    labels = numbers(2, 13)
    wanted = plain_step(model, rows, labels=labels)
    grad = rows.grad
    assert grad is not None
    for policy in ("full", Replay()):
        rows.grad = None
        check_step(step(model, rows, policy, labels=labels), wanted, 1e-12)
        assert largest_difference({"rows": rows.grad}, {"rows": grad}) < 1e-12  # type: ignore[dict-item]
    rows.grad = None
    check_step(step(model, rows, Replay(), driver=True, labels=labels), wanted, 1e-12)
    assert largest_difference({"rows": rows.grad}, {"rows": grad}) < 1e-12  # type: ignore[dict-item]


def test_another_segment_length_in_a_call() -> None:
    model = tiny(prefix=[1])
    for segment in (1, 3, 7, 18, 40):
        wanted = plain_step(model, IDS, labels=IDS, segment=segment)
        check_step(step(model, IDS, labels=IDS, segment=segment), wanted, 1e-12)
    assert model.segment == SEGMENT
    check_step(step(model, IDS, labels=IDS), plain_step(model, IDS, labels=IDS), 1e-12)


def test_memory_at_the_end_alone() -> None:
    """A layout [TOKENS | WRITE]: the memory rows come in where they go out."""

    def layout(tokens: int, memory: int) -> SegmentLayout:
        full = {("tokens", "tokens"): "causal", ("write", "tokens"): "full", ("write", "write"): "full"}
        return SegmentLayout(tokens=tokens, write=memory, rules=full)  # type: ignore[arg-type]

    model = RecurrentMemory(
        Tiny(dropout=0), memory=MEMORY, segment=SEGMENT, layout=layout, embed=nn.Embedding(VOCABULARY, WIDTH)
    ).to(F64)
    assert model.embed is not None
    memory = model.initial_memory.expand(2, -1, -1)
    for begin in (0, SEGMENT):
        x = torch.cat([model.embed(IDS[:, begin : begin + SEGMENT]), memory], dim=1)
        memory = model.backbone(x, layout=model.layout)[:, -MEMORY:]
    assert torch.allclose(model(IDS[:, : 2 * SEGMENT]).memory, memory, rtol=1e-13)


@pytest.mark.parametrize("policy", ["full", Replay(keep=0)], ids=["full", "replay"])
def test_two_calls_are_one(policy: Any) -> None:
    """A sequence read on from a memory; gradients go back through both calls."""
    model = tiny(loss=TokenLoss(weights=[1, 1], rows=3), bptt=policy)
    ids = numbers(2, 4 * SEGMENT)
    whole = tiny(loss=TokenLoss(weights=[1, 1, 1, 1]))
    labels = ids.clone()
    labels[:, 2 * SEGMENT] = -100  # not known to the first call
    torch.manual_seed(5)
    wanted = plain_loop(whole, ids, labels=labels, weights=[1, 1, 1, 1])
    assert wanted.loss is not None
    wanted.loss.backward()
    torch.manual_seed(5)
    first = model(ids[:, : 2 * SEGMENT], labels=labels[:, : 2 * SEGMENT])
    second = model(ids[:, 2 * SEGMENT :], labels=labels[:, 2 * SEGMENT :], memory=first.memory)
    (first.loss + second.loss).backward()
    assert (first.loss + second.loss).item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    assert torch.allclose(second.memory, wanted.memory, rtol=1e-12)
    assert largest_difference(gradients(model), gradients(whole)) < 1e-12


def test_the_gradient_of_a_memory_that_was_given() -> None:
    given = torch.randn(2, MEMORY, WIDTH, dtype=F64)
    model, found = tiny(), []
    for way in ("plain", "full", "replay", "keep 0", "driver", "driver keep 0", "driver keep 9"):
        memory = given.clone().requires_grad_()
        at = (memory * 2).clone()  # a part of the caller's own graph
        model.zero_grad()
        model.bptt = Replay(keep=0) if "keep 0" in way else Replay(keep=9) if "keep 9" in way else Replay()
        torch.manual_seed(5)
        if way == "plain":
            loss = plain_loop(model, IDS, labels=IDS, memory=at).loss
            assert loss is not None
            loss.backward()
        elif "driver" in way:
            replay_step(model, IDS, labels=IDS, memory=at)
        else:
            model.bptt = "full" if way == "full" else model.bptt
            model(IDS, labels=IDS, memory=at).loss.backward()
        assert memory.grad is not None
        assert model.initial_memory.grad is None
        found.append({"memory": memory.grad} | gradients(model))
    assert float(found[0]["memory"].norm()) > 1e-6
    for other in found[1:]:
        assert largest_difference(other, found[0]) < 1e-12


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["left", "right"])
def test_a_sample_with_nothing_in_a_segment_keeps_its_memory_bit_for_bit(align: str) -> None:
    """SYSTEMS.md, fault 5, in float64 and under autocast, with dropout."""
    lengths = torch.tensor([18, 5, 0])
    ids = numbers(3, 18)
    for kernel, dtype in ((False, F64), (True, torch.float32)):
        model = tiny(align=align, kernel=kernel, dtype=dtype)
        given = torch.randn(3, MEMORY, WIDTH, dtype=dtype)
        for policy in ("full", Replay(keep=0)):
            model.bptt = policy
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kernel):
                out = model(ids, memory=given, lengths=lengths)
            assert torch.equal(out.memory[2], given[2])
            assert not torch.equal(out.memory[0], given[0])
        memories = []
        hook = model.backbone.register_forward_hook(lambda module, args, out: memories.append(args[0][:, :MEMORY]))  # noqa: B023
        model(ids, memory=given, lengths=lengths)
        hook.remove()
        assert len(memories) == 4
        changed = [not torch.equal(x[1], y[1]) for x, y in pairwise(memories)]
        assert changed == ([True, False, False] if align == "left" else [False, False, False])


@pytest.mark.parametrize("align", ["left", "right"])
def test_what_padding_holds_does_not_matter(align: str) -> None:
    """Other token numbers there: the same loss, memory and gradients, bit for bit, but for dropout's own numbers."""
    lengths = torch.tensor([18, 7, 2])
    ids = numbers(3, 18)
    other = torch.where(torch.arange(18) < lengths[:, None], ids, (ids + 1) % VOCABULARY)
    for kernel, dtype in ((False, F64), (True, torch.float32)):
        model = tiny(align=align, kernel=kernel, dtype=dtype, loss=TokenLoss(rows=4))
        for policy in ("full", Replay()):
            a = step(model, ids, policy, labels=ids, lengths=lengths)
            b = step(model, other, policy, labels=other, lengths=lengths)
            assert a.loss == b.loss
            assert torch.equal(a.memory, b.memory)
            assert largest_difference(b.gradients, a.gradients) == 0


@needs_kernels
@pytest.mark.parametrize("align", ["left", "right"])
def test_nan_in_padding_does_not_reach_loss_and_memory(align: str) -> None:
    rows, lengths, labels = torch.randn(3, 18, WIDTH), torch.tensor([18, 7, 0]), numbers(3, 18)
    spoilt = rows.masked_fill((torch.arange(18) >= lengths[:, None])[..., None], torch.nan)
    model = tiny(embed=None, width=WIDTH, kernel=True, dtype=torch.float32, align=align, dropout=0)
    clean, found = model(rows, labels=labels, lengths=lengths), model(spoilt, labels=labels, lengths=lengths)
    assert torch.equal(found.memory, clean.memory)
    assert found.loss.item() == clean.loss.item()
    assert bool(model(spoilt, lengths=lengths, outputs="hidden").outputs.isfinite().all())


@needs_kernels
@pytest.mark.parametrize("align", ["left", "right"])
def test_nan_in_padding_does_not_reach_gradients(align: str) -> None:
    rows, lengths, labels = torch.randn(3, 18, WIDTH), torch.tensor([18, 7, 2]), numbers(3, 18)
    spoilt = rows.masked_fill((torch.arange(18) >= lengths[:, None])[..., None], torch.nan)
    model = tiny(embed=None, width=WIDTH, kernel=True, dtype=torch.float32, align=align, dropout=0)
    clean = step(model, rows, labels=labels, lengths=lengths)
    found = step(model, spoilt, labels=labels, lengths=lengths)
    assert largest_difference(found.gradients, clean.gradients) < 1e-6


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("lengths", [None, [18, 6], [0, 11], [3, 18]], ids=str)
def test_outputs_are_those_of_every_token(lengths: list[int] | None, align: str) -> None:
    model = tiny(align=align, prefix=[2])
    given = None if lengths is None else torch.tensor(lengths)
    torch.manual_seed(5)
    plain = plain_loop(model, IDS, lengths=lengths, align=align)
    ends = [18, 18] if lengths is None else lengths
    for kind, width in (("hidden", WIDTH), ("logits", VOCABULARY)):
        torch.manual_seed(5)
        out = model(IDS, lengths=given, outputs=kind).outputs
        assert out.shape == (2, 18, width)
        for b, end in enumerate(ends):
            rows = plain.hidden[b]
            if rows:
                wanted = torch.stack(rows) if kind == "hidden" else model.head(torch.stack(rows))  # type: ignore[misc]
                assert torch.allclose(out[b, :end], wanted, rtol=1e-12, atol=1e-12)
            assert bool((out[b, end:] == 0).all()), "padding"
        torch.manual_seed(5)
        last = model(IDS, lengths=given, outputs=f"last_{kind}").outputs
        wanted = plain.rows[-1][:, 1:]
        wanted = wanted if kind == "hidden" else model.head(wanted)  # type: ignore[misc]
        assert last.shape == wanted.shape
        for b, end in enumerate(ends):
            filled = len(span(end, 18, SEGMENT, align, 3))
            assert torch.allclose(last[b, :filled], wanted[b, :filled], rtol=1e-12, atol=1e-12)


def test_nothing_is_put_out_unless_asked_for() -> None:
    """SYSTEMS.md, fault 3."""
    out = tiny()(IDS, labels=IDS)
    assert out.outputs is None
    assert out._fields == ("loss", "memory", "outputs")
    assert tiny()(IDS).loss is None


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
def test_gradients_through_outputs(keep: int) -> None:
    """A caller's own loss of the logits, beside ours."""
    model, found = tiny(loss=TokenLoss(rows=3)), []
    for policy in ("full", Replay(keep=keep)):
        model.bptt = policy
        model.zero_grad()
        torch.manual_seed(5)
        out = model(IDS, labels=IDS, outputs="logits")
        (out.loss + out.outputs.square().mean() + out.memory.square().sum()).backward()
        found.append(gradients(model))
    assert largest_difference(found[1], found[0]) < 1e-12


def test_gradients_through_logits_of_a_head_with_dropout() -> None:
    model, found = tiny(loss=TokenLoss(rows=3)), []
    assert model.head is not None
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    for policy in ("full", Replay(keep=1)):
        model.bptt = policy
        model.zero_grad()
        torch.manual_seed(5)
        out = model(IDS, labels=IDS, outputs="logits")
        (out.loss + out.outputs.square().mean()).backward()
        found.append(gradients(model))
    assert largest_difference(found[1], found[0]) < 1e-12


# -- no state ----------------------------------------------------------------------------------------------------------


def test_sequences_in_turn_do_not_mix() -> None:
    """SYSTEMS.md, fault 7."""
    model = tiny(bptt=Replay(), dropout=0)
    a, b = numbers(2, 20, seed=1), numbers(2, 20, seed=2)
    alone = [model(ids[:, 10:], memory=model(ids[:, :10]).memory, labels=ids[:, 10:]) for ids in (a, b)]
    first = [model(ids[:, :10]) for ids in (a, b)]
    second = [model(ids[:, 10:], memory=out.memory, labels=ids[:, 10:]) for ids, out in zip((a, b), first, strict=True)]
    for x, y in zip(alone, second, strict=True):
        assert torch.equal(x.memory, y.memory)
        assert torch.equal(x.loss, y.loss)
    grads = []
    for x in (*alone, second[1], second[0]):  # backward passes in another order than forward passes
        model.zero_grad()
        x.loss.backward()
        grads.append(gradients(model))
    assert largest_difference(grads[2], grads[1]) == largest_difference(grads[3], grads[0]) == 0


def test_nothing_is_left_in_the_module() -> None:
    model = tiny()
    before = {
        name: (vars(module).copy(), dict(module.named_parameters()), dict(module.named_buffers()))
        for name, module in model.named_modules()
    }
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for policy in ("full", 2, Replay(), Replay(keep=2, offload=True)):
        model.bptt = policy
        model(IDS, labels=IDS, outputs="hidden", lengths=torch.tensor([18, 3])).loss.backward()
        if isinstance(policy, Replay):
            replay_step(model, IDS, labels=IDS)
    for name, module in model.named_modules():
        now = vars(module)
        assert now.keys() == before[name][0].keys()
        for key, value in before[name][0].items():
            assert key == "_policy" or now[key] is value, f"{name}.{key}"
        assert not any(isinstance(value, Tensor) for value in now.values())
    assert all(torch.equal(values[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[RecurrentMemory], RecurrentMemory]) -> None:
    model = tiny(
        "rmt_encoder", bptt=Replay(budget_bytes=10**6, truncate=2), align="right",
        loss=TokenLoss(weights=(1, 0.5, 0.5, 2), rows=3),
    )  # fmt: skip
    model(IDS, labels=IDS).loss.backward()  # what it has measured is copied too
    other = copied(model)
    assert other.bptt == model.bptt
    check_step(step(other, IDS, labels=IDS), step(model, IDS, labels=IDS), 0)
    check_step(step(other, IDS, labels=IDS, driver=True), step(model, IDS, labels=IDS, driver=True), 0)
    with torch.no_grad():
        other.initial_memory.add_(1)
    assert not torch.equal(other(IDS).memory, model(IDS).memory)


def test_state_dict_goes_into_a_model_of_another_policy() -> None:
    model, other = tiny(prefix=[1], dropout=0), tiny(prefix=[2], dropout=0, bptt=Replay(), seed=8)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(IDS).memory, model(IDS).memory), "the prefix is no weight"


# -- backbones ---------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A backbone's inside: every row sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).to(F64)

    def mix(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + x.mean(dim=1, keepdim=True))


class Bare(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class WithLayout(Mixed):
    def forward(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        assert layout.num_queries == hidden.shape[1]
        return self.mix(hidden)


class Positional(Mixed):
    def forward(self, inputs_embeds: Tensor, layout: SegmentLayout, token_lengths: Tensor | None = None) -> Tensor:
        return self.mix(inputs_embeds)


class Anything(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[str]] = []

    def forward(self, x: Tensor, *, layout: SegmentLayout, **rest: Any) -> Tensor:
        self.seen.append(set(rest))
        return self.mix(x)


class Stock(Mixed):
    """In the manner of Hugging Face."""

    def forward(self, x: Tensor, layout: SegmentLayout) -> Any:
        class Output:
            last_hidden_state = self.mix(x)
            hidden_states = None

        return Output()


def test_backbones_of_other_signatures() -> None:
    torch.manual_seed(9)
    inside, whole, losses = Mixed(), IDS[:, :15], []
    for made in (Bare, WithLayout, Positional, Anything, Stock):
        backbone = made()
        backbone.load_state_dict(inside.state_dict())
        for policy in ("full", Replay(keep=0)):
            model = around(backbone, own_mask=made is Bare, bptt=policy)
            out = model(whole, labels=whole)
            out.loss.backward()
            losses.append(out.loss.item())
    assert len(set(losses)) == 1


def test_a_backbone_that_takes_anything_gets_everything() -> None:
    backbone = Anything()
    around(backbone)(IDS, colour="red")
    assert backbone.seen == [{"token_lengths", "colour"}] * 4


def test_any_keyword_is_not_the_layout() -> None:
    """A model that swallows what it does not know would ignore the mask."""

    class Swallowing(Mixed):
        def forward(self, x: Tensor, **rest: Any) -> Tensor:
            return self.mix(x)

    with pytest.raises(ValueError, match=r"backbone: Swallowing.forward has no keyword 'layout'"):
        around(Swallowing())


def test_a_compiled_backbone_keeps_its_signature() -> None:
    model = around(torch.compile(Positional(), backend="eager"))  # type: ignore[arg-type]
    assert model._takes("layout")
    assert model._takes("token_lengths")
    assert not model._takes("colour")


def test_keywords_are_passed_on() -> None:
    """In every segment, by every policy; a tensor among them gets its gradient."""
    model = tiny()
    gain = torch.tensor([0.5, 1.5], dtype=F64, requires_grad=True)
    wanted = plain_step(model, IDS, labels=IDS, extra={"gain": gain})
    assert gain.grad is not None
    grad = gain.grad
    for driver, policy in ((False, "full"), (False, Replay()), (True, Replay())):
        gain.grad = None
        check_step(step(model, IDS, policy, driver=driver, labels=IDS, gain=gain), wanted, 1e-12)
        assert gain.grad is not None
        assert largest_difference({"gain": gain.grad}, {"gain": grad}) < 1e-12
    check_step(step(model, IDS, labels=IDS, gain=2.0), plain_step(model, IDS, labels=IDS, extra={"gain": 2.0}), 1e-12)


def test_progress_changes_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    for driver in (False, True):
        quiet = step(model, IDS, Replay(), driver=driver, labels=IDS)
        assert capsys.readouterr().err == ""
        check_step(step(model, IDS, Replay(), driver=driver, labels=IDS, progress=True), quiet, 0)
        shown = capsys.readouterr().err
        assert "4/4" in shown or "100%" in shown or "segment" in shown
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install tqdm"):
        model(IDS, progress=True)


# -- refused at construction and in the call ---------------------------------------------------------------------------


def made(**options: Any) -> RecurrentMemory:
    parts: dict[str, Any] = {
        "backbone": Tiny(), "memory": MEMORY, "segment": SEGMENT, "embed": nn.Embedding(VOCABULARY, WIDTH),
        "head": nn.Linear(WIDTH, VOCABULARY),
    }  # fmt: skip
    return RecurrentMemory(**(parts | options))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"backbone": lambda x: x}, TypeError, "backbone must be a torch.nn.Module, got function"),
        ({"backbone": None}, TypeError, "backbone must be a torch.nn.Module, got NoneType"),
        ({"backbone": Bare()}, ValueError, "backbone: Bare.forward has no keyword 'layout', .* own_mask=True"),
        ({"embed": 3}, TypeError, "embed must be a torch.nn.Module, got int"),
        ({"head": torch.tanh}, TypeError, "head must be a torch.nn.Module, got builtin"),
        ({"align": "middle"}, ValueError, "align must be 'left' or 'right', got 'middle'"),
        ({"segment": 0}, ValueError, "segment must be at least 1 token, got 0"),
        ({"segment": 2.0}, TypeError, "segment must be an int, got float"),
        ({"segment": True}, TypeError, "segment must be an int, got bool"),
        ({"memory": 0}, ValueError, "memory must be at least 1 row, got 0; without memory there is no recurrence"),
        ({"memory": 1.5}, TypeError, r"memory must be an int or a tensor \(M, width\), got float"),
        ({"memory": True}, TypeError, r"memory must be an int or a tensor \(M, width\), got bool"),
        ({"memory": torch.zeros(3)}, ValueError, r"memory must be a number of rows or .* got torch.float32 \(3,\)"),
        ({"memory": torch.zeros(0, 8)}, ValueError, r"memory must be a number of rows or .* \(0, 8\)"),
        ({"memory": torch.zeros(2, 8).long()}, ValueError, "memory must be a number of rows or .* got torch.int64"),
        ({"embed": None}, ValueError, "width: neither memory nor embed tells the width"),
        ({"prefix": []}, ValueError, r"prefix must be token numbers \(P,\), or rows \(P, width\), got torch.int64"),
        ({"prefix": torch.zeros(2, 2).long()}, ValueError, r"prefix must be .* got torch.int64 \(2, 2\)"),
        ({"prefix": torch.zeros(2)}, ValueError, r"prefix must be .* got torch.float32 \(2,\)"),
        ({"prefix": [1], "embed": None, "width": 8}, ValueError, "prefix must be .*; token numbers need embed="),
        ({"bptt": 0}, ValueError, "bptt must be at least 1 segment, got 0"),
        ({"bptt": "none"}, TypeError, r"bptt must be 'full', 'replay', the number of segments .* got 'none'"),
        ({"bptt": True}, TypeError, "bptt must be 'full', .* got True"),
        ({"bptt": None}, TypeError, "bptt must be 'full', .* got None"),
        ({"loss": 3}, TypeError, "loss must be TokenLoss, SampleLoss or a function, got int"),
        ({"layout": "causal"}, TypeError, r"layout must be a SegmentLayout or a function .* got 'causal'"),
        ({"layout": lambda tokens, memory: 3}, TypeError, "layout must be a SegmentLayout or a function"),
        ({"layout": SegmentLayout.rmt_decoder(6, 3)}, ValueError, "layout must have segment = 5 tokens, got 6"),
        ({"layout": SegmentLayout.rmt_decoder(5, 3), "prefix": [1, 2]}, ValueError,
         r"layout must have segment \+ 2 of the prefix = 7 tokens, got 5"),
        ({"layout": SegmentLayout.rmt_decoder(5, 4)}, ValueError, "memory: the layout has 4 READ and 4 WRITE rows"),
        ({"layout": SegmentLayout(tokens=5, read=0)}, ValueError, "layout|memory: the layout has 0 READ and 0 WRITE"),
        ({"layout": lambda t, m: SegmentLayout.rmt_decoder(t, m, cache=2)}, ValueError, "layout: every row of READ, "),
        ({"layout": SegmentLayout.memformer_read}, ValueError, "layout: every row of READ, TOKENS and WRITE must be"),
        ({"layout": SegmentLayout.memformer_write}, ValueError, "memory|layout"),
        ({"layout": lambda t, m: SegmentLayout.rmt_decoder(t, m).last(2)}, ValueError, "layout: every row of READ"),
    ],
)  # fmt: skip
def test_construction_refuses(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        made(**options)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "says"),
    [
        (IDS[:, :0], {}, ValueError, r"inputs must hold at least one token, got \(batch, length\) = \(2, 0\)"),
        (IDS[:0], {}, ValueError, r"inputs must hold at least one token, got \(batch, length\) = \(0, 18\)"),
        ([[1]], {}, TypeError, "inputs must be a torch.Tensor, got list"),
        (IDS.double(), {}, TypeError, r"inputs must be token numbers, int64 \(batch, length\), got torch.float64"),
        (IDS.bool(), {}, TypeError, "inputs must be token numbers, .* got torch.bool"),
        (IDS[0], {}, ValueError, r"inputs must have shape \(batch, length\), got \(18,\)"),
        (IDS[..., None], {}, ValueError, r"inputs must have shape \(batch, length\), got \(2, 18, 1\)"),
        (IDS.to("meta"), {}, ValueError, "inputs must be on the model's device, cpu, got meta"),
        (IDS, {"segment": 0}, ValueError, "segment must be at least 1 token, got 0"),
        (IDS, {"segment": -2}, ValueError, "segment must be at least 1 token, got -2"),
        (IDS, {"segment": 1.0}, TypeError, "segment must be an int, got float"),
        (IDS, {"segment": True}, TypeError, "segment must be an int, got bool"),
        (IDS, {"lengths": [1, 2]}, TypeError, r"lengths must be an int32 or int64 tensor of shape \(2,\), got list"),
        (IDS, {"lengths": torch.tensor([18, 19])}, ValueError, "lengths must be between 0 and 18, got"),
        (IDS, {"memory": [1]}, TypeError, "memory must be a torch.Tensor, got list"),
        (IDS, {"memory": torch.zeros(2, MEMORY, WIDTH)}, TypeError,
         "memory must be torch.float64, as initial_memory is, got torch.float32"),
        (IDS, {"memory": torch.zeros(1, MEMORY, WIDTH, dtype=F64)}, ValueError,
         r"memory must have shape \(2, 3, 8\), \(batch, memory rows, width\), on cpu, got \(1, 3, 8\) on cpu"),
        (IDS, {"memory": torch.zeros(2, MEMORY + 1, WIDTH, dtype=F64)}, ValueError, r"memory must have .* \(2, 4, 8\)"),
        (IDS, {"memory": torch.zeros(2, MEMORY, WIDTH, dtype=F64, device="meta")}, ValueError, "memory .* on meta"),
        (IDS, {"outputs": "all"}, ValueError, r"outputs must be one of \[None, 'hidden', .* got 'all'"),
        (IDS, {"colour": 1}, TypeError, r"unknown arguments \['colour'\]: neither RecurrentMemory nor its backbone"),
    ],
)  # fmt: skip
def test_calls_refuse(inputs: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tiny()(inputs, **options)


def test_calls_refuse_what_the_parts_cannot_do() -> None:
    rows = torch.zeros(2, 18, WIDTH, dtype=F64)
    model = tiny(embed=None, width=WIDTH, head=None)
    with pytest.raises(ValueError, match="outputs='logits' needs a head; give RecurrentMemory head=, or ask for"):
        model(rows, outputs="logits")
    with pytest.raises(ValueError, match="outputs='last_logits' needs a head"):
        model(rows, outputs="last_logits")
    for wrong in (rows[0], rows[..., 1:], IDS):
        with pytest.raises(ValueError, match=r"inputs must be rows \(batch, length, 8\), got .* embed="):
            model(wrong)
    strict = around(WithLayout())
    for given in ({}, {"lengths": torch.tensor([15, 15])}):
        ids = IDS[:, :15] if given else IDS
        with pytest.raises(ValueError, match="need padding, and the backbone has no keyword 'token_lengths'"):
            strict(ids, **given)
    for backbone in (lambda x: x[:, 1:], lambda x: (x,)):

        class Wrong(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return backbone(x)  # noqa: B023

        with pytest.raises(ValueError, match=r"backbone must return hidden states of shape \(2, 11, 8\), got"):
            around(Wrong(), own_mask=True)(IDS[:, :15])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: made(memory=torch.zeros(3, WIDTH - 1)), "memory"),
        (lambda: made(memory=torch.zeros(3, WIDTH), width=WIDTH + 1), "width"),
        (lambda: made(width=WIDTH + 1), "width"),
        (lambda: made(embed=None, width=0), "width"),
        (lambda: made(embed=None, width="a"), "width"),
        (lambda: made(prefix=["a"]), "prefix"),
        (lambda: made(prefix=torch.zeros(2, WIDTH - 1)), "prefix"),
        (lambda: tiny()(IDS.to(torch.int16)), "inputs"),
        (lambda: around(Anything())(IDS, layout="mine"), "layout"),
        (lambda: around(Anything())(IDS, token_lengths=torch.tensor([1, 1])), "token_lengths"),
    ],
)
def test_other_arguments_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make()


def test_initial_memory() -> None:
    """As many rows as asked for, with the embedding's spread; or the given rows, copied."""
    embed = nn.Embedding(500, 64)
    nn.init.normal_(embed.weight, std=0.07)
    model = RecurrentMemory(Tiny(64), memory=300, segment=4, embed=embed)
    assert model.initial_memory.shape == (300, 64)
    assert float(model.initial_memory.detach().std()) == pytest.approx(0.07, rel=0.05)
    rows = torch.randn(4, 64)
    model = RecurrentMemory(Tiny(64), memory=rows, segment=4, embed=embed)
    assert torch.equal(model.initial_memory, rows)
    assert model.initial_memory.data_ptr() != rows.data_ptr()
    assert model.initial_memory.requires_grad
    unknown = RecurrentMemory(Tiny(), memory=200, segment=4, width=WIDTH)
    assert float(unknown.initial_memory.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_nan_in_a_memory_is_found_on_request() -> None:
    class Spoiling(Tiny):
        passes = 0

        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            self.passes += 1
            hidden = super().forward(x, layout=layout, **keywords)
            if self.passes == 3:
                hidden = hidden.masked_fill(torch.tensor([False, True])[:, None, None], torch.inf)
            return hidden

    says = r"the memory that leaves segment 2 holds NaN or infinity, in samples \[1\]"
    for policy in ("full", Replay()):
        model = around(Spoiling().to(F64), check_memory=True, bptt=policy)
        before = generator_state()
        with pytest.raises(FloatingPointError, match=says):
            model(IDS, labels=IDS)
        assert torch.equal(generator_state(), before)
    model = around(Spoiling().to(F64), check_memory=True, bptt=Replay())
    with pytest.raises(FloatingPointError, match=r"the memory that leaves .* holds NaN or infinity, in samples \[1\]"):
        replay_step(model, IDS, labels=IDS)
    assert all(parameter.grad is None for parameter in model.parameters())
    memory = torch.zeros(2, MEMORY, WIDTH, dtype=F64)
    memory[0, 1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the memory that was given holds NaN or infinity, in samples \[0\]"):
        tiny(check_memory=True)(IDS, memory=memory)
    assert bool(tiny()(IDS, memory=memory).memory.isnan().any()), "only on request"
