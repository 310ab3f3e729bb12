"""Run folders survive what happens to processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.files import read_json, write_json
from workbench.metric import ANSWER_ERRORS, BITS_PER_BYTE
from workbench.results import RunFolder, RunRecord
from workbench.status import Status

ARCHIVE = Path(__file__).parents[2] / "results" / "benchmarks" / "training_340m" / "full_340m"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", RunRecord(arm="a"))


def steps(folder: RunFolder) -> list[int]:
    return [row["step"] for row in folder.metrics()]


@pytest.fixture
def torn(folder: RunFolder) -> RunFolder:
    """Metrics of two steps and the beginning of a third line."""
    for step in (1, 2):
        folder.add_metrics({"step": step})
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    return folder


def test_a_torn_line_is_ignored(torn: RunFolder) -> None:
    assert steps(torn) == [1, 2]


def test_a_torn_line_is_removed_by_the_next_one(torn: RunFolder) -> None:
    torn.add_metrics({"step": 4})
    assert steps(torn) == [1, 2, 4]


def test_a_file_of_one_torn_line_is_empty(folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").write_text('{"st')
    assert folder.metrics() == []


def test_rows_after_a_step_are_dropped(torn: RunFolder) -> None:
    torn.truncate_after(1)
    assert steps(torn) == [1]


def test_evaluations_after_a_step_are_dropped(folder: RunFolder) -> None:
    for step in (5, 10):
        folder.add_evaluations(step, "selection", [{"suite": "loss", "value": 1.0}])
    folder.truncate_after(5)
    assert folder.evaluations() == [{"step": 5, "split": "selection", "suite": "loss", "value": 1.0}]


def test_a_run_that_was_never_started_waits(folder: RunFolder) -> None:
    assert folder.status() == {"status": Status.WAITING}


@pytest.fixture
def process(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the run."""
    code = (
        "import sys, time; from workbench.results import RunFolder; folder = RunFolder(sys.argv[1]);"
        "lock = folder.lock(); lock.__enter__(); folder.set_status('running');"
        "print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


@pytest.mark.usefixtures("process")
def test_a_run_with_a_process_is_running(folder: RunFolder) -> None:
    assert folder.status()["status"] == Status.RUNNING


@pytest.mark.usefixtures("process")
def test_a_run_with_a_process_cannot_be_locked(folder: RunFolder) -> None:
    with folder.lock() as acquired:
        assert not acquired


@pytest.fixture
def killed(folder: RunFolder, process: subprocess.Popen[str]) -> RunFolder:
    process.kill()
    process.wait()
    return folder


def test_a_running_run_without_its_process_was_killed(killed: RunFolder) -> None:
    assert killed.status()["status"] == Status.KILLED


def test_a_killed_run_can_be_locked(killed: RunFolder) -> None:
    with killed.lock() as acquired:
        assert acquired


def test_an_existing_record_is_kept(folder: RunFolder) -> None:
    assert RunFolder.create(folder.path, RunRecord(arm="b")).record().arm == "a"


def test_a_crashed_run_is_reopened(folder: RunFolder) -> None:
    folder.finish(Status.CRASHED, "why", steps=3)
    folder.reopen()
    assert (folder.result(), folder.status()["status"]) == ({}, Status.INTERRUPTED)


def test_a_finished_run_is_not_reopened(folder: RunFolder) -> None:
    folder.finish(Status.DONE, None, steps=3)
    folder.reopen()
    assert folder.result()["steps"] == 3


def test_a_report_of_several_tasks_is_filtered_by_the_metric(folder: RunFolder) -> None:
    tasks = {"suite": ["loss", "answers"], "task": ["text", "text"], "document": [0, 0]}
    folder.write_report(pl.DataFrame(tasks))
    assert folder.report(ANSWER_ERRORS)["suite"].to_list() == ["answers"]


def test_an_older_report_is_that_of_the_metric(folder: RunFolder) -> None:
    folder.write_report(pl.DataFrame({"document": [0, 1]}))
    assert len(folder.report(BITS_PER_BYTE)) == 2


# -- killed between two files ----------------------------------------------------------------------------------------


def test_a_result_decides_the_status(folder: RunFolder) -> None:
    folder.set_status(Status.RUNNING, pid=1)
    write_json(folder.path / "result.json", {"status": "done", "reason": None, "report_value": 1.0})
    assert folder.status()["status"] == Status.DONE


def test_the_status_is_settled_by_the_result(folder: RunFolder) -> None:
    folder.set_status(Status.RUNNING, pid=1)
    write_json(folder.path / "result.json", {"status": "done", "reason": "why"})
    assert folder.settle()["status"] == Status.DONE
    assert read_json(folder.path / "status.json")["status"] == Status.DONE
    assert [event["event"] for event in folder.events()] == [Status.DONE]


def test_without_a_result_nothing_has_ended(folder: RunFolder) -> None:
    folder.finish(Status.DONE, None, steps=3)
    (folder.path / "result.json").unlink()
    assert folder.status()["status"] == Status.INTERRUPTED


def test_a_reopening_that_was_interrupted_is_one_event(folder: RunFolder) -> None:
    folder.finish(Status.CRASHED, "why")
    result = (folder.path / "result.json").read_bytes()
    folder.reopen()
    (folder.path / "result.json").write_bytes(result)  # as if it had been killed before this was removed
    folder.reopen()
    assert [event["event"] for event in folder.events()].count("reopened") == 1


def test_what_was_measured_after_the_training_is_dropped(folder: RunFolder) -> None:
    for split in ("selection", "report"):
        folder.add_evaluations(5, split, [{"suite": "loss", "value": 1.0}])
    folder.truncate_after(5)
    assert [row["split"] for row in folder.evaluations()] == ["selection"]


@pytest.mark.parametrize("content", ['{"status": 3}', '{"status": "gone"}', "[]", '{"status": {"a": 1}}', "{"])
def test_a_status_of_another_form_is_none(folder: RunFolder, content: str) -> None:
    (folder.path / "status.json").write_text(content)
    assert folder.status()["status"] == Status.WAITING


@pytest.mark.parametrize("content", ['{"status": "running"}', '{"status": "done", "report_value": "x"}', "[1]"])
def test_a_result_of_another_form_is_none(folder: RunFolder, content: str) -> None:
    (folder.path / "result.json").write_text(content)
    assert folder.result() == {}


def test_one_flipped_bit_of_a_report_is_damage(folder: RunFolder) -> None:
    checksum = folder.write_report(pl.DataFrame({"document": [0, 1]}))
    folder.finish(Status.DONE, None, report_checksum=checksum)
    assert folder.damage() is None
    content = bytearray((folder.path / "report.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder.path / "report.parquet").write_bytes(content)
    assert folder.damage() == "report.parquet"
    with pytest.raises(ConfigError, match=r"report.parquet: got .*checksum.*measures it again"):
        folder.report(BITS_PER_BYTE)


def test_a_tilde_in_a_path_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checksum = RunFolder.create(Path("~/run"), RunRecord(arm="a")).write_report(pl.DataFrame({"document": [0]}))
    assert checksum and (tmp_path / "~" / "run" / "report.parquet").exists()


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs[1]", RunRecord(arm="a"))
    frame = pl.DataFrame({"suite": ["loss"], "task": ["text"], "document": [0]})
    checksum = folder.write_report(frame)
    folder.finish(Status.DONE, report_checksum=checksum)
    assert folder.damage() is None
    assert len(folder._read_report()) == 1
