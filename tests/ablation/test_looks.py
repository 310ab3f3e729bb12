"""Looks are counted by shared documents; known runs make a verdict exploratory, new seeds do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import confirm

from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.looks import launch_table, verify
from workbench.ablation.looks import Look, Run, look_at
from workbench.ablation.run import AblationRun
from workbench.config import ConfigError
from workbench.results.ledger import FILE, Ledger, Opening, documents_fingerprint, history
from workbench.status import Stage

Make = Callable[..., Ablation]
ARMS = {"full": "F", "gdn": "G", "kda": "K"}
"""Arm -> setting, tuned or not."""


def enter(
    results: Path, name: str, documents: str, arms: tuple[str, ...], seeds: tuple[int, ...], at: str = "2026-01-01"
) -> None:
    """Openings of one launch on documents named by letters."""
    for arm in arms:
        for seed in seeds:
            setting = ARMS[arm]
            opening = Opening(
                name, name, f"{arm}-{seed}", arm, setting, seed, documents_fingerprint(documents), setting, at=at
            )
            Ledger(results / FILE).open(opening, list(documents))


def look(results: Path, documents: str, arms: tuple[str, ...], seeds: tuple[int, ...]) -> Look:
    """What the ledger knows before a launch."""
    runs = [Run(arm, ARMS[arm], seed) for arm in arms for seed in seeds]
    return look_at(history(results), "new", list(documents), {arm: ARMS[arm] for arm in arms}, runs)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three launches: two on documents a to d, one of them with other arms, and one on e and f."""
    enter(tmp_path, "first", "abcd", ("full", "gdn"), (0, 1, 2), "2026-01-01")
    enter(tmp_path, "second", "cd", ("full", "kda"), (5, 6), "2026-01-02")
    enter(tmp_path, "third", "ef", ("full", "gdn"), (7,), "2026-01-03")
    return tmp_path


@pytest.mark.parametrize(("documents", "number"), [("abcd", 3), ("ab", 2), ("dx", 3), ("ef", 2), ("xy", 1)])
def test_a_look_counts_launches_that_opened_one_of_its_documents(results: Path, documents: str, number: int) -> None:
    assert look(results, documents, ("full", "gdn"), (8, 9)).number == number


def test_earlier_looks_are_named_with_what_they_share(results: Path) -> None:
    earlier = look(results, "bcd", ("full", "gdn"), (8, 9)).earlier
    assert [(found.ablation, found.shared) for found in earlier] == [("first", 3), ("second", 2)]


def test_known_seeds_make_a_verdict_exploratory(results: Path) -> None:
    found = look(results, "abcd", ("full", "gdn"), (2, 3))
    assert found.exploratory == ["known before: seed 2 of full (in first); seed 2 of gdn (in first)"]


def test_known_seeds_are_known_on_other_documents_too(results: Path) -> None:
    assert look(results, "xy", ("full", "gdn"), (0,)).exploratory


def test_new_seeds_of_the_same_arms_are_a_confirmation(results: Path) -> None:
    assert not look(results, "abcd", ("full", "gdn"), (8, 9)).exploratory


def test_other_arms_on_the_same_documents_are_no_repeat(results: Path) -> None:
    assert look(results, "ab", ("full", "kda"), (8, 9)).repeats == {}


def test_a_repeat_states_the_error_rate_of_all_tests(results: Path) -> None:
    enter(results, "fourth", "ab", ("full", "gdn"), (3, 4), "2026-01-04")
    found = look(results, "ab", ("full", "gdn"), (8, 9))
    assert found.repeats == {"gdn": 2}
    (sentence,) = (line for line in found.sentences(0.05) if line.startswith("Test 3"))
    assert "0.143" in sentence and "0.0167" in sentence  # 1 - 0.95^3 and 0.05 / 3


def test_what_is_opened_later_was_not_known(results: Path) -> None:
    past = history(results)
    runs = [Run("full", "F", 7, position=6)]  # before the opening of "third"
    assert look_at(past, "new", list("ef"), {"full": "F"}, runs).number == 1
    assert not look_at(past, "new", list("ef"), {"full": "F"}, runs).known


# -- through an ablation ------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"tuning": {"trials": 0}, "confirmation": {"seeds": [0, 1]}}


@pytest.fixture
def opened(ablation: Make) -> AblationRun:
    """An ablation that opened its report documents with two seeds of two arms."""
    run = ablation(**SMALL).create()
    confirm(run)
    return run


