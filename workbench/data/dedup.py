"""Near-duplicates: texts that share many of their long lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

MIN_LINE_LENGTH = 20
"""Characters of the shortest line that is compared; shorter ones occur in unrelated texts."""
MAX_TEXTS_PER_LINE = 50
"""Lines in more texts than this are boilerplate and are not compared; bounds the work."""


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """Cluster texts that share at least half of the long lines of the smaller one.

    The rule is ours: lines of at least ``MIN_LINE_LENGTH`` characters, without indentation; lines in more than
    ``MAX_TEXTS_PER_LINE`` texts are ignored, so the work stays linear.

    Returns:
        A cluster number for every text.
    """
    lines = [
        {hash(stripped) for line in text.splitlines() if len(stripped := line.strip()) >= MIN_LINE_LENGTH}
        for text in texts
    ]
    texts_with = Counter(line for hashes in lines for line in hashes)
    lines = [{line for line in hashes if texts_with[line] <= MAX_TEXTS_PER_LINE} for hashes in lines]
    clusters = _Clusters(len(texts))
    for (a, b), shared in _shared_lines(lines, texts_with).items():
        if 2 * shared >= max(2, min(len(lines[a]), len(lines[b]))):
            clusters.join(a, b)
    return [clusters.of(i) for i in range(len(texts))]


def _shared_lines(lines: Sequence[set[int]], texts_with: Mapping[int, int]) -> Counter[tuple[int, int]]:
    """Pairs of texts -> number of lines in both. ``texts_with`` counts the texts that have a line."""
    indices_with: dict[int, list[int]] = {}
    for index, hashes in enumerate(lines):
        for line in hashes:
            if texts_with[line] > 1:
                indices_with.setdefault(line, []).append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in indices_with.values():
        shared.update((a, b) for i, a in enumerate(indices) for b in indices[i + 1 :])
    return shared


class _Clusters:
    """Disjoint sets with path halving."""

    def __init__(self, size: int):
        self._parent = list(range(size))

    def of(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(self, a: int, b: int) -> None:
        self._parent[self.of(b)] = self.of(a)
