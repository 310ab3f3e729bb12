"""A panel in a file of its own appears in dashboard, report and export; nothing else has to be touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboards.fake import FakeRun

import workbench as wb
from workbench.config import ConfigError
from workbench.dashboards import figure, table, write_report
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import panels
from workbench.registry import PLUGIN_FILES

SOURCE = '''
"""Training speed of each arm."""

from typing import Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards.figures.parts import figure_of
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels


@panels.register
class Throughput(FigurePanel):
    """How fast does each arm train?"""

    class Config(PanelConfig):
        kind: Literal["throughput"] = "throughput"
        unit: Literal["tokens", "thousands"] = "tokens"
        log_y: bool = Field(False, title="log y")

    title = "Throughput"
    report = {"Throughput": {}}

    def table(self, run):
        factor = 1 if self.settings.unit == "tokens" else 1e-3
        return run.runs().group_by("arm").agg(pl.col("tokens_per_second").median() * factor).sort("arm")

    def figure(self, run, table):
        figure = figure_of([go.Bar(x=table["arm"].to_list(), y=table["tokens_per_second"].to_list())])
        return figure.update_yaxes(title_text="tokens/s", type="log" if self.settings.log_y else "linear")
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRun]:
    monkeypatch.setenv(PLUGIN_FILES, os.environ.get(PLUGIN_FILES, ""))
    path = tmp_path / "throughput.py"
    path.write_text(SOURCE)
    wb.plug_in(path)
    yield FakeRun(tmp_path)
    panels.unregister("throughput")
    sys.modules.pop("throughput", None)


def test_it_has_a_tab(run: FakeRun) -> None:
    view = Dashboard(run, refresh=0)
    view.tabs.value = "Throughput"
    assert view.blocks[0].name == "throughput"


def test_its_settings_have_controls(run: FakeRun) -> None:
    view = Dashboard(run, refresh=0, panel="throughput")
    view.controls()["log_y"].value = True
    assert view.blocks[0].figure.layout.yaxis.type == "log"


def test_it_has_a_section_in_the_report(run: FakeRun, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "<h2>Throughput</h2>" in page and 'id="throughput"' in page


def test_it_is_exported(run: FakeRun) -> None:
    (path,) = Dashboard(run, refresh=0, panel="throughput").write("csv")
    assert path.name == "throughput.csv" and "tokens_per_second" in path.read_text()


def test_it_is_called_from_python(run: FakeRun) -> None:
    assert list(figure(run, "throughput", unit="thousands").data[0].y) == [2.0, 2.0]
    assert table(run, "throughput")["tokens_per_second"].to_list() == [2000.0, 2000.0]


def test_its_settings_are_checked(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match="unit"):
        figure(run, "throughput", unit="words")
