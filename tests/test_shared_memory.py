"""The shared episodic memory agent and Taxi's sub-tasks: what is carried, what is reset; acting equals training."""

from __future__ import annotations

import json
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmt_kernels.models.shared_memory import AgentConfig, SharedMemoryAgent, cut_segments
from rmt_kernels.training import taxi
from rmt_kernels.training.taxi import DROP, FIND, GO, PICK_UP, TaxiBatch, Training, Transitions

SOUTH, NORTH, EAST, WEST, PICK, DROP_OFF = range(6)
VARIANTS = [(memory, share) for memory in ("recurrent", "rmt") for share in (True, False)]
INPUTS = 7


def agent_of(memory: str, share: bool, **sizes: Any) -> SharedMemoryAgent:
    sizes = {"width": 8, "rows": 2, "segment": 4, "heads": 2, "layers": 2} | sizes
    torch.manual_seed(1)
    return SharedMemoryAgent(AgentConfig(INPUTS, 4, 6, memory, share, **sizes)).double()


def episodes_of(batch: int = 5, steps: int = 19) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sub-tasks of many lengths: one step, several segments long, exactly full, one that lasts the whole episode."""
    begins = torch.zeros(batch, steps, dtype=torch.bool)
    begins[:, 0] = True
    for row, places in enumerate(([1, 2, 9], [4, 8, 12], [3], [], [6, 17])[:batch]):
        begins[row, [place for place in places if place < steps]] = True
    observation = torch.randn(batch, steps, INPUTS, dtype=torch.float64)
    return observation, begins.cumsum(dim=1) - 1, begins, torch.tensor([steps, 13, 10, steps, 18])[:batch]


def act(agent: SharedMemoryAgent, observation: Tensor, tasks: Tensor, begins: Tensor) -> list[Tensor]:
    """Every head's outputs, step by step."""
    state, columns = agent.start(len(tasks)), []
    with torch.no_grad():
        for now in range(tasks.shape[1]):
            out, state = agent.step(observation[:, now], tasks[:, now], begins[:, now], state)
            columns.append(out)
    return [torch.stack(column, dim=1) for column in zip(*columns, strict=True)]


@pytest.mark.parametrize(("memory", "share"), VARIANTS)
def test_acting_equals_the_whole(memory: str, share: bool) -> None:
    agent = agent_of(memory, share)
    observation, tasks, begins, lengths = episodes_of()
    inside = torch.arange(tasks.shape[1]) < lengths[:, None]
    for whole, stepwise in zip(
        agent(observation, tasks, begins, lengths), act(agent, observation, tasks, begins), strict=True
    ):
        assert (whole - stepwise)[inside].abs().max() < 1e-12
    for cut, full in zip(agent(observation, tasks, begins, lengths), agent(observation, tasks, begins), strict=True):
        assert (cut - full)[inside].abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["auto", "stock", "reference"])
def test_float32_and_backends(backend: str) -> None:
    agent = agent_of("rmt", True, backend=backend).float()
    exact = agent_of("rmt", True)
    observation, tasks, begins, lengths = episodes_of()
    inside = torch.arange(tasks.shape[1]) < lengths[:, None]
    expected = exact(observation, tasks, begins, lengths).policy
    for policy in (
        agent(observation.float(), tasks, begins, lengths).policy,
        act(agent, observation.float(), tasks, begins)[0],
    ):
        assert (policy - expected)[inside].abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("memory", "share"), VARIANTS)
def test_what_a_step_depends_on(memory: str, share: bool) -> None:
    """The gradient of one step's value with regard to every observation: not zero exactly where it may be seen."""
    agent = agent_of(memory, share, width=32)
    observation, tasks, begins, lengths = episodes_of(batch=1)
    observation.requires_grad_()
    number = begins.cumsum(dim=1)[0]
    for now in range(int(lengths[0])):
        value = agent(observation, tasks, begins, lengths).value[0, now]
        (gradient,) = torch.autograd.grad(value, observation)
        earlier = torch.arange(len(number)) <= now
        seen = earlier if share else earlier & (number == number[now])
        assert torch.equal(gradient[0].abs().sum(dim=1) > 0, seen)


