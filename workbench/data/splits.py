"""Which documents belong to which split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from workbench.config import require

MeasuredSplit: TypeAlias = Literal["selection", "report", "pilot"]
SplitName: TypeAlias = Literal["train", "selection", "report", "pilot"]
MEASURED: tuple[MeasuredSplit, ...] = ("report", "pilot", "selection")
"""Splits that models are measured on, in the order in which they are drawn: the report split, which only confirmation
runs open; the pilot split, drawn by the same rule, on which pilots measure the noise of the report split; the selection
split, which tuning looks at."""
SPLITS: tuple[SplitName, ...] = ("train", "selection", "report", "pilot")


class Assignment(NamedTuple):
    """Documents of every split."""

    documents: dict[SplitName, list[int]]
    """Split -> indices of its documents; of a measured cluster, one document."""
    clusters: np.ndarray
    """(documents of the corpus,) int64: rank of each document's cluster in the order in which clusters are drawn."""
    unused: list[int]
    """The other documents of measured clusters: in no split."""


def split_by_cluster(
    sizes: Sequence[int],
    keys: Sequence[bytes],
    clusters: Iterable[int],
    fractions: Mapping[MeasuredSplit, float],
    most: Mapping[MeasuredSplit, int] | None = None,
) -> Assignment:
    """Distribute documents over the splits, whole clusters of near-duplicates at a time.

    Clusters are visited in the order of one hash of their whole content (the sorted keys of all members), so that every
    cluster has the same probability to be measured, whatever its number of members. The report split takes the first,
    the pilot split the next, the selection split the next. Of a measured cluster, the member with the least hash of
    (cluster hash, key) is measured; the other members are in no split, neither measured nor trained on. A document
    larger than twice the split's fraction of the text (one document per cluster) is left for training. The result does
    not depend on the order of reading.

    Args:
        sizes: bytes of every document.
        keys: content hash of every document.
        clusters: cluster number of every document (:func:`workbench.data.dedup.near_duplicates`).
        fractions: clusters of a measured split as a fraction of all clusters.
        most: documents of each measured split, at most.

    Raises:
        ConfigError: fewer clusters than splits.
    """
    members: dict[int, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(int(cluster), []).append(index)
    require(
        len(members) > len(fractions),
        "data.corpus",
        got=f"{len(sizes)} document(s) in {len(members)} group(s) of near-duplicates",
        expected=f"at least {len(fractions) + 1} different documents, one for each of train, {', '.join(fractions)}",
        do="Give more files, or cut the file into documents (JSONL, one a line).",
    )
    groups = [sorted(group, key=lambda index: keys[index]) for group in members.values()]
    hashed = sorted((_hash(*(keys[index] for index in group)), group) for group in groups)
    groups = [group for _, group in hashed]
    chosen = [min(group, key=lambda i: _hash(key, keys[i])) for key, group in hashed]
    ranks = np.empty(len(sizes), np.int64)
    for rank, group in enumerate(groups):
        ranks[group] = rank
    weights = [sizes[index] for index in chosen]
    remaining = list(range(len(groups)))
    documents: dict[SplitName, list[int]] = {name: [] for name in SPLITS}
    unused: list[int] = []
    order = [name for name in MEASURED if name in fractions]
    for left, name in zip(range(len(order), 0, -1), order):
        number = max(1, round(fractions[name] * len(groups)))
        number = min(number, len(remaining) - left, (most or {}).get(name, number))
        drawn = _draw(remaining, weights, number, 2 * fractions[name] * sum(weights))
        taken = set(drawn)
        remaining = [group for group in remaining if group not in taken]
        documents[name] = [chosen[group] for group in drawn]
        unused += [index for group in drawn for index in groups[group] if index != chosen[group]]
    documents["train"] = [index for group in remaining for index in groups[group]]
    return Assignment(documents, ranks, unused)


def _hash(*keys: bytes) -> bytes:
    return hashlib.sha256(b"".join(keys)).digest()


def _draw(remaining: Sequence[int], weights: Sequence[int], number: int, heaviest: float) -> list[int]:
    """The first ``number`` groups of ``remaining`` that weigh at most ``heaviest``; the lightest if there is none."""
    light = (group for group in remaining if weights[group] <= heaviest)
    return list(islice(light, number)) or [min(remaining, key=lambda group: weights[group])]
