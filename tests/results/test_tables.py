"""Tables over runs, with and without any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from workbench.results import RunFolder, RunRecord, tables
from workbench.results.tables import (
    CURVE_SCHEMA,
    DIAGNOSTICS_SCHEMA,
    EVALUATION_SCHEMA,
    POINT_SCHEMA,
    RUN_SCHEMA,
    Points,
    curves,
    diagnostics,
    evaluations,
    failed_suites,
    runs,
    thinned,
    write_ended,
)
from workbench.status import Stage, Status


@pytest.mark.parametrize("name", [".", "none"])
@pytest.mark.parametrize(
    ("read", "schema"),
    [
        (runs, RUN_SCHEMA),
        (curves, CURVE_SCHEMA),
        (evaluations, EVALUATION_SCHEMA),
        (diagnostics, DIAGNOSTICS_SCHEMA),
    ],
)
def test_tables_without_runs_have_their_columns(tmp_path: Path, name: str, read: object, schema: dict) -> None:  # type: ignore[type-arg]
    frame = read(tmp_path / name)  # type: ignore[operator]
    assert (frame.schema, len(frame)) == (schema, 0)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    record = RunRecord(arm="moe", stage=Stage.TUNING, seed=4, steps=10, tokens=100)
    return RunFolder.create(tmp_path / "runs" / "one", record)


def test_diagnostics_become_long_rows(folder: RunFolder, tmp_path: Path) -> None:
    folder.add_diagnostics([{"step": 3, "layer": 1, "values": {"entropy": 2.5, "load": [1.5, None]}}])
    rows = diagnostics(tmp_path).select("arm", "step", "layer", "name", "index", "value").rows()
    assert rows == [("moe", 3, 1, "entropy", None, 2.5), ("moe", 3, 1, "load", 0, 1.5), ("moe", 3, 1, "load", 1, None)]


def test_evaluations_name_their_run(folder: RunFolder, tmp_path: Path) -> None:
    row = {"suite": "loss", "task": "text", "metric": "bits per byte", "value": 1.5, "n": 3}
    folder.add_evaluations(5, "selection", [row])
    assert evaluations(tmp_path).row(0) == ("moe", "tuning", "one", 4, 5, "selection", *row.values())


def test_a_run_shows_the_last_evaluation_until_it_has_a_result(folder: RunFolder, tmp_path: Path) -> None:
    folder.add_metrics({"step": 5, "loss": 2.0, "selection_value": 1.5})
    folder.add_metrics({"step": 6, "loss": 1.9})
    assert runs(tmp_path)["selection_value"].to_list() == [1.5]


def test_a_finished_run_shows_its_result(folder: RunFolder, tmp_path: Path) -> None:
    folder.finish(Status.DONE, selection_value=1.25, report_value=1.5)
    assert runs(tmp_path).select("selection_value", "report_value").row(0) == (1.25, 1.5)


def test_a_run_that_changes_after_its_end_is_read_again(folder: RunFolder, tmp_path: Path) -> None:
    folder.finish(Status.CRASHED, "why")
    runs(tmp_path)
    folder.reopen()
    assert runs(tmp_path)["status"].to_list() == [Status.INTERRUPTED]


@pytest.fixture
def with_copy(folder: RunFolder, tmp_path: Path) -> pl.DataFrame:
    """Rows of two ended runs and a waiting one, whose copy is written; nothing is left in memory."""
    for name, loss in (("two", 2.0), ("three", 1.5)):
        run = RunFolder.create(tmp_path / "runs" / name, folder.record())
        run.add_metrics({"step": 5, "loss": loss, "selection_value": 1.5})
        run.add_metrics({"step": 6, "loss": float("nan")})
        run.finish(*((Status.CRASHED, "why") if name == "two" else (Status.DONE, None)))
    frame = runs(tmp_path)
    write_ended(tmp_path)
    forget()
    return frame


def forget() -> None:
    tables._contents.clear(), tables._ended.clear()


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it where no log of a run is to be read any more."""
    return lambda: monkeypatch.setattr(Points, "read", lambda path: pytest.fail(f"{path} is read"))


def test_a_copy_of_ended_runs_has_their_rows_and_points(
    with_copy: pl.DataFrame, tmp_path: Path, unread: Callable[[], None]
) -> None:
    expected = curves(tmp_path)
    forget()
    unread()
    assert_frame_equal(runs(tmp_path), with_copy)
    assert_frame_equal(curves(tmp_path), expected)


def test_a_run_that_changed_since_the_copy_is_read_again(with_copy: pl.DataFrame, tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "two").reopen()
    status = {row["run"]: row["status"] for row in runs(tmp_path).iter_rows(named=True)}
    assert status == {"one": Status.WAITING, "two": Status.INTERRUPTED, "three": Status.DONE}


