"""State tracking as the word problem of a group (arXiv 2404.08819, section 5): the product of all elements so far.

    tokens    g1 g2 g3 …        targets   g1, g1 g2, g1 g2 g3, …

``group`` is Z (integers modulo n), S (permutations of n points) or A (even ones) with its n, or a direct product:
"Z60", "A4xZ5", "A5", "S3", "S5". Parity is that of Z2; S5 is the smallest symmetric group whose word problem is
complete for NC1, beyond fixed-depth transformers and linear recurrences with non-negative eigenvalues.

Elements are numbered: residues by themselves; permutations in lexicographic order, 0 the identity; pairs of a product
by the first, then the second. The product g h applies g first, then h.
"""

from __future__ import annotations

import itertools
import math
import re
from functools import cache, cached_property, reduce
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from workbench.config import require
from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources

LARGEST = 5_040
"""Largest order of a group (S7): its table of products has the square of it as entries."""


class GroupConfig(SyntheticConfig):
    """Word problem of a group."""

    group: str = "S5"
    """The group."""
    elements: Literal["all", "swaps"] = "all"
    """Elements that occur: all of the group, or the identity and the exchanges of two points (S only)."""
    asked: Literal["all", "last"] = "all"
    """Positions with a target: every prefix, or the whole word alone."""

    size_field = "group"

    @field_validator("group")
    @classmethod
    def _known(cls, group: str) -> str:
        factors = [re.fullmatch(r"([ZSA])(\d+)", factor) for factor in group.split("x")]
        require(
            all(match is not None and int(match[2]) >= (2 if match[1] != "A" else 3) for match in factors),
            "",
            got=group,
            expected="Z, S or A with its n (Z2, S5, A5), or a product (A4xZ5)",
        )
        size = order(group)
        require(size <= LARGEST, "", got=f"{group} with {size:,} elements", expected=f"at most {LARGEST:,}")
        return group

    def model_post_init(self, _context: object) -> None:
        require(
            self.elements == "all" or re.fullmatch(r"S\d+", self.group) is not None,
            "elements",
            got=f"{self.elements} in {self.group}",
            expected="all, except in a symmetric group",
        )

    def symbols(self) -> int:
        return order(self.group)

    def chance(self, vocabulary: int) -> float:
        return 1 - 1 / order(self.group)

    def target_share(self, context: int) -> float:
        return 1.0 if self.asked == "all" else sum(1 / length for length in self.lengths) / len(self.lengths)


class Words(SyntheticTask):
    """Generator of words and of the products of their prefixes."""

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        elements, table = self._elements, multiplication(self.config.group)
        tokens = elements[generator.integers(len(elements), size=length)]
        products = [0] * length
        state = 0
        for position, element in enumerate(tokens.tolist()):
            state = table[state][element]
            products[position] = state
        asked = np.arange(length) if self.config.asked == "all" else np.array([length - 1])
        return Example(tokens, targets_at(length, asked, np.array(products)[asked]), {"length": length})

    @cached_property
    def _elements(self) -> np.ndarray:
        """Numbers of the elements that occur."""
        points = permutations(self.config.group) if self.config.elements == "swaps" else None
        if points is None:
            return np.arange(order(self.config.group))
        moved = (np.array(points) != np.arange(len(points[0]))).sum(1)
        return np.flatnonzero(moved <= 2)


@sources.register
class WordProblem(Words):
    """Word problem of a group: tracking a state."""

    class Config(GroupConfig):
        """Word problem of a group."""

        kind: Literal["word_problem"] = "word_problem"
        lengths: Annotated[Lengths, Field(min_length=1)] = (32,)

        published = Published(
            "The Illusion of State, arXiv 2404.08819, section 5; extrapolation: arXiv 2411.12537, section 5.2",
            {"lengths": (32,)},
            {"group": ("Z60", "A4xZ5", "A5", "S5"), "measured_lengths": (64, 128, 256, 512)},
            "all words of a length, or a million of them, split into training and test; one to eight layers",
        )


@sources.register
class Parity(Words):
    """Parity of a bit string: the word problem of Z2, asked at the end."""

    class Config(GroupConfig):
        """Parity of a bit string."""

        kind: Literal["parity"] = "parity"
        group: Literal["Z2"] = "Z2"
        asked: Literal["all", "last"] = "last"
        lengths: Annotated[Lengths, Field(min_length=1)] = (8, 16, 24, 32, 40)

        published = Published(
            "Neural Networks and the Chomsky Hierarchy, arXiv 2207.02098; linear recurrences: arXiv 2411.12537",
            {"lengths": tuple(range(3, 41))},
            {"measured_lengths": (64, 128, 256)},
            "fresh rows, 20,000 steps of batch 256, AdamW 1e-3, cosine, two layers of width 128",
        )


def order(group: str) -> int:
    """Number of elements."""
    sizes = {"Z": lambda n: n, "S": math.factorial, "A": lambda n: math.factorial(n) // 2}
    return math.prod(sizes[factor[0]](int(factor[1:])) for factor in group.split("x"))


def permutations(group: str) -> list[tuple[int, ...]]:
    """The elements of S or A as images of the points 0 … n − 1, in the order of their numbers."""
    kind, n = group[0], int(group[1:])
    everything = itertools.permutations(range(n))
    return [p for p in everything if kind == "S" or _is_even(p)]


@cache
def multiplication(group: str) -> list[list[int]]:
    """``table[g][h]``: the number of the product g h."""
    table = reduce(_product, map(_factor, group.split("x")))
    result: list[list[int]] = table.tolist()
    return result


def _factor(group: str) -> np.ndarray:
    if group[0] == "Z":
        n = int(group[1:])
        return np.add.outer(np.arange(n), np.arange(n)) % n
    points = np.array(permutations(group))
    n = points.shape[1]
    weights = n ** np.arange(n)
    number = {code: index for index, code in enumerate((points @ weights).tolist())}
    # g first, then h: point i goes to h[g[i]]
    return np.array([[number[code] for code in (points[:, g] @ weights).tolist()] for g in points])


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Table of the direct product; the pair (a, b) has the number a · |second| + b."""
    size = len(first) * len(second)
    pairs: Any = first[:, None, :, None] * len(second) + second[None, :, None, :]
    return np.asarray(pairs.reshape(size, size))


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 0
