"""A run that grows: what its phases are, and that growth is exact, resumable and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields
from ranks import on_ranks

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.results import RunFolder
from workbench.training import RunConfig
from workbench.training.checkpoint import load_checkpoint, load_weights
from workbench.training.schedule import rate_at
from workbench.training.trial import train

pytestmark = pytest.mark.process

MakeRun = Callable[..., RunFolder]
GROWTH: dict[str, Any] = {"model": {"depth": 2}, "at": 0.4, "transforms": [{"kind": "stack"}]}
"""Of a run of 20 steps: two layers become four after step 8."""


def grown(**changes: Any) -> dict[str, Any]:
    return {"model": {"depth": 4}, "growth": {**GROWTH, **changes}}


def config_of(corpus: Path, **fields: Any) -> RunConfig:
    return RunConfig.parse(run_fields(corpus, **(fields or grown())))


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.metrics()]


def stop_after(step: int) -> Callable[[], bool]:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) == step


@pytest.fixture(scope="module")
def whole(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that grows, without interruption."""
    folder = make_run(tmp_path_factory.mktemp("whole") / "run", cache, run_fields(corpus, **grown()))
    train(folder.path, cache)
    return folder


def test_the_small_model_trains_first(whole: RunFolder, new: MakeRun, cache: Path) -> None:
    """Its losses are those of a run of the small model with the same schedule and data."""
    small = new("small", model={"depth": 2})
    train(small.path, cache)
    assert losses(whole)[:8] == losses(small)[:8] and losses(whole)[8] != losses(small)[8]


@pytest.mark.parametrize("step", [7, 8, 9])
def test_a_run_stopped_around_growth_resumes_bit_for_bit(
    step: int, whole: RunFolder, new: MakeRun, cache: Path
) -> None:
    resumed = new(**grown())
    train(resumed.path, cache, stop_after(step))
    train(resumed.path, cache)
    assert losses(resumed) == losses(whole)
    a, b = (load_checkpoint(run.path / "checkpoint" / "step-20") for run in (resumed, whole))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    for index, entry in b["optimiser"]["state"].items():
        assert all(torch.equal(value, a["optimiser"]["state"][index][key]) for key, value in entry.items())


def test_the_step_counts_of_copied_state_continue(whole: RunFolder) -> None:
    state = load_checkpoint(whole.path / "checkpoint" / "step-20")["optimiser"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {20.0}


def test_a_fresh_state_of_copies_starts_counting(new: MakeRun, cache: Path) -> None:
    folder = new(**grown(transforms=[{"kind": "stack", "optimiser": "reset_new"}]))
    train(folder.path, cache)
    state = load_checkpoint(folder.path / "checkpoint" / "step-20")["optimiser"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {12.0, 20.0}


def test_silent_copies_compute_the_same_loss_until_the_next_update(new: MakeRun, cache: Path) -> None:
    """The loss of the first step after growth is that of the small model's run; the next one is not."""
    small, large = (
        new("small", model={"depth": 2}),
        new("large", **grown(transforms=[{"kind": "stack", "new_out": "zero"}])),
    )
    for folder in (small, large):
        train(folder.path, cache)
    assert [a == b for a, b in zip(losses(small), losses(large))].index(False) == 9


def test_logged_flops_count_both_models(whole: RunFolder, corpus: Path) -> None:
    config = config_of(corpus)
    small, large = (account(phase.model, config.training.context).training_flops for phase in config.phases)
    tokens = config.training.tokens_per_step
    assert [row["flops"] for row in whole.metrics()][7:9] == [8 * small * tokens, (8 * small + large) * tokens]
    assert whole.metrics()[-1]["flops"] == config.training_flops == (8 * small + 12 * large) * tokens


def test_growth_is_an_event(whole: RunFolder, events: Callable[..., list[Any]]) -> None:
    assert [event["step"] for event in events(whole, "grown")] == [8]


def train_on_two(path: Path, cache: Path) -> None:
    train(path, cache, devices=2)


def test_two_ranks_grow_as_one_does(whole: RunFolder, new: MakeRun, cache: Path) -> None:
    two = new("two", **grown())
    on_ranks(2, train_on_two, two.path, cache)
    assert losses(two) == pytest.approx(losses(whole), rel=1e-4)


def test_width_grows(new: MakeRun, cache: Path) -> None:
    """The loss continues where it was, up to rounding."""
    model = {"mixers": {"full": {"head_dim": 16}}, "feedforwards": {"swiglu": {"hidden": 96}}}
    growth = {"model": {"width": 16, "feedforwards.swiglu.hidden": 48}, "at": 0.4, "transforms": [{"kind": "widen"}]}
    small = new("small", model={**model, "width": 16, "feedforwards": {"swiglu": {"hidden": 48}}})
    large = new("large", model=model, growth=growth)
    for folder in (small, large):
        train(folder.path, cache)
    assert losses(large)[8] == pytest.approx(losses(small)[8], rel=1e-5)


def test_the_rate_rises_again_where_asked(corpus: Path) -> None:
    growth = config_of(corpus, **grown(rewarm=0.2)).growth
    assert growth is not None
    assert [growth.rate_factor(step, 20) for step in (7, 8, 9, 10, 11, 12)] == [1.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_rewarmed_rate_is_logged(new: MakeRun, cache: Path) -> None:
    folder = new(**grown(rewarm=0.2))
    train(folder.path, cache)
    training = RunConfig.parse(folder.record().config).training
    expected = training.learning_rate * rate_at(8, training) * 0.25
    assert folder.metrics()[8]["learning_rate"] == pytest.approx(expected)


def test_no_growth_changes_no_identity(corpus: Path) -> None:
    plain = RunConfig.parse(run_fields(corpus))
    assert "growth" not in plain.canonical()
    assert plain.identity == RunConfig.parse({**run_fields(corpus), "growth": None}).identity


def test_the_time_of_growth_is_part_of_the_identity(corpus: Path) -> None:
    assert config_of(corpus, **grown(at=0.2)).identity != config_of(corpus, **grown(at=0.3)).identity


@pytest.mark.parametrize(("at", "step"), [(0.001, 1), (0.4, 8), (0.999, 19)])
def test_both_models_train(at: float, step: int, corpus: Path) -> None:
    assert [phase.last for phase in config_of(corpus, **grown(at=at)).phases] == [step, 20]


def test_a_small_model_that_cannot_be_built_is_named(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"growth.model.depht"):
        config_of(corpus, **grown(model={"depht": 2}))


def test_what_does_not_lead_to_the_large_model_is_refused() -> None:
    growth = {"model": {"width": 64}, "at": 0.2}
    with pytest.raises(ConfigError, match=r"growth.transforms: got .*layers.*widen, which repeats channels"):
        RunConfig.parse({"model": {"width": 128}, "growth": growth})


def test_a_large_model_that_is_no_multiple_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.depth: got 4; expected a multiple of the small model's 3"):
        config_of(corpus, **grown(model={"depth": 3}))


def test_a_transform_that_leaves_weights_out_does_not_grow(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"growth.transforms: got 'start_from'"):
        config_of(corpus, **grown(transforms=["start_from"]))


def test_a_checkpoint_before_growth_holds_the_small_model(new: MakeRun, cache: Path) -> None:
    folder = new(**grown())
    train(folder.path, cache, stop_after(8))
    assert "blocks.2.mixer.qkv.weight" not in load_weights(folder.path / "checkpoint" / "step-8")
