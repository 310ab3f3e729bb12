"""Copying, induction, selective recall, memorisation, compression: answers by reading the example again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.data import prepare, sources
from workbench.data.synthetic import SyntheticTask


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SyntheticTask]:
    def made(kind: str, **fields: Any) -> SyntheticTask:
        task: SyntheticTask = prepare(sources.parse({"kind": kind, "examples": 4, **fields}), 300, tmp_path)
        return task

    return made


def drawn(task: SyntheticTask, count: int = 50) -> list[tuple[list[int], dict[int, int]]]:
    """Tokens, and position -> target, of examples."""
    examples = (task.sample(task.config.lengths[0], "report", np.random.default_rng(n)) for n in range(count))
    return [(e.tokens.tolist(), {int(p): int(e.targets[p]) for p in np.flatnonzero(e.targets >= 0)}) for e in examples]


def test_selective_copying_writes_the_content_in_order(make: Callable[..., SyntheticTask]) -> None:
    for tokens, targets in drawn(make("selective_copying", lengths=[40], copied=5, vocabulary=12)):
        copy = tokens.index(11)
        assert copy == 34 and tokens[35:] == [10] * 5
        assert targets == dict(zip(range(35, 40), [token for token in tokens[:copy] if token != 10]))


def test_places_of_the_content_are_uniform(make: Callable[..., SyntheticTask]) -> None:
    examples = drawn(make("selective_copying", lengths=[16], copied=3, vocabulary=12), 2_000)
    counts = np.sum([np.array(tokens[:12]) != 10 for tokens, _ in examples], axis=0)
    assert np.abs(counts / 2_000 - 0.25).max() < 0.04


def test_copying_repeats_the_string(make: Callable[..., SyntheticTask]) -> None:
    for tokens, targets in drawn(make("copying", lengths=[20], vocabulary=9)):
        assert tokens[10] == 8 and tokens[11:] == tokens[:9]
        assert targets == dict(zip(range(10, 20), tokens[:10]))


def test_a_copied_string_is_one_answer(make: Callable[..., SyntheticTask]) -> None:
    assert make("copying", lengths=[20]).report.columns["answers"].tolist() == [1] * 4


def test_induction_predicts_what_followed_the_mark(make: Callable[..., SyntheticTask]) -> None:
    for tokens, targets in drawn(make("induction_heads", lengths=[12], vocabulary=6)):
        assert tokens.count(5) == 2 and targets == {11: tokens[tokens.index(5) + 1]}


def test_the_mark_occurs_everywhere(make: Callable[..., SyntheticTask]) -> None:
    examples = drawn(make("induction_heads", lengths=[8]), 300)
    assert {tokens.index(15) for tokens, _ in examples} == set(range(6))


def test_selective_recall_answers_with_the_marked_value(make: Callable[..., SyntheticTask]) -> None:
    for tokens, targets in drawn(make("selective_recall", lengths=[42], pairs=4, vocabulary=18)):
        body, end = tokens[1:34], tokens[34:]  # one token fills no triple
        triples = [tuple(body[i : i + 3]) for i in range(0, 33, 3)]
        value_of = {key: value for flag, key, value in triples if flag == 17}
        assert len(value_of) == 4 and targets == {34 + 2 * i: value_of[end[2 * i]] for i in range(4)}
        assert all(value != value_of[key] for flag, key, value in triples if flag == 16)


def test_longer_examples_have_more_distractors(make: Callable[..., SyntheticTask]) -> None:
    task = make("selective_recall", lengths=[32], measured_lengths=[32, 128])
    assert task.report.columns["answers"].tolist() == [4] * 4


def test_memorised_facts_are_the_same_everywhere(make: Callable[..., SyntheticTask]) -> None:
    task = make("memorisation", lengths=[20], vocabulary=21)
    facts = {
        (int(example.tokens[p - 1]), int(example.targets[p]))
        for split in ("train", "report")
        for n in range(30)
        for example in [task.sample(20, split, np.random.default_rng(n))]
        for p in np.flatnonzero(example.targets >= 0)
    }
    assert len(facts) == 10 and len({value for _, value in facts}) == 10


def test_values_of_memorised_facts_are_never_shown(make: Callable[..., SyntheticTask]) -> None:
    for tokens, targets in drawn(make("memorisation", lengths=[20], vocabulary=21)):
        assert max(tokens[::2]) < 10 and set(tokens[1::2]) == {20} and list(targets) == list(range(1, 20, 2))


def test_another_seed_has_other_facts(make: Callable[..., SyntheticTask]) -> None:
    one, other = (make("memorisation", lengths=[20], vocabulary=41, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.values, other.values)  # type: ignore[attr-defined]


def test_compression_asks_for_every_symbol_where_it_was(make: Callable[..., SyntheticTask]) -> None:
    for tokens, targets in drawn(make("compression", lengths=[10], vocabulary=7)):
        assert tokens[-1] == 6 and targets == dict(enumerate(tokens[:-1]))
