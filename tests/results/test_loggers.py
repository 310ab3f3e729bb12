"""Metrics are copied to loggers, without values of the report split, and without harm to the run."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields, make_run, run_fields, write_corpus

from workbench.ablation.ablation import Ablation
from workbench.config import ConfigError
from workbench.results import RunFolder, loggers
from workbench.results.loggers import check_loggers, open_loggers


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run", tmp_path / "cache", run_fields(write_corpus(tmp_path / "corpus")))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: tag -> step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.process
def test_tensorboard_has_the_curves_of_every_trial(tmp_path: Path) -> None:
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"),
        tuning={"trials": 0, "space": {}},
        confirmation={"seeds": [0]},
        launch={"loggers": ["tensorboard"]},
    )
    launched = Ablation.parse(fields, tmp_path / "results").launch()
    assert launched.wait(500)
    for path in (launched.folder / "runs").iterdir():
        drawn, logged = scalars(path / "tensorboard"), RunFolder(path).metrics()
        assert drawn["loss"] == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in logged]
        assert len(drawn["selection_value"]) == 2 and "learning_rate" in drawn
        assert not any("report" in tag for tag in drawn)
    assert launched.identity == Ablation.parse({**fields, "launch": {}}, tmp_path).config.identity


def test_trackio_gets_project_name_and_values(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake: Any = types.ModuleType("trackio")
    fake.init = lambda **about: calls.append(about)
    fake.config = {}
    fake.log = lambda values, step: calls.append((step, values))
    fake.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with open_loggers(["trackio"], run) as log:
        assert log is not None
        log({"step": 3, "loss": 2, "rejected": {}})
    about, row, end = calls
    assert about["name"] == "run" and about["project"] == "workbench"
    assert row == (3, {"loss": 2.0}) and end == "finished" and fake.config["seed"] == 3


def test_a_logger_that_fails_is_an_event(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def log_hyperparams(self, params: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int) -> None:
            raise ConnectionError("no route")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda run, record: Broken())
    with open_loggers(["wandb"], run) as log:
        assert log is not None
        log({"step": 1, "loss": 1.0})
        log({"step": 2, "loss": 1.0})
    failed = [event for event in run.events() if event["event"] == "logger_failed"]
    assert [event["reason"] for event in failed] == ["ConnectionError: no route"]


def test_a_missing_package_is_named_before_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"launch\.loggers.*pip install mlflow"):
        check_loggers(["mlflow"])
    with pytest.raises(ConfigError, match="wandb or mlflow"):
        check_loggers(["tensorbord"])
    fields = ablation_fields(tmp_path, launch={"loggers": ["wandb"]})
    with pytest.raises(ConfigError, match="not installed"):
        Ablation.parse(fields, tmp_path / "results").create()
    assert not (tmp_path / "results").exists()


def test_without_loggers_nothing_is_called(run: RunFolder) -> None:
    with open_loggers([], run) as log:
        assert log is None
