"""Distributions of document lengths with which balanced training is studied.

    uniform     1k to 32k tokens
    bimodal     one half 512 to 4k, the other 16k to 32k, as in ChatQA2-Long-SFT (< 4k / > 16k)
    long_tail   8k to 72k with two thirds below 16k, as in LongAlign-10k: a Pareto tail with exponent 1.5, truncated

SparseBalance (arXiv 2604.13847, section 5) states the ranges of the two data sets, not the densities within: these are
ours, uniform in the logarithm of the length inside a mode.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

__all__ = ["DISTRIBUTIONS", "LengthDistribution", "draw_lengths"]

LengthDistribution: TypeAlias = Literal["uniform", "bimodal", "long_tail"]
DISTRIBUTIONS: tuple[LengthDistribution, ...] = get_args(LengthDistribution)
LONGEST = 73_728
"""Tokens of the longest document of any distribution: 72 · 1024."""
TAIL = 1.5
"""Exponent of the long tail."""


def draw_lengths(
    distribution: LengthDistribution, count: int, generator: np.random.Generator, scale: float = 1.0
) -> np.ndarray:
    """(count,) int64 lengths in tokens, at least 1.

    Args:
        distribution: name of the distribution.
        count: number of documents.
        generator: source of randomness.
        scale: factor of all lengths, for small machines.
    """
    share = generator.random(count)
    if distribution == "uniform":
        lengths = 1024 + share * (32_768 - 1024)
    elif distribution == "bimodal":
        is_long = generator.random(count) < 0.5
        low, high = np.where(is_long, 16_384, 512), np.where(is_long, 32_768, 4096)
        lengths = low * (high / low) ** share
    else:
        least = (8192 / LONGEST) ** TAIL  # share of a Pareto tail beyond the longest
        lengths = 8192 * (1 - share * (1 - least)) ** (-1 / TAIL)
    return np.maximum(1, (scale * lengths).astype(np.int64))