@pytest.mark.parametrize("memory", ["recurrent", "rmt"])
def test_the_task_network_restarts(memory: str) -> None:
    """With the episodic memory cut off from the heads, sharing makes no difference: the task network never carries."""
    shared, reset = agent_of(memory, True), agent_of(memory, False)
    for agent in (shared, reset):
        join = agent.join[0]
        assert isinstance(join, torch.nn.Linear)
        with torch.no_grad():
            join.weight[:, : agent.config.width] = 0
    inputs = episodes_of()
    assert torch.equal(shared(*inputs).policy, reset(*inputs).policy)


def test_the_first_memory_learns() -> None:
    for share in (True, False):
        agent = agent_of("rmt", share)
        agent(*episodes_of()).value.sum().backward()
        unused = [name for name, p in agent.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert unused == ["policy.weight", "policy.bias", "finished.weight", "finished.bias"]


def test_gradients_are_right() -> None:
    """Through every memory handed on, against differences."""
    for memory in ("recurrent", "rmt"):
        agent = agent_of(memory, True, width=4, segment=2, layers=1)
        observation, tasks, begins, lengths = episodes_of(batch=1, steps=5)
        begins[0, 3], lengths[0] = True, 5
        observation.requires_grad_()

        def value(x: Tensor, agent: SharedMemoryAgent = agent, rest: Any = (tasks, begins, lengths)) -> Tensor:
            return agent(x, *rest).value  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(value, (observation,))


def test_segments() -> None:
    begins = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    number, where, fresh = cut_segments(begins, torch.tensor([8, 5]), 3)
    assert number == 3
    assert where.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 3, 6, 7, 9, 9, 9]]
    assert fresh.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": "lstm"}, ValueError, "memory must be one of"),
        ({"width": 9}, ValueError, "width must be a multiple of heads=2"),
        ({"segment": 0}, ValueError, "segment must be at least 1"),
        ({"rows": 2.0}, TypeError, "rows must be an int"),
        ({"share": 1}, TypeError, "share must be True or False"),
    ],
)
def test_bad_sizes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AgentConfig(INPUTS, 4, 6, **change)


def test_bad_shapes() -> None:
    agent = agent_of("recurrent", True)
    observation, tasks, begins, lengths = episodes_of()
    with pytest.raises(ValueError, match="observation must have shape"):
        agent(observation[..., 1:], tasks, begins)
    with pytest.raises(ValueError, match="begins must have shape"):
        agent(observation, tasks, begins[:, 1:])
    with pytest.raises(ValueError, match="lengths must have shape"):
        agent(observation, tasks, begins, lengths[1:])


def test_without_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install 'gymnasium>=1"):
        taxi.train(training=Training(updates=1))


