"""The Taxi problem for agents with an episodic memory: four sub-tasks in sequence.

The world is gymnasium's Taxi, stepped for a whole batch at once from its own table of transitions. What is added: the
sub-tasks (find the passenger, pick up, go to the destination, drop), of which the agent is told which one is on; and
that the destination is not always seen. The passenger says where to while the taxi stands by, and does not say it again
on the way. An agent whose memory outlives the sub-task then knows the way; one whose memory does not has to search.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.models.shared_memory import AgentConfig, SharedMemoryAgent

__all__ = ["TASKS", "Episodes", "TaxiBatch", "Training", "Transitions", "evaluate", "play", "shortest", "train"]

TASKS = ("find", "pick up", "go", "drop")
FIND, PICK_UP, GO, DROP = range(4)
ACTIONS = 6  # south, north, east, west, pick up, drop off
_INSIDE = 4  # the passenger's place in the taxi


class Transitions(NamedTuple):
    """What gymnasium's Taxi does in each of its 500 states, and where episodes start."""

    state: Tensor  # int64 (500, 6): the next state
    reward: Tensor  # float32 (500, 6)
    ended: Tensor  # bool (500, 6): the passenger is delivered
    starts: Tensor  # int64 (300,): the initial states, all equally likely
    taxi: Tensor  # int64 (500,): the taxi's square, 5 * row + column
    passenger: Tensor  # int64 (500,): 0..3 at that pad, 4 in the taxi
    destination: Tensor  # int64 (500,): pad
    pads: Tensor  # int64 (4,): the pads' squares

    @classmethod
    def load(cls) -> Transitions:
        """From ``gymnasium.make("Taxi-v4")``, without rain and fickle passengers.

        Raises:
            ImportError: gymnasium is missing, or older than its Taxi-v4.
        """
        try:
            gymnasium: Any = importlib.import_module("gymnasium")
        except ImportError as error:
            raise ImportError("the Taxi task needs gymnasium >= 1.3: pip install 'gymnasium>=1.3'") from error
        try:
            world: Any = gymnasium.make("Taxi-v4").unwrapped
        except gymnasium.error.Error as error:
            found = gymnasium.__version__
            raise ImportError(
                f"the Taxi task needs gymnasium >= 1.3 for Taxi-v4, found {found}: pip install 'gymnasium>=1.3'"
            ) from error
        rows = [[world.P[state][action][0] for action in range(ACTIONS)] for state in range(len(world.P))]
        column = [torch.tensor([[entry[i] for entry in row] for row in rows]) for i in (1, 2, 3)]
        places = torch.tensor([[int(part) for part in world.decode(state)] for state in range(len(rows))])
        pads = torch.tensor([5 * row + col for row, col in world.locs])
        starts = torch.from_numpy(world.initial_state_distrib).nonzero()[:, 0]
        return cls(
            column[0], column[1].float(), column[2].bool(), starts, 5 * places[:, 0] + places[:, 1], places[:, 2],
            places[:, 3], pads,
        )  # fmt: skip


def meeting(world: Transitions) -> Tensor:
    """Whether the taxi stands at the square of a passenger who is not inside, bool (500,)."""
    return (world.passenger != _INSIDE) & (world.pads[world.passenger.clamp(max=3)] == world.taxi)


def over(world: Transitions) -> Tensor:
    """Whether a state ends a sub-task that is on in it, bool (500, 4); dropping ends with the episode, never here."""
    inside = world.passenger == _INSIDE
    arrived = inside & (world.pads[world.destination] == world.taxi)
    return torch.stack([meeting(world), inside, arrived, torch.zeros_like(inside)], dim=1)


