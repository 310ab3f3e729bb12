"""Launching: workers, studies, kills, second calls. Real processes on small models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields, write_corpus
from optuna.trial import TrialState

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.studies import slots
from workbench.ablation.run import AblationRun
from workbench.config import ConfigError
from workbench.files import write_json
from workbench.results.tables import table

LONG = {"training": {"tokens": 300 * 64, "checkpoint_every": 25, "log_every": 5}}
# where something else than the comparison is tested: one arm, one tuning trial, one seed
FEW: dict[str, Any] = {
    "arms": {"full": {}},
    "tuning": {"trials": 1, "sampler": "random"},
    "confirmation": {"seeds": [0]},
}
PATIENCE = 500  # seconds; a loaded machine with a slow disk is no failure


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def ablation(corpus: Path, results: Path, name: str = "test", **changes: Any) -> Ablation:
    return Ablation.parse(ablation_fields(corpus, name, **changes), results)


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def mtimes(run: AblationRun) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in run.folder.glob("runs/*/result.json")}


def test_two_workers_on_one_study_do_every_trial_once(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path).launch()
    until(lambda: len(run.workers()) == 2 or run.finished)
    assert run.wait(PATIENCE)
    frame = run.runs()
    assert frame["status"].to_list() == ["done"] * run.total and run.total == 10
    plan = Plan(run)
    for arm in run.arms:
        for stage, wanted in (("tuning", 2), ("confirmation", 3)):
            by_slot = slots(plan.study(arm, stage))
            assert len(by_slot) == wanted and all(len(trials) == 1 for trials in by_slot.values())
            assert all(trials[0].state == TrialState.COMPLETE for trials in by_slot.values())
            assert len({trials[0].user_attrs["run"] for trials in by_slot.values()}) == wanted
    # every run was started exactly once
    starts = [path.read_text().count('"started"') for path in run.folder.glob("runs/*/events.jsonl")]
    assert starts == [1] * 10

    chosen = run.selection()
    tuned = frame.filter((pl.col("arm") == "full") & (pl.col("stage") == "tuning"))
    assert chosen["full"]["selection_value"] == tuned["selection_value"].min()
    assert frame.filter("selected").height == 2
    verdict = run.verdict()
    assert verdict is not None and [row.seeds for row in verdict.rows] == [3, 3]
    assert verdict.rows[1].verdict in ("better", "worse", "undecided")
    bpb = frame.filter((pl.col("arm") == "full") & (pl.col("stage") == "confirmation"))["report_value"]
    assert verdict.rows[0].value == pytest.approx(bpb.mean(), rel=1e-9)
    assert table(tmp_path).height == 10 and run.curves().height > 10

    # a second call reports; it repeats nothing, even with Optuna's storage lost
    before = mtimes(run)
    assert ablation(corpus, tmp_path).launch().finished and mtimes(run) == before
    for path in run.folder.glob("study.db*"):
        path.unlink()
    (run.folder / "finished.json").unlink()
    again = ablation(corpus, tmp_path).launch()
    assert again.wait(PATIENCE) and mtimes(again) == before
    assert str(again.verdict()) == str(verdict)


def test_more_workers_than_the_file_says_share_the_machine(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.ablation.ablation.usable_cores", lambda: 32)
    asked = ablation(corpus, tmp_path)
    assert asked.threads == 16 and asked.shared_by(1).threads == 16  # as the file says: two workers
    assert asked.shared_by(8).threads == 4 and asked.shared_by(8).config.identity == asked.config.identity


def test_same_name_with_other_arms_is_refused_with_the_difference(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path).create()
    with pytest.raises(ConfigError) as raised:
        ablation(
            corpus,
            tmp_path,
            arms={"full": {}, "sliding": {"model.pattern": "sliding", "model.mixers.sliding.window": 5}},
        ).create()
    text = str(raised.value)
    assert "name: got" in text and "window: 4 there, 5 here" in text and str(run.folder) in text


def test_killed_worker_is_replaced_and_its_trial_resumes(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path, base=LONG, **FEW).launch(workers=1)  # trials have one thread, as with two
    until(lambda: run.runs()["step"].sum() > 30)
    (victim,) = run.workers()
    os.kill(victim, signal.SIGKILL)
    until(lambda: not run.workers())
    assert not run.finished
    run.start_workers(1)  # no relaunch: the heartbeat alone must bring the trial back
    assert run.wait(PATIENCE)
    assert set(run.runs()["status"]) == {"done"}
    resumed = [path for path in run.folder.glob("runs/*/events.jsonl") if '"resumed"' in path.read_text()]
    assert resumed, "the trial of the killed worker did not go on from its checkpoint"
    trials = [trial for arm in run.arms for trial in Plan(run).study(arm, "tuning").get_trials()]
    retried = [trial for trial in trials if "failed_trial" in trial.system_attrs]
    assert len(retried) == 1 and retried[0].state == TrialState.COMPLETE

    # Optuna's view of the resumed trial is that of an undisturbed one
    whole = ablation(corpus, tmp_path, "whole", base=LONG, **FEW).launch()
    assert whole.wait(PATIENCE)
    (same,) = Plan(whole).study("full", "tuning").get_trials()
    assert (same.params, same.intermediate_values, same.value) == (
        retried[0].params,
        retried[0].intermediate_values,
        retried[0].value,
    )
    assert [row.value for row in whole.verdict().rows] == [row.value for row in run.verdict().rows]  # type: ignore[union-attr]


def test_killed_trial_is_taken_up_again_by_its_worker(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path, base=LONG, **FEW).launch(workers=1)  # trials have one thread, as with two
    until(lambda: run.runs()["step"].sum() > 30)
    (path,) = [p for p in run.folder.glob("runs/*/status.json") if '"running"' in p.read_text()]
    os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
    assert run.wait(PATIENCE)
    assert set(run.runs()["status"]) == {"done"}
    assert '"resumed"' in (path.parent / "events.jsonl").read_text()


def test_stopped_at_once_no_worker_stays(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path).create()
    started = run.start_workers()
    assert run.workers() == sorted(started) and len(started) == 2
    assert not run.start_workers()  # those there count
    assert run.stop(PATIENCE) == [] == run.workers() and not run.finished


def test_stopped_by_the_user_it_goes_on_with_the_same_call(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path, base=LONG, **FEW).launch()
    until(lambda: run.runs()["step"].sum() > 20)
    run.stop(PATIENCE)
    assert not run.workers() and not run.finished
    assert "interrupted" in set(run.runs()["status"]) and "killed" not in set(run.runs()["status"])
    again = ablation(corpus, tmp_path, base=LONG, **FEW).launch()
    assert again.wait(PATIENCE) and set(again.runs()["status"]) == {"done"}


def test_ctrl_c_in_the_command_line_stops_after_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    fields = ablation_fields(corpus, base=LONG)
    write_json(tmp_path / "ablation.yaml", fields)  # JSON is YAML
    call = [
        sys.executable,
        "-m",
        "workbench",
        "run",
        str(tmp_path / "ablation.yaml"),
        "--results",
        str(tmp_path / "results"),
    ]
    process = subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    folder = tmp_path / "results" / "test"
    until(lambda: (folder / "ablation.json").exists() and AblationRun(folder).runs()["step"].sum() > 20)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "The same command goes on from here" in output and "Traceback" not in output
    run = AblationRun(folder)
    assert not run.workers()
    assert list(folder.glob("runs/*/checkpoint/step-*"))


def test_two_launches_at_once_share_the_work(corpus: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "ablation.yaml", ablation_fields(corpus, confirmation={"seeds": [0]}))
    call = [
        sys.executable,
        "-m",
        "workbench",
        "run",
        str(tmp_path / "ablation.yaml"),
        "--results",
        str(tmp_path / "results"),
        "--detach",
    ]
    processes = [subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
    run = AblationRun(tmp_path / "results" / "test")
    assert run.wait(PATIENCE) and set(run.runs()["status"]) == {"done"} and run.runs().height == run.total
    assert [path.read_text().count('"started"') for path in run.folder.glob("runs/*/events.jsonl")] == [1] * run.total


def test_failed_arm_stays_in_the_table_and_in_the_verdict(corpus: Path, tmp_path: Path) -> None:
    wild = {"training.learning_rate": 1e300}
    run = ablation(
        corpus,
        tmp_path,
        arms={"full": {}, "wild": wild},
        tuning={"trials": 1, "sampler": "random", "space": {"training.weight_decay": {"low": 0.1, "high": 0.2}}},
    ).launch()
    assert run.wait(PATIENCE)
    rows = {row["arm"]: row for row in run.runs().iter_rows(named=True) if row["stage"] == "tuning"}
    assert rows["wild"]["status"] == "diverged" and "step" in rows["wild"]["reason"]
    verdict = run.verdict()
    assert verdict is not None
    words = {row.arm: row.verdict for row in verdict.rows}
    assert words == {"full": "baseline", "wild": "failed"}
    assert "every tuning trial failed" in verdict.rows[1].sentence
    # divergence is a result: a second call does not try it again
    before = mtimes(run)
    assert (
        ablation(
            corpus,
            tmp_path,
            arms={"full": {}, "wild": wild},
            tuning={"trials": 1, "sampler": "random", "space": {"training.weight_decay": {"low": 0.1, "high": 0.2}}},
        )
        .launch()
        .finished
    )
    assert mtimes(run) == before


def test_one_arm_gives_a_verdict_about_itself(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path, arms={"full": {}}, tuning={"trials": 0}, confirmation={"seeds": [0, 1]}).launch()
    assert run.wait(PATIENCE)
    verdict = run.verdict()
    assert verdict is not None and [row.verdict for row in verdict.rows] == ["baseline"]
