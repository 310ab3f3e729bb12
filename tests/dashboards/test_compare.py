"""Arms of several ablations in one figure, saved views, and the journal with what can be changed in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import workbench as wb
from workbench.config import ConfigError
from workbench.dashboards import saved_view, table
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import Figure, Grid, Text, make_panel
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.view import ResultsFolder
from workbench.distribution import ROOT
from workbench.results.views import View, delete_view, read_views, save_view

ARCHIVES = ROOT / "results" / "ablations"
NAMES = ("scmoe", "balance", "needle")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of three archives: two on the same text, one of a task."""
    for name in NAMES:
        shutil.copytree(ARCHIVES / name, tmp_path / name)
    return tmp_path


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    assert condition()


def test_arms_of_several_ablations_share_a_figure(results: Path) -> None:
    chosen = ("scmoe/strict", "balance/loss", "needle/gdn")
    panel = make_panel("compare", selected=chosen, y="report_value", x="flops")
    blocks = panel.blocks(Snapshot(ResultsFolder(results)))
    figure, *rest = blocks
    assert isinstance(figure, Figure)
    assert figure.table["arm"].to_list() == ["scmoe/strict", "balance/loss"], "another metric has no place on the axis"
    assert "bits per byte" in figure.figure.layout.yaxis.title.text
    difference = next(block for block in rest if isinstance(block, Grid) and block.name == "difference")
    fields = difference.table["field"].to_list()
    assert "model.shortcut" in fields and "model.width" not in fields, "what is equal is left out"
    arms = next(block for block in rest if isinstance(block, Grid) and block.name == "arms")
    assert {row.key for row in arms.rows} >= set(chosen) and arms.marks == ("selected",)


def test_values_of_other_data_are_pointed_out(results: Path) -> None:
    panel = make_panel("compare", selected=("scmoe/strict", "needle/gdn"), y="loss")
    texts = [str(block.html) for block in panel.blocks(Snapshot(ResultsFolder(results))) if isinstance(block, Text)]
    assert any("Not comparable with scmoe/strict: needle/gdn" in text for text in texts)


@pytest.mark.parametrize("x", ["tokens", "flops", "seconds", "cache_bytes"])
@pytest.mark.parametrize("y", ["loss", "selection_value", "report_value"])
def test_every_pair_of_axes_has_a_table(results: Path, x: str, y: str) -> None:
    found = table(wb.open(results / "scmoe"), "compare", x=x, y=y)
    assert found.columns == ["arm", x, "mean", "low", "high", "runs"]
    if y == "report_value" and x != "seconds":
        assert found["arm"].to_list() == ["scmoe/interleaved", "scmoe/scmoe", "scmoe/strict"]


def test_a_view_is_saved_and_opened_by_name(results: Path) -> None:
    save_view(results, View(name="moe", arms=("scmoe/scmoe", "balance/none"), x="flops", y="report_value"))
    save_view(results, View(name="other", arms=("needle/full",)))
    assert list(read_views(results)) == ["moe", "other"]
    assert {trace.name for trace in saved_view("moe", results).data} == {"scmoe/scmoe", "balance/none"}
    delete_view(results, "other")
    with pytest.raises(ConfigError, match="Nearest valid name: 'moe'"):
        saved_view("mo", results)


def test_views_are_saved_on_the_page(results: Path) -> None:
    view = Dashboard(results, refresh=0, panel="compare")
    for key in ("scmoe/scmoe", "balance/loss"):
        view._on_event({"event": "mark", "mark": "selected", "key": key, "on": True})
    view.controls()["x"].value = "flops"
    view.controls()["save_as"].value = "mine"
    view.act("Save view")
    wait_for(lambda: view.controls()["view"].value == "mine")
    assert read_views(results)["mine"] == View(name="mine", arms=("balance/loss", "scmoe/scmoe"), x="flops")
    again = Dashboard(results, refresh=0, panel="compare")
    again.controls()["view"].value = "mine"
    assert again.marks["selected"] == {"balance/loss", "scmoe/scmoe"} and again.controls()["x"].value == "flops"
    again.act("Delete view")
    wait_for(lambda: not read_views(results))


def test_the_journal_has_every_arm_with_its_reason(results: Path) -> None:
    (block,) = make_panel("journal").blocks(Snapshot(ResultsFolder(results)))
    assert isinstance(block, Text)
    for name in NAMES:
        assert f"<h3>{name}</h3>" in block.html
    assert '<b>gdn</b> <span class="undecided">undecided</span>: gdn' in block.html, "negative results too"


def test_notes_names_and_deletion_from_the_page(results: Path) -> None:
    view = Dashboard(results, refresh=0, panel="journal")
    controls = view.controls()
    controls["ablation"].value = "needle"
    controls["note"].value, controls["tags"].value = "three seeds only", "recall, negative"
    controls["names"].value = "gdn = Gated DeltaNet"
    view.act("Save")
    wait_for(lambda: "Saved" in view.message.value)
    run = wb.open(results / "needle")
    assert run.names["gdn"] == "Gated DeltaNet" and run.notes().tags == ["recall", "negative"]
    assert run.notes().notes[0].text == "three seeds only" and controls["note"].value == ""
    controls["ablation"].value = "scmoe"
    assert controls["tags"].value == "" and controls["names"].value == "", "those of the other ablation"
    view.act("Delete")
    wait_for(lambda: "Nothing was deleted" in view.message.value)
    controls["confirm"].value = "scmoe"
    view.act("Delete")
    wait_for(lambda: not (results / "scmoe").exists())
    assert (results / "needle").exists()


def test_a_damaged_file_of_views_is_one_error_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "views.json"
    for text in ("{", '{"views": 5}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match="a damaged file"):
            save_view(tmp_path, View(name="mine", arms=("a/b",)))
        assert file.read_text() == text
