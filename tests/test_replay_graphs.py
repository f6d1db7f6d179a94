"""``ReplayGraphs``: what it explains, what it replays, what it keeps and what it drops.

Without a GPU a pretended one takes CUDA's part: while "capturing", nothing is run; a replay runs the body as Python saw
it at capture: with that ``.grad``, those parameters and those training flags, whatever has changed since.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmt_kernels import RecurrentMemory, Replay, SegmentLayout, replay_step
from rmt_kernels.recurrence import ReplayError, ReplayGraphs, SampleLoss, TokenLoss, Truncate
from rmt_kernels.recurrence.wrapper import Batch
from tests.recurrence import (
    MEMORY,
    SEGMENT,
    VOCABULARY,
    WIDTH,
    Step,
    Tiny,
    check_step,
    generator_state,
    gradients,
    largest_difference,
    numbers,
    step,
    tiny,
)

IDS = numbers(2, 18)  # 4 segments, the last one short
WHOLE = IDS[:, :15]


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.body: Callable[[], None] | None = None

    def capture(self, body: Callable[[], None]) -> None:
        """Note what the body would find now."""
        model = self.device.model
        self.body = body
        self.flags = {module: module.training for module in model.modules()}
        self.places = {p: (p.grad, p.data_ptr()) for p in model.parameters()}

    def replay(self) -> None:
        assert self.body is not None, "nothing was captured"
        self.device.replays += 1
        flags, grads = {module: module.training for module in self.flags}, {p: p.grad for p in self.places}
        for module, flag in self.flags.items():
            module.training = flag
        for parameter, (grad, place) in self.places.items():
            assert parameter.data_ptr() == place, "a captured graph reads a parameter where it no longer is"
            parameter.grad = grad
        try:
            self.body()
            assert all(parameter.grad is grad for parameter, (grad, _) in self.places.items()), "a graph makes none"
        finally:
            for module, flag in flags.items():
                module.training = flag
            for parameter, before in grads.items():
                parameter.grad = before


class Device:
    """In place of a GPU."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.failing: frozenset[int] = frozenset()  # captures that do not succeed, counted from 1
        self.graph: Graph | None = None  # being captured
        self.model: nn.Module = nn.Identity()

    @contextmanager
    def capturing(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.captures += 1
        self.graph = graph
        try:
            yield
            if self.captures in self.failing:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self.graph = None


class OnGpu(Tensor):
    """Says that it is on one."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


class Pretended(ReplayGraphs):
    """All of the real one but the test for a GPU."""

    def __init__(self, device: Device, **options: Any) -> None:
        super().__init__(**options)
        self.device = device

    def _objection(self, model: nn.Module, batch: Batch, policy: Replay) -> str | None:
        return super()._objection(model, replace(batch, inputs=batch.inputs.as_subclass(OnGpu)), policy)

    def _capture(self, run: Callable[[], None], reset: Callable[[], None]) -> Callable[[], None]:
        assert self._model is not None
        self.device.model = self._model

        def body() -> None:
            if self.device.graph is None:
                run()
            else:
                self.device.graph.capture(run)

        return super()._capture(body, reset)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(made))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "graph", made.capturing)
    return made


def graphed(model: RecurrentMemory, graphs: ReplayGraphs, ids: Tensor = IDS, **options: Any) -> Step:
    """A step with graphs, without warnings, and its gradients."""
    policy = options.pop("policy", Replay())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return step(model, ids, policy, driver=True, graphs=graphs, **({"labels": ids} | options))


# -- without a GPU -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_explains_and_falls_back() -> None:
    model, graphs = tiny(bptt=Replay()), ReplayGraphs()
    wanted = step(model, IDS, driver=True, labels=IDS)
    with pytest.warns(RuntimeWarning, match=r"replay_step runs without CUDA graphs: .* the model is on cpu"):
        check_step(step(model, IDS, driver=True, labels=IDS, graphs=graphs), wanted, 0)
    for _ in range(2):
        check_step(graphed(model, graphs, policy=None), wanted, 0)
    assert graphs.reasons == ["CUDA graphs need a CUDA device, the model is on cpu"]


def test_the_policy_still_counts_where_it_falls_back() -> None:
    class Counted(Tiny):
        passes = 0

        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            self.passes += 1
            return super().forward(x, layout=layout, **keywords)

    model = tiny(bptt=Replay(keep=3))
    model.backbone = counted = Counted().double()
    with pytest.warns(RuntimeWarning):
        replay_step(model, IDS, labels=IDS, graphs=ReplayGraphs())
    assert counted.passes == 4 + 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"shapes": 0}, ValueError, "shapes must be at least 1, got 0"),
        ({"warmup": 0}, ValueError, "warmup must be at least 1, got 0"),
        ({"shapes": 1.0}, TypeError, "shapes must be an int, got float"),
        ({"warmup": True}, TypeError, "warmup must be an int, got bool"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ReplayGraphs(**options)


# -- what a pretended GPU replays --------------------------------------------------------------------------------------


def test_gradients_are_the_eager_drivers(device: Device) -> None:
    """With dropout, in step after step; captured once: two bodies for full segments, two for the short one."""
    model = tiny(loss=TokenLoss(rows=4))
    graphs = Pretended(device)
    for seed in range(4):
        wanted = step(model, IDS, Replay(), driver=True, labels=IDS, seed=seed)
        check_step(graphed(model, graphs, seed=seed), wanted)
        assert device.captures == 4
        assert device.replays == (seed + 1) * 8
    assert graphs.reasons == []


def test_warmup_leaves_no_trace(device: Device) -> None:
    """Neither in gradients that were there, nor in the random state, nor in what an optimizer holds."""
    model = tiny(bptt=Replay())
    wanted = step(model, WHOLE, driver=True, labels=WHOLE)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(5)
    replay_step(model, WHOLE, labels=WHOLE, graphs=Pretended(device, warmup=5))
    assert torch.equal(generator_state(), wanted.state)
    found = {name: grad - 1 for name, grad in gradients(model).items()}
    assert all(torch.allclose(found[name], grad, rtol=1e-9, atol=1e-12) for name, grad in wanted.gradients.items())


@pytest.mark.parametrize("to_none", [True, False])
def test_training(device: Device, to_none: bool) -> None:
    """Two models, one with graphs: the same weights after each of several steps, with accumulation over two batches."""
    eager, model = tiny(loss=TokenLoss(rows=4)), tiny(loss=TokenLoss(rows=4))
    graphs = Pretended(device)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (eager, model)]
    for turn in range(4):
        losses = []
        for m, optimizer, given in ((eager, optimizers[0], None), (model, optimizers[1], graphs)):
            optimizer.zero_grad(set_to_none=to_none)
            torch.manual_seed(turn)
            for part in range(2):
                ids = numbers(2, 18, seed=2 * turn + part)
                out = replay_step(m, ids, labels=ids, policy=Replay(), loss_scale=0.5, sync=part == 1, graphs=given)
                losses.append(out.loss)
            optimizer.step()
        assert torch.allclose(torch.stack(losses[:2]), torch.stack(losses[2:]), rtol=1e-10)  # type: ignore[arg-type]
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), turn
    assert device.captures == 4


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Replay]] = {
    "lengths": ({}, {"lengths": torch.tensor([18, 7])}, Replay()),
    "aligned right": ({"align": "right"}, {"lengths": torch.tensor([18, 7])}, Replay()),
    "last": ({"loss": TokenLoss(weights="last", rows=4)}, {}, Replay()),
    "some segments": ({"loss": TokenLoss(weights=(1.0, 0.0, 0.0, 2.0), rows=100)}, {}, Replay()),
    "truncated": ({"loss": TokenLoss(rows=4)}, {}, Replay(truncate=2)),
    "every second": ({}, {}, Replay(truncate=Truncate(2, every=True))),
    "offload": ({}, {}, Replay(offload=True)),
    "check": ({}, {}, Replay(check=True)),
    "keep": ({}, {}, Replay(keep=3)),
    "budget": ({}, {}, Replay(budget_bytes=10**9)),
    "segment": ({}, {"segment": 4}, Replay()),
    "whole segments": ({}, {"segment": 6}, Replay()),
    "keyword": ({}, {"gain": 0.5}, Replay()),
    "tensor": ({}, {"gain": torch.tensor([0.5, 2.0], dtype=torch.float64)}, Replay()),
    "mask": ({}, {"label_mask": torch.arange(18).expand(2, -1) % 3 > 0}, Replay()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_serves(device: Device, name: str) -> None:
    made, options, policy = CASES[name]
    model, graphs = tiny(**made), Pretended(device)
    for seed in range(2):
        wanted = step(model, IDS, policy, driver=True, labels=IDS, seed=seed, **options)
        check_step(graphed(model, graphs, policy=policy, seed=seed, **options), wanted)
    assert graphs.reasons == []
    assert device.replays == 2 * 2 * -(-18 // options.get("segment", SEGMENT))


def test_classification(device: Device) -> None:
    model = tiny("rmt_encoder", loss=SampleLoss(), prefix=[7, 9], align="right")
    options = {"labels": torch.tensor([3, 8]), "lengths": torch.tensor([18, 4])}
    wanted = step(model, IDS, Replay(), driver=True, **options)  # type: ignore[arg-type]
    check_step(graphed(model, Pretended(device), **options), wanted)


@pytest.mark.parametrize("to_caller", [False, True], ids=["leaf", "with a graph"])
def test_resumed_from_a_memory(device: Device, to_caller: bool) -> None:
    model, found = tiny(bptt=Replay()), []
    for graphs in (None, Pretended(device), Pretended(device)):
        memory = torch.linspace(-1, 1, 2 * MEMORY * WIDTH, dtype=torch.float64).view(2, MEMORY, WIDTH).requires_grad_()
        model.zero_grad()
        torch.manual_seed(5)
        replay_step(model, IDS, labels=IDS, memory=memory * 2 if to_caller else memory, graphs=graphs)
        assert memory.grad is not None
        assert model.initial_memory.grad is None or not bool(model.initial_memory.grad.any())
        found.append({"memory": memory.grad} | gradients(model))
    assert largest_difference(found[1], found[0]) < 1e-10


def test_scaled_losses(device: Device) -> None:
    model = tiny(dtype=torch.float32)
    wanted = step(model, IDS, Replay(), driver=True, labels=IDS, loss_scale=1 / 3)
    check_step(graphed(model, Pretended(device), loss_scale=1 / 3), wanted, 1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled = graphed(model, Pretended(device), loss_scale=1 / 3, scaler=scaler)
    assert largest_difference({name: grad / 256 for name, grad in scaled.gradients.items()}, wanted.gradients) < 1e-5


def test_scaled_losses_in_float64(device: Device) -> None:
    model = tiny()
    wanted = step(model, IDS, Replay(), driver=True, labels=IDS, loss_scale=1 / 3)
    check_step(graphed(model, Pretended(device), loss_scale=1 / 3), wanted)


def test_autocast_is_part_of_a_shape(device: Device) -> None:
    model, graphs = tiny(dtype=torch.float32), Pretended(device)
    for dtype in (None, torch.bfloat16, None):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            wanted = step(model, WHOLE, Replay(), driver=True, labels=WHOLE)
            check_step(graphed(model, graphs, WHOLE), wanted, 1e-5)
    assert device.captures == 4


def test_frozen_parts(device: Device) -> None:
    model, graphs = tiny(), Pretended(device)
    for frozen in ("embed", "backbone", "nothing"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        wanted = step(model, WHOLE, Replay(), driver=True, labels=WHOLE)
        check_step(graphed(model, graphs, WHOLE), wanted)
    assert device.captures == 6, "what is trained is part of what was captured"


# -- what it drops and refuses -----------------------------------------------------------------------------------------


def test_another_shape_is_captured_beside_the_first(device: Device) -> None:
    model, graphs = tiny(), Pretended(device)
    for ids, captures in ((WHOLE, 2), (IDS, 4), (WHOLE, 4), (WHOLE[:1], 6), (IDS, 6)):
        wanted = step(model, ids, Replay(), driver=True, labels=ids)
        check_step(graphed(model, graphs, ids), wanted)
        assert device.captures == captures


def test_too_many_shapes_are_run_eagerly(device: Device) -> None:
    model, graphs = tiny(), Pretended(device, shapes=1)
    check_step(graphed(model, graphs, WHOLE), step(model, WHOLE, Replay(), driver=True, labels=WHOLE))
    wanted = step(model, IDS, Replay(), driver=True, labels=IDS)
    with pytest.warns(RuntimeWarning, match="1 shapes of segments are captured already"):
        check_step(step(model, IDS, Replay(), driver=True, labels=IDS, graphs=graphs), wanted)
    check_step(graphed(model, graphs), wanted)  # explained once
    assert len(graphs.reasons) == 1
    assert device.captures == 2
    assert device.replays == 6 + 6 + 6


@pytest.mark.parametrize("own", [False, True], ids=["none", "one's own"])
def test_a_new_shape_after_gradients_were_taken_away(device: Device, own: bool) -> None:
    """``zero_grad()``, or a gradient of one's own, between two steps of different shapes."""
    model, graphs = tiny(bptt=Replay()), Pretended(device)
    wanted = step(model, WHOLE[:1], driver=True, labels=WHOLE[:1]).gradients
    replay_step(model, WHOLE, labels=WHOLE, graphs=graphs)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if own else None
    torch.manual_seed(5)
    replay_step(model, WHOLE[:1], labels=WHOLE[:1], graphs=graphs)
    found = {name: grad - float(own) for name, grad in gradients(model).items()}
    assert largest_difference(found, wanted) < 1e-8


def test_weights_that_are_loaded_are_read(device: Device) -> None:
    """The same places: nothing is captured anew, and the new values count."""
    model, graphs = tiny(), Pretended(device)
    graphed(model, graphs, WHOLE)
    model.load_state_dict(tiny(seed=8).state_dict())
    wanted = step(tiny(seed=8), WHOLE, Replay(), driver=True, labels=WHOLE)
    check_step(graphed(model, graphs, WHOLE), wanted)
    assert device.captures == 2


def test_weights_that_have_moved_are_captured_anew(device: Device) -> None:
    model, graphs = tiny(), Pretended(device)
    graphed(model, graphs, WHOLE)
    model.head.weight.data = model.head.weight.data * 2  # type: ignore[union-attr, operator]
    wanted = step(model, WHOLE, Replay(), driver=True, labels=WHOLE)
    check_step(graphed(model, graphs, WHOLE), wanted)
    assert device.captures == 4
    model.load_state_dict(tiny(seed=8).state_dict(), assign=True)
    wanted = step(model, WHOLE, Replay(), driver=True, labels=WHOLE)
    check_step(graphed(model, graphs, WHOLE), wanted)
    assert device.captures == 6


def test_a_parameter_replaced_at_its_place_is_captured_anew(device: Device) -> None:
    model, graphs = tiny(), Pretended(device)
    graphed(model, graphs, WHOLE)
    assert model.head is not None
    model.head.weight = nn.Parameter(model.head.weight.detach())  # type: ignore[arg-type, operator]
    graphed(model, graphs, WHOLE)
    assert device.captures == 4


def test_training_mode_is_part_of_a_shape(device: Device) -> None:
    model, graphs = tiny(), Pretended(device)
    for training in (True, False, True):
        model.train(training)
        wanted = step(model, WHOLE, Replay(), driver=True, labels=WHOLE)
        check_step(graphed(model, graphs, WHOLE), wanted)
    assert device.captures == 4


def test_training_mode_of_a_part_is_part_of_a_shape(device: Device) -> None:
    """``model.backbone.eval()``: a graph with dropout must not be replayed."""
    model, graphs = tiny(), Pretended(device)
    graphed(model, graphs, WHOLE)
    model.backbone.eval()
    wanted = step(model, WHOLE, Replay(), driver=True, labels=WHOLE)
    check_step(graphed(model, graphs, WHOLE), wanted)


def test_another_loss_is_captured_anew(device: Device) -> None:
    model, graphs = tiny(), Pretended(device)
    graphed(model, graphs, WHOLE)
    model.loss = TokenLoss(lambda logits, labels: logits.square().mean(dim=1), shift=True)
    graphed(model, graphs, WHOLE)
    assert device.captures == 4


def test_another_model_is_refused(device: Device) -> None:
    model, other, graphs = tiny(bptt=Replay()), tiny(bptt=Replay()), Pretended(device)
    graphed(model, graphs)
    before = generator_state()
    with pytest.raises(ValueError, match="graphs: these were captured for another model; make a ReplayGraphs for each"):
        replay_step(other, IDS, labels=IDS, graphs=graphs)
    assert torch.equal(generator_state(), before)
    assert all(parameter.grad is None for parameter in other.parameters())
    with pytest.raises(ValueError, match="graphs: these were captured for another model"):
        replay_step(copy.deepcopy(model), IDS, labels=IDS, graphs=graphs)


@pytest.mark.parametrize("failing", [{1}, {2}, {3}, {4}, {1, 2, 3, 4}], ids=str)
def test_what_cannot_be_captured_is_run_eagerly(device: Device, failing: set[int]) -> None:
    """Rolling forward or going back, full segments or the short one."""
    model, graphs = tiny(), Pretended(device)
    wanted = step(model, IDS, Replay(), driver=True, labels=IDS)
    device.failing = frozenset(failing)
    with pytest.warns(RuntimeWarning, match="a segment could not be captured: operation not permitted"):
        check_step(step(model, IDS, Replay(), driver=True, labels=IDS, graphs=graphs), wanted)
    captures = device.captures
    check_step(graphed(model, graphs), wanted)
    assert device.captures == captures, "it is not tried again"


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        ({"head": nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, VOCABULARY))}, {}, "the head draws random numbers"),
        ({"check_memory": True}, {}, "check_memory=True looks at values"),
        ({}, {"policy": Replay(recompute="except_attention")}, "recompute='except_attention' records attention"),
        ({}, {"gain": [1.0]}, "extra arguments hold something other than tensors and hashable values"),
    ],
)
def test_what_it_does_not_serve(device: Device, made: dict[str, Any], options: dict[str, Any], says: str) -> None:
    class Loose(Tiny):
        def forward(self, x: Tensor, *, layout: SegmentLayout, gain: Any = 1.0, **keywords: Any) -> Tensor:
            return super().forward(x, layout=layout, **keywords)

    kernel = "policy" in options
    model = tiny(**made, dtype=torch.float32, kernel=kernel)
    backbone = Loose(kernel=kernel)
    backbone.load_state_dict(model.backbone.state_dict())
    model.backbone = backbone
    options = {"policy": Replay(), **options}
    policy = options.pop("policy")
    wanted = step(model, IDS, policy, driver=True, labels=IDS, **options)
    graphs = Pretended(device)
    with pytest.warns(RuntimeWarning, match=says):
        check_step(step(model, IDS, policy, driver=True, labels=IDS, graphs=graphs, **options), wanted, 1e-6)
    assert device.captures == 0
    assert len(graphs.reasons) == 1