def observations(world: Transitions) -> Tensor:
    """What the agent sees in each state, float32 (500, 34).

    Taxi's own observation, one-hot: the taxi's square (25), the passenger's place (4 pads, or inside). But the
    destination's pad (4) only while the taxi stands at the square of the passenger who waits; zeros elsewhere.
    """
    told = F.one_hot(world.destination, 4) * meeting(world)[:, None]
    return torch.cat([F.one_hot(world.taxi, 25), F.one_hot(world.passenger, 5), told], dim=1).float()


class TaxiBatch:
    """A batch of Taxi episodes in step.

    Args:
        transitions: the world; see :meth:`Transitions.load`.
        starts: int64 (batch,), initial states.

    A sub-task is over when the taxi is at the passenger's square, the passenger inside, the taxi at the destination
    with the passenger inside, the passenger delivered; then the next one is on. An episode that starts at the
    passenger's square starts with picking up. Nothing goes back to an earlier sub-task: a passenger who is put down
    on the way has to be picked up again within the later one.
    """

    def __init__(self, transitions: Transitions, starts: Tensor) -> None:
        self.world, self.state = transitions, starts.clone()
        self._seen, self._over = observations(transitions), over(transitions)
        self.ended = torch.zeros_like(starts, dtype=torch.bool)
        self.tasks = self._over[self.state, FIND].long()
        self.begins = torch.ones_like(self.ended)

    def observe(self) -> Tensor:
        """Observations, float32 (batch, inputs): rows of :func:`observations`."""
        return self._seen[self.state]

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Take actions, int64 (batch,): the rewards of gymnasium, float32, and which sub-tasks that finished, bool.

        Episodes that have ended stay as they are and give 0 and False.
        """
        running = ~self.ended
        reward = torch.where(running, self.world.reward[self.state, actions], 0.0)
        self.ended = self.ended | self.world.ended[self.state, actions]
        self.state = torch.where(running, self.world.state[self.state, actions], self.state)
        finished = (self._over[self.state, self.tasks] | self.ended) & running
        self.begins = finished & ~self.ended
        self.tasks = torch.where(self.begins, self.tasks + 1, self.tasks)
        return reward, finished


def shortest(transitions: Transitions) -> Tensor:
    """The fewest steps to deliver the passenger for one who is told everything, int64 (500,); -1 where impossible."""
    far = len(transitions.state) + 1
    steps = torch.full((len(transitions.state),), far)
    while True:
        after = torch.where(transitions.ended, 0, steps[transitions.state])
        better = torch.minimum(steps, after.min(dim=1).values + 1)
        if torch.equal(better, steps):
            return torch.where(steps < far, steps, -1)
        steps = better


class Episodes(NamedTuple):
    """A batch of episodes as they were played. ``steps`` is that of the longest; ``lengths`` says where each ends."""

    observation: Tensor  # float32 (batch, steps, inputs)
    tasks: Tensor  # int64 (batch, steps)
    begins: Tensor  # bool (batch, steps)
    actions: Tensor  # int64 (batch, steps)
    chances: Tensor  # float32 (batch, steps): log-probability of the action
    value: Tensor  # float32 (batch, steps)
    claims: Tensor  # bool (batch, steps): the agent says that this action finishes the sub-task
    reward: Tensor  # float32 (batch, steps): gymnasium's
    finished: Tensor  # bool (batch, steps): it does
    lengths: Tensor  # int64 (batch,)
    success: Tensor  # bool (batch,): delivered within the limit

    @property
    def inside(self) -> Tensor:
        """Whether a step lies inside its episode, bool (batch, steps)."""
        return torch.arange(self.tasks.shape[1]) < self.lengths[:, None]

    def take(self, rows: Tensor) -> Episodes:
        """Some of the episodes, to the end of the longest of them."""
        longest = int(self.lengths[rows].max())
        return Episodes(*(column[rows, :longest] if column.dim() > 1 else column[rows] for column in self))


@torch.no_grad()
def play(
    agent: SharedMemoryAgent, world: TaxiBatch, limit: int, generator: torch.Generator, greedy: bool = False
) -> Episodes:
    """Play to the end, or for ``limit`` steps. Actions are drawn from the policy, or are its likeliest (``greedy``)."""
    state, columns = agent.start(len(world.state)), []
    lengths = torch.full_like(world.state, limit)
    for now in range(limit):
        observation, tasks, begins = world.observe(), world.tasks, world.begins
        out, state = agent.step(observation, tasks, begins, state)
        chances = out.policy.log_softmax(dim=-1)
        taken = chances.argmax(1, keepdim=True) if greedy else torch.multinomial(chances.exp(), 1, generator=generator)
        actions = taken[:, 0]
        before = world.ended
        reward, finished = world.step(actions)
        columns.append((
            observation, tasks, begins, actions, chances.gather(1, taken)[:, 0], out.value,
            out.finished.gather(1, taken)[:, 0] > 0, reward, finished,
        ))  # fmt: skip
        lengths[world.ended & ~before] = now + 1
        if bool(world.ended.all()):
            break
    stacked = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return Episodes._make((*stacked, lengths, world.ended))


@dataclass(frozen=True)
class Training:
    """How an agent is trained: proximal policy optimisation over whole episodes."""

    updates: int = 80
    batch: int = 128  # episodes of an update
    passes: int = 3  # over the batch
    minibatches: int = 4
    limit: int = 50  # steps of an episode; gymnasium's own limit is 200
    learning_rate: float = 3e-3  # falls linearly to a tenth
    discount: float = 0.98
    trace: float = 0.95  # lambda of the generalised advantage estimate
    clip: float = 0.2
    entropy: float = 0.04  # falls linearly to a tenth
    finished: float = 0.5  # weight of the task-finished head's loss
    step_cost: float = 0.02  # a finished sub-task is worth 1

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "passes", "minibatches", "limit"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        if self.batch % self.minibatches:
            raise ValueError(f"batch must be a multiple of minibatches={self.minibatches}, got {self.batch}")


def advantages(episodes: Episodes, reward: Tensor, training: Training) -> Tensor:
    """Generalised advantage estimates, (batch, steps). An episode cut at the limit counts as ended there."""
    inside, last = episodes.inside, torch.zeros(len(reward))
    following, found = torch.zeros(len(reward)), []
    for now in reversed(range(reward.shape[1])):
        surprise = reward[:, now] + training.discount * following - episodes.value[:, now]
        last = torch.where(inside[:, now], surprise + training.discount * training.trace * last, 0.0)
        following = torch.where(inside[:, now], episodes.value[:, now], 0.0)
        found.append(last)
    return torch.stack(found[::-1], dim=1)


def loss(
    agent: SharedMemoryAgent, episodes: Episodes, advantage: Tensor, returns: Tensor, training: Training, entropy: float
) -> Tensor:
    """The loss of some episodes: clipped policy objective, value, entropy, task-finished head's cross-entropy."""
    out = agent(episodes.observation, episodes.tasks, episodes.begins, episodes.lengths)
    inside, taken = episodes.inside, episodes.actions[..., None]
    chances = out.policy.log_softmax(dim=-1)
    ratio = (chances.gather(2, taken)[..., 0] - episodes.chances).exp()[inside]
    gain, value = advantage[inside], out.value[inside]
    clipped = ratio.clamp(1 - training.clip, 1 + training.clip)
    policy: Tensor = -torch.minimum(ratio * gain, clipped * gain).mean()
    spread: Tensor = -(chances.exp() * chances).sum(dim=-1)[inside].mean()
    claims = out.finished.gather(2, taken)[..., 0][inside]
    finished: Tensor = F.binary_cross_entropy_with_logits(claims, episodes.finished[inside].float())
    return policy + 0.5 * F.mse_loss(value, returns[inside]) - entropy * spread + training.finished * finished


