"""The loader resumes at any micro-batch; its background thread changes nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import run_fields, write_corpus

from workbench.data import Batch, StepLoader, TrainingStream, batch_plans, prepare
from workbench.training import RunConfig


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TrainingStream:
    folder = tmp_path_factory.mktemp("ranks")
    config = RunConfig.parse(run_fields(write_corpus(folder / "corpus")))
    data = prepare(config.data, 300, folder / "cache")
    return TrainingStream(data.train, context=32, seed=5)


def loader(stream: TrainingStream, rank: int = 0, world: int = 1) -> StepLoader:
    plan = batch_plans["contiguous"](batch_plans.parse("contiguous"), None)
    return StepLoader(stream, plan, batch_size=8, accumulate=3, steps=3, rank=rank, world=world)


def batches(stream: TrainingStream) -> list[Batch]:
    """The micro-batches of one rank, read without a loader."""
    return [stream.batch(range(8 * k, 8 * k + 8)) for k in range(9)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_ranks_together_have_the_batch_of_one(stream: TrainingStream, world: int) -> None:
    ranks = [list(loader(stream, rank, world)) for rank in range(world)]
    joined = [Batch(*map(torch.cat, zip(*shares))) for shares in zip(*ranks)]
    assert all(same(a, b) for a, b in zip(joined, batches(stream), strict=True))


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_loader_resumes_at_any_micro_batch(stream: TrainingStream, stop: int) -> None:
    first, second = loader(stream), loader(stream)
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(second, batches(stream)[stop:], strict=True))


def test_the_state_is_the_number_of_micro_batches_handed_out(stream: TrainingStream) -> None:
    one = loader(stream)
    next(iter(one))
    assert one.state_dict() == {"position": 1}


def threads() -> int:
    return sum(thread.name.startswith("batches") for thread in threading.enumerate())


def test_the_thread_ends_with_the_iteration(stream: TrainingStream) -> None:
    iterator = iter(loader(stream))
    next(iterator)
    assert threads() == 1
    iterator.close()  # type: ignore[attr-defined]
    assert threads() == 0


def test_an_error_in_the_thread_reaches_the_caller(stream: TrainingStream, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(stream, "batch", broken)
    with pytest.raises(OSError, match="the disk went away"):
        next(iter(loader(stream)))
