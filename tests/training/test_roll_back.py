"""Windows that are rolled back: arithmetic on a small model, planted faults in runs, resume, ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields
from ranks import on_ranks

from workbench.config import ConfigError
from workbench.model import LanguageModel
from workbench.optimisers import AVERAGE
from workbench.results import RunFolder
from workbench.training.checkpoint import latest, load_checkpoint
from workbench.training.config import RunConfig
from workbench.training.roll_back import RollBack
from workbench.training.trial import train

MakeRun = Callable[..., RunFolder]
ROLL_BACK = [{"kind": "ratio", "factor": 50.0, "action": "roll_back"}]


class Trained:
    """A linear map trained with AdamW; rejected steps are skipped."""

    def __init__(self, window: int):
        self.model = torch.nn.Linear(3, 2)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.roll_back = RollBack(self.model, self.optimiser, window, torch.device("cpu"))
        self.weights: dict[int, torch.Tensor] = {}
        self.moments: dict[int, torch.Tensor] = {}
        self.undone: dict[int, float] = {}

    def run(self, steps: range, rejected: set[int] = frozenset(), last: int = 0) -> None:  # type: ignore[assignment]
        for step in steps:
            if step not in rejected:
                self.model.weight.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
                self.optimiser.step()
            flag = torch.tensor(float(step in rejected))
            undone = self.roll_back.end_step(step, flag, is_last=step == last)
            if undone is not None:
                self.undone[step] = float(undone)
            self.weights[step] = self.model.weight.detach().clone()
            self.moments[step] = self.optimiser.state[self.model.weight]["exp_avg_sq"].clone()

    def is_at(self, step: int, like: int) -> bool:
        return torch.equal(self.weights[step], self.weights[like]) and torch.equal(
            self.moments[step], self.moments[like]
        )


def test_windows_without_a_rejection_stay() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 13))
    assert trained.undone == {4: 0, 8: 0, 12: 0}
    assert not trained.is_at(12, like=8)


def test_a_rejection_returns_to_the_end_of_the_window_before_the_last() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 17), rejected={14})
    assert trained.undone == {4: 0, 8: 0, 12: 0, 16: 8}
    assert trained.is_at(16, like=8)


def test_a_rejection_in_the_first_window_returns_to_the_first_step() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 5), rejected={3})
    assert trained.undone == {4: 3} and trained.is_at(4, like=1)


def test_the_last_window_may_be_shorter() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 15), rejected={14}, last=14)
    assert trained.undone[14] == 6 and trained.is_at(14, like=8)


def test_a_window_ends_once() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 5))
    assert trained.roll_back.end_step(4, torch.zeros(()), is_last=True) is None, "as where a model grows after step 4"


def test_steps_are_undone_once() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 21), rejected={14, 18})
    assert (trained.undone[16], trained.undone[20]) == (8, 4)
    assert trained.is_at(20, like=8)


def test_training_goes_on_after_a_return() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 29), rejected={14})
    assert not trained.is_at(20, like=16)
    assert trained.undone[28] == 0


def test_a_return_after_new_windows_is_to_these() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 29), rejected={14, 26})
    assert trained.undone[28] == 8 and trained.is_at(28, like=20)


def test_a_parameter_without_a_state_in_the_copy_gets_an_untrained_one() -> None:
    trained = Trained(window=4)
    trained.run(range(1, 13))
    trained.model.bias.grad = torch.ones(2)
    trained.optimiser.step()
    trained.optimiser.state[trained.model.bias][AVERAGE] = torch.full((2,), 5.0)
    before = trained.roll_back.older["bias", ""].clone()
    trained.run(range(13, 17), rejected={14})
    entry = trained.optimiser.state[trained.model.bias]
    assert torch.equal(entry["exp_avg"], torch.zeros(2)) and float(entry["step"]) == 0
    assert torch.equal(entry[AVERAGE], before) and torch.equal(trained.model.bias, before)


def test_a_loaded_state_continues_inside_a_window() -> None:
    whole, parts = Trained(window=4), Trained(window=4)
    parts.model.load_state_dict(whole.model.state_dict())
    whole.run(range(1, 17), rejected={14})
    parts.run(range(1, 16), rejected={14})
    resumed = Trained(window=4)
    resumed.model.load_state_dict(parts.model.state_dict())
    resumed.optimiser.load_state_dict(parts.optimiser.state_dict())
    resumed.roll_back.load_state_dict(parts.roll_back.state_dict())
    resumed.run(range(16, 17))
    assert torch.equal(resumed.weights[16], whole.weights[16])
    assert resumed.undone == {16: 8}


def test_transforms_during_training_are_refused() -> None:
    training = {"guards": ROLL_BACK, "transforms": [{"kind": "wisca", "every": 10}]}
    with pytest.raises(ConfigError, match=r"training.guards: got .action roll_back with transforms"):
        RunConfig.parse({"training": training})


def plant(faults: dict[int, float], rank: int | None = None) -> None:
    """Multiply the loss of the n-th forward pass by ``faults[n]``, in this process."""
    import os

    loss, calls = LanguageModel.loss, iter(range(1, 10_000))

    def spoilt(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        factor = faults.get(next(calls), 1.0)
        here = rank is None or int(os.environ.get("RANK", "0")) == rank
        return loss(self, *args, **kwargs) * (factor if here else 1.0)

    LanguageModel.loss = spoilt  # type: ignore[method-assign]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    loss = LanguageModel.loss

    def replace(planted: dict[int, float]) -> None:
        monkeypatch.setattr(LanguageModel, "loss", loss)
        plant(planted)

    return replace


def state(folder: RunFolder) -> dict[str, Any]:
    path, _ = latest(folder.path / "checkpoint")
    assert path is not None
    saved = load_checkpoint(path)
    saved.pop("seconds")
    return saved


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second", "flops_per_second", "memory_bytes")
    return [{name: value for name, value in row.items() if name not in timed} for row in folder.metrics()]


@pytest.mark.process
class TestRun:
    """Runs of 20 steps in windows of 5, whose seventh step has a fault."""

    TRAINING = {"guards": ROLL_BACK, "roll_back_window": 5, "log_every": 5}

    @pytest.mark.parametrize("fault", [1e6, float("nan")])
    def test_a_fault_is_rolled_back_counted_and_named(
        self, fault: float, new: MakeRun, cache: Path, faults: Callable[..., None]
    ) -> None:
        faults({7: fault})
        folder = new(training=self.TRAINING)
        result = train(folder.path, cache)
        assert result["status"] == "done"
        assert result["reason"] == "guards skipped 1 of 20 steps; guards rolled back 1 time, undoing 9 steps"
        rows = folder.metrics()
        assert [row["rolled_back"] for row in rows] == [0, 1, 1, 1]
        assert [row["rejected"] for row in rows] == [{}, {"ratio": [7]}, {}, {}]

    def test_resumed_inside_a_window_it_ends_with_the_same_bits(
        self, new: MakeRun, cache: Path, faults: Callable[..., None]
    ) -> None:
        from training.test_resume import assert_same_bits, stop_after

        whole, parts = (new(name, training=self.TRAINING) for name in ("whole", "parts"))
        faults({7: 1e6})
        train(whole.path, cache)
        faults({7: 1e6})
        assert train(parts.path, cache, stop_after(8))["status"] == "interrupted"
        faults({})
        train(parts.path, cache)
        assert_same_bits(state(parts), state(whole))
        assert lines(parts) == lines(whole)


def faulty_run(folder: Path, cache: Path, faults: dict[int, float]) -> dict[str, Any]:
    """Train on two ranks with a fault on the second; called on both."""
    plant(faults, rank=1)
    return train(folder, cache, devices=2)


@pytest.mark.process
def test_two_ranks_decide_alike(corpus: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus, training={**TestRun.TRAINING, "batch_size": 2, "checkpoint_every": 8})
    one, two = (make_run(tmp_path / name / "run", tmp_path / "cache", fields) for name in ("one", "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "loss", LanguageModel.loss)
        plant({7: float("nan")})
        train(one.path, tmp_path / "cache")
    results = on_ranks(2, partial(faulty_run, faults={7: float("nan")}), two.path, tmp_path / "cache")
    assert results[0]["status"] == "done"
    assert [row["rejected"] for row in two.metrics()] == [row["rejected"] for row in one.metrics()]
    assert two.result()["reason"] == one.result()["reason"]
    weights, expected = state(two)["model"], state(one)["model"]
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, rtol=1e-3, atol=1e-4), name
    copies, of_one = state(two)["roll_back"]["copies"], state(one)["roll_back"]["copies"]
    assert [[entry[:2] for entry in copy] for copy in copies] == [[entry[:2] for entry in copy] for copy in of_one]
