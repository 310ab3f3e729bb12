"""`workbench show`: the run that a name means, and everything known about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import make_run, run_fields, write_corpus
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.run import AblationRun
from workbench.api.runs import details, show
from workbench.config import ConfigError
from workbench.status import Stage

Call = Callable[..., tuple[int, dict[str, Any]]]
ARCHIVES = Path(__file__).parents[2] / "results/ablations"
RUN = "confirmation-scmoe-24ce73d4-seed0"


@pytest.mark.parametrize(
    ("name", "results"),
    [
        (RUN, ARCHIVES),
        (RUN[:22], ARCHIVES),
        (f"scmoe/{RUN[:22]}", ARCHIVES),
        (ARCHIVES / "scmoe" / RUN[:22], "results"),
        (ARCHIVES / "scmoe/runs" / RUN, "results"),
    ],
)
def test_a_name_its_beginning_or_a_path_finds_a_run(name: str | Path, results: str | Path) -> None:
    assert details(name, results).row["run"] == RUN


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scmoe/confirmation-scmoe", ["fits 5 runs", f"scmoe/{RUN}", "and 1 more"]),
        ("scmoe/tunin-scmoe", ["Nearest valid name: 'tuning-scmoe-", "workbench table"]),
        ("scmoee/tuning", ["ablation: got 'scmoee'", "'scmoe'"]),
        ("scmoe", ["scmoe, an ablation", "expected one of its runs", "--runs --columns run"]),
        ("scmoe/", ["an ablation"]),
        ("", ["runs'; expected the folder of a run"]),
        ("nothing-like-it", ["got 'nothing-like-it'", "the name of one run in"]),
    ],
)
def test_an_unknown_or_ambiguous_name_is_one_error(name: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        details(name, ARCHIVES)
    assert len(error.value.problems) == 1 and all(part in str(error.value) for part in expected), str(error.value)


def test_an_archived_run_is_shown_as_far_as_it_is_kept() -> None:
    page = show(f"scmoe/{RUN}", ARCHIVES)
    assert page.baseline == "interleaved" and page.run["report_value"] == pytest.approx(2.255803)
    assert [row["field"] for row in page.differences] == ["model.shortcut_from", "training.learning_rate"]
    assert page.recorded["selection_value"] > 2 and (page.folder, page.log, page.seeds) == (None, None, None)


def test_the_terminal_has_every_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = CliRunner().invoke(cli.app, ["show", RUN, "--results", str(ARCHIVES)]).output
    assert printed.splitlines()[0] == "scmoe · confirmation · seed 0"
    for part in (
        "bits per byte)          2.2558",
        "differs from the baseline interleaved",
        "An archive keeps no logs.",
    ):
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.process
def test_a_run_of_an_ablation_has_everything(finished: AblationRun, call: Call) -> None:
    row = (
        finished.runs()
        .filter((finished.runs()["arm"] == "sliding") & (finished.runs()["seed"] == 1))
        .row(0, named=True)
    )
    code, answer = call("show", row["run"], "--results", finished.results)
    page = answer["data"]
    assert code == 0 and page == call("show", row["folder"])[1]["data"]
    changed = {each["field"]: (each["baseline"], each["run"]) for each in page["differences"]}
    assert changed["model.pattern"] == ("full", "sliding") and "seed 1" in page["compared"]
    assert page["seeds"] == {"init": 1, "order": 1, "other": 1}
    assert {"loss", "learning_rate", "selection_value"} <= set(page["recorded"])
    assert {each["split"] for each in page["measured"]} == {"selection", "report"}
    assert [each["event"] for each in page["events"]][:2] == ["assigned", "started"]
    assert "device" in page["environment"] and Path(page["checkpoint"]).is_dir() and page["log"] is not None
    printed = CliRunner().invoke(cli.app, ["show", row["folder"]]).output
    for part in ("Recorded, last values", "Measured, last values", "Events", "Environment", "\nLog\n", row["folder"]):
        assert part in printed


@pytest.mark.process
def test_report_values_stay_sealed(fields: dict[str, Any], tmp_path: Path) -> None:
    run = Ablation.parse(fields, tmp_path).create()
    made = Plan(run.files).create_run("full", Stage.CONFIRMATION, 0, {})
    for split in ("report", "selection"):
        made.add_evaluations(20, split, [{"suite": "text", "task": "text", "metric": "bits", "value": 2.0, "n": 3}])
    page = show(made.path)
    assert [row["split"] for row in page.measured] == ["selection"] and page.run["report_value"] is None
    (made.path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=f"workbench run {run.folder} --results {run.results}` writes it again"):
        show(made.path)


def test_a_run_of_its_own_has_no_baseline(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/mine", tmp_path / "cache", run_fields(write_corpus(tmp_path / "corpus")))
    page = show("mine", tmp_path)
    assert page.baseline is None and page.compared == "A run of its own has no baseline." and page.log is None
    assert page.folder == str(tmp_path / "runs/mine") == show("runs/mi", tmp_path).folder
    printed = CliRunner().invoke(cli.app, ["show", "mine", "--results", str(tmp_path)]).output
    assert "There is no log: the run has not started" in printed and "Configuration" not in printed


def test_the_log_is_as_long_as_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs/mine", tmp_path / "cache", run_fields(write_corpus(tmp_path / "corpus")))
    (run.path / "log.txt").write_text("".join(f"line {i}\n" for i in range(50)))
    assert show(run.path).log == [f"line {i}" for i in range(30, 50)]
    assert show(run.path, log_lines=2).log == ["line 48", "line 49"] and show(run.path, log_lines=0).log == []


def test_a_damaged_run_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/run.json").write_text("{")
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        show("mine", tmp_path)


def test_without_an_ablation_no_list_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no ablation in") as error:
        details("mine", tmp_path)
    assert "workbench table" not in str(error.value)