def test_batch_normalisation_is_refused_with_graphs_too(device: Device) -> None:
    class Normed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.batch = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            x = self.batch(x.flatten(0, 1)).view(x.shape)
            return super().forward(x, layout=layout, **keywords)

    model = tiny(bptt=Replay())
    model.backbone = Normed().double()
    with pytest.raises(ValueError, match="running statistics"):
        replay_step(model, IDS, labels=IDS, graphs=Pretended(device))


def test_inputs_with_a_gradient_are_not_served(device: Device) -> None:
    model, graphs = tiny(embed=None, width=WIDTH), Pretended(device)
    rows = torch.randn(2, 15, WIDTH, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="inputs"):
        replay_step(model, rows, labels=WHOLE, policy=Replay(), graphs=graphs)


# -- errors ------------------------------------------------------------------------------------------------------------


class Failing(Tiny):
    """Raises in its nth pass."""

    passes, at = 0, 0

    def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
        x = super().forward(x, layout=layout, **keywords)
        self.passes += 1
        if self.passes == self.at:
            raise FloatingPointError("out of luck")
        return x


def test_errors(device: Device) -> None:
    """Rolling forward: no trace. Going back: ReplayError, and the random state is as before."""
    model = tiny(bptt=Replay())
    backbone = Failing().double()
    model.backbone = backbone
    graphs = Pretended(device, warmup=1)
    for at, error in ((1, FloatingPointError), (3, FloatingPointError), (5, ReplayError), (8, ReplayError)):
        model.zero_grad()
        backbone.passes, backbone.at = 0, at
        torch.manual_seed(at)
        before = generator_state()
        with pytest.raises(error, match="out of luck"):
            replay_step(model, WHOLE, labels=WHOLE, graphs=Pretended(device, warmup=1))
        assert torch.equal(generator_state(), before)
        assert error is ReplayError or all(parameter.grad is None for parameter in model.parameters())
    backbone.at = 0
    check_step(graphed(model, graphs, WHOLE), step(model, WHOLE, driver=True, labels=WHOLE))


