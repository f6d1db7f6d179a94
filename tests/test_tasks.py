"""Tasks: every answer worked out again from the token numbers alone."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmt_kernels.training import TASKS, Task, make_task
from rmt_kernels.training.corpora import documentation, source_files, sources
from rmt_kernels.training.tasks import ASK, PLACEHOLDER, best_guess

_SHAPES = [(1, 40), (2, 24), (3, 26), (8, 32)]
_RECALL = ["copy", "reverse", "associative", "quadratic", "remember", "detect", "reasoning"]
_OPTIONS: dict[str, dict[str, Any]] = {"quadratic": {"roots": 9}, "associative": {"pairs": 4, "queries": 3}}


def _task(name: str) -> Task:
    return make_task(name, **_OPTIONS.get(name, {}))


def _words(task: Task, ids: torch.Tensor) -> list[str]:
    return task.decode(ids)


def _asked(words: list[str], labels: torch.Tensor) -> list[str]:
    """The words that are to be predicted."""
    return [word for word, label in zip(words, labels.tolist(), strict=True) if label >= 0]


def _answer(name: str, before: list[str], ending: list[str]) -> list[str]:
    """The right answer, from what comes before the question and from the question."""
    if name in ("copy", "reverse"):
        symbols = [word for word in before if word.startswith("s")]
        return symbols if name == "copy" else symbols[::-1]
    if name == "associative":
        pairs = {key: value for key, value in itertools.pairwise(before) if key.startswith("k")}
        return [pairs[word] for word in ending if word.startswith("k")]
    text = " ".join(before)
    if name in ("remember", "detect"):
        places = dict(re.findall(r"(\w+) (?:went|moved|walked|ran) to the (\w+)", text))
        return [places[ending[ending.index("is") + 1]]]
    (first, way, middle), (again, also, last) = re.findall(r"(\w+) is (north|south|east|west) of (\w+)", text)
    if middle != again:  # the second fact came first
        first, middle, again, last = again, last, first, middle
    assert (middle, way) == (again, also)
    question = " ".join(ending[:-1])
    if question == f"? what is {way} of {middle}":
        return [first]
    assert question == f"? what is {middle} {way} of"
    return [last]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", [name for name in _RECALL if name != "quadratic"])
def test_answers_follow_from_the_information(name: str, held_out: bool) -> None:
    task = _task(name)
    for segments, tokens in _SHAPES:
        batch = task.batch(24, segments, tokens, seed=3, step=segments, held_out=held_out)
        assert batch.ids.shape == batch.labels.shape == (24, segments * tokens)
        assert batch.ids.dtype == batch.labels.dtype == torch.int64
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            words = _words(task, ids)
            start = words.index("?")
            assert start >= (segments - 1) * tokens, "the answer is in the last segment"
            # With several segments all of the information lies before the one with the answer.
            before = words[: (segments - 1) * tokens] if segments > 1 else words[:start]
            asked = _asked(words, labels)
            assert asked == _answer(name, before, words[start:])
            assert torch.equal(labels[labels >= 0], ids[labels >= 0])


@pytest.mark.parametrize("working", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_equations_are_solved(working: bool, held_out: bool) -> None:
    task = make_task("quadratic", roots=12, leading=3, working=working)
    for segments, tokens in [(1, 110), (4, 90)]:
        batch = task.batch(60, segments, tokens, seed=1, step=0, held_out=held_out)
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            words = _words(task, ids)
            text = "".join(words)
            found = re.match(r"(-?\d+)\*x\^2([+-]\d+)\*x([+-]\d+)=0", text)
            assert found is not None
            a, b, c = (int(number) for number in found.groups())
            answer = "".join(_asked(words, labels))
            assert text.rstrip("_").endswith("?" + answer)
            assert answer.endswith(";")
            assert answer.count(";") == 1
            roots = [int(root) for root in re.findall(r"=(-?\d+)(?=[,;](?:x|$))", answer)]
            if not working:
                assert answer == f"x={roots[0]},x={roots[1]};"
            assert roots[0] >= roots[1]
            # Both roots, and no others: sum and product.
            assert a * (roots[0] + roots[1]) == -b
            assert a * roots[0] * roots[1] == c
            if working:
                discriminant, *formulas = answer[2:-1].split(",x=")
                for part in (discriminant, *formulas):
                    values = {_value(side) for side in part.split("=")}
                    assert len(values) == 1, part
                assert _value(discriminant.split("=")[0]) == b * b - 4 * a * c


def _value(expression: str) -> float:
    assert not set(expression) - set("0123456789+-*/^()")
    return float(eval(compile(ast.parse(expression.replace("^", "**"), mode="eval"), "", "eval")))


def test_held_out_equations_come_in_no_training_batch() -> None:
    task = make_task("quadratic", roots=4)
    seen: list[set[str]] = []
    for held_out in (False, True):
        batch = task.batch(3000, 1, 60, seed=0, step=0, held_out=held_out)
        seen.append({"".join(_words(task, ids)).split("=0")[0] for ids in batch.ids})
    assert len(seen[0] | seen[1]) == 2 * 9 * 10 // 2, "every equation comes in one of them"
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("name", list(TASKS))
def test_a_batch_depends_on_task_seed_and_step_alone(name: str) -> None:
    task = _task(name)
    first = task.batch(8, 3, 40, seed=5, step=7)
    torch.manual_seed(99)
    np.random.seed(99)
    task.batch(8, 3, 40, seed=5, step=8)
    again = _task(name).batch(8, 3, 40, seed=5, step=7)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.labels, again.labels)
    for other in ({"seed": 6}, {"step": 8}, {"held_out": True}):
        arguments: dict[str, Any] = {"seed": 5, "step": 7} | other
        changed = task.batch(8, 3, 40, **arguments)
        assert not torch.equal(first.ids, changed.ids), other


def test_other_processes_draw_the_same() -> None:
    code = (
        "import hashlib\nfrom rmt_kernels.training import TASKS, make_task\n"
        "h = hashlib.sha256()\n"
        "for name in TASKS:\n"
        "    b = make_task(name).batch(4, 3, 40, seed=1, step=2)\n"
        "    h.update(b.ids.numpy().tobytes() + b.labels.numpy().tobytes())\n"
        "print(h.hexdigest())\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    namespace: dict[str, Any] = {}
    exec(code.replace("print(h.hexdigest())", "found = h.hexdigest()"), namespace)
    assert done.stdout == namespace["found"] + "\n"


@pytest.mark.parametrize("name", _RECALL)
def test_more_segments_ask_the_same_with_more_noise(name: str) -> None:
    task = _task(name)
    few, many = (task.batch(16, n, 40, seed=0, step=0) for n in (2, 9))
    for short, long, a, b in zip(few.ids, many.ids, few.labels, many.labels, strict=True):
        assert torch.equal(short[a >= 0], long[b >= 0])
        assert (
            _words(task, short)[_words(task, short).index("?") :] == _words(task, long)[_words(task, long).index("?") :]
        )


@pytest.mark.parametrize("name", list(TASKS))
def test_placeholders_hide_all_that_is_to_be_predicted(name: str) -> None:
    task = _task(name)
    for segments, tokens in _SHAPES:
        shown = task.batch(16, segments, tokens, seed=2, step=2)
        hidden = task.batch(16, segments, tokens, seed=2, step=2, causal=False)
        counts = hidden.labels >= 0
        assert bool(counts.any(dim=1).all())
        assert bool((hidden.ids[counts] == PLACEHOLDER).all())
        assert torch.equal(hidden.ids[~counts], shown.ids[~counts])
        assert torch.equal(hidden.labels[counts], shown.ids[counts])
        if name in _RECALL:
            assert torch.equal(hidden.labels, shown.labels)


@pytest.mark.parametrize("name", _RECALL)
def test_nothing_else_in_the_last_segment_tells_the_answer(name: str) -> None:
    """Samples that differ in nothing but their answers' information have the same last segment, placeholders in."""
    task = _task(name)
    batch = task.batch(200, 3, 40, seed=4, step=4, causal=False)
    telling = re.compile({"associative": r"v\d+", "quadratic": r"[0-9=x]"}.get(name, r"s\d+|kitchen|office|garden"))
    for ids, labels in zip(batch.ids[:, -40:], batch.labels[:, -40:], strict=True):
        words = _words(task, ids)
        if name != "reasoning":
            assert not any(telling.fullmatch(word) for word in words)
        else:  # the place that is asked about is no answer
            assert [words.count(place) for place in task.decode(labels[labels >= 0])] == [0]
        # One run of places, so their number says nothing of what they hide; an equation's solution has a fixed room.
        start = words.index("?")
        assert all(int(i) not in (PLACEHOLDER, ASK) for i in ids[:start])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [*_RECALL, "quadratic-working"])
