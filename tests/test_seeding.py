"""Derived random numbers depend on a seed and names alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.seeding import counter_generator, derived_seed, generator


def test_the_derivation_is_fixed() -> None:
    """Initial weights depend on it: a change is a change of every run."""
    assert derived_seed(0, "embedding.weight") == 768630630169380073


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ()])
def test_names_and_seed_repeat(names: tuple[str, ...]) -> None:
    a, b = (torch.rand(3, generator=generator(7, *names)) for _ in range(2))
    assert torch.equal(a, b)


def test_another_name_is_another_stream() -> None:
    assert len({derived_seed(0, "a"), derived_seed(0, "b"), derived_seed(1, "a"), derived_seed(0, "a", "b")}) == 4


def test_entries_of_a_stream_do_not_depend_on_earlier_ones() -> None:
    fifth = counter_generator(3, 1, 5).random(4)
    counter_generator(3, 1, 4).random(4)
    assert np.array_equal(counter_generator(3, 1, 5).random(4), fifth)


@pytest.mark.parametrize("seed", [-1, 2**64 - 2])
def test_any_seed_of_64_bits_is_valid(seed: int) -> None:
    assert 0 <= counter_generator(seed, 0).random() < 1