def summary(episodes: Episodes) -> dict[str, float]:
    """Means over episodes: return (gymnasium's, to the limit), success, steps; and the task-finished head's F1."""
    inside = episodes.inside
    claims, finished = episodes.claims & inside, episodes.finished & inside
    both = float((claims & finished).sum())
    either = float(claims.sum() + finished.sum())
    return {
        "return": float((episodes.reward * inside).sum(dim=1).mean()),
        "success": float(episodes.success.float().mean()),
        "steps": float(episodes.lengths.float().mean()),
        "finished_f1": 2 * both / either if either else 0.0,
        **{f"steps_{name.replace(' ', '_')}": float(((episodes.tasks == task) & inside).sum() / len(claims))
           for task, name in enumerate(TASKS)},
    }  # fmt: skip


def evaluate(
    agent: SharedMemoryAgent, transitions: Transitions, training: Training, *, repeats: int = 4, seed: int = 0,
    greedy: bool = False,
) -> dict[str, float]:  # fmt: skip
    """:func:`summary` over every initial state ``repeats`` times, actions drawn from the policy."""
    starts = transitions.starts.repeat(repeats)
    generator = torch.Generator().manual_seed(seed)
    return summary(play(agent, TaxiBatch(transitions, starts), training.limit, generator, greedy))