def test_chance_is_what_the_best_guess_reaches(name: str, causal: bool) -> None:
    """The likeliest token after the same question and answer so far, counted.

    On the samples that it was counted on, such a guess is a little better than chance; on others a little worse.
    """
    task = make_task("quadratic", roots=9, working=True) if name.endswith("working") else _task(name)
    symbols = name in ("copy", "reverse", "associative")  # too many answers to count, and each token alike
    tokens: dict[Any, Counter[int]] = defaultdict(Counter)
    wholes: dict[Any, Counter[Any]] = defaultdict(Counter)

    def samples(step: int) -> Iterator[tuple[Any, list[Any], tuple[int, ...]]]:
        batch = task.batch(4000, 1, 80, seed=0, step=step, held_out=True)
        for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
            answer = tuple(label for label in labels if label >= 0)
            asked = () if symbols or "quadratic" in name else tuple(ids[ids.index(ASK) : -1])
            yield asked, [() if symbols else (asked, answer[:i] if causal else i) for i in range(len(answer))], answer

    for asked, keys, answer in samples(0):
        for key, token in zip(keys, answer, strict=True):
            tokens[key][token] += 1
        wholes[asked][() if symbols else answer] += 1
    likeliest = {asked: found.most_common(1)[0][0] for asked, found in wholes.items()}
    best = {key: found.most_common(1)[0][0] for key, found in tokens.items()}
    reached = []
    for step in (0, 1):
        right = count = whole = 0
        for asked, keys, answer in samples(step):
            count += len(answer)
            right += sum(best.get(key) == token for key, token in zip(keys, answer, strict=True))
            whole += likeliest[asked] == answer
        reached.append((right / count, whole / 4000))
    chance = task.chance(causal)
    assert reached[1][0] - 0.02 < chance.token < reached[0][0] + 0.02
    if symbols:
        assert chance.answer == pytest.approx(chance.token ** len(answer))
    else:
        assert reached[1][1] - 0.02 < chance.answer < reached[0][1] + 0.02


