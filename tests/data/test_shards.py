"""Shards hold what one array holds."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from workbench.data.shards import ShardWriter, Tokens

GENERATOR = random.Random(0)
DOCUMENTS = [np.arange(GENERATOR.randint(2, 40)) for _ in range(30)]
LONGEST = max(map(len, DOCUMENTS))


def written(folder: Path, shard_tokens: int, vocabulary: int = 300) -> Tokens:
    writer = ShardWriter(folder, "train", vocabulary, shard_tokens)
    for document in DOCUMENTS:
        writer.add(document)
    writer.flush()
    return Tokens([folder / file for file in writer.files])


@pytest.mark.parametrize("shard_tokens", [1, LONGEST - 1, 3 * LONGEST])
def test_shards_hold_every_token_in_order(tmp_path: Path, shard_tokens: int) -> None:
    tokens = written(tmp_path, shard_tokens)
    assert np.array_equal(np.concatenate(tokens.shards), np.concatenate(DOCUMENTS))


@pytest.mark.parametrize("shard_tokens", [1, LONGEST - 1, 3 * LONGEST])
def test_a_document_is_read_from_its_shard(tmp_path: Path, shard_tokens: int) -> None:
    tokens = written(tmp_path, shard_tokens)
    offsets = np.cumsum([0, *map(len, DOCUMENTS)]).tolist()
    assert all(np.array_equal(tokens[a:b], d) for a, b, d in zip(offsets, offsets[1:], DOCUMENTS))


@pytest.mark.parametrize("shard_tokens", [1, LONGEST - 1, 3 * LONGEST])
def test_only_a_longer_document_exceeds_the_size_of_a_shard(tmp_path: Path, shard_tokens: int) -> None:
    assert all(len(shard) <= max(shard_tokens, LONGEST) for shard in written(tmp_path, shard_tokens).shards)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_token_ids_take_two_or_four_bytes(tmp_path: Path, vocabulary: int, dtype: type) -> None:
    assert written(tmp_path, 100, vocabulary).shards[0].dtype == dtype