@pytest.mark.parametrize("name", ["run.json", "result.json", "environment.json", "events.jsonl", "metrics.jsonl"])
def test_a_run_of_which_a_file_changed_since_the_copy_is_read_again(
    with_copy: pl.DataFrame, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "runs" / "two" / name
    path.write_text((path.read_text() if path.exists() else "{}") + "\n")
    assert_frame_equal(runs(tmp_path), with_copy)
    read = {run for run in ("two", "three") if str(tmp_path / "runs" / run / "run.json") in tables._contents}
    assert read == {"two"}


def test_a_copy_moves_with_its_folder(with_copy: pl.DataFrame, tmp_path: Path, unread: Callable[[], None]) -> None:
    for name in ("runs", tables.ENDED_RUNS):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "moved" / name)
    unread()
    folders = runs(tmp_path / "moved")["folder"].to_list()
    assert folders == [str(tmp_path / "moved" / "runs" / name) for name in ("one", "three", "two")]


@pytest.mark.parametrize("rows", ["", "{", "[1]", '[{"run": "two"}]', "3", "[]"])
def test_a_damaged_copy_is_not_read(with_copy: pl.DataFrame, tmp_path: Path, rows: str) -> None:
    path = tmp_path / tables.ENDED_RUNS
    if rows:
        pl.read_parquet(path).write_parquet(path, metadata={"version": tables.ENDED_VERSION, "runs": rows})
    else:
        path.write_bytes(b"PAR1")
    assert_frame_equal(runs(tmp_path), with_copy)


@pytest.mark.parametrize("version", [{}, {"version": "0"}])
def test_a_copy_of_another_version_is_not_read(
    with_copy: pl.DataFrame, tmp_path: Path, version: dict[str, str]
) -> None:
    path = tmp_path / tables.ENDED_RUNS
    changed = pl.read_parquet_metadata(path)["runs"].replace('"why"', '"another reason"')
    for metadata, expected in (({"version": tables.ENDED_VERSION}, "another reason"), (version, "why")):
        pl.read_parquet(path).write_parquet(path, metadata={**metadata, "runs": changed})
        forget()
        assert runs(tmp_path)["reason"].to_list() == [None, None, expected]


