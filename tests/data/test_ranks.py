"""Ranks share every batch; the loader's background thread changes nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import run_fields, write_corpus

from workbench.data import StepLoader, TrainingStream, evaluation_batches, prepare
from workbench.training import RunConfig


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TrainingStream:
    folder = tmp_path_factory.mktemp("ranks")
    config = RunConfig.parse(run_fields(write_corpus(folder / "corpus")))
    data = prepare(config.data, 300, folder / "cache")
    return TrainingStream(data.train, batch_size=8, context=32, seed=5)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_ranks_together_have_the_batch_of_one(stream: TrainingStream, world: int) -> None:
    for k in (0, 3, 17):
        whole = stream.batch(k)
        shares = [stream.batch(k, rank, world) for rank in range(world)]
        for part, *pieces in zip(whole, *shares):
            assert torch.equal(part, torch.cat(pieces))


def test_a_loader_resumes_at_any_step_whatever_it_had_prepared(stream: TrainingStream) -> None:
    wanted = [stream.batch(k) for k in range(9)]
    for stop in range(1, 9):
        loader = StepLoader(stream, 9)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = loader.state_dict()
        assert state == {"position": stop}
        again = StepLoader(stream, 9)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == 9 - stop
        for got, exact in zip(rest, wanted[stop:]):
            assert all(torch.equal(a, b) for a, b in zip(got, exact))


def test_the_thread_ends_with_the_iteration_and_hands_its_errors_on(
    stream: TrainingStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads() -> int:
        return sum(thread.name.startswith("batches") for thread in threading.enumerate())

    iterator = iter(StepLoader(stream, 9))
    next(iterator)
    assert threads() == 1
    iterator.close()  # type: ignore[attr-defined]
    assert threads() == 0

    def broken(*args: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(stream, "batch", broken)
    with pytest.raises(OSError, match="the disk went away"):
        next(iter(StepLoader(stream, 9)))


def test_evaluation_batches_have_one_shape(stream: TrainingStream) -> None:
    batches = list(evaluation_batches(stream.documents, batch_size=7, context=32))
    assert {tuple(batch.tokens_BT.shape) for batch in batches} == {(7, 32)}
    targets = sum(int((batch.targets_BT >= 0).sum()) for batch in batches)
    assert targets == int(stream.lengths.sum())
    last = batches[-1]
    nothing = last.documents_BT < 0
    assert (last.targets_BT[nothing] == -100).all() and (last.segments_BT[nothing] == -1).all()
