"""Which documents belong to which split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
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
    (cluster hash, key) is measured; the other members are in no split, neither measured nor trained on. The
    result does not depend on the order of reading.

    Args:
        sizes: bytes of every document.
        keys: content hash of every document.
        clusters: cluster number of every document (:func:`workbench.data.dedup.near_duplicates`).
        fractions: bytes of a measured split as a fraction of the bytes of one document per cluster.
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
    for number, name in enumerate(order):
        drawn = _draw(remaining, weights, fractions[name] * sum(weights), len(order) - number, (most or {}).get(name))
        taken = set(drawn)
        remaining = [group for group in remaining if group not in taken]
        documents[name] = [chosen[group] for group in drawn]
        unused += [index for group in drawn for index in groups[group] if index != chosen[group]]
    documents["train"] = [index for group in remaining for index in groups[group]]
    return Assignment(documents, ranks, unused)


def _hash(*keys: bytes) -> bytes:
    return hashlib.sha256(b"".join(keys)).digest()


def _draw(remaining: Sequence[int], weights: Sequence[int], target: float, leave: int, most: int | None) -> list[int]:
    """Groups from the front of ``remaining`` until they weigh ``target`` or are ``most``; at least ``leave`` groups are
    not drawn.

    A group of more than twice the target is left for training, unless no other is left.
    """
    drawn: list[int] = []
    weight = 0
    for group in remaining:
        if weight >= target or len(drawn) == most or len(remaining) - len(drawn) <= leave:
            break
        if weight + weights[group] <= 2 * target:
            drawn.append(group)
            weight += weights[group]
    return drawn or [min(remaining, key=lambda group: weights[group])]