def test_a_copy_that_cannot_be_written_is_left_out(
    with_copy: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise pl.exceptions.ComputeError("No space left on device")

    (tmp_path / tables.ENDED_RUNS).unlink()
    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    write_ended(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "ended" in path.name]
    assert_frame_equal(runs(tmp_path), with_copy)


def points(**columns: list[float | None]) -> Points:
    return Points(pl.DataFrame({name: columns.get(name, [None] * 3) for name in POINT_SCHEMA}, schema=POINT_SCHEMA))


def test_a_line_has_finite_points_only() -> None:
    xs, ys = points(step=[1, 2, 3], loss=[2.0, float("nan"), 1.0]).line("step", "loss")
    assert (xs.tolist(), ys.tolist()) == ([1, 3], [2, 1])


def test_the_last_of_equal_points_counts() -> None:
    xs, ys = points(step=[1, 2, 2], loss=[3.0, 2.0, 1.0]).line("step", "loss")
    assert np.array_equal([xs, ys], [[1, 2], [3, 1]])


def steps(ends: list[int], losses: list[float], **columns: list[float | None]) -> pl.DataFrame:
    """Points after ``ends`` steps of ten tokens, with the mean loss over the steps since the point before."""
    given = {"step": ends, "tokens": [10 * end for end in ends], "loss": losses, **columns}
    return pl.DataFrame({name: given.get(name, [None] * len(ends)) for name in POINT_SCHEMA}, schema=POINT_SCHEMA)


def test_short_windows_of_a_loss_are_joined() -> None:
    frame = steps([5, 10, 13, 15, 20, 22], [5.0, 4.0, 3.0, 8.0, 2.0, 9.0])
    xs, ys = Points(frame).line("step", "loss")
    assert xs.tolist() == [5, 10, 15, 22]
    assert ys.tolist() == pytest.approx([5.0, 4.0, (3 * 3.0 + 2 * 8.0) / 5, (5 * 2.0 + 2 * 9.0) / 7])


def test_even_windows_and_other_columns_stay() -> None:
    even = steps([5, 10, 15], [5.0, 4.0, 3.0])
    assert Points(even).line("tokens", "loss")[1].tolist() == [5, 4, 3]
    short = steps([5, 10, 11], [5.0, 4.0, 3.0], gradient_norm=[1.0, 2.0, 3.0])
    assert Points(short).line("tokens", "gradient_norm")[1].tolist() == [1, 2, 3]


def test_a_thinned_run_keeps_its_evaluations_and_its_mean_loss() -> None:
    ends = list(range(1, 1001))
    losses = np.random.default_rng(0).uniform(1, 5, 1000)
    evaluated = [1.5 if end % 250 == 3 else None for end in ends]
    frame = steps(ends, losses.tolist(), selection_value=evaluated)
    thin = thinned(frame, 100)
    assert len(thin) <= 100 and thin["step"][-1] == 1000
    assert thin.filter(pl.col("selection_value").is_not_null())["step"].to_list() == [3, 253, 503, 753]
    weights = np.diff(thin["tokens"].to_numpy(), prepend=0)
    assert np.average(thin["loss"], weights=weights) == pytest.approx(losses.mean())
    assert thinned(frame, 1000) is frame


def test_what_is_recorded_is_known() -> None:
    assert {"step", "tokens", "loss"} == Points(steps([1, 2], [3.0, 2.0])).recorded


DAMAGED = ['{"a": 1}', "[1, 2]", '"text"', "null", '{"status": 3, "codes": 4, "paths": 5}', "{", "\0" * 9, "[" * 10_000]


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("file", ["run.json", "status.json", "result.json", "environment.json", "metrics.jsonl"])
def test_a_damaged_file_leaves_the_other_runs_alone(file: str, content: str, folder: RunFolder, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "runs" / "two", folder.record())
    whole.finish(Status.DONE, None, selection_value=1.0)
    (folder.path / file).write_text(content + "\n")
    rows = {row["run"]: row["selection_value"] for row in runs(tmp_path).iter_rows(named=True)}
    assert rows.get("two") == 1.0
    curves(tmp_path), evaluations(tmp_path), diagnostics(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_no_file(folder: RunFolder, tmp_path: Path) -> None:
    (folder.path / "result.json").mkdir()
    assert runs(tmp_path)["status"].to_list() == [Status.WAITING]


def test_lines_of_other_types_are_left_out(folder: RunFolder, tmp_path: Path) -> None:
    lines = ['{"step": "x", "loss": "NaN?"}', '{"step": 1, "loss": {}}', '{"values": 3, "layer": 1, "step": 2}']
    for name in ("metrics.jsonl", "diagnostics.jsonl", "evaluations.jsonl", "events.jsonl"):
        (folder.path / name).write_text("".join(f"{line}\n" for line in lines))
    assert len(runs(tmp_path)) == 1
    curves(tmp_path), evaluations(tmp_path), diagnostics(tmp_path)


@pytest.mark.parametrize("name", ["seed", "tokens", "steps", "parameters"])
def test_a_record_beyond_64_bits_leaves_the_other_runs_readable(tmp_path: Path, name: str) -> None:
    for run, fields in (("whole", {}), ("foreign", {name: 2**63})):
        folder = RunFolder.create(tmp_path / "runs" / run, RunRecord(arm="a"))
        (folder.path / "run.json").write_text(json.dumps({**RunRecord(arm="a").plain(), **fields}))
    assert runs(tmp_path)["run"].to_list() == ["whole"]


def test_log_lines_beyond_64_bits_are_damaged(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "a", RunRecord(arm="a"))
    folder.add_metrics({"step": 2**70, "loss": 1.0})
    folder.add_evaluations(1, "selection", [{"suite": "loss", "task": "t", "metric": "m", "value": 1.0, "n": 2**70}])
    folder.add_diagnostics([{"step": 1, "layer": 2**70, "values": {"a": 1.0}}])
    assert curves(tmp_path)["step"].to_list() == [None]
    assert evaluations(tmp_path)["n"].to_list() == [None]
    assert len(diagnostics(tmp_path)) == 0


def test_windows_with_a_loss_that_is_not_finite_have_no_mean() -> None:
    losses = [None if i in (100, 101) else 2.0 for i in range(300)]
    frame = pl.DataFrame(
        {"tokens": [100 * (i + 1) for i in range(300)], "loss": losses, "selection_value": [None] * 300}
    )
    found = thinned(frame.with_columns(pl.col("selection_value").cast(pl.Float64)), 100)["loss"]
    assert found.null_count() >= 1
    assert found.drop_nulls().to_list() == [2.0] * (len(found) - found.null_count())


def test_suites_that_failed_are_counted_by_reason() -> None:
    runs = pl.DataFrame(
        {"failed_suites": ["ruler: got 8. Give more.", None, "ruler: got 8. Give more.", "mad: no data"]}
    )
    assert failed_suites(runs) == [
        "Suites could not measure something in 2 of 4 runs: ruler: got 8. Give more.",
        "Suites could not measure something in 1 of 4 runs: mad: no data.",
    ]
