"""Random numbers that depend on a seed and names alone, never on what was drawn before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

if TYPE_CHECKING:
    from torch import Generator

__all__ = ["COMPONENTS", "Component", "Seed", "counter_generator", "derived_seed", "generator"]

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Type of every seed in a configuration: what torch, SQLite and the tables' 64-bit integers all hold."""
Component = Literal["init", "order", "other"]
"""What a run draws at random: initial weights; the order of the training data, of a task its examples; everything else
(dropout, router noise, sampling)."""
COMPONENTS: tuple[Component, ...] = ("init", "order", "other")


def derived_seed(seed: int, *names: str) -> int:
    """64 bits of the SHA-256 of ``seed`` and ``names``.

    >>> derived_seed(0, "embedding.weight") == derived_seed(0, "embedding.weight")
    True
    >>> derived_seed(0, "embedding.weight") == derived_seed(1, "embedding.weight")
    False
    """
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def generator(seed: int, *names: str) -> Generator:
    """A torch generator on the CPU for ``names`` under ``seed``, independent of every other one."""
    from torch import Generator

    return Generator().manual_seed(derived_seed(seed, *names) >> 1)


def counter_generator(seed: int, stream: int, number: int = 0) -> np.random.Generator:
    """A numpy generator for entry ``number`` of a numbered stream (Philox: key = seed and stream, counter = number)."""
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, number, 0], np.uint64)))
