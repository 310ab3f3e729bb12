"""What a person sees and clicks, in a real browser: the stand-alone page, and JupyterLab through launch, watch, restart, stop,
pin and export."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from dashboards.browser import ROOT, lab, needs_browser, page, voila
from helpers import ablation_fields, write_corpus
from test_project import SMALL

from workbench.ablation.run import AblationRun

pytestmark = [needs_browser, pytest.mark.browser]
SLOW = pytest.mark.skipif("WORKBENCH_SLOW" not in os.environ, reason="minutes; set WORKBENCH_SLOW=1")


def choose(view: Any, panel: str) -> None:
    view.locator(".widget-toggle-button", has_text=re.compile(f"^{panel}$")).click()


def header(view: Any, text: str, patience: float = 60) -> None:
    """Wait until the dashboard's header holds ``text``."""
    view.locator(".workbench-dashboard").filter(has_text=re.compile(text)).first.wait_for(timeout=1000 * patience)


def notebook(*cells: str) -> str:
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "p"}},
                       "cells": [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None,
                                  "source": source} for i, source in enumerate(cells)]})  # fmt: skip


def prepare_lab(where: Path) -> None:
    """Settings of a lab whose every cell is on the page, in sight or not."""
    settings = where / ".lab" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')


def run_all(view: Any, address: str, path: str) -> None:
    view.goto(f"{address}/lab/tree/{path}?token=t")
    view.wait_for_selector(".jp-Notebook .jp-Cell")
    view.locator(".jp-NotebookPanel [title*='Python'], .jp-NotebookPanel .jp-KernelName").first.wait_for()
    view.get_by_role("menuitem", name="Run", exact=True).click()
    view.get_by_text("Run All Cells", exact=True).click()


def test_the_page_of_kept_results(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / "ablations" / "needle", tmp_path / "results" / "needle")
    with voila(tmp_path / "results") as address, page() as view:
        with urllib.request.urlopen(address.partition("?")[0]) as answer:
            assert "/login" in answer.geturl(), "the token is asked for"
        view.goto(address)
        row = view.locator("tr[data-key]").filter(has_text="needle")
        row.wait_for(timeout=240_000)
        assert "finished" in row.inner_text()
        row.get_by_role("button", name="open").click()
        header(view, "finished: ")
        choose(view, "Effects")
        view.locator(".js-plotly-plot .ytick text", has_text="gdn").wait_for()
        assert view.locator(".ytick text").all_text_contents() == ["sliding", "gdn"]
        text = view.locator(".wb-board").inner_text()
        assert "paired seeds" in text and "code " in text, "the verdict, and where its numbers come from"
        choose(view, "Progress")
        pin = view.get_by_role("button", name="pin arm gdn").first
        pin.click()
        view.locator("tr.wb-pinned").first.wait_for()
        assert view.locator("tbody tr").first.get_attribute("data-key") == "arm gdn"
        view.get_by_role("button", name="hide arm sliding").first.click()
        view.locator("tr.wb-hidden").first.wait_for()
        choose(view, "Effects")
        view.wait_for_function("document.querySelectorAll('.ytick text').length == 1")
        choose(view, "Mechanisms")
        view.locator(".widget-toggle-button", has_text="recall").click()
        view.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
        choose(view, "Runs")
        view.locator("th button", has_text="seed").click()
        view.get_by_role("searchbox").fill("gdn")
        view.wait_for_function("[...document.querySelectorAll('tbody tr')].every(row => row.innerText.includes('gdn'))")
        assert view.locator("th[aria-sort=ascending]").inner_text() == "seed"
        view.locator("select").filter(has_text="LaTeX").select_option("CSV")
        view.get_by_role("button", name="Export", exact=True).click()
        header(view, "Wrote .*runs.csv")
        assert (tmp_path / "results" / "needle" / "exports" / "runs.csv").read_text().startswith("# needle ")
        assert not view.errors, view.errors
        width = view.evaluate("document.documentElement.scrollWidth")
        assert width <= 1280, f"{width} pixels wide"


@SLOW
def test_launch_watch_restart_stop_pin_export(tmp_path: Path) -> None:
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"), tuning={"trials": 0, "space": {}}, confirmation={"seeds": [0, 1]}
    )
    fields["base"]["training"] |= {"tokens": 200_000 * 64, "checkpoint_every": 50}
    (tmp_path / "ablation.yaml").write_text(json.dumps(fields))
    (tmp_path / "look.ipynb").write_text(notebook(
        "import workbench as wb\nablation = wb.Ablation.load('ablation.yaml')", "wb.dashboard(ablation, refresh=0.5)"))  # fmt: skip
    prepare_lab(tmp_path)
    with lab(tmp_path) as address, page() as view:
        try:
            run_all(view, address, "look.ipynb")
            header(view, "not launched", 120)
            assert "parameters" in view.locator(".wb-board").inner_text(), "the cost card comes first"
            view.get_by_role("button", name="Launch", exact=True).click()
            header(view, "running: 0 of 4 runs", 120)
            view.locator(".wb-board .scatterlayer .trace").first.wait_for(timeout=120_000)
            points = "Math.max(...[...document.querySelectorAll('.wb-plot')].flatMap(p => p.data.map(t => t.x.length)))"
            before = view.evaluate(points)
            view.wait_for_function(f"{points} > {before}", timeout=60_000)

            view.get_by_role("menuitem", name="Kernel", exact=True).click()
            view.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
            view.get_by_role("button", name="Confirm Kernel Restart").click()
            time.sleep(3)
            header(view, "running: 0 of 4 runs", 120)
            view.locator(".wb-board [data-block]").first.wait_for()

            view.get_by_role("button", name="Stop", exact=True).click()
            header(view, "Stopped", 120)
            header(view, "not running", 60)
            choose(view, "Progress")
            view.get_by_role("button", name="pin arm sliding").first.click()
            view.locator("tr.wb-pinned").first.wait_for()
            view.locator("select").filter(has_text="LaTeX").select_option("Markdown")
            view.get_by_role("button", name="Export", exact=True).click()
            header(view, "Wrote .*arms.md")
            assert not view.errors, view.errors
        finally:
            if (tmp_path / "results" / "test" / "ablation.json").exists():
                AblationRun(tmp_path / "results" / "test").stop()
    assert (tmp_path / "results" / "test" / "exports" / "arms.md").read_text().count("| sliding |") == 2


@SLOW
@pytest.mark.parametrize("name", ["00_quickstart", "04_launch_and_steer"])
def test_notebooks_in_the_lab(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sweeps", tmp_path / "sweeps")
    (tmp_path / "notebooks").mkdir()
    held = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    for cell in held["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = f"overrides = {SMALL!r}\nresults = '../results'"
    (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps(held))
    prepare_lab(tmp_path)
    with lab(tmp_path) as address, page() as view:
        run_all(view, address, f"notebooks/{name}.ipynb")
        view.locator(".wb-board .js-plotly-plot").first.wait_for(timeout=240_000)
        view.locator(".jp-OutputArea").filter(has_text="paired seeds").last.wait_for(timeout=240_000)
        header(view, "finished: ")
        assert (
            not view.locator("[data-mime-type='application/vnd.jupyter.stderr']").filter(has_text="Traceback").count()
        )
        assert not view.errors, view.errors
