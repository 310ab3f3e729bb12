"""Every command answers with one JSON object that its schema describes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from helpers import run_fields, write_corpus
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.run import AblationRun
from workbench.api.answers import Error, Status, VerdictAnswer, error_schema, plain, schema_of
from workbench.cli import output
from workbench.files import write_json

Call = Callable[..., tuple[int, dict[str, Any]]]
ROOT = Path(__file__).parents[2]
ARCHIVES = ROOT / "results/ablations"


def test_every_command_has_a_schema(call: Call) -> None:
    code, answer = call("schema")
    names = {
        str(command.name or command.callback.__name__).replace("_", "-") for command in cli.app.registered_commands
    }  # type: ignore[union-attr]
    assert code == 0 and set(answer["data"]["schemas"]) == {*names, "error"}
    for schema in answer["data"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    "command",
    [
        ["variants"],
        ["verdict", ARCHIVES / "growth"],
        ["status", ARCHIVES / "growth"],
        ["transfer", ARCHIVES / "transfer"],
        ["ledger", ARCHIVES],
        ["table", "--results", ARCHIVES],
        ["show", "scmoe/confirmation-scmoe-24", "--results", ARCHIVES],
        ["parametrisation", ROOT / "sweeps/runs/mup_tiny.yaml"],
        ["plan", ROOT / "sweeps/quickstart.yaml", "--sd", "0.01"],
        ["schema", "verdict"],
    ],
    ids=lambda command: command[0],
)
def test_an_answer_is_valid_by_its_schema(command: list[Any], call: Call) -> None:
    code, answer = call(*command)
    assert code == 0 and answer["command"] == command[0]
    jsonschema.validate(answer, schema_of(command[0], output.ANSWERS[command[0]]))


@pytest.mark.process
def test_a_finished_ablation_answers(finished: AblationRun, fields: dict[str, Any], call: Call, tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.yaml", fields)
    code, answer = call("run", tmp_path / "sweep.yaml", "--results", finished.results)
    assert code == 0 and Path(answer["data"]["report"]).is_file()
    status = answer["data"]["status"]
    assert (status["state"], status["ended"], status["planned"], status["failed"]) == ("finished", 4, 4, 0)
    assert status["elapsed_seconds"] > 0 and "4 of 4 runs ended" in status["line"]
    words = [row["verdict"] for row in answer["data"]["verdict"]["verdict"]["rows"]]
    assert words == ["baseline", "undecided"]
    code, run = call("status", next((finished.folder / "runs").iterdir()))
    assert code == 0 and (run["data"]["state"], run["data"]["ended"]) == ("done", 20)


def test_a_mistake_has_its_field_and_exit_code_2(call: Call, tmp_path: Path) -> None:
    code, answer = call("cost", ROOT / "sweeps/quickstart.yaml", "margin=-1", "alpha=2", "--results", tmp_path)
    jsonschema.validate(answer, error_schema())
    error = answer["error"]
    assert code == 2 and error["kind"] == "mistake" and error["field"] in ("margin", "alpha")
    assert {problem["field"] for problem in error["problems"]} == {"margin", "alpha"}
    assert error["got"] and error["expected"]


def test_a_wrong_command_line_is_json_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["workbench", "verdict", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert ended.value.code == 2 and error["kind"] == "usage" and "folder" in error["message"].lower()


def test_a_machine_that_refuses_is_exit_code_3(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/full")

    monkeypatch.setattr("workbench.api.ablations.status", full)
    code, answer = call("status", ARCHIVES / "growth")
    assert code == 3 and (answer["error"]["kind"], answer["error"]["field"]) == ("machine", "/full")


def test_an_error_of_the_workbench_is_json_and_a_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.api.ablations.status", lambda folder: 1 / 0)
    code, answer = call("status", ARCHIVES / "growth")
    assert code == 1 and answer["error"]["kind"] == "internal" and "ZeroDivisionError" in answer["error"]["message"]


def test_a_table_of_no_runs_is_exit_code_1(call: Call, tmp_path: Path) -> None:
    code, answer = call("table", "--results", tmp_path)
    assert code == 1 and answer["data"]["rows"] == []


@pytest.mark.parametrize(("ends", "expected"), [(0, {"data": {}}), (1, "unfinished"), (130, "interrupted")])
def test_a_command_without_an_answer_says_how_it_ended(
    ends: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain_command() -> None:
        print("for people")
        if ends:
            raise typer.Exit(ends)

    monkeypatch.setattr(output, "ANSWERS", {})
    program = typer.Typer()
    program.command()(output.answering(plain_command))
    done = CliRunner().invoke(program, ["--json"])
    answer = json.loads(done.stdout)
    assert done.exit_code == ends and "for people" not in done.stdout
    if ends:
        assert answer["error"]["kind"] == expected
    else:
        assert answer == {"schema": 1, "command": "plain-command", **expected}


def verdict_answer(failed: bool) -> VerdictAnswer:
    rows = [{"arm": "full", "verdict": "baseline", "seeds": 3}, {"arm": "wild", "verdict": "failed", "seeds": 0}]
    return VerdictAnswer(
        name="x",
        folder="x",
        question="",
        finished=True,
        metric="bits per byte",
        verdict={"rows": rows},
        summary="",
        failed=failed,
        text="",
        savings=[],
        notes=[],
    )


def test_an_ablation_in_which_everything_failed_is_exit_code_1() -> None:
    assert verdict_answer(failed=True).exit_code == 1
    assert verdict_answer(failed=False).exit_code == 0


def test_numbers_that_are_not_finite_are_null() -> None:
    assert plain({"a": float("nan"), 3: [float("inf"), 1.5], "p": Path("x")}) == {"a": None, "3": [None, 1.5], "p": "x"}


def test_exit_codes_of_errors() -> None:
    kinds = ("mistake", "usage", "machine", "unfinished", "interrupted", "internal")
    assert [Error(kind=kind, message="").exit_code for kind in kinds] == [2, 2, 3, 1, 130, 1]  # type: ignore[arg-type]


def test_the_schema_says_what_a_field_is() -> None:
    data = schema_of("status", Status)["properties"]["data"]
    assert "Time left" in data["properties"]["seconds_left"]["description"]


@pytest.mark.process
def test_a_training_run_writes_one_object_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "run.yaml", run_fields(write_corpus(tmp_path / "corpus")))
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "train", "run.yaml", "--folder", "run", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    jsonschema.validate(answer, schema_of("train", output.ANSWERS["train"]))
    assert answer["data"]["status"] == "done" and answer["data"]["result"]["step"] == 20
