"""Evaluation suites of a run: during training, at its end, and of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from ranks import on_ranks

from workbench.cli.training import evaluate
from workbench.config import ConfigError
from workbench.data import tasks
from workbench.evaluation.suites import suites
from workbench.files import checksum
from workbench.results import RunFolder
from workbench.results.ledger import FILE, Ledger
from workbench.results.tables import _Events, run_row, scores
from workbench.training.config import RunConfig
from workbench.training.export import export
from workbench.training.suites import evaluate_export, evaluate_run, finished_runs, parse_suites
from workbench.training.trial import train

MQAR = {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}, {"length": 64, "pairs": 2}], "examples": 4}
SUITE: dict[str, Any] = {"kind": "answers", "name": "recall", "data": MQAR}
"""Longer examples than the 32 tokens that the runs are trained on."""
JUDGED = ("result.json", "report.parquet", "evaluations.jsonl", "metrics.jsonl", "run.json")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "OVERLAP_ROWS", 10)


@pytest.fixture
def trained(new: Callable[..., RunFolder], cache: Path) -> RunFolder:
    run = new(evaluation=[{**SUITE, "when": [5, "end"]}])
    assert train(run.path, cache)["status"] == "done"
    return run


def moments(run: RunFolder) -> list[tuple[int, str]]:
    return run.scores().select("step", "split").unique(maintain_order=True).rows()  # type: ignore[return-value]


def test_suites_measure_at_their_steps_and_at_the_end(trained: RunFolder) -> None:
    assert moments(trained) == [(5, "selection"), (20, "report")]


def test_documents_have_the_labels_of_the_task(trained: RunFolder) -> None:
    rows = trained.scores().filter(pl.col("document").is_not_null(), pl.col("step") == 20)
    assert set(rows.select("metric", "length", "pairs").unique().rows()) == {
        (metric, length, 2) for metric in ("errors per answer", "bits per answer") for length in (16, 64)
    }


def test_the_primary_metric_is_elsewhere(trained: RunFolder) -> None:
    assert {row["suite"] for row in trained.evaluations()} == {"loss"}
    assert set(trained.scores()["suite"]) == {"recall"}


def test_a_suite_changes_no_number_of_the_training(
    new: Callable[..., RunFolder], cache: Path, trained: RunFolder
) -> None:
    plain = new("plain")
    train(plain.path, cache)
    losses = [[row["loss"] for row in run.metrics()] for run in (plain, trained)]
    assert losses[0] == losses[1]
    assert plain.result()["report_value"] == trained.result()["report_value"]


def test_a_tuning_run_measures_the_selection_split(new: Callable[..., RunFolder], cache: Path) -> None:
    run = new(stage="tuning", evaluation=[SUITE])
    train(run.path, cache)
    assert moments(run) == [(20, "selection")]


def test_a_run_killed_in_a_suite_resumes_there(new: Callable[..., RunFolder], cache: Path) -> None:
    run, whole = new(evaluation=[SUITE]), new("whole", evaluation=[SUITE])
    asked = iter(range(1000))
    result = train(run.path, cache, should_stop=lambda: next(asked) >= 20)  # after every step, then after every task
    assert (result["status"], "measuring recall" in result["reason"]) == ("interrupted", True)
    assert train(run.path, cache)["status"] == train(whole.path, cache)["status"] == "done"
    assert run.scores().equals(whole.scores())
    assert run.result()["report_value"] == whole.result()["report_value"]


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks do not share the only GPU")
def test_two_ranks_stop_in_a_suite_and_go_on(new: Callable[..., RunFolder], cache: Path, trained: RunFolder) -> None:
    run = new("two", evaluation=[{**SUITE, "when": [5, "end"]}])
    assert [result["status"] for result in on_ranks(2, train_on_two, run.path, cache, 5)] == ["interrupted", "ended"]
    assert moments(run) == [(5, "selection")]
    assert [result["status"] for result in on_ranks(2, train_on_two, run.path, cache, 1000)] == ["done", "ended"]
    assert moments(run) == moments(trained)
    assert run.scores()["value"].to_list() == pytest.approx(trained.scores()["value"].to_list(), rel=0.05)


def train_on_two(path: Path, cache: Path, questions: int) -> dict[str, Any]:
    """On one of two ranks, asked to stop after so many documents and logged steps."""
    asked = iter(range(1000))
    return train(path, cache, should_stop=lambda: next(asked) >= questions, devices=2)


def test_the_average_of_the_weights_is_measured_where_it_judges(new: Callable[..., RunFolder], cache: Path) -> None:
    ema = {"decay": 0.5, "evaluate": "instead"}
    run = new(evaluation=[SUITE], training={"ema": ema})
    train(run.path, cache)
    values = run.scores()["value"].to_list()
    (run.suites_path / "recall.parquet").unlink()
    assert evaluate_run(run.path, cache=cache) == 1
    assert run.scores()["value"].to_list() == values
    export(run.path, run.path.parent / "trained", cache=cache, weights="trained")
    evaluate_export(run.path.parent / "trained", run.path.parent / "tables", [suites.parse(SUITE)])
    assert read(run.path.parent / "tables")["value"].to_list() != pytest.approx(values, rel=1e-4)


def test_a_suite_that_fails_is_an_event_and_the_run_is_done(
    new: Callable[..., RunFolder], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(evaluation=[SUITE])
    monkeypatch.setattr(suites["answers"], "measure", lambda *arguments: 1 / 0)
    assert train(run.path, cache)["status"] == "done"
    (event,) = (event for event in run.events() if event["event"] == "suite_failed")
    assert (event["suite"], event["reason"]) == ("recall", "ZeroDivisionError: division by zero")
    assert run_row(run)["failed_suites"] == "recall: ZeroDivisionError: division by zero"


def test_a_finished_run_gets_further_suites(new: Callable[..., RunFolder], cache: Path, trained: RunFolder) -> None:
    run = new("later")
    train(run.path, cache)
    judged = {name: checksum(run.path / name) for name in JUDGED}
    lines = Ledger(cache.parent / FILE).hashes
    assert evaluate_run(run.path, [suites.parse(SUITE)], cache=cache) == 1
    assert run.scores().equals(trained.scores().filter(pl.col("step") == 20))
    assert {name: checksum(run.path / name) for name in JUDGED} == judged
    assert Ledger(cache.parent / FILE).hashes == lines
    assert evaluate_run(run.path, [suites.parse(SUITE)], cache=cache) == 0


def test_without_suites_those_of_the_run_are_measured_that_failed(
    new: Callable[..., RunFolder], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(evaluation=[SUITE])
    with monkeypatch.context() as patch:
        patch.setattr(suites["answers"], "measure", lambda *arguments: 1 / 0)
        train(run.path, cache)
    assert evaluate_run(run.path, cache=cache) == 1
    assert _Events.read(run.path / "events.jsonl").failed_suites is None


def test_a_run_that_has_not_finished_is_refused(new: Callable[..., RunFolder], cache: Path) -> None:
    run = new()
    train(run.path, cache, should_stop=lambda: True)
    with pytest.raises(ConfigError, match="expected a finished run"):
        evaluate_run(run.path, [suites.parse(SUITE)], cache=cache)


def test_a_decoded_run_is_measured_again_through_its_policy(
    new: Callable[..., RunFolder], cache: Path, trained: RunFolder
) -> None:
    start, policy = {"folder": str(trained.path)}, {"kind": "streaming", "tokens": 4, "sink": 1}
    run = new("decoded", training={"tokens": 0}, start=start, decoding={"policy": policy}, evaluation=[SUITE])
    assert train(run.path, cache)["status"] == "done"
    values = run.scores().filter(pl.col("suite") == "recall")["value"].to_list()
    assert values != trained.scores().filter(pl.col("step") == 20)["value"].to_list()
    (run.suites_path / "recall.parquet").unlink()
    assert evaluate_run(run.path, cache=cache) == 1
    assert run.scores().filter(pl.col("suite") == "recall")["value"].to_list() == values


def test_the_weights_of_a_decoded_run_must_still_be_there(
    new: Callable[..., RunFolder], cache: Path, trained: RunFolder
) -> None:
    run = new("decoded", training={"tokens": 0}, start={"folder": str(trained.path)}, decoding={})
    train(run.path, cache)
    trained.path.rename(trained.path.parent / "elsewhere")
    with pytest.raises(ConfigError, match=r"start\.folder: got "):
        evaluate_run(run.path, [suites.parse(SUITE)], cache=cache)


def test_a_run_that_trains_nothing_has_no_weights_to_export(
    new: Callable[..., RunFolder], cache: Path, trained: RunFolder
) -> None:
    run = new("decoded", training={"tokens": 0}, start={"folder": str(trained.path)}, decoding={})
    train(run.path, cache)
    with pytest.raises(ConfigError, match="which trains nothing"):
        export(run.path, run.path.parent / "export", cache=cache)


def test_without_any_suite_nothing_is_measured(
    new: Callable[..., RunFolder], cache: Path, trained: RunFolder, tmp_path: Path
) -> None:
    plain = new("plain")
    train(plain.path, cache)
    with pytest.raises(ConfigError, match="suites: got 'none, and none in the configuration of the run'"):
        evaluate_run(plain.path, cache=cache)
    with pytest.raises(ConfigError, match="suites: got 'none'"):
        evaluate_export(export(trained.path, tmp_path / "export", cache=cache), tmp_path / "tables", [])


def test_an_exported_model_is_measured_like_its_run(trained: RunFolder, cache: Path, tmp_path: Path) -> None:
    folder = export(trained.path, tmp_path / "export", cache=cache)
    evaluate_export(folder, tmp_path / "tables", [suites.parse(SUITE)])
    values = [
        frame.filter(pl.col("document").is_null(), pl.col("step") == 20)["value"].to_list()
        for frame in (RunFolder(trained.path).scores(), read(tmp_path / "tables"))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def read(folder: Path) -> pl.DataFrame:
    from workbench.results.scores import read_scores

    return read_scores(folder)


def test_an_export_has_no_data_of_a_run(trained: RunFolder, cache: Path, tmp_path: Path) -> None:
    folder = export(trained.path, tmp_path / "export", cache=cache)
    with pytest.raises(ConfigError, match=r"evaluation\[0\]\.data: got .no data for 'loss'"):
        evaluate_export(folder, tmp_path / "tables", [suites.parse("loss")])


def test_the_table_over_runs_names_arm_and_seed(trained: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "runs").mkdir()
    trained.path.rename(tmp_path / "ablation" / "runs" / "one")
    frame = scores(tmp_path / "ablation")
    assert frame.select("arm", "seed", "run", "suite").unique().rows() == [("arm", 3, "one", "recall")]
    assert [run.path.name for run in finished_runs(tmp_path / "ablation")] == ["one"]


def test_other_text_needs_the_models_tokenizer(new: Callable[..., RunFolder]) -> None:
    needle = {
        "kind": "needle",
        "haystack": "noise",
        "lengths": [96],
        "examples": 2,
        "text": {"corpus": {"kind": "stdlib", "limit_bytes": 300_000}},
    }
    with pytest.raises(ConfigError, match=r"evaluation\[0\]\.data: .*another tokenizer"):
        new(evaluation=[{"kind": "answers", "data": needle}])


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (["answer"], "'answers'"),
        ([SUITE, SUITE], r"evaluation\[1\]\.name: got 'recall'"),
        ([{**SUITE, "when": 20}], r"evaluation\[0\]\.when: .*steps before the last one \(20\)"),
        ([{**SUITE, "data": {"kind": "mqar", "mixes": [{"length": 4, "pairs": 4}]}}], "pairs"),
    ],
)
def test_mistakes_name_their_suite(fields: dict[str, Any], evaluation: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse({**fields, "evaluation": evaluation})


@pytest.fixture
def fields(corpus: Path) -> dict[str, Any]:
    from helpers import run_fields

    return run_fields(corpus)


def test_suites_change_the_identity_and_not_the_setting(fields: dict[str, Any]) -> None:
    plain, measured = RunConfig.parse(fields), RunConfig.parse({**fields, "evaluation": [SUITE]})
    assert plain.setting == measured.setting and plain.identity != measured.identity


def test_suites_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "suites.yaml").write_text("evaluation: [{kind: loss, name: text}]")
    parsed = parse_suites(["loss", "{kind: answers, name: recall}", str(tmp_path / "suites.yaml")])
    assert [(suite.kind, suite.label) for suite in parsed] == [
        ("loss", "loss"),
        ("answers", "recall"),
        ("loss", "text"),
    ]


def test_suites_of_a_sweep_are_those_of_its_runs(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("base: {evaluation: [{kind: loss, name: text}]}")
    assert [suite.label for suite in parse_suites([str(tmp_path / "sweep.yaml")])] == ["text"]


def test_a_file_without_suites_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {depth: 2}")
    with pytest.raises(ConfigError, match=r"run\.yaml: got 'no suites'"):
        parse_suites([str(tmp_path / "run.yaml")])


@pytest.fixture
def command(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`workbench evaluate` of a run in tmp_path, beside the cache; signals keep their handlers."""
    (tmp_path / "cache").symlink_to(cache)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    return lambda run: evaluate(run, [])


def test_the_command_prints_a_table_of_the_scores(
    trained: RunFolder, command: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(trained.path)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("recall", "mqar", "errors per answer", trained.path.name, "1.0000"))


def test_the_command_prints_no_value_that_is_sealed(
    trained: RunFolder,
    command: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Running:
        """An ablation whose values of the report split may not be read."""

        def __init__(self, folder: Path):
            assert folder == tmp_path / "ablation"

        def scores(self) -> pl.DataFrame:
            return scores(tmp_path / "ablation").clear()

    (tmp_path / "ablation" / "runs").mkdir(parents=True)
    (tmp_path / "ablation" / "ablation.json").write_text("{}")
    run = trained.path.rename(tmp_path / "ablation" / "runs" / "one")
    monkeypatch.setattr("workbench.ablation.run.AblationRun", Running)
    command(run)
    assert "once the ablation has ended" in capsys.readouterr().out
