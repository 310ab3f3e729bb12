"""The verdict as a table for a paper."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from workbench.ablation.run import AblationRun
from workbench.ablation.verdict.paper import verdict_table
from workbench.ablation.verdict.verdict import ArmVerdict, Verdict
from workbench.cli import app
from workbench.config import ConfigError
from workbench.metric import BITS_PER_BYTE
from workbench.paper import PaperTable

ARCHIVES = Path(__file__).parents[3] / "results" / "ablations"


def row(arm: str, word: str, difference: float | None = None, half: float = 0.01, **fields: object) -> ArmVerdict:
    ends = {} if difference is None else {"low": difference - half, "high": difference + half, "p_holm": 0.0004}
    value = {"value": 2.0 + (difference or 0.0), "value_sd": 0.0123}
    return ArmVerdict(
        **{
            "arm": arm,
            "verdict": word,
            "difference": difference,
            "seeds": 5,
            "failed": 0,
            "sentence": "",
            **value,
            **ends,
            **fields,
        }
    )  # type: ignore[arg-type]


def verdict(*rows: ArmVerdict, exploratory: str | None = None) -> Verdict:
    return Verdict("full", (row("full", "baseline"), *rows), None, 0.05, 0.02, exploratory)


def table(*rows: ArmVerdict, **fields: str) -> PaperTable:
    return verdict_table(verdict(*rows, **fields), "mine", BITS_PER_BYTE)


def bold(paper: PaperTable) -> list[str]:
    return [cells[0].text for cells in paper.rows if cells[0].bold]


def test_numbers_have_the_digits_of_their_noise() -> None:
    texts = [cell.text for cell in table(row("gdn", "better", -0.123456, half=0.0234)).rows[1]]
    assert texts == ["gdn", "1.877 ± 0.012", "−0.123 [−0.147, −0.100]", "< 0.001", "better", "5"]


def test_the_baseline_has_no_difference() -> None:
    assert [cell.text for cell in table().rows[0]] == ["full", "2.000 ± 0.012", "–", "–", "baseline", "5"]


def test_the_best_is_bold_only_where_an_order_is_shown() -> None:
    assert bold(table(row("gdn", "better", -0.1), row("kda", "worse", 0.1))) == ["gdn"]
    assert bold(table(row("gdn", "undecided", -0.1), row("kda", "worse", 0.1))) == ["full", "gdn"]
    undecided = table(row("gdn", "undecided", -0.1), row("kda", "equivalent", 0.0))
    assert bold(undecided) == []
    assert "No arm is shown to be better" in undecided.caption and "Equivalent: within ±0.02" in undecided.caption


def test_failed_seeds_and_reservations_are_marked() -> None:
    paper = table(row("gdn", "better", -0.1, seeds=4, failed=1, reservations=("No claim.",)), exploratory="a pilot")
    assert [cell.text for cell in paper.rows[1]][-2:] == ["better*", "4 of 5"]
    assert paper.caption.endswith("*: No claim. Exploratory: a pilot.")


def test_hidden_arms_are_not_printed() -> None:
    paper = verdict_table(verdict(row("gdn", "better", -0.1)), "mine", BITS_PER_BYTE, ["gdn"])
    assert len(paper.rows) == 1 and paper.data["arm"].to_list() == ["gdn"]


def test_a_sequential_design_prints_its_interval_over_all_looks() -> None:
    looked = row("gdn", "better", -0.1, level=0.01, repeated_low=-0.2, repeated_high=-0.01)
    paper = table(looked)
    assert paper.rows[1][2].text == "−0.100 [−0.200, −0.010]"
    assert "over all looks" in paper.caption
    unbounded = replace(looked, repeated_low=None, repeated_high=None)
    assert table(unbounded).rows[1][2].text == "−0.10"


@pytest.mark.parametrize("kind", ["tex", "md", "csv", "parquet"])
def test_an_archive_writes_its_table(kind: str, tmp_path: Path) -> None:
    run = AblationRun(ARCHIVES / "scmoe")
    path = run.paper_table(tmp_path / f"t.{kind}")
    if kind in ("csv", "parquet"):
        read = pl.read_csv(path) if kind == "csv" else pl.read_parquet(path)
        found = run.verdict()
        assert found is not None
        assert read["difference"].to_list() == pytest.approx([None, *(r.difference for r in found.rows[1:])])
        return
    text = path.read_text()
    assert run.identity in text and "scmoe" in text
    assert not re.search(r"\d\.\d{6}", text), "no debug digits"


def test_the_command_writes_the_table(tmp_path: Path) -> None:
    output = tmp_path / "new" / "t.tex"
    answer = CliRunner().invoke(app, ["paper-table", str(ARCHIVES / "needle"), "--output", str(output)])
    assert answer.exit_code == 0 and r"\begin{table}" in output.read_text()


def test_without_a_verdict_there_is_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = AblationRun(ARCHIVES / "needle")
    monkeypatch.setattr(run, "verdict", lambda: None)
    with pytest.raises(ConfigError, match="no verdict"):
        run.paper_table(tmp_path / "t.tex")
    assert not list(tmp_path.iterdir())
