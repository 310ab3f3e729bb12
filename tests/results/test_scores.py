"""Tables of scores survive a kill at any moment, and never mix settings."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.results.scores import JOURNAL, SCORE_SCHEMA, ScoreTable, read_scores, truncate_scores

ROWS = pl.DataFrame(
    {
        "document": [None, 0, 1],
        "metric": ["accuracy"] * 3,
        "value": [0.5, 1.0, 0.0],
        "count": [2.0, 1.0, 1.0],
        "higher_is_better": [True] * 3,
        "upper": [1.0] * 3,
        "length": [None, 8, 16],
    }
)
BASIS = {"kind": "ruler", "lengths": (8, 16)}


@pytest.fixture
def table(tmp_path: Path) -> ScoreTable:
    table = ScoreTable(tmp_path, "ruler", BASIS)
    table.add(5, "report", "single", ROWS)
    return table


def test_a_task_is_found_by_step_split_and_name(table: ScoreTable, tmp_path: Path) -> None:
    again = ScoreTable(tmp_path, "ruler", BASIS)
    keys = [(5, "report", "single"), (6, "report", "single"), (5, "selection", "single"), (5, "report", "other")]
    assert [again.has(*key) for key in keys] == [True, False, False, False]


def test_rows_come_back_with_their_keys_and_labels(table: ScoreTable, tmp_path: Path) -> None:
    frame = read_scores(tmp_path)
    assert frame.columns == [*SCORE_SCHEMA, "length"]
    assert frame.row(1) == (5, "report", "ruler", "single", 0, "accuracy", 1.0, 1.0, True, 1.0, 8)


def test_other_settings_are_refused_with_the_difference(table: ScoreTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lengths\[1\]: 16 there, 32 here.*another name"):
        ScoreTable(tmp_path, "ruler", {**BASIS, "lengths": (8, 32)})


def test_a_folder_without_tables_has_the_columns(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "none").schema == SCORE_SCHEMA


def test_a_damaged_table_is_left_out(table: ScoreTable, tmp_path: Path) -> None:
    (tmp_path / "mad.parquet").write_bytes(b"PAR1")
    assert set(read_scores(tmp_path)["suite"]) == {"ruler"}


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "ruler.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"ruler\.parquet: got .a damaged file"):
        ScoreTable(tmp_path, "ruler", BASIS)


def test_a_journal_of_the_same_task_is_resumed(tmp_path: Path) -> None:
    table = ScoreTable(tmp_path, "ruler", BASIS)
    table.journal(5, "report", "single").add(3, {"text": "ä"})
    assert table.journal(5, "report", "single").get(3) == {"text": "ä"}


def test_a_torn_line_of_a_journal_is_measured_again(tmp_path: Path) -> None:
    table = ScoreTable(tmp_path, "ruler", BASIS)
    table.journal(5, "report", "single").add(1, 0.5)
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"key": "2", "val')
    journal = table.journal(5, "report", "single")
    journal.add(3, 0.25)
    assert [table.journal(5, "report", "single").get(key) for key in (1, 2, 3)] == [0.5, None, 0.25]


@pytest.mark.parametrize(
    ("step", "split", "task", "basis"),
    [
        (6, "report", "single", BASIS),
        (5, "selection", "single", BASIS),
        (5, "report", "multi", BASIS),
        (5, "report", "single", {}),
    ],
)
def test_a_journal_of_another_task_is_not(tmp_path: Path, step: int, split: str, task: str, basis: dict) -> None:  # type: ignore[type-arg]
    ScoreTable(tmp_path, "ruler", BASIS).journal(5, "report", "single").add(3, 1.0)
    assert ScoreTable(tmp_path, "ruler", basis).journal(step, split, task).get(3) is None


def test_scores_after_the_step_of_a_resumed_run_are_dropped(table: ScoreTable, tmp_path: Path) -> None:
    table.add(9, "selection", "single", ROWS)
    truncate_scores(tmp_path, 5)
    assert read_scores(tmp_path)["step"].unique().to_list() == [5]
    assert ScoreTable(tmp_path, "ruler", BASIS).has(5, "report", "single")


def test_a_journal_after_the_step_of_a_resumed_run_is_dropped(table: ScoreTable, tmp_path: Path) -> None:
    table.journal(9, "selection", "single").add(0, 1.0)
    truncate_scores(tmp_path, 5)
    assert not (tmp_path / JOURNAL).exists()


def test_a_table_that_is_empty_then_goes(table: ScoreTable, tmp_path: Path) -> None:
    truncate_scores(tmp_path, 4)
    assert list(tmp_path.glob("*.parquet")) == []
