"""Extending, naming, annotating, exporting and deleting ablations, from the shell and from Python."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields, write_corpus

import workbench as wb
from workbench.ablation.execution.extension import unused_seeds
from workbench.ablation.run import AblationRun
from workbench.ablation.verdict.measurements import looks_taken
from workbench.ablation.verdict.sequential import decided
from workbench.api.lifecycle import HEAD
from workbench.config import ConfigError
from workbench.files import read_json, write_json

Call = Callable[..., tuple[int, dict[str, Any]]]
ARCHIVES = Path(__file__).parents[2] / "results/ablations"
WAIT = 500


@pytest.fixture
def mine(finished: AblationRun, tmp_path: Path) -> AblationRun:
    """A copy of the finished ablation, with the cache and the ledger beside it."""
    shutil.copytree(finished.results, tmp_path / "results", symlinks=True)
    return AblationRun(tmp_path / "results" / finished.name)


def identity_of(run: AblationRun) -> tuple[str, str]:
    return run.identity, read_json(run.folder / "ablation.json")["registration"]["hash"]


@pytest.mark.process
def test_an_undeclared_extension_is_exploratory_and_says_why(mine: AblationRun, call: Call) -> None:
    code, answer = call("extend", mine.folder, "--seeds", "+2")
    assert code == 2 and answer["error"]["field"] == "deviation"
    assert AblationRun(mine.folder).seeds == [0, 1] and AblationRun(mine.folder).finished
    code, answer = call("extend", mine.folder, "--seeds", "+2", "--why", "the interval is wide")
    assert code == 0 and answer["data"]["seeds"] == [2, 3] and not answer["data"]["planned"]
    verdict = answer["data"]["launch"]["verdict"]["verdict"]
    assert "the interval is wide" in verdict["exploratory"]
    assert [row["seeds"] for row in verdict["rows"]] == [4, 4]
    again = AblationRun(mine.folder)
    assert "the interval is wide" in str(again.verdict()) and again.seeds == [0, 1, 2, 3]
    assert [deviation["planned"] for deviation in again.deviations()] == [False]


@pytest.mark.process
def test_the_file_of_an_extended_ablation_names_the_command_that_resumes(
    mine: AblationRun, fields: dict[str, Any], call: Call, tmp_path: Path
) -> None:
    mine.extend([7], "the interval is wide")
    write_json(tmp_path / "sweep.yaml", fields)
    code, answer = call("run", tmp_path / "sweep.yaml", "--results", mine.results, "--detach")
    error = answer["error"]
    assert code == 2 and error["field"] == "confirmation.seeds" and "the seeds [7] too" in error["expected"]
    assert "launched or extended" in error["expected"]
    command = error["hint"].split("`")[1]
    assert "seeds: [0, 1, 7]" in error["hint"] and command.startswith(f"workbench run {mine.folder}")
    code, answer = call(*command.split()[1:])
    assert code == 0 and answer["data"]["status"]["state"] == "finished"
    assert AblationRun(mine.folder).seeds == [0, 1, 7] and len(AblationRun(mine.folder).deviations()) == 1
    with_all = {**fields, "confirmation": {"seeds": [0, 1, 7]}}
    assert wb.Ablation.parse(with_all, mine.results).create().finished


@pytest.fixture(scope="session")
def anytime(tmp_path_factory: pytest.TempPathFactory) -> AblationRun:
    """A finished anytime-valid ablation whose arm, equal to the baseline, is undecided."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    fields = ablation_fields(
        corpus,
        "anytime",
        arms={"full": {}, "wide": {"model.mixers.full.rotary": False}},
        tuning={"trials": 0, "space": {}},
        confirmation={"seeds": [0, 1, 2, 3]},
        protocol={"stopping": {"anytime": True}},
    )
    run = wb.Ablation.parse(fields, tmp_path_factory.mktemp("anytime")).launch()
    assert run.wait(WAIT), (run.folder / "workers" / "log.txt").read_text()
    return AblationRun(run.folder)


@pytest.mark.process
def test_a_declared_sequential_design_is_extended_without_a_reason(anytime: AblationRun) -> None:
    assert not decided(looks_taken(anytime.files))
    deviation = anytime.extend(1)
    assert deviation.planned
    anytime.start_workers()
    assert anytime.wait(WAIT)
    verdict = anytime.verdict()
    assert verdict is not None and "deviation" not in (verdict.exploratory or "")
    assert max(row.seeds for row in verdict.rows) == 5 and anytime.seeds == [0, 1, 2, 3, 4]


def test_what_cannot_be_extended_says_why(mine: AblationRun) -> None:
    with pytest.raises(ConfigError, match="an archive"):
        AblationRun(ARCHIVES / "growth").extend(1, "more")
    with pytest.raises(ConfigError, match="none of"):
        mine.extend([0], "again")
    with pytest.raises(ConfigError, match="none of the confirmation seeds"):
        mine.extend([1000], "again")
    looks = mine.record.config.changed(protocol={"stopping": {"looks": [4]}}, confirmation={"seeds": [0, 1, 2, 3]})
    mine.files.write_record(mine.record.changed(config=looks, canonical=looks.canonical()))
    with pytest.raises(ConfigError, match="group-sequential"):
        AblationRun(mine.folder).extend(1, "more")


