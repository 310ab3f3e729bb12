"""What a person sees and clicks in JupyterLab, in a real browser: launch, watch, restart, stop, pin, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dashboards.browser import ROOT, choose, header, lab, needs_browser, page
from helpers import ablation_fields, write_corpus
from test_project import SMALL

from workbench.ablation.run import AblationRun

pytestmark = [needs_browser, pytest.mark.browser, pytest.mark.slow]

REACHED = "Math.max(...[...document.querySelectorAll('.wb-plot')].flatMap(p => p.data.flatMap(t => t.x)))"
"""The largest x of all lines on the page."""


def notebook(*cells: str) -> str:
    plain = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
        for i, source in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": plain})


def run_all(view: Any, address: str, path: str) -> None:
    view.goto(f"{address}/lab/tree/{path}?token=t")
    view.wait_for_selector(".jp-Notebook .jp-Cell")
    # cells that are run before the kernel is idle are lost silently
    view.locator("#jp-main-statusbar").filter(has_text="Idle").wait_for()
    view.get_by_role("menuitem", name="Run", exact=True).click()
    view.get_by_text("Run All Cells", exact=True).click()


def test_launch_watch_restart_stop_pin_export(tmp_path: Path) -> None:
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"), tuning={"trials": 0, "space": {}}, confirmation={"seeds": [0, 1]}
    )
    fields["base"]["training"] |= {"tokens": 200_000 * 64, "checkpoint_every": 50}
    (tmp_path / "ablation.yaml").write_text(json.dumps(fields))
    load = "import workbench as wb\nablation = wb.Ablation.load('ablation.yaml')"
    (tmp_path / "look.ipynb").write_text(notebook(load, "wb.dashboard(ablation, refresh=0.5)"))
    folder = tmp_path / "results" / "test"
    with lab(tmp_path) as address, page(height=1000) as view:
        try:
            run_all(view, address, "look.ipynb")
            header(view, "not launched", 180)
            view.locator(".wb-board").filter(has_text="parameters").wait_for()
            view.get_by_role("button", name="Launch", exact=True).click()
            header(view, "running: 0 of 4 runs", 180)
            view.locator(".wb-board .scatterlayer .trace").first.wait_for(timeout=180_000)
            before = view.evaluate(REACHED)
            view.wait_for_function(f"{REACHED} > {before}", timeout=120_000)

            view.get_by_role("menuitem", name="Kernel", exact=True).click()
            view.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
            view.evaluate("document.querySelector('.workbench-dashboard').classList.add('before')")
            view.get_by_role("button", name="Confirm Kernel Restart").click()
            view.locator(".workbench-dashboard:not(.before)").wait_for(timeout=180_000)
            header(view, "running: 0 of 4 runs", 180)
            view.locator(".wb-board .scatterlayer .trace").first.wait_for()
            before = view.evaluate(REACHED)
            view.wait_for_function(f"{REACHED} > {before}", timeout=120_000)

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
            if (folder / "ablation.json").exists():
                AblationRun(folder).stop()
    assert (folder / "exports" / "arms.md").read_text().count("| sliding |") == 2


def test_draws_and_stops_while_a_cell_waits(tmp_path: Path) -> None:
    """Run All: the dashboard draws trials that run, and Stop stops them, while the next cell waits for their end."""
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"), tuning={"trials": 0, "space": {}}, confirmation={"seeds": [0, 1]}
    )
    fields["base"]["training"] |= {"tokens": 200_000 * 64, "checkpoint_every": 50}
    (tmp_path / "ablation.yaml").write_text(json.dumps(fields))
    launch = "import workbench as wb\nrun = wb.Ablation.load('ablation.yaml').launch(workers=1)"
    cells = [launch, "wb.dashboard(run, refresh=0.5)", "run.wait()\nprint('waited' + ' till the end')"]
    (tmp_path / "look.ipynb").write_text(notebook(*cells))
    folder = tmp_path / "results" / "test"
    with lab(tmp_path) as address, page(height=1000) as view:
        try:
            run_all(view, address, "look.ipynb")
            view.locator(".wb-board .scatterlayer .trace").first.wait_for(timeout=240_000)
            before = view.evaluate(REACHED)
            view.wait_for_function(f"{REACHED} > {before}", timeout=120_000)
            header(view, "running: 0 of 4 runs")
            choose(view, "Progress")
            view.locator("tr[data-key='arm sliding']").first.wait_for(timeout=30_000)
            assert view.locator(".jp-InputPrompt").last.inner_text() == "[*]:", "the last cell still waits"
            view.get_by_role("button", name="Stop", exact=True).click()
            header(view, "not running", 120)
            view.locator(".jp-OutputArea").filter(has_text="waited till the end").last.wait_for(timeout=60_000)
            assert not view.errors, view.errors
        finally:
            if (folder / "ablation.json").exists():
                AblationRun(folder).stop()


@pytest.mark.parametrize("name", ["00_quickstart", "04_launch_and_steer"])
def test_notebooks(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "sweeps", tmp_path / "sweeps")
    (tmp_path / "notebooks").mkdir()
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = f"overrides = {SMALL!r}\nresults = '../results'"
    (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook))
    with lab(tmp_path) as address, page() as view:
        run_all(view, address, f"notebooks/{name}.ipynb")
        view.locator(".wb-board .js-plotly-plot").first.wait_for(timeout=300_000)
        view.locator(".jp-OutputArea").filter(has_text="paired seeds").last.wait_for(timeout=300_000)
        header(view, "finished: ")
        assert not view.get_by_text("Traceback").count()
        assert not view.errors, view.errors
