"""Taxi: does an episodic memory that outlives the sub-task beat one that restarts with it?

Run ``python -m benchmarks.systems.taxi``. Trains every variant with every seed, and writes a record of all runs after
each, so that an interrupted table goes on where it stopped; then a table and a picture of the learning curves.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arguments import count
from benchmarks.environment import ROOT, environment
from benchmarks.files import RESULTS, write_json
from benchmarks.report import replace_block, source_line
from benchmarks.systems.goals import interval
from benchmarks.tables import environment_lines
from rmt_kernels.training.taxi import ACTIONS, TASKS, TaxiBatch, Training, Transitions, evaluate, shortest, train

__all__ = ["QUICK", "STANDARD", "VARIANTS", "main", "picture", "table", "update_docs"]

VARIANTS = {  # name: (memory, share)
    "LSTM, shared": ("recurrent", True),
    "LSTM, reset": ("recurrent", False),
    "RMT memory, shared": ("rmt", True),
    "RMT memory, reset": ("rmt", False),
}
STANDARD = Training()
QUICK = replace(STANDARD, updates=6, batch=64, minibatches=2, limit=30)
_COLUMNS = {"return": "return", "success": "success", "steps": "steps", "steps_go": "of these, to the destination"}
PAGE, PICTURE = ROOT / "docs" / "systems" / "shared_memory.md", ROOT / "docs" / "pictures" / "taxi.png"


def _run(job: tuple[str, int, Training]) -> dict[str, Any]:
    """One variant with one seed, in a process of its own."""
    name, seed, training = job
    torch.set_num_threads(1)
    memory, share = VARIANTS[name]
    transitions = Transitions.load()
    agent, record = train(memory, share, seed=seed, training=training, transitions=transitions)
    greedy = evaluate(agent, transitions, training, repeats=1, greedy=True)
    record["curve"] = {
        key: [round(point[key], 3) for point in record["curve"]] for key in ("return", "success", "steps")
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"variant": name, "seed": seed, "date": date, **record, "greedy": greedy}


def _kept(path: Path, training: Training) -> dict[str, Any]:
    """What an earlier call left at ``path``.

    Raises:
        ValueError: its runs were trained otherwise.
    """
    if not path.exists():
        return {"runs": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["training"] != asdict(training):
        raise ValueError(f"{path} holds runs trained otherwise: give another --save, or remove it")
    return found


def searching(transitions: Transitions) -> float:
    """What it costs, in steps of an episode, not to know the destination after the pick-up: the best search there is.

    The three other pads are equally likely, so the best order to try them in is the one with the least mean way.
    """
    steps, pads = shortest(transitions), range(4)
    way = [[0.0] * 4 for _ in pads]
    for state in range(len(steps)):
        if int(transitions.passenger[state]) == 4 and transitions.taxi[state] in transitions.pads:
            here = transitions.pads.tolist().index(int(transitions.taxi[state]))
            way[here][int(transitions.destination[state])] = float(steps[state]) - 1.0
    extra = []
    for start in pads:
        others = [pad for pad in pads if pad != start]
        found = [
            3 * way[start][first] + 2 * way[first][second] + way[second][third]
            for first, second, third in itertools.permutations(others)
        ]
        extra.append((min(found) - sum(way[start][pad] for pad in others)) / 3)
    return statistics.mean(extra)


def references(training: Training, episodes: int = 2400) -> dict[str, Any]:
    """What bounds the table: the best with and without the destination in mind, and actions at random."""
    transitions = Transitions.load()
    steps = shortest(transitions)[transitions.starts].double().mean().item()
    generator = torch.Generator().manual_seed(0)
    starts = transitions.starts[torch.randint(len(transitions.starts), (episodes,), generator=generator)]
    world, total, taken = TaxiBatch(transitions, starts), torch.zeros(episodes), torch.zeros(episodes)
    for _ in range(training.limit):
        taken += (~world.ended).float()
        total += world.step(torch.randint(ACTIONS, (episodes,), generator=generator))[0]
    return {
        "best that remembers": {"return": 21.0 - steps, "success": 1.0, "steps": steps},
        "best that searches": {
            "return": 21.0 - steps - searching(transitions), "success": 1.0, "steps": steps + searching(transitions)
        },
        "actions at random": {
            "return": total.mean().item(), "success": world.ended.float().mean().item(), "steps": taken.mean().item()
        },
    }  # fmt: skip


def measure(training: Training, seeds: int, path: Path, processes: int = 2, progress: bool = True) -> dict[str, Any]:
    """Run what is missing at ``path``, writing after each run; the whole record."""
    kept = _kept(path, training)
    runs = kept["runs"]
    done = {(run["variant"], run["seed"]) for run in runs}
    missing = [(name, seed, training) for seed in range(seeds) for name in VARIANTS if (name, seed) not in done]
    if not missing:
        return kept
    here = environment()
    here["versions"]["gymnasium"] = importlib.metadata.version("gymnasium")
    result: dict[str, Any] = {
        "training": asdict(training), "references": references(training), "runs": runs, "environment": here,
    }  # fmt: skip
    # Spawned: a forked process would share the threads of this one.
    with (
        multiprocessing.get_context("spawn").Pool(min(processes, len(missing))) as pool,
        tqdm(total=len(missing), unit="run", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for run in pool.imap_unordered(_run, missing):
            runs.append(run)
            runs.sort(key=lambda run: (run["seed"], list(VARIANTS).index(run["variant"])))
            write_json(path, result)
            bar.set_postfix_str(f"{run['variant']}, seed {run['seed']}: return {run['final']['return']:.1f}")
            bar.update()
    return result


def _of(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [run for run in result["runs"] if run["variant"] == name]


def table(result: dict[str, Any]) -> str:
    """A Markdown table: means over seeds with 95 % t-intervals."""
    lines = ["| agent | " + " | ".join(_COLUMNS.values()) + " | seeds |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for name in VARIANTS:
        runs = _of(result, name)
        if runs:
            cells = []
            for key in _COLUMNS:
                mean, half = interval(run["final"][key] for run in runs)
                digits = 3 if key == "success" else 2
                cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}"))
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(runs)} |")
    for label, found in result["references"].items():
        lines.append(f"| {label} | {found['return']:.2f} | {found['success']:.3f} | {found['steps']:.2f} | | |")
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> list[str]:
    """Whether sharing beats resetting, in return: a sentence for each kind of memory, from the intervals."""
    sentences = []
    for kind in dict.fromkeys(name.split(",")[0] for name in VARIANTS):
        returns = [[run["final"]["return"] for run in _of(result, f"{kind}, {how}")] for how in ("shared", "reset")]
        if min(map(len, returns)) < 2:
            continue
        shared, reset = map(interval, returns)
        gap = (shared[0] - shared[1]) - (reset[0] + reset[1])
        apart = f"the intervals are apart by {gap:.2f}" if gap > 0 else f"the intervals overlap by {-gap:.2f}"
        sentences.append(f"{kind}: sharing changes the return by {shared[0] - reset[0]:+.2f}; {apart}.")
    return sentences


def picture(result: dict[str, Any], path: Path) -> None:
    """Learning curves, means over seeds with 95 % t-intervals; and the final steps of each sub-task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"LSTM": "#8b8f98", "RMT memory": "#c8372d"}
    figure, (curve, parts) = plt.subplots(1, 2, figsize=(10.4, 3.9), width_ratios=[1.5, 1], layout="constrained")
    batch = result["training"]["batch"]
    for place, name in enumerate(VARIANTS):
        runs = _of(result, name)
        if not runs:
            continue
        kind, how = name.split(", ")
        columns = zip(*(run["curve"]["steps"] for run in runs), strict=True)
        points = [interval(column) for column in columns]
        episodes = [batch * (i + 1) / 1000 for i in range(len(points))]
        mean = [point[0] for point in points]
        style = "-" if how == "shared" else "--"
        curve.plot(episodes, mean, style, color=colours[kind], label=name, linewidth=1.8)
        if len(runs) > 1:
            low, high = [m - h for m, h in points], [m + h for m, h in points]
            curve.fill_between(episodes, low, high, color=colours[kind], alpha=0.15, linewidth=0)
        left = 0.0
        for shade, task in zip((0.95, 0.25, 0.6, 0.25), TASKS, strict=True):
            steps = statistics.mean(run["final"][f"steps_{task.replace(' ', '_')}"] for run in runs)
            parts.barh(place, steps, left=left, color=colours[kind], alpha=shade, edgecolor="white")
            if steps > 2:
                parts.text(left + steps / 2, place, f"{task}\n{steps:.1f}", ha="center", va="center", fontsize=8)
            left += steps
        total, half = interval(run["final"]["steps"] for run in runs)
        if not math.isnan(half):
            parts.errorbar(total, place, xerr=half, color="black", capsize=3, linewidth=1)
    for label in ("best that remembers", "best that searches"):
        steps = result["references"][label]["steps"]
        for line in (curve.axhline, parts.axvline):
            line(steps, color="#2f6db3", linewidth=1, linestyle=":")
        curve.annotate(label, (0.01, steps), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    limit = result["training"]["limit"]
    curve.set(xlabel="thousand episodes", ylabel="steps of an episode in training", ylim=(0, 1.05 * limit))
    curve.legend(frameon=False, fontsize=9)
    parts.set_yticks(range(len(VARIANTS)), list(VARIANTS), fontsize=9)
    parts.invert_yaxis()
    parts.set(xlabel="steps after training, by sub-task")
    for ax in (curve, parts):
        ax.spines[["top", "right"]].set_visible(False)
    seeds = len({run["seed"] for run in result["runs"]})
    figure.suptitle(
        f"Taxi in four sub-tasks, episodic memory shared over them or reset: {seeds} seeds, 95 % intervals", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines(result: dict[str, Any]) -> list[str]:
    """Where, with what and when."""
    here = result["environment"]
    return [
        *environment_lines(here), f"gymnasium {here['versions']['gymnasium']}, {here['command']}"
    ]  # fmt: skip


def update_docs(result: dict[str, Any], file: Path, page: Path = PAGE, drawn: Path = PICTURE) -> None:
    """Write the table and the picture into the page of the system, between its ``taxi`` comments."""
    picture(result, drawn)
    source = f"<sub>{'<br>'.join(lines(result))}<br>{source_line(file)}</sub>"
    shown = f"![Steps of an episode in training and after it](../pictures/{drawn.name})"
    replace_block(page, "taxi", ["", table(result), "", " ".join(verdict(result)), "", shown, "", source])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems.taxi", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute: everything runs, little is learned")
    parser.add_argument("--seeds", type=count, metavar="N", help="seeds 0 to N - 1 (default: 5; quick: 2)")
    parser.add_argument(
        "--processes", type=count, default=2, metavar="N", help="runs side by side, one thread each (default: 2)"
    )
    parser.add_argument(
        "--save", metavar="NAME", help="benchmarks/results/NAME.json (default: latest/taxi; quick: latest/taxi-quick); "
        "runs that it holds already are not repeated",
    )  # fmt: skip
    parser.add_argument("--render", type=Path, metavar="FILE", help="train nothing, show the result in FILE")
    parser.add_argument("--docs", action="store_true", help="also write it into docs/systems/shared_memory.md")
    given = parser.parse_args(arguments)

    if given.render is not None:
        path = given.render
        result = json.loads(path.read_text(encoding="utf-8"))
    else:
        name = given.save or ("latest/taxi-quick" if given.quick else "latest/taxi")
        path = RESULTS / f"{name}.json"
        seeds = given.seeds or (2 if given.quick else 5)
        result = measure(QUICK if given.quick else STANDARD, seeds, path, given.processes)
    print("\n".join([table(result), *verdict(result), *lines(result)]))
    if given.docs:
        update_docs(result, path)
    elif given.render is None:
        picture(result, path.with_suffix(".png"))
        print(f"written: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
