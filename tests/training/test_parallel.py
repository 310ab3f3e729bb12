"""Several processes for one run: the numbers of one process up to rounding; checkpoints for any number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields

from workbench.files import write_json
from workbench.results import RunFolder
from workbench.training.checkpoint import load_checkpoint
from workbench.training.trial import train

pytestmark = pytest.mark.process

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
    "training": {"tokens": 24 * 4 * 32, "batch_size": 4, "checkpoint_every": 8, "spike_factor": 100.0},
}


UNEQUAL = {
    # rows of 1 to 12 targets, of which the short ones end with padding
    "model": {
        "pattern": "gdn",
        "feedforward": "moe",
        "feedforwards": {"moe": {"experts": 4, "bias": "proportional", "balance_weight": 0.1, "z_weight": 1e-2}},
        "hidden_z": 1e-3,
    },
    "training": {"tokens": 4 * 8 * 56, "batch_size": 4, "accumulate": 2, "context": 56},
}
MIXES = [{"length": 48, "pairs": 1}, {"length": 48, "pairs": 12}, {"length": 20, "pairs": 5}]


def trained(folder: Path, corpus: Path, devices: int, fields: dict[str, Any] | None = None) -> RunFolder:
    """A run trained by the command line, as a user would."""
    write_json(folder.parent / "run.yaml", fields or run_fields(corpus, **FIELDS))  # JSON is YAML
    call = [
        sys.executable,
        "-m",
        "workbench",
        "train",
        str(folder.parent / "run.yaml"),
        "--folder",
        str(folder),
        "--devices",
        str(devices),
        "--stage",
        "confirmation",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(folder)


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("one") / "run", corpus, 1)


@pytest.fixture(scope="module")
def four(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("four") / "run", corpus, 4)


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("two") / "run", corpus, 2)


@pytest.fixture(scope="module")
def one_then_two(one: RunFolder, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return resumed(one, tmp_path_factory.mktemp("one_then_two"), corpus, 2)


@pytest.fixture(scope="module")
def four_then_one(four: RunFolder, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return resumed(four, tmp_path_factory.mktemp("four_then_one"), corpus, 1)


def resumed(older: RunFolder, path: Path, corpus: Path, devices: int) -> RunFolder:
    """A copy of a run, resumed from step 16."""
    folder = Path(shutil.copytree(older.path, path / "run"))
    shutil.copytree(older.path.parent / "cache", path / "cache")
    shutil.rmtree(folder / "checkpoint" / "step-24")
    (folder / "result.json").unlink()
    return trained(folder, corpus, devices)


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


def test_lines_of_the_log_have_the_same_fields(run: RunFolder, one: RunFolder) -> None:
    assert [row.keys() for row in run.metrics()] == [row.keys() for row in one.metrics()]


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
    assert torch.equal(state["health"][-2:], exact["health"][-2:])


@pytest.fixture(scope="module")
def unequal(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """Rows with unequal numbers of targets and tokens, on one rank and on two; the second without accumulation."""
    fields, path = run_fields(corpus, **UNEQUAL), tmp_path_factory.mktemp("unequal")
    fields["data"] = {"kind": "mqar", "mixes": MIXES, "examples": 6}
    one = make_run(path / "run", path / "cache", fields, seed=0)
    train(one.path, path / "cache")
    whole = {**fields["training"], "batch_size": 8, "accumulate": 1}
    two = trained(tmp_path_factory.mktemp("unequal") / "run", corpus, 2, {**fields, "training": whole})
    return one, two


def test_unequal_rows_have_the_gradient_and_loss_of_one_process(unequal: tuple[RunFolder, RunFolder]) -> None:
    lines = [run.metrics() for run in unequal]
    assert [len(rows) for rows in lines] == [4, 4]
    for name in ("gradient_norm", "loss", "hidden_z_excess"):
        one, two = ([row[name] for row in rows] for rows in lines)
        assert two[0] == pytest.approx(one[0], rel=1e-5), name
        assert two == pytest.approx(one, rel=1e-3), name


def test_unequal_rows_have_the_diagnostics_of_one_process(unequal: tuple[RunFolder, RunFolder]) -> None:
    one, two = ([row["values"] for row in run.diagnostics() if row["step"] == 1] for run in unequal)
    assert len(one) == 2
    for layer, exact in zip(two, one, strict=True):
        assert layer.keys() == exact.keys()
        for name, value in exact.items():
            if value is not None:
                value = pytest.approx(value, rel=1e-3, abs=1e-6)
            assert layer[name] == value, name


@pytest.mark.parametrize(("name", "devices"), [("one_then_two", 2), ("four_then_one", 1)])
def test_a_run_resumes_with_another_number_of_ranks(
    name: str, devices: int, request: pytest.FixtureRequest, events: Callable[..., list[Any]]
) -> None:
    (event,) = events(request.getfixturevalue(name), "resumed")
    assert (event["step"], event["devices"]) == (16, devices)


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "run.yaml", run_fields(corpus, **FIELDS))
    call = [
        sys.executable,
        "-m",
        "workbench",
        "train",
        str(tmp_path / "run.yaml"),
        "--folder",
        str(tmp_path / "run"),
        "--devices",
        "3",
    ]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 2
    assert "training.batch_size: got 4" in done.stderr
    assert "Traceback" not in done.stderr