@pytest.mark.parametrize("change", [{"updates": 0}, {"batch": 6}, {"limit": True}])
def test_bad_training(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Training(**change)


# -- the world, which needs gymnasium ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Transitions:
    pytest.importorskip("gymnasium")
    return Transitions.load()


def state_of(row: int, column: int, passenger: int, destination: int) -> int:
    return ((5 * row + column) * 5 + passenger) * 4 + destination


def test_steps_are_gymnasiums(world: Transitions) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    real = gymnasium.make("Taxi-v4", max_episode_steps=500)
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        state, _ = real.reset(seed=seed)
        assert state in world.starts
        ours = TaxiBatch(world, torch.tensor([state]))
        for _ in range(400):
            action = torch.randint(6, (1,), generator=generator)
            state, reward, ended, _, _ = real.step(int(action))
            got, _ = ours.step(action)
            assert (int(ours.state), float(got), bool(ours.ended)) == (state, float(reward), ended)
            if ended:
                break
    assert len(world.starts) == 300
    real.close()


def test_subtasks_in_sequence(world: Transitions) -> None:
    """A delivery by hand, from R (0, 0) to Y (4, 0), with an illegal act and a wall on the way."""
    batch = TaxiBatch(world, torch.tensor([state_of(0, 1, 0, 2)]))
    seen = []
    for action in (PICK, EAST, WEST, WEST, PICK, SOUTH, SOUTH, SOUTH, SOUTH, SOUTH, DROP_OFF, NORTH):
        before = (int(batch.tasks), bool(batch.begins))
        reward, finished = batch.step(torch.tensor([action]))
        seen.append((*before, float(reward), bool(finished)))
    assert seen[:5] == [
        (FIND, True, -10, False), (FIND, False, -1, False), (FIND, False, -1, True), (PICK_UP, True, -1, False),
        (PICK_UP, False, -1, True),
    ]  # fmt: skip
    assert seen[5:] == [
        (GO, True, -1, False), *[(GO, False, -1, False)] * 2, (GO, False, -1, True), (DROP, True, -1, False),
        (DROP, False, 20, True), (DROP, False, 0, False),
    ]  # fmt: skip
    assert bool(batch.ended)


def test_a_start_beside_the_passenger_skips_finding(world: Transitions) -> None:
    batch = TaxiBatch(world, torch.tensor([state_of(0, 0, 0, 1), state_of(0, 0, 1, 0)]))
    assert batch.tasks.tolist() == [PICK_UP, FIND]
    assert batch.begins.tolist() == [True, True]


def test_what_is_seen(world: Transitions) -> None:
    def parts(*state: int) -> list[list[int]]:
        row = taxi.observations(world)[state_of(*state)]
        return [piece.nonzero()[:, 0].tolist() for piece in row.split([25, 5, 4])]

    assert parts(2, 2, 0, 3) == [[12], [0], []]  # the passenger waits elsewhere
    assert parts(0, 0, 0, 3) == [[0], [0], [3]]  # stands here, and says where to
    assert parts(0, 0, 4, 3) == [[0], [4], []]  # once
    assert parts(4, 3, 4, 3) == [[23], [4], []]  # also at the destination


def test_the_shortest_way(world: Transitions) -> None:
    steps = taxi.shortest(world)
    assert int(steps[state_of(4, 0, 4, 2)]) == 1
    assert int(steps[state_of(0, 1, 0, 2)]) == 7
    assert float(steps[world.starts].double().mean()) == pytest.approx(13.07, abs=0.005)


def test_the_best_search(world: Transitions) -> None:
    """Counted by hand from the ways between the pads R, G, Y, B."""
    from benchmarks.systems.taxi import searching

    way = {"RG": 8, "RY": 4, "RB": 7, "GY": 8, "GB": 5, "YB": 7}
    between = {**way, **{key[::-1]: value for key, value in way.items()}}
    tours = {start: tuple(order) for start, order in {"R": "YBG", "Y": "RBG", "G": "BRY", "B": "GRY"}.items()}
    extra = 0.0
    for start, (first, second, third) in tours.items():
        tour = 3 * between[start + first] + 2 * between[first + second] + between[second + third]
        extra += (tour - sum(between[start + pad] for pad in (first, second, third))) / 3
    assert searching(world) == pytest.approx(extra / 4)


SMALL = Training(updates=2, batch=16, minibatches=2, limit=12)


@pytest.mark.parametrize(("memory", "share"), VARIANTS)
def test_training_is_repeatable(world: Transitions, memory: str, share: bool) -> None:
    first, again, other = (
        taxi.train(memory, share, seed=seed, training=SMALL, transitions=world, width=8)[1] for seed in (3, 3, 4)
    )
    assert first == again != other
    assert json.loads(json.dumps(first)) == first


def test_what_is_played_is_what_is_trained_on(world: Transitions) -> None:
    """The chances and values that were noted in play are those of the training pass, before any update."""
    for memory, share in VARIANTS:
        inputs = taxi.observations(world).shape[1]
        agent = SharedMemoryAgent(AgentConfig(inputs, 4, 6, memory, share, width=8))
        generator = torch.Generator().manual_seed(0)
        episodes = taxi.play(agent, TaxiBatch(world, world.starts[:40]), 25, generator)
        out = agent(episodes.observation, episodes.tasks, episodes.begins, episodes.lengths)
        chances = out.policy.log_softmax(dim=-1).gather(2, episodes.actions[..., None])[..., 0]
        assert torch.allclose(chances[episodes.inside], episodes.chances[episodes.inside], atol=1e-5)
        assert torch.allclose(out.value[episodes.inside], episodes.value[episodes.inside], atol=1e-5)


def test_advantages_by_hand(world: Transitions) -> None:
    value, reward = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, 1.0, 9.0]])
    empty = torch.zeros(1, 3)
    episodes = taxi.Episodes(
        empty[..., None], empty.long(), empty.bool(), empty.long(), empty, value, empty.bool(), reward, empty.bool(),
        torch.tensor([2]), torch.tensor([True]),
    )  # fmt: skip
    found = taxi.advantages(episodes, reward, Training(discount=0.5, trace=0.5))
    assert found.tolist() == [[0.5 + 0.5 * 2.0 - 1.0 + 0.25 * (1.0 - 2.0), 1.0 - 2.0, 0.0]]


