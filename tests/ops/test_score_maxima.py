"""The largest score of every head equals that of all scores at once."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.ops.attention import maxima, score_maxima
from workbench.ops.attention.reference import visible


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tile", [3, 64])
def test_tiles_equal_all_scores(window: int | None, packed: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxima, "MIN_TILE", tile)
    monkeypatch.setattr(maxima, "TILE_NUMBERS", 1)
    B, T, H, G, K = 2, 13, 4, 2, 8
    q_BTHK, k_BTGK = torch.randn(B, T, H, K), torch.randn(B, T, G, K)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 4, [3] * 13]) if packed else None
    mask_BTS = visible(T, T, window=window, device=q_BTHK.device).expand(B, T, T)
    if segments is not None:
        mask_BTS = mask_BTS & (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] >= 0)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTGK.repeat_interleave(2, 2)) / math.sqrt(K)
    expected_H = scores_BHTS.masked_fill(~mask_BTS[:, None], -math.inf).amax((0, 2, 3))
    torch.testing.assert_close(score_maxima(q_BTHK, k_BTGK, window=window, segments=segments), expected_H)


def test_scores_of_padding_do_not_count() -> None:
    q_BTHK = torch.ones(1, 4, 1, 2)
    assert score_maxima(q_BTHK, q_BTHK, segments=torch.full((1, 4), -1)).item() == -math.inf


def test_no_gradient() -> None:
    q_BTHK = torch.randn(1, 4, 1, 2, requires_grad=True)
    assert not score_maxima(q_BTHK, q_BTHK, scale=1.0).requires_grad