def train(
    memory: str = "recurrent",
    share: bool = True,
    *,
    seed: int = 0,
    training: Training | None = None,
    transitions: Transitions | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
    **sizes: Any,
) -> tuple[SharedMemoryAgent, dict[str, Any]]:
    """Train an agent on Taxi; the same seed gives the same agent.

    Args:
        memory, share, sizes: of the agent; see :class:`~rmt_kernels.models.shared_memory.AgentConfig`.
        seed: decides the weights, the episodes and the actions.
        training: how (default: ``Training()``).
        transitions: the world (default: gymnasium's).
        report: called after each update with its number and the :func:`summary` of its episodes.

    Returns:
        The agent, and a record of plain JSON values: ``config``, ``training``, ``curve`` (a summary of each update) and
        ``final`` (:func:`evaluate`).

    Raises:
        ImportError: gymnasium is missing or too old, and no transitions are given.
        TypeError, ValueError: a size that is not accepted.
    """
    training = training or Training()
    transitions = transitions or Transitions.load()
    inputs = observations(transitions).shape[1]
    config = AgentConfig(observation=inputs, tasks=len(TASKS), actions=ACTIONS, memory=memory, share=share, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        agent = SharedMemoryAgent(config)
    optimizer = torch.optim.Adam(agent.parameters(), lr=training.learning_rate)
    curve = []
    for update in range(training.updates):
        left = 1.0 - 0.9 * update / training.updates
        optimizer.param_groups[0]["lr"] = training.learning_rate * left
        chosen = torch.randint(len(transitions.starts), (training.batch,), generator=generator)
        world = TaxiBatch(transitions, transitions.starts[chosen])
        episodes = play(agent, world, training.limit, generator)
        reward = episodes.finished.float() - training.step_cost
        advantage = advantages(episodes, reward, training)
        returns, inside = advantage + episodes.value, episodes.inside
        advantage = (advantage - advantage[inside].mean()) / (advantage[inside].std() + 1e-6)
        for _ in range(training.passes):
            order = torch.randperm(training.batch, generator=generator)
            for part in order.view(training.minibatches, -1):
                some = episodes.take(part)
                longest = some.tasks.shape[1]
                gain, aim = advantage[part, :longest], returns[part, :longest]
                objective = loss(agent, some, gain, aim, training, training.entropy * left)
                optimizer.zero_grad()
                objective.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        curve.append(summary(episodes))
        if not math.isfinite(objective.item()):
            raise FloatingPointError(f"the loss is not finite after update {update + 1}")
        if report is not None:
            report(update, curve[-1])
    final = evaluate(agent, transitions, training, seed=seed)
    return agent, {"config": asdict(config), "training": asdict(training), "curve": curve, "final": final}