def test_best_guess_by_hand() -> None:
    answers = [("q", "ab"), ("q", "ac"), ("q", "ab"), ("r", "zy"), ("r", "xy")]
    causal, alone = best_guess(answers, True), best_guess(answers, False)
    # q: "a" 3 of 3, then "b" 2 of 3; r: 1 of 2, then "y" is certain.
    assert causal.token == alone.token == pytest.approx((3 + 2 + 1 + 2) / 10)
    assert causal.answer == pytest.approx((2 + 1) / 5)
    # What came before tells the rest; a place alone does not.
    answers = [("", "ab"), ("", "cd")]
    assert best_guess(answers, True).token == pytest.approx(3 / 4)
    assert best_guess(answers, False).token == pytest.approx(2 / 4)


@pytest.mark.parametrize("name", ["text", "source"])
def test_language_is_the_text_itself(name: str) -> None:
    task = _task(name)
    whole = {False: documentation, True: documentation} if name == "text" else {False: sources, True: sources}
    for held_out in (False, True):
        text = whole[held_out](held_out).tobytes()
        batch = task.batch(6, 4, 32, seed=0, step=0, held_out=held_out)
        assert torch.equal(batch.ids, batch.labels)
        for ids in batch.ids:
            assert bytes((ids - 2).tolist()) in text
    hidden = task.batch(50, 4, 64, seed=0, step=0, causal=False).labels >= 0
    assert float(hidden.float().mean()) == pytest.approx(0.15, abs=0.01)


