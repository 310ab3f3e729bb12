"""Several processes for one run: the numbers of one process up to rounding; checkpoints for any number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields
from ranks import on_ranks

from workbench.config import ConfigError
from workbench.files import write_json
from workbench.results import RunFolder
from workbench.training import health
from workbench.training.checkpoint import load_checkpoint
from workbench.training.trial import train

pytestmark = pytest.mark.process

SEED = 3

FIELDS = {
    # the multi-token head starts after the step from which runs are resumed below
    "model": {
        "pattern": "full gdn",
        "tied": False,
        "shortcut": "moe",
        "feedforwards": {
            "moe": {"experts": 4, "zero_experts": 2, "top_k": 3, "bias": "proportional", "renormalise": False}
        },
        "hidden_z": 1e-4,
        "mtp": {"start": 0.7},
        "embedding": {"kind": "ngram", "size": 2},
    },
    "training": {
        "tokens": 24 * 4 * 32,
        "batch_size": 4,
        "checkpoint_every": 8,
        "guards": [{"kind": "ratio", "factor": 100.0}],
        "ema": {"decay": 0.9},
        "qk_clip": {"threshold": 0.5, "missing": "skip"},
    },
}


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("one"), corpus, 1)


@pytest.fixture(scope="module")
def four(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("four"), corpus, 4)


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Trained by the command line, as a user would."""
    path = tmp_path_factory.mktemp("two")
    write_json(path / "run.yaml", {**run_fields(corpus, **FIELDS), "seed": SEED})  # JSON is YAML
    done = command_line("train", path / "run.yaml", "--folder", path / "run", "--devices", 2, "--stage", "confirmation")
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(path / "run")


@pytest.fixture(scope="module")
def one_then_two(one: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return resumed(one, tmp_path_factory.mktemp("one_then_two"), 2)


@pytest.fixture(scope="module")
def four_then_one(four: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return resumed(four, tmp_path_factory.mktemp("four_then_one"), 1)


def command_line(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    call = [sys.executable, "-m", "workbench", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, env=environment, check=False, timeout=500)


def trained(path: Path, corpus: Path, devices: int) -> RunFolder:
    """A run in ``path``, trained to its end."""
    folder = make_run(path / "run", path / "cache", run_fields(corpus, **FIELDS), seed=SEED)
    return finished(folder, devices)


def finished(folder: RunFolder, devices: int) -> RunFolder:
    cache = folder.path.parent / "cache"
    if devices == 1:
        result = train(folder.path, cache)
    else:
        result, *_ = on_ranks(devices, partial(train, devices=devices), folder.path, cache)
    assert result["status"] == "done", result
    return folder


def resumed(older: RunFolder, path: Path, devices: int) -> RunFolder:
    """A copy of a run, resumed from step 16."""
    folder = RunFolder(shutil.copytree(older.path, path / "run"))
    shutil.copytree(older.path.parent / "cache", path / "cache")
    shutil.rmtree(folder.path / "checkpoint" / "step-24")
    (folder.path / "result.json").unlink()
    return finished(folder, devices)


@pytest.fixture(params=["two", "four", "one_then_two", "four_then_one"])
def run(request: pytest.FixtureRequest) -> RunFolder:
    """A run on several ranks, or resumed with another number of ranks."""
    return request.getfixturevalue(request.param)


def last_state(run: RunFolder) -> dict[str, Any]:
    return load_checkpoint(run.path / "checkpoint" / "step-24")


def test_the_first_gradient_is_that_of_one_process(run: RunFolder, one: RunFolder) -> None:
    first, exact = run.metrics()[0], one.metrics()[0]
    assert first["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("step", 0), ("loss", 1e-4), ("hidden_z_excess", 1e-3), ("gradient_rms_median", 1e-2)]
)
def test_every_line_of_the_log_is_that_of_one_process(
    name: str, tolerance: float, run: RunFolder, one: RunFolder
) -> None:
    wanted = [row[name] for row in one.metrics()]
    assert [row[name] for row in run.metrics()] == pytest.approx(wanted, rel=tolerance)


def test_lines_of_the_log_have_the_same_fields_beside_times_of_ranks(run: RunFolder, one: RunFolder) -> None:
    of_ranks = {"step_seconds", "rank_imbalance", "ranks"}
    assert [row.keys() - of_ranks for row in run.metrics()] == [row.keys() for row in one.metrics()]


def test_the_report_is_that_of_one_process(run: RunFolder, one: RunFolder) -> None:
    assert run.result()["report_value"] == pytest.approx(one.result()["report_value"], rel=1e-4)


def test_weights_are_those_of_one_process(run: RunFolder, one: RunFolder) -> None:
    weights, exact = last_state(run)["model"], last_state(one)["model"]
    assert list(weights) == list(exact)
    for name, tensor in exact.items():
        assert float((weights[name] - tensor).norm() / tensor.norm()) < 1e-3, name


def test_the_optimiser_state_has_the_form_of_one_process(run: RunFolder, one: RunFolder) -> None:
    state, exact = last_state(run)["optimiser"], last_state(one)["optimiser"]
    assert state["state"].keys() == exact["state"].keys()
    assert [group["params"] for group in state["param_groups"]] == [group["params"] for group in exact["param_groups"]]
    for number, moments in exact["state"].items():
        assert state["state"][number]["step"] == moments["step"]
        assert state["state"][number]["exp_avg"].shape == moments["exp_avg"].shape


def test_the_loader_and_skipped_steps_are_those_of_one_process(run: RunFolder, one: RunFolder) -> None:
    state, exact = last_state(run), last_state(one)
    assert state["loader"] == exact["loader"]
    counters, expected = (saved["health"]["state"][health.FIELDS.index("skipped") :] for saved in (state, exact))
    assert torch.equal(counters, expected)


@pytest.mark.parametrize(("name", "devices"), [("one_then_two", 2), ("four_then_one", 1)])
def test_a_run_resumes_with_another_number_of_ranks(
    name: str, devices: int, request: pytest.FixtureRequest, events: Callable[..., list[Any]]
) -> None:
    (event,) = events(request.getfixturevalue(name), "resumed")
    assert (event["step"], event["devices"]) == (16, devices)


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus, **FIELDS))
    with pytest.raises(ConfigError, match=r"training.batch_size: got 4; expected a multiple of the 3 devices"):
        train(folder.path, tmp_path / "cache", devices=3)
    assert not (folder.path / "status.json").exists()
