"""The command line in a process of its own: its surroundings do not end the work."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import run_fields, write_corpus

from workbench.cli import output
from workbench.cli.output import print_line
from workbench.training import parallel
from workbench.training.trial import stop_signals

ROOT = Path(__file__).parents[1]


def start(folder: Path, *changes: str, **variables: str) -> subprocess.Popen[str]:
    """``workbench train`` of a small run in ``folder / "run"``."""
    (folder / "run.yaml").write_text(json.dumps(run_fields(write_corpus(folder / "corpus"))))
    return subprocess.Popen(
        [sys.executable, "-m", "workbench", "train", "run.yaml", *changes, "--folder", "run"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where tests run under nohup
    )


@pytest.mark.process
def test_an_ascii_terminal_and_foreign_ranks_change_nothing(tmp_path: Path) -> None:
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    output, _ = start(tmp_path, **ranks, **plain).communicate(timeout=300)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done", output


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_after_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "training.tokens=64_000_000", "training.checkpoint_every=100_000")
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=100)
    assert process.returncode == 130
    assert list((tmp_path / "run" / "checkpoint").glob("step-*"))


@pytest.mark.process
@pytest.mark.parametrize(("command", "code"), [("prepare run.yaml --cache cache", 0), ("variants", 1)])
def test_a_reader_that_has_gone_ends_output_and_no_work(command: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(run_fields(write_corpus(tmp_path / "corpus"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=300) == code
    assert process.stderr.read() == b""


def test_output_that_cannot_be_written_is_dropped() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(io.BufferedWriter(output._Lossy(writer, "w")), line_buffering=True)
    print("a line", file=stream)
    stream.close()


def test_markup_in_a_path_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("done (results/[/b][bold]x)")
    assert capsys.readouterr().out == "done (results/[/b][bold]x)\n"


def test_ranks_of_a_cluster_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert parallel.launched_rank() == 0


def test_ranks_of_a_launch_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv(parallel.LAUNCHED, "4")
    assert parallel.launched_rank() == 3


def test_brackets_in_a_path_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    output.console.print("results/a[bold]/b[/b]", soft_wrap=True)
    assert capsys.readouterr().out == "results/a[bold]/b[/b]\n"


@pytest.mark.process
def test_a_closed_output_ends_nothing(tmp_path: Path) -> None:
    command = f"{sys.executable} -m workbench variants >&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        received = stop_signals([signal.SIGHUP])
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)
