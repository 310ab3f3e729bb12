"""A longer horizon from a shorter run's trunk is the run that would have been trained from the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_run, run_fields, write_corpus
from safetensors.torch import load_file

from workbench.config import ConfigError
from workbench.training import RunConfig
from workbench.training.branch import branch, branched
from workbench.training.schedule import rate_at
from workbench.training.trial import train


def test_a_branch_is_bitwise_the_run_of_its_own(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "corpus"), tmp_path / "cache"
    fields = run_fields(corpus, training={"keep_trunk": True, "warmup": 0.1, "checkpoint_every": 1000, "log_every": 3})
    short = make_run(tmp_path / "short", cache, fields)
    with pytest.raises(ConfigError, match="without a trunk"):
        branch(short.path, tmp_path / "early", cache, 2000)
    assert train(short.path, cache)["status"] == "done"
    assert [p.name for p in (short.path / "trunk").iterdir()] == ["step-14"]  # 20 steps, the last 6 decay

    long = branch(short.path, tmp_path / "long", cache, 2 * 20 * 64)
    assert branch(short.path, tmp_path / "long", cache, 2 * 20 * 64).path == long.path, "found again"
    told = train(long.path, cache)
    assert told["status"] == "done" and told["step"] == 40
    assert '"resumed"' in (long.path / "events.jsonl").read_text()
    config = RunConfig.parse(long.record().config)
    own = make_run(tmp_path / "own", cache, config.plain(), seed=config.seed)
    assert train(own.path, cache)["report_value"] == told["report_value"]
    one, two = (load_file(run.path / "checkpoint" / "step-40" / "model.safetensors") for run in (own, long))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["loss"] for row in long.metrics() if row["step"] in (3, 30, 39)] == [
        row["loss"] for row in own.metrics() if row["step"] in (3, 30, 39)
    ]
    assert (long.record().branched_from or {})["checkpoint"] == "step-14"


def test_schedules_agree_on_the_trunk_or_are_refused() -> None:
    config = RunConfig.parse({"training": {"tokens": 100 * 2048, "warmup": 0.07}})
    for factor in (1, 1.5, 2, 3.3):
        longer = branched(config, int(factor * 100) * 2048)
        assert all(rate_at(s, config.training) == rate_at(s, longer.training) for s in range(70))
        assert longer.training.steps == int(factor * 100)
    with pytest.raises(ConfigError, match="first 70 steps"):
        branched(config, 50 * 2048)
    assert branched(config, 100 * 2048, decay=0.1).training.trunk_steps == 90
    with pytest.raises(ConfigError, match="wsd schedule"):
        branched(RunConfig.parse({"training": {"tokens": 100 * 2048, "schedule": "cosine"}}), 400 * 2048)


def test_a_head_that_would_begin_at_another_step_is_refused() -> None:
    late = RunConfig.parse({"model": {"mtp": {"start": 0.2}}, "training": {"tokens": 100 * 2048}})
    with pytest.raises(ConfigError, match=r"model.mtp.start: got 0.2"):
        branched(late, 200 * 2048)
    early = RunConfig.parse({"model": {"mtp": {}}, "training": {"tokens": 100 * 2048}})
    assert branched(early, 200 * 2048).training.steps == 200


def test_a_router_bias_that_would_be_frozen_inside_the_trunk_is_refused() -> None:
    def run(decay: float, bias: str = "proportional") -> RunConfig:
        return RunConfig.parse(
            {
                "model": {"feedforward": "moe", "feedforwards": {"moe": {"experts": 4, "top_k": 2, "bias": bias}}},
                "training": {"tokens": 200 * 2048, "decay": decay},
            }
        )

    with pytest.raises(ConfigError, match=r"training.decay: got .*0.02, .*router biases are frozen"):
        branched(run(0.02), 400 * 2048)
    assert branched(run(0.02, "none"), 400 * 2048).training.steps == 400
    assert branched(run(0.03), 400 * 2048).training.steps == 400