@pytest.mark.parametrize("memory", ["recurrent", pytest.param("rmt", marks=pytest.mark.slow)])
def test_a_little_training_helps(world: Transitions, memory: str) -> None:
    """Some short updates: from near the passenger at Y, who goes to R, deliveries come about."""
    starts = torch.tensor([state_of(3, 0, 2, 0), state_of(2, 0, 2, 0)])
    training = Training(updates=16, batch=64, minibatches=4, limit=30, learning_rate=1e-2)
    _, record = taxi.train(memory, training=training, transitions=world._replace(starts=starts), width=32)
    first, last = record["curve"][0], record["final"]
    assert first["success"] < 0.2
    assert last["success"] > 0.8
    assert last["return"] > first["return"] + 50.0


def test_the_table(world: Transitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.systems import taxi as bench

    monkeypatch.setattr(bench, "VARIANTS", dict(list(bench.VARIANTS.items())[:2]))
    path = tmp_path / "taxi.json"
    # A thread: a process takes seconds to start.
    monkeypatch.setattr("multiprocessing.get_context", lambda _: SimpleNamespace(Pool=ThreadPool))
    result = bench.measure(SMALL, 1, path, processes=1, progress=False)
    assert [(run["variant"], run["seed"]) for run in result["runs"]] == [(name, 0) for name in bench.VARIANTS]
    again = bench.measure(SMALL, 2, path, processes=1, progress=False)  # only the second seed is left to do
    assert again["runs"][:2] == result["runs"][:2]
    assert len(again["runs"]) == 4
    assert bench.measure(SMALL, 2, path, processes=1, progress=False) == json.loads(path.read_text())
    written = json.loads(path.read_text())
    assert {"device", "versions", "commit", "date", "command"} <= written["environment"].keys()
    assert "| LSTM, shared |" in bench.table(written)
    assert len(bench.verdict(written)) == 1
    page, drawn = tmp_path / "page.md", tmp_path / "taxi.png"
    page.write_text("a\n<!-- taxi:start -->\nbefore\n<!-- taxi:end -->\nb\n")
    bench.update_docs(written, path, page, drawn)
    assert drawn.stat().st_size > 10_000
    assert bench.table(written) in page.read_text()
    assert "before" not in page.read_text()
    with pytest.raises(ValueError, match="trained otherwise"):
        bench.measure(Training(), 2, path)


def test_intervals() -> None:
    from benchmarks.systems.goals import interval

    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
