"""What leaves the dashboard carries its provenance and can be read by what it is meant for."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import polars as pl
import pytest
from dashboards.browser import needs_browser
from dashboards.fake import FakeRun

from workbench.config import ConfigError
from workbench.dashboards import export_figure, export_table, figure, provenance_line

LINE = "name 0123 · code 1_0%"
TABLE = pl.DataFrame({"arm": ["a_1 & b|c", "d"], "value": [1 / 3, None], "runs": [3, 4], "high": [math.nan, 1e-9]})


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    lines = export_table(TABLE, tmp_path / "new" / "t.csv", LINE).read_text().splitlines()
    assert lines[0] == f"# {LINE}"
    rows = list(csv.DictReader(lines[1:]))
    assert rows[0]["arm"] == "a_1 & b|c" and float(rows[0]["value"]) == 1 / 3 and rows[1]["value"] == ""
    assert pl.read_csv(tmp_path / "new" / "t.csv", comment_prefix="#").columns == TABLE.columns


def test_latex_escapes(tmp_path: Path) -> None:
    text = export_table(TABLE, tmp_path / "t.tex", LINE).read_text()
    assert text.startswith(f"% {LINE}\n") and r"a\_1 \& b|c & 0.333333 & 3 & -- \\" in text
    assert r"\begin{tabular}{lrrr}" in text


def test_markdown_is_a_table(tmp_path: Path) -> None:
    lines = export_table(TABLE, tmp_path / "t.md", LINE).read_text().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: |" and r"b\|c" in lines[2] and lines[-1] == f"*{LINE}*"


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.csv, \.tex, \.md"):
        export_table(TABLE, tmp_path / "t.xlsx", LINE)
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        export_figure(figure(FakeRun(tmp_path), "effects"), tmp_path / "t.jpg", LINE)


@needs_browser
@pytest.mark.browser
def test_images_carry_their_provenance(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    drawn = figure(run, "curves")
    before = drawn.to_json()
    svg = export_figure(drawn, tmp_path / "f.svg", provenance_line(run)).read_text()
    assert "code 1.0+&#60;script&#62;" in svg and "training tokens" in svg
    assert drawn.to_json() == before, "the figure is not changed"
    assert export_figure(drawn, tmp_path / "f.png", LINE).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "+1+cmd|x", "-1+cmd|x", "\t=1"])
def test_a_text_that_looks_like_a_formula_is_no_formula(text: str, tmp_path: Path) -> None:
    path = export_table(pl.DataFrame({"arm": [text]}), tmp_path / "t.csv", LINE)
    assert next(csv.DictReader(path.read_text().splitlines()[1:]))["arm"] == f"'{text}"


@pytest.mark.parametrize("text", ["-1.5", "+0.25", "-1e-3", "full"])
def test_a_number_in_a_text_column_stays(text: str, tmp_path: Path) -> None:
    path = export_table(pl.DataFrame({"arm": [text]}), tmp_path / "t.csv", LINE)
    assert next(csv.DictReader(path.read_text().splitlines()[1:]))["arm"] == text


def test_a_provenance_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    monkeypatch.setattr(run, "provenance", lambda: {"code": "1\n\\input{secret}"}, raising=False)
    assert "\n" not in provenance_line(run)
