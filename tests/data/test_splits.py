"""Splits are disjoint, and a cluster stays in one of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.data.splits import MEASURED, Assignment, MeasuredSplit, split_by_cluster

GENERATOR = random.Random(0)
SIZES = [GENERATOR.randint(50, 150) for _ in range(40)]
KEYS = [GENERATOR.randbytes(32) for _ in SIZES]
CLUSTERS = [i % 30 for i in range(40)]
FRACTIONS: dict[MeasuredSplit, float] = {"selection": 0.2, "report": 0.2, "pilot": 0.2}


def split(most: dict[MeasuredSplit, int] | None = None, **fractions: float) -> Assignment:
    return split_by_cluster(SIZES, KEYS, CLUSTERS, {**FRACTIONS, **fractions}, most)  # type: ignore[arg-type]


def test_every_document_is_in_one_split_or_unused() -> None:
    splits = split()
    assert sorted(sum(splits.documents.values(), splits.unused)) == list(range(40))


def test_a_cluster_is_in_one_split() -> None:
    names: dict[int, set[str]] = {}
    for name, members in split().documents.items():
        for index in members:
            names.setdefault(CLUSTERS[index], set()).add(name)
    assert sorted(names) == list(range(30)) and all(len(found) == 1 for found in names.values())


def test_one_document_of_a_cluster_is_measured() -> None:
    measured = [CLUSTERS[index] for name in MEASURED for index in split().documents[name]]
    assert len(set(measured)) == len(measured)


def test_unused_documents_share_a_cluster_with_a_measured_one() -> None:
    splits = split()
    measured = {CLUSTERS[index] for name in MEASURED for index in splits.documents[name]}
    assert splits.unused and {CLUSTERS[index] for index in splits.unused} <= measured


def test_cluster_numbers_are_dense_and_equal_within_a_cluster() -> None:
    numbers = split().clusters
    assert sorted(set(numbers.tolist())) == list(range(30))
    assert len(set(zip(CLUSTERS, numbers.tolist()))) == 30


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3])
def test_a_split_has_its_fraction_of_the_clusters(fraction: float) -> None:
    assert len(split(report=fraction).documents["report"]) == 30 * fraction


def test_a_split_has_at_most_so_many_documents() -> None:
    splits = split(dict.fromkeys(MEASURED, 3))
    assert [len(splits.documents[name]) for name in MEASURED] == [3, 3, 3]


def test_families_of_copies_are_as_rare_in_every_split_as_in_the_corpus() -> None:
    """20 families of 20 copies among 380 single documents are 5 % of the clusters, over 200 random corpora."""
    clusters = [c for c in range(400) for _ in range(20 if c < 20 else 1)]
    shares = []
    for _ in range(200):
        keys = [GENERATOR.randbytes(8) for _ in clusters]
        splits = split_by_cluster([5000] * len(clusters), keys, clusters, dict.fromkeys(MEASURED, 0.1))
        shares.append([np.mean([clusters[i] < 20 for i in splits.documents[name]]) for name in MEASURED])
    assert np.mean(shares, axis=0) == pytest.approx([0.05] * 3, abs=0.01)


def test_the_order_of_reading_does_not_matter() -> None:
    order = GENERATOR.sample(range(40), 40)
    sizes, keys, clusters = ([column[i] for i in order] for column in (SIZES, KEYS, CLUSTERS))
    shuffled = split_by_cluster(sizes, keys, clusters, FRACTIONS)  # type: ignore[arg-type]
    assert {name: [order[i] for i in members] for name, members in shuffled.documents.items()} == {
        name: members for name, members in split().documents.items()
    }
    assert [shuffled.clusters[order.index(i)] for i in range(40)] == split().clusters.tolist()


def test_a_document_larger_than_a_split_is_left_for_training() -> None:
    splits = split_by_cluster([10_000, *[10] * 30], KEYS[:31], range(31), dict.fromkeys(MEASURED, 0.01))
    assert 0 in splits.documents["train"]


def test_four_documents_are_one_for_each_split() -> None:
    splits = split_by_cluster([5, 900, 70, 60], KEYS[:4], range(4), dict.fromkeys(MEASURED, 0.05))
    assert [len(members) for members in splits.documents.values()] == [1, 1, 1, 1]


def test_fewer_clusters_than_splits_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 4 different documents"):
        split_by_cluster([1, 2, 3, 4], KEYS[:4], [0, 0, 1, 2], dict.fromkeys(MEASURED, 0.05))
