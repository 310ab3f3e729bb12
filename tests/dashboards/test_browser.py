"""What a person sees and clicks on the stand-alone page, in a real browser."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

import pytest
from dashboards.browser import ROOT, choose, header, needs_browser, page, voila

pytestmark = [needs_browser, pytest.mark.browser]


def test_the_page_of_kept_results(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results" / "ablations" / "needle", tmp_path / "results" / "needle")
    asked: list[str] = []
    with voila(tmp_path / "results") as address, page() as view:
        view.on("request", lambda request: asked.append(request.url))
        with urllib.request.urlopen(address.partition("?")[0]) as answer:
            assert "/login" in answer.geturl(), "the token is asked for"
        view.goto(address)
        row = view.locator("tr[data-key]").filter(has_text="needle")
        row.wait_for(timeout=240_000)
        assert "finished" in row.inner_text()
        row.get_by_role("button", name="open").click()
        header(view, "finished: ")
        view.locator(".wb-board summary").click()
        text = view.locator(".wb-board").inner_text()
        assert "paired seeds" in text and "code " in text, "how it was found, and where its numbers come from"
        choose(view, "Effects")
        view.locator(".js-plotly-plot .ytick text", has_text="gdn").wait_for()
        assert view.locator(".ytick text").all_text_contents() == ["sliding", "gdn"]
        choose(view, "Progress")
        pin = view.get_by_role("button", name="pin arm gdn").first
        pin.click()
        view.locator("tr.wb-pinned").first.wait_for()
        assert view.locator("tbody tr").first.get_attribute("data-key") == "arm gdn"
        view.get_by_role("button", name="hide arm sliding").first.click()
        view.locator("tr.wb-hidden").first.wait_for()
        choose(view, "Effects")
        view.wait_for_function("document.querySelectorAll('.ytick text').length == 1")
        choose(view, "Mechanisms")  # of an archive, the recall map alone
        view.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
        choose(view, "Runs")
        choose(view, "Every run")
        view.locator("th button", has_text="seed").click()
        view.get_by_role("searchbox").fill("gdn confirmation lr>0")
        view.wait_for_function("[...document.querySelectorAll('tbody tr')].every(row => row.innerText.includes('gdn'))")
        assert view.locator("th[aria-sort=ascending]").inner_text() == "seed"
        view.locator("select").filter(has_text="LaTeX").select_option("CSV")
        view.get_by_role("button", name="Export", exact=True).click()
        header(view, "Wrote .*every-run.csv")
        exports = tmp_path / "results" / "exports" / "needle"  # from where the server was started
        assert (exports / "every-run.csv.provenance.json").exists()
        assert not (tmp_path / "results" / "needle" / "exports").exists(), "archives are committed"
        assert not view.errors, view.errors
        here = address.partition("?")[0]
        assert [url for url in asked if not url.startswith((here, here.replace("http", "ws"), "data:", "blob:"))] == []
        width = view.evaluate("document.documentElement.scrollWidth")
        assert width <= 1280, f"{width} pixels wide"
