"""What leaves the dashboard carries its provenance and can be read by what it is meant for."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from dashboards.browser import needs_browser
from dashboards.fake import FakeRun

from workbench.config import ConfigError
from workbench.dashboards import export_figure, export_table, figure, provenance_line
from workbench.dashboards.export import SIZES, Width, _at_size, exported_tables
from workbench.dashboards.panel import make_panel
from workbench.dashboards.snapshot import Snapshot
from workbench.paper import PaperCell, PaperColumn, PaperTable

LINE = "name 0123 · code 1_0%"
TABLE = pl.DataFrame({"arm": ["a_1 & b|c", "d"], "value": [1 / 3, None], "runs": [3, 4], "high": [math.nan, 1e-9]})


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    path = export_table(TABLE, tmp_path / "new" / "t.csv", LINE)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows[0]["arm"] == "a_1 & b|c" and float(rows[0]["value"]) == 1 / 3 and rows[1]["value"] == ""
    assert pl.read_csv(path).columns == TABLE.columns


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_provenance_of_data_is_beside_it(kind: str, tmp_path: Path) -> None:
    path = export_table(TABLE, tmp_path / f"t.{kind}", LINE)
    assert json.loads((tmp_path / f"t.{kind}.provenance.json").read_text())["provenance"] == LINE
    read = pl.read_csv(path) if kind == "csv" else pl.read_parquet(path)
    assert read["value"].to_list() == TABLE["value"].to_list()


def test_lists_of_a_table_are_json_in_csv(tmp_path: Path) -> None:
    frame = pl.DataFrame({"texts": [["a", "b"], None]}, schema={"texts": pl.List(pl.String)})
    read = pl.read_csv(export_table(frame, tmp_path / "t.csv", LINE))
    assert read["texts"].to_list() == ['["a", "b"]', None]


def test_latex_escapes(tmp_path: Path) -> None:
    text = export_table(TABLE, tmp_path / "t.tex", LINE).read_text()
    assert text.startswith(f"% {LINE}\n") and r"a\_1 \& b|c & 0.3333 & 3 & -- \\" in text
    assert r"\begin{tabular}{lrrr}" in text


def test_markdown_is_a_table(tmp_path: Path) -> None:
    lines = export_table(TABLE, tmp_path / "t.md", LINE).read_text().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: |" and r"b\|c" in lines[2] and lines[-1] == f"*{LINE}*"


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.csv, \.parquet, \.tex, \.md"):
        export_table(TABLE, tmp_path / "t.xlsx", LINE)
    with pytest.raises(ConfigError, match=r"\.pdf, \.svg, \.png"):
        export_figure(figure(FakeRun(tmp_path), "effects"), tmp_path / "t.jpg", LINE)


@needs_browser
@pytest.mark.browser
def test_images_carry_their_provenance(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    drawn = figure(run, "curves")
    before = drawn.to_json()
    svg = export_figure(drawn, tmp_path / "f.svg", provenance_line(run), stamped=True).read_text()
    assert "code 1.0+&#60;script&#62;" in svg and "training tokens" in svg
    assert drawn.to_json() == before, "the figure is not changed"
    assert export_figure(drawn, tmp_path / "f.png", LINE).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "+1+cmd|x", "-1+cmd|x", "\t=1"])
def test_a_text_that_looks_like_a_formula_is_no_formula(text: str, tmp_path: Path) -> None:
    path = export_table(pl.DataFrame({"arm": [text]}), tmp_path / "t.csv", LINE)
    assert next(csv.DictReader(path.read_text().splitlines()))["arm"] == f"'{text}"


@pytest.mark.parametrize("text", ["-1.5", "+0.25", "-1e-3", "full"])
def test_a_number_in_a_text_column_stays(text: str, tmp_path: Path) -> None:
    path = export_table(pl.DataFrame({"arm": [text]}), tmp_path / "t.csv", LINE)
    assert next(csv.DictReader(path.read_text().splitlines()))["arm"] == text


@pytest.mark.parametrize("rows", [0, 201])
def test_no_rows_and_data_are_not_printed(rows: int, tmp_path: Path) -> None:
    frame = pl.DataFrame({"value": range(rows)}, schema={"value": pl.Int64})
    with pytest.raises(ConfigError, match=f"{rows} rows"):
        export_table(frame, tmp_path / "t.tex", LINE)
    assert export_table(frame, tmp_path / "t.csv", LINE).exists()


def test_a_table_of_a_paper_has_caption_label_and_bold(tmp_path: Path) -> None:
    columns = [PaperColumn("arm"), PaperColumn("Δ ↓", numeric=True)]
    table = PaperTable(columns, [[PaperCell("a_b", True), PaperCell("−0.1 ± 0.2")]], TABLE, "Loss < 1 %.", "my_table")
    text = export_table(table, tmp_path / "t.tex", LINE).read_text()
    assert r"\caption{Loss $<$ 1 \%.}" in text and r"\label{tab:my-table}" in text
    assert r"arm & $\Delta$ $\downarrow$ \\" in text and r"\textbf{a\_b} & $-$0.1 $\pm$ 0.2 \\" in text
    assert "| **a_b** | −0.1 ± 0.2 |" in export_table(table, tmp_path / "t.md", LINE).read_text()


def test_panels_export_what_is_on_screen(tmp_path: Path) -> None:
    blocks = make_panel("effects").blocks(Snapshot(FakeRun(tmp_path)))
    printed = exported_tables(blocks, "tex")
    assert list(printed) == ["verdict"] and [c.title for c in printed["verdict"].columns][1] == "bits/byte ↓"
    assert set(exported_tables(blocks, "csv")) == {"effects", "verdict"}
    runs = exported_tables(make_panel("runs").blocks(Snapshot(FakeRun(tmp_path))), "md")["runs"]
    texts = [cell.text for row in runs.rows for cell in row]
    assert texts and not any(str(tmp_path) in text for text in texts)
    curves = make_panel("curves").blocks(Snapshot(FakeRun(tmp_path)))
    assert isinstance(exported_tables(curves, "md")["curves"], pl.DataFrame)


@pytest.mark.parametrize(("width", "inches", "points"), [("column", 3.25, 8), ("page", 6.75, 8), ("slide", 10, 14)])
def test_all_type_of_an_image_has_one_size(width: Width, inches: float, points: float, tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path), "effects")
    printed = _at_size(drawn, SIZES[width])
    assert printed.layout.width == inches * 96
    sizes = {layout["size"] for layout in fonts(printed.to_plotly_json())} | {printed.layout.font.size}
    assert sizes == {points * 96 / 72}
    title = printed.layout.xaxis.title.text
    assert "<span" not in title and title.replace("<br>", " ").startswith("difference to “full” in bits per byte")
    factor = points * 96 / 72 / 13
    assert printed.data[-2].marker.size == pytest.approx(drawn.data[-2].marker.size * factor)


def fonts(value: Any, name: str = "") -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if name.endswith("font") and "size" in value:
            yield value
        for key, item in value.items():
            yield from fonts(item, key)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from fonts(item, name)


def test_an_unknown_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="column or page or slide"):
        export_figure(figure(FakeRun(tmp_path), "effects"), tmp_path / "t.pdf", LINE, "poster")  # type: ignore[arg-type]


@needs_browser
@pytest.mark.browser
def test_a_pdf_has_the_width_of_a_column(tmp_path: Path) -> None:
    path = export_figure(figure(FakeRun(tmp_path), "effects"), tmp_path / "f.pdf", LINE, "column")
    (box,) = re.findall(rb"/MediaBox ?\[ ?0 0 ([\d.]+) ", path.read_bytes())[:1]
    assert float(box) == pytest.approx(3.25 * 72, abs=1.5)
    assert (tmp_path / "f.pdf.provenance.json").exists()


def test_a_provenance_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(tmp_path)
    monkeypatch.setattr(run, "provenance", lambda: {"code": "1\n\\input{secret}"}, raising=False)
    assert "\n" not in provenance_line(run)
