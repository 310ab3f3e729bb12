"""`workbench table`: arms and runs of ablations and archives, at the width of a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from workbench import cli
from workbench.api.results import listing
from workbench.cli import output
from workbench.cli.output import print_table
from workbench.cli.results import print_rows

ARCHIVES = Path(__file__).parents[2] / "results" / "ablations"


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def table(*arguments: object, code: int = 0) -> str:
    printed = CliRunner().invoke(cli.app, ["table", *map(str, arguments)])
    assert printed.exit_code == code, printed.output
    return printed.output


def test_one_line_an_arm() -> None:
    lines = table(ARCHIVES / "scmoe").splitlines()
    assert lines[0].startswith("scmoe: archive, 24 runs; report and selection in bits per byte")
    assert "stage confirmation" in lines[1]
    assert [line.split()[0] for line in lines[2:6]] == ["arm", "interleaved", "scmoe", "strict"]
    assert lines[4].split() == ["scmoe", "5", *["2.2570", "±", "0.0061", "2.1969", "±", "0.0060"], "0.00289", "29", "s"]


@pytest.mark.parametrize("options", [[], ["--runs"]])
def test_every_archive_fits_eighty_columns(options: list[str]) -> None:
    lines = table(ARCHIVES, *options).splitlines()
    assert len(lines) > 80 and max(map(len, lines)) <= 80


def test_archives_are_named_by_the_folder_of_results() -> None:
    assert table("needle", "--results", ARCHIVES) == table(ARCHIVES / "needle")


def test_runs_are_filtered_and_columns_chosen() -> None:
    where = ["--runs", "--where", "strict confirmation report<2.3", "--columns", "seed,lr"]
    lines = table(ARCHIVES / "scmoe", *where).splitlines()
    assert [line.split() for line in lines[1:-1]] == [["seed", "learning", "rate"], *([s, "0.00272"] for s in "134")]


def test_arms_are_filtered() -> None:
    assert "full-muon" in table(ARCHIVES / "muon", "--where", "lr>0.01") and "adamw" not in table(
        ARCHIVES / "muon", "--where", "lr>0.01"
    )


def test_nothing_found_is_an_error() -> None:
    assert "No row satisfies 'nothing'" in table(ARCHIVES / "needle", "--where", "nothing", code=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["needl", "--results", ARCHIVES], "Nearest valid name: 'needle'"),
        ([ARCHIVES / "needle", "--where", "speed>1"], "filter: got 'speed'; expected a column"),
        ([ARCHIVES / "needle", "--columns", "arm,speed"], "columns: got 'speed'; expected a column"),
    ],
)
def test_mistakes_are_named(arguments: list[object], expected: str) -> None:
    result = CliRunner().invoke(cli.app, ["table", *map(str, arguments)])
    assert expected in str(result.exception)


def test_csv_has_every_run_and_column() -> None:
    frame = pl.read_csv(io.StringIO(table(ARCHIVES / "scmoe", "--csv", "--where", "tuning")))
    assert len(frame) == 9 and {"ablation", "hyperparameters", "run"} <= set(frame.columns)


def test_json_has_runs_and_arms() -> None:
    data = json.loads(table(ARCHIVES / "scmoe", "--json"))["data"]
    assert len(data["rows"]) == 24 and [row["runs"] for row in data["arms"]] == [5, 5, 5]
    assert data["arms"][0]["ablation"] == "scmoe" and output.ANSWERS["table"].__name__ == "RunTable"


def test_archives_are_mentioned_where_nothing_was_launched(tmp_path: Path) -> None:
    folder = tmp_path / "ablations" / "one"
    folder.mkdir(parents=True)
    (folder / "ablation.json").write_text("{}")
    assert "workbench table" in table("--results", tmp_path, code=1)


def test_a_column_that_an_ablation_lacks_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    (part,) = listing(ARCHIVES, ["needle"])
    print_rows(part, False, ["arm", "window"])
    lines = capsys.readouterr().out.splitlines()
    assert ["arm", "window"] in [line.split() for line in lines] and "full" in lines


def test_columns_without_room_follow_in_further_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.cli.output.console._width", 60)
    print_table(["task", *(f"arm {n}" for n in range(12))], [["needle", *(f"0.{n:04}" for n in range(12))]])
    printed = capsys.readouterr().out
    assert printed.count("needle") == printed.count("task") == 3
    assert all(f"arm {n} " in printed and f"0.{n:04} " in printed for n in range(12))


def test_a_table_with_room_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["task", "arm"], [["needle", "0.5"]])
    assert capsys.readouterr().out.count("needle") == 1
