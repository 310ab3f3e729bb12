"""The cache of rows: what new tokens may see, with and without a window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.layers import RowCache


def cache(length: int, keep: int | None = None) -> RowCache:
    return RowCache(1, length, [(), (2,)], "cpu", torch.float32, keep)


def rows(start: int, end: int) -> tuple[Tensor, Tensor]:
    """Rows of two tensors for positions ``start`` to ``end`` - 1."""
    positions_BT = torch.arange(start, end, dtype=torch.float32)[None]
    return positions_BT, positions_BT[..., None].expand(1, end - start, 2)


@pytest.mark.parametrize("cuts", [(3, 6), (1, 2, 6), (6,)])
def test_every_token_is_seen_without_a_window(cuts: tuple[int, ...]) -> None:
    full, start = cache(6), 0
    for end in cuts:
        seen = full.extend(*rows(start, end))
        assert all(torch.equal(x, y) for x, y in zip(seen, rows(0, end)))
        start = end
    assert full.length == 6


@pytest.mark.parametrize("end", [5, 6, 9])
def test_a_window_keeps_the_last_tokens(end: int) -> None:
    window = cache(10, keep=3)
    window.extend(*rows(0, 4))
    seen = window.extend(*rows(4, end))
    assert all(torch.equal(x, y) for x, y in zip(seen, rows(1, end)))
    assert window.rows[0].tolist() == [list(range(end - 3, end))]


def test_a_full_cache_refuses_further_tokens() -> None:
    full = cache(4)
    full.extend(*rows(0, 3))
    with pytest.raises(ValueError, match="got 5 tokens; expected at most 4"):
        full.extend(*rows(3, 5))


def test_every_allocated_tensor_is_accounted() -> None:
    assert [tuple(tensor.shape) for tensor in cache(9, keep=3).tensors()] == [(1, 3), (1, 3, 2)]
