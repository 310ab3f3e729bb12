"""Documents to rows: no target lost, none twice, no leakage between documents."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data import IGNORE_INDEX, Batch, DataConfig, Documents, TrainingStream, evaluation_batches, prepare
from workbench.data.packing import DocumentStream


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    folder = tmp_path_factory.mktemp("text")
    corpus = {"kind": "files", "path": str(write_corpus(folder / "corpus", 12))}
    return prepare(DataConfig.parse({"corpus": corpus}), 300, folder / "cache").train


def stream(documents: Documents, **changes: Any) -> TrainingStream:
    return TrainingStream(documents, **{"context": 16, "seed": 7, **changes})


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def numbered_documents(seed: int) -> Documents:
    """Documents whose tokens are all different, so that a target is identified by its value."""
    generator = random.Random(seed)
    lengths = [generator.randint(2, 40) for _ in range(30)]
    return Documents(
        np.arange(sum(lengths)), np.concatenate(([0], np.cumsum(lengths))), np.ones(30, np.int64), np.arange(30)
    )


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 2])
def test_rows_are_a_function_of_their_number(documents: Documents, seed: int) -> None:
    one, other = stream(documents, seed=seed), stream(documents, seed=seed)
    count = 2 * one.rows_in_epoch + 2  # across an epoch's boundary
    in_order = [one.row(r) for r in range(count)]
    assert all(same(other.row(r), in_order[r]) for r in random.Random(0).sample(range(count), count))


def test_rows_leave_the_global_generators_alone(documents: Documents) -> None:
    def states() -> list[bytes]:
        numpy_state = np.random.get_state()[1].tobytes()  # type: ignore[index]
        return [bytes(torch.get_rng_state().tolist()), numpy_state, repr(random.getstate()).encode()]

    before = states()
    stream(documents).row(3)
    assert states() == before


def test_seeds_differ(documents: Documents) -> None:
    firsts = [stream(documents, seed=seed).row(0)[0] for seed in (-2, -1, 0, 1)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(firsts) for b in firsts[i + 1 :])


@pytest.mark.parametrize("context", [2, 7, 64])
def test_an_epoch_has_every_target_once(context: int) -> None:
    documents = numbered_documents(context)
    one = TrainingStream(documents, context=context, seed=3)
    total = int(documents.lengths.sum())
    for epoch in range(2):
        rows = range(epoch * one.rows_in_epoch, (epoch + 1) * one.rows_in_epoch)
        targets = [target for r in rows for target in one.row(r)[1].tolist()]
        assert len(set(targets)) == len(targets) == total - total % context


@pytest.mark.parametrize("context", [2, 7, 64])
def test_every_segment_is_a_piece_of_one_document(context: int) -> None:
    documents = numbered_documents(context)
    one = TrainingStream(documents, context=context, seed=3)
    for r in range(2 * one.rows_in_epoch):
        tokens, targets, segments, numbers = one.row(r)
        assert (targets == tokens + 1).all()
        for segment in np.unique(segments):
            piece, (number,) = tokens[segments == segment], np.unique(numbers[segments == segment])
            low, high = documents.offsets[number], documents.offsets[number + 1]
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
            assert low <= piece[0] < piece[-1] + 1 < high


@pytest.mark.parametrize("context", [2, 64])
def test_segment_lengths_are_those_of_the_row(context: int) -> None:
    one = TrainingStream(numbered_documents(context), context=context, seed=3)
    lengths = [one.segment_lengths(r) for r in range(9)]
    assert [int(row.sum()) for row in lengths] == [context] * 9


def test_a_context_longer_than_the_corpus(documents: Documents) -> None:
    with pytest.raises(ConfigError, match=r"training.context: got 1000000"):
        stream(documents, context=10**6)


@pytest.mark.parametrize(("batch_size", "context"), [(1, 5), (4, 16), (3, 1000)])
def test_evaluation_counts_every_target_once(batch_size: int, context: int) -> None:
    documents = numbered_documents(1)
    targets: Counter[int] = Counter()
    for batch in evaluation_batches(documents, batch_size=batch_size, context=context):
        targets.update(batch.targets_BT[batch.targets_BT >= 0].tolist())
    firsts = set(documents.offsets[:-1].tolist())
    assert targets == Counter(set(range(int(documents.offsets[-1]))) - firsts)


class Long:
    """Two examples of 40 and 10 tokens that must not be divided."""

    indivisible = True
    lengths = np.array([40, 10])

    def __len__(self) -> int:
        return 2

    def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(count, document), np.arange(first, first + count)


def test_rows_are_as_long_as_the_longest_indivisible_document() -> None:
    """Four rows of 16 tokens, or one of 40."""
    batches = list(evaluation_batches(Long(), batch_size=4, context=16))  # type: ignore[arg-type]
    assert [tuple(batch.tokens_BT.shape) for batch in batches] == [(1, 40), (1, 40)]
    assert [batch.targets_BT[0].max().item() for batch in batches] == [39, 9]


@pytest.fixture(scope="module")
def measured(documents: Documents) -> list[Batch]:
    return list(evaluation_batches(documents, batch_size=7, context=32))


def test_targets_of_evaluation_follow_their_tokens() -> None:
    for batch in evaluation_batches(numbered_documents(1), batch_size=4, context=16):
        real = batch.targets_BT >= 0
        assert torch.equal(batch.targets_BT[real], batch.tokens_BT[real] + 1)


def test_evaluation_batches_have_one_shape(measured: list[Batch]) -> None:
    assert {tuple(batch.tokens_BT.shape) for batch in measured} == {(7, 32)}


def test_padding_has_neither_target_nor_segment_nor_document(measured: list[Batch]) -> None:
    last = measured[-1]
    padded = last.documents_BT < 0
    assert padded.any()
    assert (last.targets_BT[padded] == IGNORE_INDEX).all()
    assert (last.segments_BT[padded] == -1).all()


def by_document(documents: Documents, seed: int = 7) -> DocumentStream:
    return DocumentStream(documents, buckets=(8, 16), seed=seed)


def test_an_epoch_of_rows_of_one_document_has_every_target_once() -> None:
    documents = numbered_documents(3)
    one = by_document(documents)
    found = [int(t) for r in range(one.rows_in_epoch) for t in one.row(r)[1] if t != IGNORE_INDEX]
    expected = [int(t) for d, n in enumerate(documents.lengths) for t in documents.piece(d, 0, int(n))[1]]
    assert sorted(found) == sorted(expected)


def test_a_row_of_one_document_has_the_length_of_its_bucket() -> None:
    one = by_document(numbered_documents(3))
    for r in range(one.rows_in_epoch):
        tokens, _, segments, _ = one.row(r)
        (count,) = one.segment_lengths(r)
        assert (segments >= 0).sum() == count
        assert len(tokens) == one.row_length(r) == (8 if count <= 8 else 16)


def test_a_batch_is_padded_to_its_longest_row() -> None:
    one = by_document(numbered_documents(3))
    short, long = (next(r for r in range(99) if one.row_length(r) == length) for length in (8, 16))
    batch = one.batch([short, long])
    assert batch.tokens_BT.shape == (2, 16)
    assert (batch.segments_BT[0, 8:] == -1).all() and (batch.targets_BT[0, 8:] == IGNORE_INDEX).all()
    assert one.batch([short, short]).tokens_BT.shape == (2, 8)


def test_rows_may_be_read_in_several_threads() -> None:
    one = stream(numbered_documents(3))
    rows = [r for _ in range(20) for r in (0, one.rows_in_epoch, 1, one.rows_in_epoch + 1)]
    expected = [one.row(r) for r in rows]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(one.row, rows), expected))
