"""Run folders survive what happens to processes; tables stand on nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workbench.files import locked, read_json, write_json
from workbench.results import RunFolder, RunRecord
from workbench.results.tables import CURVE_SCHEMA, DIAGNOSTICS_SCHEMA, RUN_SCHEMA, curves, diagnostics, runs, table
from workbench.status import Stage


def test_a_torn_line_is_left_out_and_repaired(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.add_metrics({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in folder.metrics()] == [1, 2]
    folder.add_metrics({"step": 4})
    assert [row["step"] for row in folder.metrics()] == [1, 2, 4]
    folder.forget_metrics_after(2)
    assert [row["step"] for row in folder.metrics()] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert folder.metrics() == []
    folder.add_metrics({"step": 1})
    assert folder.metrics() == [{"step": 1}]


def test_a_dead_process_was_killed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.status() == {"status": "waiting"}
    code = (
        "import sys, time; from workbench.results.store import RunFolder; f = RunFolder(sys.argv[1]); h = f.hold();"
        "h.__enter__(); f.set_status('running'); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert folder.status()["status"] == "running" and folder.is_held()
        with folder.hold() as mine:
            assert not mine
    finally:
        process.kill()
        process.wait()
    assert folder.status()["status"] == "killed" and "resumes" in folder.status()["reason"]
    with folder.hold() as mine:
        assert mine


def test_finish_and_reopen(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", RunRecord(arm="a"))
    assert RunFolder.create(tmp_path / "run", RunRecord(arm="b")).record().arm == "a"
    folder.finish("crashed", "why", steps=3)
    assert folder.status()["status"] == "crashed" and folder.result()["steps"] == 3
    folder.reopen()
    assert folder.result() == {} and folder.status()["status"] == "interrupted"
    folder.finish("done", None, steps=3)
    folder.reopen()  # says something about the model: kept
    assert folder.result()["steps"] == 3


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "none.json") == {}
    with locked(tmp_path / "lock") as one, locked(tmp_path / "lock", patience=0) as two:
        assert one and not two


def test_tables_on_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert runs(folder).schema == RUN_SCHEMA and len(runs(folder)) == 0
        assert curves(folder).schema == CURVE_SCHEMA and len(curves(folder)) == 0
        assert table(folder).columns == ["ablation", *RUN_SCHEMA]


def test_diagnostics_become_long_rows(tmp_path: Path) -> None:
    record = RunRecord(arm="moe", stage=Stage.TUNING, seed=4)
    folder = RunFolder.create(tmp_path / "runs" / "one", record)
    assert diagnostics(tmp_path).schema == DIAGNOSTICS_SCHEMA
    folder.add_diagnostics(
        {"step": step, "layer": 1, "values": {"entropy": 2.5, "load": [1.5, None]}} for step in (3, 6)
    )
    folder.forget_metrics_after(3)
    rows = diagnostics(tmp_path).select("arm", "step", "layer", "name", "index", "value").rows()
    assert rows == [("moe", 3, 1, "entropy", None, 2.5), ("moe", 3, 1, "load", 0, 1.5), ("moe", 3, 1, "load", 1, None)]
