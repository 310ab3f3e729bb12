"""Suites are measured task by task; a killed evaluation loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
from helpers import small_model

from workbench.config import ConfigError, require
from workbench.evaluation import Conditions, Measured, Score, Settings, Suite, SuiteConfig, measure_suite, suites
from workbench.evaluation.measure import check_suites
from workbench.results.scores import JOURNAL, read_scores

CONDITIONS = Conditions(Settings(2, 8), vocabulary=300)
DOCUMENTS = 4


class Counting(Suite):
    """Two tasks of four documents; counts what it measures."""

    class Config(SuiteConfig):
        """Counts."""

        kind: Literal["counting"] = "counting"
        missing: bool = False
        documents: int = DOCUMENTS

    measured: list[tuple[str, int]] = []

    def tasks(self, conditions: Conditions) -> list[str]:
        require(not self.config.missing, "missing", got="no such file", expected="a file")
        return ["one", "two"]

    def measure(self, model: Any, task: str, conditions: Conditions, journal: Any) -> Measured:
        values = []
        for document in range(self.config.documents):
            value = journal.get(document)
            if value is None:
                self.measured.append((task, document))
                value = journal.add(document, float(document))
            values.append(value)
        return Measured([Score("errors per answer", values)], pl.DataFrame({"length": range(self.config.documents)}))


@pytest.fixture(autouse=True)
def counting() -> Iterator[None]:
    suites.register(Counting)
    Counting.measured.clear()
    yield
    suites.unregister("counting")


def measure(folder: Path, on_document: Any = lambda: None, **fields: Any) -> int:
    config = suites.parse({"kind": "counting", **fields})
    return measure_suite(small_model(vocabulary=300), config, CONDITIONS, folder, 7, on_document)


def test_every_task_has_its_documents(tmp_path: Path) -> None:
    assert measure(tmp_path) == 2
    rows = read_scores(tmp_path).select("task", "document", "value", "length").rows()
    one = [("one", None, 1.5, None), *(("one", d, float(d), d) for d in range(DOCUMENTS))]
    assert rows == [*one, *(("two", *row[1:]) for row in one)]


def test_a_task_that_cannot_be_measured_holds_up_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_all = Counting.measure

    def measure_two(self: Any, model: Any, task: str, *more: Any) -> Measured:
        require(task != "one", "lengths", got=64, expected="at least 80 tokens")
        return of_all(self, model, task, *more)

    monkeypatch.setattr(Counting, "measure", measure_two)
    with pytest.raises(ConfigError, match=r"one.lengths: got 64; expected at least 80 tokens"):
        measure(tmp_path)
    assert read_scores(tmp_path)["task"].unique().to_list() == ["two"] and not (tmp_path / JOURNAL).exists()
    monkeypatch.setattr(Counting, "measure", of_all)
    assert measure(tmp_path) == 1 and len(Counting.measured) == 2 * DOCUMENTS


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    measure(tmp_path)
    assert measure(tmp_path) == 0 and len(Counting.measured) == 2 * DOCUMENTS


@pytest.mark.parametrize("kill_after", range(1, 2 * DOCUMENTS + 2))
def test_killed_after_any_document_it_resumes_there(tmp_path: Path, kill_after: int) -> None:
    calls = iter(range(1, 100))

    def kill() -> None:
        if next(calls) == kill_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, kill)
    measure(tmp_path)
    assert Counting.measured == [(task, d) for task in ("one", "two") for d in range(DOCUMENTS)]
    assert len(read_scores(tmp_path)) == 2 * (DOCUMENTS + 1) and not (tmp_path / JOURNAL).exists()


def test_killed_between_table_and_journal_it_resumes_after_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.results.scores.TaskJournal.remove", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(tmp_path)
    monkeypatch.undo()
    assert measure(tmp_path) == 1 and len(Counting.measured) == 2 * DOCUMENTS


def test_a_suite_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no documents"):
        measure(tmp_path, documents=0)


def test_other_settings_need_another_name(tmp_path: Path) -> None:
    measure(tmp_path)
    with pytest.raises(ConfigError, match="documents: 4 there, 3 here"):
        measure(tmp_path, documents=3)
    assert measure(tmp_path, documents=3, name="shorter") == 2


def test_when_and_split_are_no_settings(tmp_path: Path) -> None:
    measure(tmp_path)
    assert measure(tmp_path, when=[3, "end"], split="selection") == 0


def test_missing_data_are_found_before_anything_is_measured() -> None:
    configs = [suites.parse("counting"), suites.parse({"kind": "counting", "missing": True})]
    with pytest.raises(ConfigError, match=r"evaluation\[1\]\.missing: got 'no such file'"):
        check_suites(configs, CONDITIONS)


@pytest.mark.parametrize("when", ["later", [], 0])
def test_a_moment_is_a_step_or_the_end(when: Any) -> None:
    with pytest.raises(ConfigError, match="when"):
        suites.parse({"kind": "counting", "when": when})


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a b"])
def test_a_name_is_a_file_name(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        suites.parse({"kind": "counting", "name": name})


def test_the_mode_of_the_model_is_restored(tmp_path: Path) -> None:
    model = small_model(vocabulary=300).train()
    measure_suite(model, suites.parse("counting"), CONDITIONS, tmp_path, 1)
    assert model.training
