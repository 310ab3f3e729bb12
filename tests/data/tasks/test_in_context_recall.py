"""In-context recall: read as a list of pairs by a small parser, and answered from a dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.data import prepare, sources
from workbench.data.tasks import Example
from workbench.data.tasks.in_context_recall import Recall

PLAIN = {"lengths": [32], "vocabulary": 16}
NOISY = {"lengths": [64], "vocabulary": 24, "noise": 0.4, "noise_symbols": 8}
FUZZY = {"lengths": [64], "vocabulary": 16}
CASES = {"in_context_recall": PLAIN, "noisy_in_context_recall": NOISY, "fuzzy_in_context_recall": FUZZY}


@pytest.fixture(scope="module", params=CASES)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recall:
    fields: dict[str, Any] = {"kind": request.param, "examples": 4, **CASES[request.param]}
    return prepare(sources.parse(fields), 32, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def examples(task: Recall) -> list[Example]:
    return [task.sample(task.config.lengths[0], "report", np.random.default_rng(n)) for n in range(80)]


Motif = tuple[int, ...]


def pairs(task: Recall, example: Example) -> list[tuple[Motif, Motif, int]]:
    """Key, value, position of the value's first token; noise and padding are left out."""
    keys, values = task.config.halves
    read: list[tuple[list[int], list[int], int]] = []
    before = "noise"
    for position, token in enumerate(example.tokens.tolist()):
        part = "key" if token < keys else "value" if token < keys + values else "noise"
        if part == "key" and before != "key":
            read.append(([], [], 0))
        if part == "key":
            read[-1][0].append(token)
        elif part == "value":
            if not read[-1][1]:
                read[-1] = (*read[-1][:2], position)
            read[-1][1].append(token)
        before = part
    return [(tuple(key), tuple(value), position) for key, value, position in read]


def wanted(task: Recall, example: Example) -> dict[int, int]:
    """Position -> target of every repeated value, by the dictionary of what was read before."""
    value_of: dict[Motif, Motif] = {}
    targets: dict[int, int] = {}
    for key, value, position in pairs(task, example):
        if key in value_of:
            targets |= {position - 1 + i: token for i, token in enumerate(value_of[key])}
        value_of[key] = value
    return targets


def test_targets_are_the_values_read_before(task: Recall, examples: list[Example]) -> None:
    for example in examples:
        given = {int(p): int(example.targets[p]) for p in np.flatnonzero(example.targets >= 0)}
        assert given == wanted(task, example)


def test_a_key_has_one_value(task: Recall, examples: list[Example]) -> None:
    for example in examples:
        read = pairs(task, example)
        assert len({key for key, *_ in read}) == len({(key, value) for key, value, _ in read})


def test_the_last_pair_is_asked(examples: list[Example]) -> None:
    assert all(example.targets[-2] == example.tokens[-1] for example in examples)


def test_examples_have_the_asked_length(task: Recall, examples: list[Example]) -> None:
    assert {len(example.tokens) for example in examples} == set(task.config.lengths)


def test_training_predicts_every_token_but_padding(task: Recall) -> None:
    example = task.sample(task.config.lengths[0], "train", np.random.default_rng(0))
    is_target = example.targets >= 0
    assert np.array_equal(example.targets[is_target], example.tokens[1:][is_target[:-1]])
    assert is_target[np.argmax(is_target) : -1].all()


def test_training_on_answers_alone(task: Recall, tmp_path: Path) -> None:
    fields = {**task.config.plain(), "loss_on": "answers"}
    other = prepare(sources.parse(fields), 32, tmp_path)
    example = other.sample(task.config.lengths[0], "train", np.random.default_rng(0))
    assert {int(p) for p in np.flatnonzero(example.targets >= 0)} == set(wanted(task, example))


def made(kind: str, folder: Path) -> Recall:
    return prepare(sources.parse({"kind": kind, "examples": 3, **CASES[kind]}), 32, folder)


def test_the_share_of_noise(tmp_path: Path) -> None:
    task = made("noisy_in_context_recall", tmp_path)
    tokens = np.stack([task.sample(64, "report", np.random.default_rng(n)).tokens for n in range(200)])
    # 31 pairs before the last, one of them never noise
    assert (tokens >= 16).mean() == pytest.approx(0.4 * 30 / 32, abs=0.02)


@pytest.mark.parametrize(("split", "sizes"), [("report", {3}), ("train", {1, 2, 3})])
def test_sizes_of_fuzzy_keys(tmp_path: Path, split: Any, sizes: set[int]) -> None:
    task = made("fuzzy_in_context_recall", tmp_path)
    drawn = [task.sample(64, split, np.random.default_rng(n)) for n in range(20)]
    assert {len(key) for example in drawn for key, *_ in pairs(task, example)} == sizes


def test_symbols_of_a_motif_are_different(tmp_path: Path) -> None:
    task = made("fuzzy_in_context_recall", tmp_path)
    read = pairs(task, task.sample(64, "train", np.random.default_rng(1)))
    assert all(len(set(motif)) == len(motif) for key, value, _ in read for motif in (key, value))
