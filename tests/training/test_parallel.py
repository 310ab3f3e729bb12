"""Several processes for one run: the numbers of one process up to rounding; checkpoints for any number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_fields, write_corpus

from workbench.files import write_json
from workbench.results import RunFolder
from workbench.training.checkpoint import load_checkpoint

FIELDS = {
    # the head for the token after the next begins after the step at which runs are taken up again below
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(folder: Path, corpus: Path, devices: int, **changes: object) -> RunFolder:
    """A run trained by the command line, as a user would."""
    write_json(folder.parent / "run.yaml", run_fields(corpus, **{**FIELDS, **changes}))  # JSON is YAML
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


def assert_equal_to_rounding(got: RunFolder, wanted: RunFolder) -> None:
    rows = list(zip(got.metrics(), wanted.metrics(), strict=True))
    first, exact = rows[0]
    assert first["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=1e-5)
    for a, b in rows:
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.keys() == b.keys() and a["hidden_z_excess"] == pytest.approx(b["hidden_z_excess"], rel=1e-3)
        assert a["gradient_rms_median"] == pytest.approx(b["gradient_rms_median"], rel=1e-2)
    assert got.result()["report_value"] == pytest.approx(wanted.result()["report_value"], rel=1e-4)
    states = [load_checkpoint(run.path / "checkpoint" / "step-24") for run in (got, wanted)]
    assert list(states[0]["model"]) == list(states[1]["model"])
    for name, tensor in states[1]["model"].items():
        assert float((states[0]["model"][name] - tensor).norm() / tensor.norm()) < 1e-3, name
    a, b = (state["optimiser"] for state in states)
    assert a["state"].keys() == b["state"].keys()
    for number, moments in b["state"].items():
        assert a["state"][number]["step"] == moments["step"]
        assert a["state"][number]["exp_avg"].shape == moments["exp_avg"].shape
    assert [group["params"] for group in a["param_groups"]] == [group["params"] for group in b["param_groups"]]
    assert states[0]["loader"] == states[1]["loader"]
    assert torch.equal(states[0]["health"][-2:], states[1]["health"][-2:])


@pytest.fixture(scope="module")
def four(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("four") / "run", corpus, 4)


def test_four_ranks_train_what_one_process_trains(one: RunFolder, four: RunFolder) -> None:
    assert_equal_to_rounding(four, one)


def test_two_ranks_train_what_one_process_trains(one: RunFolder, corpus: Path, tmp_path: Path) -> None:
    assert_equal_to_rounding(trained(tmp_path / "run", corpus, 2), one)


@pytest.mark.parametrize(("before", "after"), [("one", 2), ("four", 1)])
def test_a_run_goes_on_with_another_number_of_ranks(
    before: str, after: int, one: RunFolder, corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    begun: RunFolder = request.getfixturevalue(before)
    path = Path(shutil.copytree(begun.path, tmp_path / "run"))
    shutil.copytree(begun.path.parent / "cache", tmp_path / "cache")
    shutil.rmtree(path / "checkpoint" / "step-24")
    (path / "result.json").unlink()
    run = trained(path, corpus, after)
    (resumed,) = [line for line in (path / "events.jsonl").read_text().splitlines() if '"resumed"' in line]
    assert '"step": 16' in resumed and f'"devices": {after}' in resumed
    assert_equal_to_rounding(run, one)


def test_rows_that_ranks_cannot_share_are_told_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
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
    assert done.returncode == 2 and "training.batch_size: got 4" in done.stderr and "Traceback" not in done.stderr
