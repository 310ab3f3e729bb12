"""The block index: summaries that grow with the cache, forced blocks, ragged ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.decoding.blocks import BlockIndex, MinMaxIndex, block_index
from workbench.decoding.policies.quest import Quest
from workbench.ops.sparse_decoding import Forced, tokens_of
from workbench.ops.sparse_decoding.torch import select

B, G, K, BLOCK, SUB, LENGTH = 2, 3, 4, 8, 4, 40


def index_of(kind: str) -> BlockIndex:
    fields = {"block": BLOCK, "tokens": 16, "block_index": kind, "sub_block": SUB, "sink": 0, "local": 1}
    view: Any = SimpleNamespace(H=2 * G, G=G, K=K, scale=1.0)
    return block_index(Quest.Config(**fields), (B, LENGTH, "cpu", torch.float64), view)  # type: ignore[arg-type]


def summaries(index: BlockIndex) -> list[Tensor]:
    return [index.upper, index.lower] if isinstance(index, MinMaxIndex) else [index.keys.means]  # type: ignore[attr-defined]


def expected(index: BlockIndex, k_SGK: Tensor) -> list[Tensor]:
    """(G, N, K) of one sequence, block by block."""
    parts = k_SGK.split(BLOCK if isinstance(index, MinMaxIndex) else SUB)
    if isinstance(index, MinMaxIndex):
        return [torch.stack([part.amax(0) for part in parts], 1), torch.stack([part.amin(0) for part in parts], 1)]
    return [torch.stack([part.mean(0) for part in parts], 1)]


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("pieces", [[1] * 21, [21], [5, 1, 1, 9, 5], [8, 13], [1, 20], [7, 2, 1, 1, 10]])
def test_summaries_do_not_depend_on_how_tokens_come(kind: str, pieces: list[int]) -> None:
    index, k_BTGK = index_of(kind), torch.randn(B, 21, G, K, dtype=torch.float64)
    for tensor in index.tensors():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    start_B = torch.zeros(B, dtype=torch.int64)
    for piece in k_BTGK.split(pieces, dim=1):
        index.append(piece, start_B)
        start_B = start_B + piece.shape[1]
    for b in range(B):
        for table, values in zip(summaries(index), expected(index, k_BTGK[b])):
            torch.testing.assert_close(table[b, :, : values.shape[1]], values, rtol=1e-13, atol=1e-13)


def config(**fields: Any) -> Any:
    return Quest.Config(**{"block": 4, "tokens": 16, "sink": 0, "local": 1, **fields})


def chosen(scores: Tensor, length: int, count: int, sink: int = 0, local: int = 1) -> list[int]:
    """Of blocks of 4 tokens."""
    return select(scores, torch.tensor([length]), count, Forced(sink, local), 4)[0, 0].tolist()


def test_the_best_blocks_are_chosen_beside_the_newest() -> None:
    scores = torch.tensor([[[0.1, 5.0, 0.2, 4.0, 3.0, -1.0, 9.0]]])
    assert chosen(scores, 22, 3) == [1, 3, 5]  # block 5 has two tokens, block 6 none


def test_blocks_of_first_and_newest_tokens_are_forced() -> None:
    scores = torch.arange(7.0).flip(0)[None, None]
    # the first 5 tokens lie in blocks 0 and 1; the newest 4 of 22 in blocks 4 and 5
    assert chosen(scores, 22, 4, sink=5, local=4) == [0, 1, 4, 5]


def test_a_short_sequence_has_fewer_blocks() -> None:
    assert chosen(torch.zeros(1, 1, 7), 6, 4) == [0, 1, -1, -1]


def test_of_equal_scores_the_first_are_chosen() -> None:
    assert chosen(torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]]]), 24, 4) == [0, 1, 3, 5]


def test_scores_of_blocks_without_tokens_may_be_anything() -> None:
    assert chosen(torch.tensor([[[1.0, 2.0, torch.nan, torch.inf]]]), 8, 2) == [0, 1]


def test_tokens_of_a_ragged_block_end_with_the_sequence() -> None:
    tokens = tokens_of(torch.tensor([[[5, -1, 0]]]), 4, torch.tensor([22]))
    assert tokens[0, 0].tolist() == [20, 21, -1, -1, -1, -1, -1, -1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 18}, "tokens: got 18; expected a multiple of block=4"),
        ({"sink": 9, "local": 6}, r"tokens: got 16; expected at least 24, the blocks that overlap sink=9 and local=6"),
        ({"block_index": "mean", "sub_block": 3}, "sub_block: got 3; expected a divisor of block=4"),
        ({"block_index": "max"}, "block_index"),
        ({"local": 0}, "local"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)
