"""Word problems: products by permuting objects one after another, and the axioms of a group."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.data import prepare, sources
from workbench.data.tasks.word_problem import Words, multiplication, order, permutations


def made(folder: Path, group: str, **changes: Any) -> Words:
    fields = {"kind": "word_problem", "group": group, "lengths": [10], "examples": 3, **changes}
    return prepare(sources.parse(fields), 200, folder)


@pytest.mark.parametrize(
    ("group", "elements"), [("Z2", 2), ("Z60", 60), ("S3", 6), ("S5", 120), ("A4", 12), ("A5", 60), ("A4xZ5", 60)]
)
def test_orders(group: str, elements: int) -> None:
    assert order(group) == elements == len(multiplication(group))


@pytest.mark.parametrize("group", ["Z6", "S3", "S4", "A4", "Z2xS3"])
def test_tables_are_those_of_groups(group: str) -> None:
    table = np.array(multiplication(group))
    size = len(table)
    column = np.arange(size)[:, None]
    assert np.array_equal(table[0], np.arange(size)) and np.array_equal(table[:, 0], np.arange(size))
    assert all((np.sort(table, axis=axis) == index).all() for axis, index in ((0, column), (1, column.T)))
    assert np.array_equal(table[table], table[:, table])  # (g h) k = g (h k)


@pytest.mark.parametrize("group", ["S3", "S5", "A5"])
def test_prefixes_are_products_of_permutations(tmp_path: Path, group: str) -> None:
    """Each element moves the object at place i to place p(i)."""
    task, points = made(tmp_path, group), permutations(group)
    for n in range(20):
        example = task.sample(10, "report", np.random.default_rng(n))
        place = list(range(len(points[0])))  # of every object
        for token, target in zip(example.tokens.tolist(), example.targets.tolist()):
            place = [points[token][p] for p in place]
            assert points[target] == tuple(place)


def test_residues_are_added(tmp_path: Path) -> None:
    example = made(tmp_path, "Z7").sample(10, "report", np.random.default_rng(0))
    assert example.targets.tolist() == (np.cumsum(example.tokens) % 7).tolist()


def test_a_direct_product_is_componentwise() -> None:
    table, first, second = (multiplication(group) for group in ("S3xZ4", "S3", "Z4"))
    for (a, b), (c, d) in itertools.product(itertools.product(range(6), range(4)), repeat=2):
        assert table[4 * a + b][4 * c + d] == 4 * first[a][c] + second[b][d]


def test_swaps_move_two_points_at_most(tmp_path: Path) -> None:
    task = made(tmp_path, "S4", elements="swaps", lengths=[40])
    points = np.array(permutations("S4"))
    drawn = np.unique([task.sample(40, "report", np.random.default_rng(n)).tokens for n in range(5)])
    assert len(drawn) == 7 and ((points[drawn] != np.arange(4)).sum(1) <= 2).all()


def test_the_last_prefix_alone(tmp_path: Path) -> None:
    task = made(tmp_path, "Z7", asked="last")
    example = task.sample(10, "report", np.random.default_rng(0))
    assert example.targets[-1] == example.tokens.sum() % 7 and (example.targets[:-1] < 0).all()


def test_parity_is_the_sum_of_the_bits(tmp_path: Path) -> None:
    task = prepare(sources.parse({"kind": "parity", "lengths": [12], "examples": 3}), 8, tmp_path)
    for n in range(20):
        example = task.sample(12, "report", np.random.default_rng(n))
        assert example.targets[-1] == bin(int("".join(map(str, example.tokens)), 2)).count("1") % 2


def test_each_prefix_is_an_answer(tmp_path: Path) -> None:
    assert set(made(tmp_path, "S3").report.columns["answers"].tolist()) == {10}
