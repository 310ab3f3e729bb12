"""A longer horizon from a shorter run's trunk is the run that would have been trained from the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields

from workbench.config import ConfigError
from workbench.results import RunFolder
from workbench.training import RunConfig
from workbench.training.branch import branch, branched
from workbench.training.checkpoint import load_weights
from workbench.training.schedule import rate_at
from workbench.training.trial import train

pytestmark = pytest.mark.process

MakeRun = Callable[..., RunFolder]
TRUNK = {"keep_trunk": True, "warmup": 0.1, "checkpoint_every": 1000, "log_every": 3}


class TestBranch:
    """A run of 20 steps, whose last 6 decay, and a branch of 40 steps from its trunk."""

    @pytest.fixture(scope="class")
    def short(self, corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
        folder = make_run(tmp_path_factory.mktemp("short") / "run", cache, run_fields(corpus, training=TRUNK))
        train(folder.path, cache)
        return folder

    @pytest.fixture(scope="class")
    def long(self, short: RunFolder, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
        folder = branch(short.path, tmp_path_factory.mktemp("long") / "run", cache, 2 * 20 * 64)
        train(folder.path, cache)
        return folder

    @pytest.fixture(scope="class")
    def independent(self, long: RunFolder, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
        """The run of the branch, trained from its beginning."""
        config = RunConfig.parse(long.record().config)
        folder = make_run(tmp_path_factory.mktemp("independent") / "run", cache, config.plain(), seed=config.seed)
        train(folder.path, cache)
        return folder

    def test_the_trunk_is_kept_where_the_decay_begins(self, short: RunFolder) -> None:
        assert [path.name for path in (short.path / "trunk").iterdir()] == ["step-14"]

    def test_the_branch_names_its_origin(self, long: RunFolder) -> None:
        assert (long.record().branched_from or {})["checkpoint"] == "step-14"

    def test_the_branch_resumes_from_the_trunk(self, long: RunFolder, events: Callable[..., list[Any]]) -> None:
        assert [event["step"] for event in events(long, "resumed")] == [14]

    def test_the_branch_is_trained_to_its_own_end(self, long: RunFolder) -> None:
        assert long.result()["step"] == 40

    def test_its_weights_are_bitwise_those_of_an_independent_run(self, long: RunFolder, independent: RunFolder) -> None:
        a, b = (load_weights(run.path / "checkpoint" / "step-40") for run in (long, independent))
        assert all(torch.equal(a[name], b[name]) for name in b)

    def test_its_report_is_that_of_an_independent_run(self, long: RunFolder, independent: RunFolder) -> None:
        assert long.result()["report_value"] == independent.result()["report_value"]

    @pytest.mark.parametrize("step", [3, 30, 39])
    def test_its_losses_are_those_of_an_independent_run(
        self, step: int, long: RunFolder, independent: RunFolder
    ) -> None:
        losses = [[row["loss"] for row in run.metrics() if row["step"] == step] for run in (long, independent)]
        assert losses[0] == losses[1] != []

    def test_an_existing_branch_is_opened(self, short: RunFolder, long: RunFolder, cache: Path) -> None:
        assert branch(short.path, long.path, cache, 2 * 20 * 64).path == long.path

    def test_a_run_without_a_trunk_is_refused(self, new: MakeRun, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="without a trunk"):
            branch(new().path, tmp_path / "early", cache, 2000)


def config_of(**training: Any) -> RunConfig:
    return RunConfig.parse({"training": {"tokens": 100 * 2048, **training}})


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3.3])
def test_schedules_agree_on_the_trunk(factor: float) -> None:
    config = config_of(warmup=0.07)
    longer = branched(config, int(factor * 100) * 2048)
    assert longer.training.steps == int(factor * 100)
    assert all(rate_at(step, config.training) == rate_at(step, longer.training) for step in range(70))


def test_a_branch_that_decays_earlier_is_refused() -> None:
    with pytest.raises(ConfigError, match="first 70 steps"):
        branched(config_of(warmup=0.07), 50 * 2048)


def test_the_decay_of_a_branch_may_be_its_own() -> None:
    assert branched(config_of(), 100 * 2048, decay=0.1).training.trunk_steps == 90


def test_a_cosine_schedule_has_no_trunk() -> None:
    with pytest.raises(ConfigError, match="wsd schedule"):
        branched(config_of(schedule="cosine"), 400 * 2048)


def test_a_head_that_would_start_at_another_step_is_refused() -> None:
    late = RunConfig.parse({"model": {"mtp": {"start": 0.2}}, "training": {"tokens": 100 * 2048}})
    with pytest.raises(ConfigError, match=r"model.mtp.start: got 0.2"):
        branched(late, 200 * 2048)


def test_several_decays_share_a_trunk(corpus: Path) -> None:
    config = RunConfig.parse(run_fields(corpus, training=TRUNK))
    tokens, trunk = config.training.tokens, config.training.trunk_steps
    decays = [
        branched(config, tokens, decay_shape="sqrt"),
        branched(config, tokens, decay=0.1),
        branched(config, 2 * tokens),
    ]
    for other in decays:
        assert [rate_at(step, other.training) for step in range(trunk)] == [
            rate_at(step, config.training) for step in range(trunk)
        ]
    assert len({other.identity for other in (config, *decays)}) == 4


def test_a_head_that_trains_from_the_beginning_may_branch() -> None:
    early = RunConfig.parse({"model": {"mtp": {}}, "training": {"tokens": 100 * 2048}})
    assert branched(early, 200 * 2048).training.steps == 200


def with_experts(decay: float, bias: str = "proportional") -> RunConfig:
    return RunConfig.parse(
        {
            "model": {"feedforward": "moe", "feedforwards": {"moe": {"experts": 4, "top_k": 2, "bias": bias}}},
            "training": {"tokens": 200 * 2048, "decay": decay},
        }
    )


def test_a_router_bias_that_would_be_frozen_inside_the_trunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.decay: got .*0.02, .*router biases are frozen"):
        branched(with_experts(0.02), 400 * 2048)


@pytest.mark.parametrize(("decay", "bias"), [(0.02, "none"), (0.03, "proportional")])
def test_a_router_bias_that_is_not_frozen_inside_the_trunk_may_branch(decay: float, bias: str) -> None:
    assert branched(with_experts(decay, bias), 400 * 2048).training.steps == 400


def test_a_branch_grows_at_the_same_step() -> None:
    fields = {"model": {"depth": 4}, "growth": {"model": {"depth": 2}, "at": 0.2}, "training": {"tokens": 100 * 2048}}
    longer = branched(RunConfig.parse(fields), 300 * 2048)
    assert [phase.last for phase in longer.phases] == [20, 300]


def test_the_rate_of_a_branch_rises_again_over_as_many_steps() -> None:
    growth = {"model": {"depth": 2}, "at": 0.2, "rewarm": 0.1}
    config = RunConfig.parse({"model": {"depth": 4}, "growth": growth, "training": {"tokens": 140 * 2048}})
    longer = branched(config, 200 * 2048)  # (0.1 · 140 / 200) · 200 is a little more than 14
    assert config.growth is not None and longer.growth is not None
    assert config.growth.rising_steps(140) == longer.growth.rising_steps(200) == 14
    assert [longer.growth.rate_factor(step, 200) for step in range(98)] == [
        config.growth.rate_factor(step, 140) for step in range(98)
    ]


def test_a_branch_from_before_growth_is_refused() -> None:
    fields = {"model": {"depth": 4}, "growth": {"model": {"depth": 2}, "at": 0.9}, "training": {"tokens": 100 * 2048}}
    with pytest.raises(ConfigError, match=r"growth.at: got .*growth after step 90, inside the decay"):
        branched(RunConfig.parse(fields), 300 * 2048)