@pytest.mark.process
class TestThroughAnAblation:
    """Real runs of a second each."""

    def test_the_first_look_is_a_confirmation(self, opened: AblationRun) -> None:
        verdict = opened.verdict()
        assert verdict is not None and verdict.exploratory is None
        assert any(line.startswith("Look 1 at these 3 report documents;") for line in verdict.declared)
        assert launch_table(opened.results).select("ablation", "runs", "seeds", "documents", "look").rows() == [
            ("test", 4, "0, 1", 3, 1)
        ]

    def test_the_same_seeds_under_another_name(self, opened: AblationRun, ablation: Make) -> None:
        announced: list[str] = []
        again = ablation("again", **SMALL).create(announced.append)
        told = " ".join(announced)
        assert "Look 2" in told and "opened once before: test" in told
        assert "seeds 0, 1 of full (in test); seeds 0, 1 of sliding (in test)" in told
        assert again.record.announced == [line for line in announced if line.endswith(".")]
        confirm(again)
        verdict = again.verdict()
        assert verdict is not None and "known before: seeds 0, 1 of full" in str(verdict.exploratory)
        first = opened.verdict()
        assert first is not None and first.exploratory is None, "what is opened later changes no earlier verdict"

    def test_new_seeds_under_another_name(self, opened: AblationRun, ablation: Make) -> None:
        again = ablation("again", tuning={"trials": 0}, confirmation={"seeds": [7, 8]}).create(lambda line: None)
        confirm(again, (7, 8))
        verdict = again.verdict()
        assert verdict is not None and verdict.exploratory is None
        assert any(line.startswith("Test 2 of sliding against the baseline") for line in verdict.declared)

    def test_a_folder_that_is_removed_and_launched_again(self, opened: AblationRun, ablation: Make) -> None:
        shutil.rmtree(opened.folder)
        with pytest.warns(UserWarning, match="Known before"):
            again = ablation(**SMALL).create()
        confirm(again)
        look = again.look()
        assert look is not None and (look.number, len(look.known)) == (2, 4)

    def test_a_damaged_record_continues_its_launch(self, opened: AblationRun, ablation: Make) -> None:
        (opened.folder / "ablation.json").write_text("")
        assert ablation(**SMALL).create().record.launch == opened.record.launch

    def test_documents_match_whatever_the_tokenizer(self, opened: AblationRun, ablation: Make) -> None:
        base = {"model": {"vocabulary": 290}, "data": {"evaluation_bytes": 100}}
        look = ablation("other", base=base, tuning={"trials": 0}).look()
        assert look.earlier[0].shared == 3 and not look.known

    def test_how_often_a_run_is_logged_is_no_new_draw(self, opened: AblationRun, ablation: Make) -> None:
        look = ablation("other", base={"training": {"log_every": 7, "evaluations": 1}}, **SMALL).look()
        assert len(look.known) == 4

    def test_a_changed_ledger_makes_verdicts_exploratory(self, opened: AblationRun) -> None:
        path = opened.results / FILE
        path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 9', 1))
        assert "line 3" in str(opened.verdict().exploratory)  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="line 3"):
            verify(opened.results)

    def test_a_ledger_cut_at_its_end(self, opened: AblationRun) -> None:
        path = opened.results / FILE
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        assert "1 of the 4 openings of this ablation are gone" in str(opened.verdict().exploratory)  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="1 of the 4 openings"):
            verify(opened.results)

    def test_an_archive_keeps_its_look_and_enters_it_beside(self, opened: AblationRun, tmp_path: Path) -> None:
        from workbench.ablation.analysis.archive import archive

        archived = AblationRun(archive(opened, tmp_path / "archives" / "test"))
        assert archived.look() == opened.look()
        assert archived.verdict() == opened.verdict()
        assert len(Ledger(tmp_path / "archives" / FILE).openings) == 4
        assert history(tmp_path).openings == history(opened.results).openings

    def test_report_values_stay_sealed_until_the_end(self, opened: AblationRun) -> None:
        opened.files.mark_finished(False)
        run = AblationRun(opened.folder)
        assert run.runs()["report_value"].null_count() == 4 and not list(run.reports())
        opened.files.mark_finished(True)
        assert run.runs()["report_value"].null_count() == 0 and len(list(run.reports())) == 4

    def test_runs_of_different_code_are_a_stated_deviation(self, opened: AblationRun) -> None:
        run = opened.files.run_folders(Stage.CONFIRMATION)[0]
        run.add_to_environment(codes=["1+sources.12345678"])
        run.set_status(run.status()["status"])
        verdict = opened.verdict()
        assert verdict is not None and "different code" in str(verdict.exploratory)
        assert any("1+sources.12345678: confirmation-full" in line for line in verdict.declared)

    def test_a_run_that_was_run_again_is_named(self, opened: AblationRun) -> None:
        run = next(run for run in opened.files.run_folders(Stage.CONFIRMATION) if run.record().seed == 0)
        run.event("reopened", was="crashed", reason="bus error")
        run.set_status(run.status()["status"])
        verdict = opened.verdict()
        assert verdict is not None
        assert "Run again after a failure: seed 0 of full (crashed: bus error; then done)." in verdict.declared
