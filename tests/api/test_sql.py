"""SQL over results: read only, sealed as everything else, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from workbench.ablation.ablation import Ablation
from workbench.ablation.run import AblationRun
from workbench.api.sql import TABLES, select
from workbench.cli import app
from workbench.config import ConfigError

Call = Callable[..., tuple[int, dict[str, Any]]]
ARCHIVES = Path(__file__).parents[2] / "results/ablations"


def test_runs_are_grouped_over_ablations(call: Call) -> None:
    text = (
        "select ablation, arm, count(*) as n, avg(report_value) as value from runs "
        "where stage = 'confirmation' and status = 'done' and ablation in ('growth', 'muon') group by ablation, arm"
    )
    code, answer = call("sql", text, "--results", ARCHIVES)
    rows = answer["data"]["rows"]
    assert code == 0 and {row["ablation"] for row in rows} == {"growth", "muon"}
    assert answer["data"]["columns"] == ["ablation", "arm", "n", "value"]
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.process
def test_every_table_can_be_selected(finished: AblationRun) -> None:
    for name, (schema, _) in TABLES.items():
        frame = select(f"select * from {name}", finished.results)
        assert frame.columns[: len(schema)] == list(schema), name
        assert len(frame) or name == "scores"
    verdicts = select("select v.arm, a.question from verdicts v join ablations a using (ablation)", finished.results)
    assert verdicts["arm"].to_list() == finished.arms


@pytest.mark.process
def test_report_values_stay_sealed(fields: dict[str, Any], tmp_path: Path) -> None:
    run = Ablation.parse(fields, tmp_path).create()
    folder = run.files.runs_path
    from workbench.ablation.execution.plan import Plan
    from workbench.status import Stage

    made = Plan(run.files).create_run("full", Stage.CONFIRMATION, 0, {})
    row = {"suite": "text", "task": "text", "metric": "bits per byte", "value": 2.0, "n": 3}
    made.add_evaluations(20, "report", [row])
    made.add_evaluations(20, "selection", [row])
    assert folder.is_dir()
    assert select("select split from evaluations", tmp_path)["split"].to_list() == ["selection"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("drop table runs", "one SELECT"),
        ("select 1; select 2", "one SELECT"),
        ("select * from read_csv('/etc/hosts')", "files are not read"),
        ("select nothing from runs", "nothing"),
        ("select * from elsewhere", "Tables: ablations"),
        ("select from where", "polars"),
    ],
)
def test_a_statement_that_is_no_select_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match="query") as error:
        select(text, ARCHIVES)
    assert expected in str(error.value)


def test_rows_can_be_csv() -> None:
    done = CliRunner().invoke(app, ["sql", "select 1 as one, 'a' as b", "--csv", "--results", str(ARCHIVES)])
    assert done.output == "one,b\n1,a\n"
