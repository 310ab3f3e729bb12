"""Which documents belong to which split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from workbench.config import require

SplitName: TypeAlias = Literal["train", "selection", "report"]
SPLITS: tuple[SplitName, ...] = ("train", "selection", "report")


def split_by_cluster(
    sizes: Sequence[int],
    keys: Sequence[bytes],
    clusters: Sequence[int],
    fractions: Mapping[Literal["selection", "report"], float],
) -> dict[SplitName, list[int]]:
    """Distribute documents over the splits; a cluster of near-duplicates stays in one split.

    The order within a split is that of the clusters' smallest keys, so it does not depend on the order of reading.

    Args:
        sizes: bytes of every document.
        keys: content hash of every document.
        clusters: cluster number of every document (:func:`workbench.data.dedup.near_duplicates`).
        fractions: bytes of a split as a fraction of all bytes.

    Returns:
        Split -> indices of its documents.

    Raises:
        ConfigError: fewer than three clusters.
    """
    members: dict[int, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    require(
        len(members) >= 3,
        "data.corpus",
        got=f"{len(sizes)} document(s) in {len(members)} group(s) of near-duplicates",
        expected="at least 3 different documents, one for each of train, selection and report",
        do="Give more files, or cut the file into documents (JSONL, one a line).",
    )
    groups = sorted(members.values(), key=lambda group: min(keys[i] for i in group))
    weights = [sum(sizes[i] for i in group) for group in groups]
    remaining = list(range(len(groups)))
    report = _draw(remaining, weights, fractions["report"] * sum(weights), leave=2)
    remaining = [group for group in remaining if group not in report]
    selection = _draw(remaining, weights, fractions["selection"] * sum(weights), leave=1)
    remaining = [group for group in remaining if group not in selection]
    by_split = {"train": remaining, "selection": selection, "report": report}
    return {name: [index for group in by_split[name] for index in groups[group]] for name in SPLITS}


def _draw(remaining: Sequence[int], weights: Sequence[int], target: float, leave: int) -> list[int]:
    """Groups from the front of ``remaining`` until they weigh ``target``; at least ``leave`` groups are not drawn.

    A group of more than twice the target is left for training, unless no other is left.
    """
    drawn: list[int] = []
    weight = 0
    for group in remaining:
        if weight >= target or len(remaining) - len(drawn) <= leave:
            break
        if weight + weights[group] <= 2 * target:
            drawn.append(group)
            weight += weights[group]
    return drawn or [min(remaining, key=lambda group: weights[group])]
