"""Metrics are copied to loggers, without values of the report split, and without harm to the run."""

from __future__ import annotations

import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields, make_run, run_fields, write_corpus

from workbench.ablation.ablation import Ablation
from workbench.config import ConfigError
from workbench.results import RunFolder, loggers
from workbench.results.loggers import check_loggers, open_loggers
from workbench.status import Status


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run", tmp_path / "cache", run_fields(write_corpus(tmp_path / "corpus")))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: tag -> step and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def interrupted_and_resumed(run: RunFolder, name: str) -> None:
    """Two steps of a run that was interrupted between them."""
    for step, status in ((1, Status.INTERRUPTED), (2, Status.DONE)):
        with open_loggers([name], run) as log:
            assert log is not None, run.events()
            log({"step": step, "loss": float(step), "rejected": {}})
            run.set_status(status)
            if status == Status.DONE:
                run.finish(status)
    assert not [event for event in run.events() if event["event"] == "logger_failed"]


def wandb_records(folder: Path) -> Iterator[Any]:
    """What an offline run of W&B has written: records in blocks of 32 KiB, each with checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


@pytest.mark.process
def test_wandb_has_one_run_of_a_resumed_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted_and_resumed(run, "wandb")
    folders = sorted(path for path in (run.path / "wandb").iterdir() if path.name.startswith("offline-run"))
    found = [list(wandb_records(folder)) for folder in folders]
    assert len(found) == 2
    for step, (records, code) in enumerate(zip(found, (1, 0), strict=True), 1):
        runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert (runs[0].run_id, runs[0].project, runs[0].run_group) == (run.logger_ids()["wandb"], "workbench", "arm")
        logged = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
        values = {item.key or item.nested_key[0]: item.value_json for item in logged[-1]}
        assert (values["loss"], values["trainer/global_step"]) == (f"{step}", f"{step}")
        config = {each.key for record in records for each in record.config.update}
        assert {"model.width", "training.learning_rate", "arm", "seed"} <= config and "" not in config
        assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [code]
        assert not [record for record in records if record.WhichOneof("record_type") == "output_raw"]


@pytest.mark.process
def test_mlflow_has_one_run_of_a_resumed_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(run.path)
    interrupted_and_resumed(run, "mlflow")
    client = tracking.MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("workbench")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run.logger_ids()["mlflow"], "FINISHED")
    assert found.data.tags["mlflow.runName"] == "run" and found.data.params["model.width"] == "32"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(value.step, value.value) for value in history] == [(1, 1.0), (2, 2.0)]
    assert not (run.path / "mlruns").exists()


@pytest.mark.process
def test_mlflow_begins_another_run_where_the_first_is_unknown(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{run.path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run.set_logger_id("mlflow", "0" * 32)
    with open_loggers(["mlflow"], run) as log:
        assert log is not None, run.events()
    assert tracking.MlflowClient(uri).get_run(run.logger_ids()["mlflow"]).info.status == "FAILED"


def test_every_field_has_a_name_that_loggers_take(run: RunFolder) -> None:
    names = loggers._about(run.record())
    assert names["model.width"] == 32 and names["arm"] == "arm" and names["seed"] == 3
    assert all(name and not {*name} & {*"[]"} for name in names)


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
    fake.init = lambda **about: calls.append(about) or types.SimpleNamespace(name=about["name"])
    fake.config = {}
    fake.log = lambda values, step: calls.append((step, values))
    fake.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with open_loggers(["trackio"], run) as log:
        assert log is not None
        log({"step": 3, "loss": 2, "rejected": {}})
    about, row, end = calls
    assert (about["name"], about["project"], about["resume"]) == ("run", "workbench", "never")
    assert row == (3, {"loss": 2.0}) and end == "finished" and fake.config["seed"] == 3
    with open_loggers(["trackio"], run):
        assert (calls[-1]["name"], calls[-1]["resume"]) == ("run", "allow")


def test_trackio_resumes_the_run_that_it_has_renamed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With resume="never" it gives another name where an earlier run, of a deleted ablation, has the one asked for."""
    calls: list[Any] = []
    fake: Any = types.ModuleType("trackio")
    fake.init = lambda **about: calls.append(about) or types.SimpleNamespace(name="another")
    fake.config, fake.finish = {}, lambda: None
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for _ in range(2):
        with open_loggers(["trackio"], run):
            pass
    assert [(about["name"], about["resume"]) for about in calls] == [("run", "never"), ("another", "allow")]


def test_a_logger_that_fails_is_an_event(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def log_hyperparams(self, params: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: int) -> None:
            raise ConnectionError("no route to https://me:secret@host/api")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda run, record: Broken())
    with open_loggers(["wandb"], run) as log:
        assert log is not None
        log({"step": 1, "loss": 1.0})
        log({"step": 2, "loss": 1.0})
    failed = [event for event in run.events() if event["event"] == "logger_failed"]
    assert [event["reason"] for event in failed] == ["ConnectionError: no route to https://host/api"]


def test_a_missing_package_is_named_before_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"launch\.loggers.*pip install mlflow"):
        check_loggers(["mlflow"])
    with pytest.raises(ConfigError, match=r"pip install .*\[tensorboard\]"):
        check_loggers(["tensorboard"])
    with pytest.raises(ConfigError, match="wandb or mlflow"):
        check_loggers(["tensorbord"])
    fields = ablation_fields(tmp_path, launch={"loggers": ["wandb"]})
    with pytest.raises(ConfigError, match="not installed"):
        Ablation.parse(fields, tmp_path / "results").create()
    assert not (tmp_path / "results").exists()


def test_without_loggers_nothing_is_called(run: RunFolder) -> None:
    with open_loggers([], run) as log:
        assert log is None
