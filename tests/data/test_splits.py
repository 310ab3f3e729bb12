"""Splits are disjoint, and a cluster stays in one of them."""

from __future__ import annotations

import random

import pytest

from workbench.config import ConfigError
from workbench.data.splits import SplitName, split_by_cluster

GENERATOR = random.Random(0)
SIZES = [GENERATOR.randint(50, 150) for _ in range(40)]
KEYS = [GENERATOR.randbytes(32) for _ in SIZES]
CLUSTERS = [i % 30 for i in range(40)]


def split(selection: float = 0.2, report: float = 0.2) -> dict[SplitName, list[int]]:
    return split_by_cluster(SIZES, KEYS, CLUSTERS, {"selection": selection, "report": report})


def test_every_document_is_in_one_split() -> None:
    assert sorted(index for members in split().values() for index in members) == list(range(40))


def test_a_cluster_stays_together() -> None:
    split_of = {CLUSTERS[index]: name for name, members in split().items() for index in members}
    assert all(split_of[CLUSTERS[index]] == name for name, members in split().items() for index in members)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3])
def test_a_split_has_about_its_fraction_of_the_bytes(fraction: float) -> None:
    size = sum(SIZES[index] for index in split(report=fraction)["report"])
    assert fraction <= size / sum(SIZES) <= fraction + max(SIZES) * 2 / sum(SIZES)


def test_the_order_of_reading_does_not_matter() -> None:
    order = GENERATOR.sample(range(40), 40)
    shuffled = split_by_cluster(
        [SIZES[i] for i in order],
        [KEYS[i] for i in order],
        [CLUSTERS[i] for i in order],
        {"selection": 0.2, "report": 0.2},
    )
    assert {name: {order[i] for i in members} for name, members in shuffled.items()} == {
        name: set(members) for name, members in split().items()
    }


def test_a_document_larger_than_a_split_is_left_for_training() -> None:
    splits = split_by_cluster([10_000, *[10] * 30], KEYS[:31], range(31), {"selection": 0.01, "report": 0.01})
    assert 0 in splits["train"]


def test_three_documents_are_one_for_each_split() -> None:
    splits = split_by_cluster([5, 900, 70], KEYS[:3], range(3), {"selection": 0.05, "report": 0.05})
    assert [len(members) for members in splits.values()] == [1, 1, 1]


def test_fewer_than_three_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 3 different documents"):
        split_by_cluster([1, 2, 3], KEYS[:3], [0, 0, 1], {"selection": 0.05, "report": 0.05})