def test_language_is_split_without_overlap() -> None:
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics)).encode()
    assert documentation(False).tobytes() + documentation(True).tobytes() == whole
    assert 0.08 < len(documentation(True)) / len(whole) < 0.12
    train, held_out = set(source_files(False)), set(source_files(True))
    assert len(train) > 100
    assert not train & held_out
    assert 0.05 < len(held_out) / len(train) < 0.2
    assert source_files(False) == sorted(train, key=lambda path: path.as_posix())
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in train | held_out)


def test_missing_sources_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"not in .* use the task 'text'"):
        source_files(False)


@pytest.mark.parametrize("name", list(TASKS))
def test_vocabularies_name_every_token(name: str) -> None:
    task = _task(name)
    words = task.vocabulary
    assert words[PLACEHOLDER] == "_"
    assert words[ASK] == "?"
    batch = task.batch(64, 2, 60, seed=0, step=0)
    assert int(batch.ids.min()) >= 0
    assert int(batch.ids.max()) < len(words)
    assert name in ("text", "source") or len(set(words)) == len(words)
    assert task.to_dict()["name"] == name


def test_information_and_answer_may_take_several_segments() -> None:
    task = make_task("copy", length=24)
    batch = task.batch(8, 5, 13, seed=0, step=0)
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        words = _words(task, ids)
        assert _asked(words, labels) == _answer("copy", words[: 3 * 13], []) == words[:24]
    with pytest.raises(ValueError, match=r"3 segments of 13 tokens can't hold copy .* or at least 4 segments"):
        task.batch(8, 3, 13, seed=0, step=0)


def test_facts_stand_anywhere_before_the_last_segment() -> None:
    task = make_task("detect")
    batch = task.batch(400, 3, 12, seed=0, step=0)
    names = {task.vocabulary.index(name) for name in ("daniel", "john", "mary", "sandra")}
    places = [next(i for i, token in enumerate(ids.tolist()) if token in names) for ids in batch.ids]
    assert set(places) == set(range(2 * 12 - 5 + 1))
    two = make_task("reasoning").batch(400, 2, 14, seed=0, step=0)
    starts = Counter(tuple(i for i, t in enumerate(ids.tolist()[:14]) if t == 2 + 4 + 6 + 4 + 7)[:1] for ids in two.ids)
    assert len(starts) > 3


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("sort", {}, ValueError, r"task must be one of \['copy', .*, got 'sort'"),
        ("copy", {"pairs": 3}, ValueError, r"pairs: no option of the task 'copy'; it takes \['length'"),
        ("copy", {"length": 0}, ValueError, "length must be at least 1, got 0"),
        ("copy", {"alphabet": 2.5}, TypeError, "alphabet must be an int"),
        ("associative", {"pairs": 17}, ValueError, "keys must be at least pairs, 17"),
        ("associative", {"queries": 5}, ValueError, "queries must be at most pairs, 4"),
        ("quadratic", {"working": 1}, TypeError, "working must be True or False"),
        ("text", {"masked": 101}, ValueError, "masked must be at most 100"),
    ],
)
def test_options_that_are_not_accepted(name: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_task(name, **options)


def test_sizes_that_cannot_hold_a_sample() -> None:
    with pytest.raises(
        ValueError, match=r"1 segment of 16 tokens can't hold copy .* use at least 17 tokens, or at least 2"
    ):
        make_task("copy").batch(1, 1, 16, seed=0, step=0)
    with pytest.raises(ValueError, match=r"longer than text's shorter part, .* bytes"):
        make_task("text").batch(1, 1000, 1000, seed=0, step=0)
    with pytest.raises(ValueError, match="a passage of text has at least 2 tokens"):
        make_task("text").batch(1, 1, 1, seed=0, step=0)
    for name in ("batch", "segments", "tokens", "seed", "step"):
        arguments: dict[str, Any] = {"batch": 1, "segments": 1, "tokens": 40, "seed": 0, "step": 0} | {name: -1}
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            make_task("copy").batch(**arguments)