# -- on a GPU ----------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(kernel: bool = False, **options: Any) -> RecurrentMemory:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return RecurrentMemory(
            Tiny(64, heads=2, kernel=kernel), memory=8, segment=32, bptt=Replay(), embed=nn.Embedding(VOCABULARY, 64),
            head=nn.Linear(64, VOCABULARY), **options,
        ).cuda()  # fmt: skip


@gpu
@pytest.mark.parametrize("kernel", [False, True], ids=["dense", "kernel"])
def test_on_a_gpu(kernel: bool) -> None:
    """Real graphs, with dropout, over several training steps, a short segment among them."""
    eager, model, graphs = on_gpu(kernel), on_gpu(kernel), ReplayGraphs()
    for m in (eager, model):
        m.backbone.positions = nn.Parameter(torch.zeros(64, 64, device="cuda"))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, model)]
    for turn in range(4):
        ids = numbers(2, 150, seed=turn).cuda()
        found = []
        for m, optimizer, given in ((eager, optimizers[0], None), (model, optimizers[1], graphs)):
            optimizer.zero_grad(set_to_none=turn % 2 == 0)
            torch.manual_seed(turn)
            out = replay_step(m, ids, labels=ids, graphs=given)
            found.append((out.loss, out.memory, gradients(m), torch.cuda.get_rng_state()))
            optimizer.step()
        assert torch.allclose(found[0][0], found[1][0], rtol=1e-4)  # type: ignore[arg-type]
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-3)
        assert largest_difference(found[1][2], found[0][2]) < 1e-3
        assert torch.equal(found[0][3], found[1][3])
    assert graphs.reasons == []


