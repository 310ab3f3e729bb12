"""The cache of rows: what new tokens may see, with and without a window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.layers import RowCache


def cache(length: int, window: int | None = None, batch: int = 1) -> RowCache:
    return RowCache(batch, length, [(), (2,)], "cpu", torch.float32, window)


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
    window = cache(10, window=3)
    window.extend(*rows(0, 4))
    seen = window.extend(*rows(4, end))
    assert all(torch.equal(x, y) for x, y in zip(seen, rows(2, end)))
    assert sorted(window.rows[0][0].tolist()) == list(range(end - 3, end))


def test_steps_append_at_positions_of_their_own() -> None:
    full = cache(6, batch=2)
    full.step_from(torch.tensor([1, 4]))
    lengths_B = full.append(torch.tensor([[7.0], [8.0]]), torch.zeros(2, 1, 2))
    assert lengths_B.tolist() == [2, 5]
    assert full.rows[0][0, 1] == 7 and full.rows[0][1, 4] == 8


def test_steps_in_a_window_replace_the_oldest_token() -> None:
    window = cache(10, window=3)
    window.extend(*rows(0, 4))
    window.step_from(torch.tensor([4]))
    lengths_B = window.append(*rows(4, 5))
    assert lengths_B.tolist() == [3] and sorted(window.rows[0][0].tolist()) == [2, 3, 4]


def test_a_part_shares_the_memory_of_its_sequences() -> None:
    full = cache(6, batch=3)
    part = full.part(1, 2)
    part.extend(*rows(0, 4))
    assert full.rows[0][1, :4].tolist() == [0, 1, 2, 3] and part.length == 4 and full.length == 0


def test_a_full_cache_refuses_further_tokens() -> None:
    full = cache(4)
    full.extend(*rows(0, 3))
    with pytest.raises(ValueError, match="got 5 tokens; expected at most 4"):
        full.extend(*rows(3, 5))


def test_every_allocated_tensor_is_accounted() -> None:
    assert [tuple(tensor.shape) for tensor in cache(9, window=3).tensors()] == [(1, 3), (1, 3, 2)]