def test_new_seeds_are_those_that_nobody_has_opened(mine: AblationRun) -> None:
    assert unused_seeds(mine.results, [3], 3) == (2, 4, 5), "0 and 1 were opened"


def test_names_tags_and_notes_change_no_hash(mine: AblationRun, call: Call) -> None:
    before = identity_of(mine)
    code, answer = call("rename", mine.folder, "sliding=Window of 4")
    assert code == 0 and answer["data"]["names"] == {"full": "full", "sliding": "Window of 4"}
    call("annotate", mine.folder, "The window is too small.", "--tag", "negative", "--tag", "window")
    code, answer = call("annotate", mine.folder, "--untag", "window")
    assert answer["data"]["tags"] == ["negative"]
    assert [note["text"] for note in answer["data"]["notes"]] == ["The window is too small."]
    run = AblationRun(mine.folder)
    assert identity_of(run) == before and run.deviations() == []
    assert call("verdict", mine.folder)[1]["data"]["names"]["sliding"] == "Window of 4"
    _, rows = call("sql", "select name, tags from verdicts join ablations using (ablation)", "--results", run.results)
    assert rows["data"]["rows"][1] == {"name": "Window of 4", "tags": ["negative"]}
    run.rename({"sliding": ""})
    assert run.names == {"full": "full", "sliding": "sliding"}


def test_a_name_that_is_taken_or_of_no_arm_is_refused(mine: AblationRun) -> None:
    with pytest.raises(ConfigError, match="a different name"):
        mine.rename({"sliding": "full"})
    with pytest.raises(ConfigError, match="Nearest valid name: 'sliding'"):
        mine.rename({"slidin": "x"})


def test_damaged_notes_are_not_overwritten(mine: AblationRun) -> None:
    (mine.folder / "notes.json").write_text("{")
    with pytest.raises(ConfigError, match=r"notes\.json"):
        mine.annotate("more")
    assert (mine.folder / "notes.json").read_text() == "{"


@pytest.mark.process
def test_the_best_run_is_exported(mine: AblationRun, call: Call, tmp_path: Path) -> None:
    verdict = mine.verdict()
    assert verdict is not None
    winner = min(verdict.rows, key=lambda row: row.value or 9.0).arm
    assert f"-{winner}-" in mine.best().name and "-sliding-" in mine.best("sliding").name
    code, answer = call("export", mine.folder, tmp_path / "best", "--best")
    assert code == 0 and read_json(Path(answer["data"]["path"]) / "config.json")
    code, answer = call("export", mine.folder, tmp_path / "other")
    assert code == 2 and answer["error"]["field"] == "--best"
    code, answer = call("export", mine.folder, tmp_path / "other", "--best", "--arm", "slide")
    assert code == 2 and "sliding" in answer["error"]["hint"]


def test_an_ablation_is_deleted_and_the_ledger_stays(mine: AblationRun, call: Call) -> None:
    ledger = (mine.results / "ledger.jsonl").read_bytes()
    code, answer = call("rm", mine.folder)
    assert code == 2 and mine.exists and answer["error"]["field"] == "--yes"
    code, answer = call("rm", mine.folder, "--yes")
    assert code == 0 and answer["data"]["runs"] == 4
    assert not mine.folder.exists() and (mine.results / "ledger.jsonl").read_bytes() == ledger
    assert {path.name for path in mine.results.iterdir()} == {"cache", "ledger.jsonl", "ledger.lock"}


def test_what_a_refused_launch_has_left_is_deleted(fields: dict[str, Any], call: Call, tmp_path: Path) -> None:
    nowhere = {"data": {"corpus": {"kind": "files", "path": str(tmp_path / "nowhere")}}}
    refused = {**fields, "name": "odd", "base": fields["base"] | nowhere}
    with pytest.raises(ConfigError):
        wb.Ablation.parse(refused, tmp_path).create()
    assert call("verdict", tmp_path / "odd")[0] == 2
    code, answer = call("rm", tmp_path / "odd", "--yes")
    assert code == 0 and answer["data"]["runs"] == 0 and not (tmp_path / "odd").exists()


def test_a_running_ablation_is_not_deleted(mine: AblationRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AblationRun, "workers", lambda run: [1])
    with pytest.raises(ConfigError, match="1 worker"):
        mine.delete()
    assert mine.exists


def test_the_journal_has_every_ablation(mine: AblationRun, call: Call) -> None:
    mine.annotate("Nothing came of it.", tags=["window"])
    mine.rename({"sliding": "Window of 4"})
    code, answer = call("journal", mine.results)
    text = Path(answer["data"]["path"]).read_text()
    assert code == 0 and text.startswith(HEAD) and text == answer["data"]["text"]
    assert "## test" in text and "**Window of 4**: undecided." in text and "> " in text and "window" in text
    assert call("journal", mine.results)[0] == 0, "it is written again"
    Path(answer["data"]["path"]).write_text("my own notes")
    code, answer = call("journal", mine.results)
    assert code == 2 and (mine.results / "JOURNAL.md").read_text() == "my own notes"


def test_the_journal_of_archives_has_negative_results(tmp_path: Path, call: Call) -> None:
    for name in ("growth", "wisca"):
        shutil.copytree(ARCHIVES / name, tmp_path / name)
    text = call("journal", tmp_path)[1]["data"]["text"]
    assert text.count("## ") == 2 and "undecided" in text and "equivalent" in text