@gpu
def test_on_a_gpu_under_autocast_with_lengths() -> None:
    model, graphs, ids = on_gpu(), ReplayGraphs(), numbers(2, 128).cuda()
    found = []
    for given in (None, graphs, graphs):
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            replay_step(model, ids, labels=ids, lengths=torch.tensor([128, 40], device="cuda"), graphs=given)
        found.append(gradients(model))
    assert largest_difference(found[1], found[0]) < 2e-2
    assert largest_difference(found[2], found[0]) < 2e-2
    assert graphs.reasons == []


@gpu
def test_on_a_gpu_what_synchronises_falls_back() -> None:
    class Looking(Tiny):
        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            assert x.sum().item() < torch.inf
            return super().forward(x, layout=layout, **keywords)

    model = RecurrentMemory(
        Looking(), memory=MEMORY, segment=SEGMENT, bptt=Replay(), embed=nn.Embedding(VOCABULARY, WIDTH),
        head=nn.Linear(WIDTH, VOCABULARY),
    ).cuda()  # fmt: skip
    ids, graphs = WHOLE.cuda(), ReplayGraphs()
    torch.manual_seed(5)
    replay_step(model, ids, labels=ids)
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    with pytest.warns(RuntimeWarning, match="a segment could not be captured"):
        replay_step(model, ids, labels=ids, graphs=graphs)
    assert largest_difference(gradients(model), wanted) < 1e-4
