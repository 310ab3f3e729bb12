"""Pages that a reader opens: none offers to send a figure elsewhere, or asks another machine for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.io
import pytest
from dashboards.browser import needs_browser, page
from dashboards.fake import FakeRun

from workbench.dashboards import figure, write_report
from workbench.dashboards.live.widget import WAITING
from workbench.dashboards.style import UPLOADS

pytestmark = [needs_browser, pytest.mark.browser]

BUTTONS = ".modebar-btn"
"""Every button beside a figure."""


def buttons(view: Any) -> list[str]:
    """Names of the buttons beside figures, in lower case."""
    return [(name or "").lower() for name in view.locator(BUTTONS).evaluate_all("all => all.map(b => b.dataset.title)")]


def check(path: Path) -> None:
    """Open a file and look at its figures and requests."""
    asked: list[str] = []
    with page(height=1400) as view:
        view.on("request", lambda request: asked.append(request.url))
        view.goto(path.as_uri())
        view.locator(".js-plotly-plot .modebar-btn").first.wait_for(state="attached")
        names = buttons(view)
        assert any("download" in name for name in names), names
        assert not [name for name in names if "share" in name or "cloud" in name or "studio" in name], names
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
        assert not view.errors, view.errors


def test_the_report(tmp_path: Path) -> None:
    check(write_report(FakeRun(tmp_path), tmp_path / "report.html"))


def test_a_figure_as_notebooks_show_it(tmp_path: Path) -> None:
    shown = figure(FakeRun(tmp_path), "curves")
    assert set(UPLOADS) <= set(shown.layout.template.layout.modebar.remove)
    path = tmp_path / "cell.html"
    path.write_text(plotly.io.to_html(shown, include_plotlyjs=True))  # what the renderers of notebooks embed
    check(path)


def test_a_panel_that_does_not_come_up_says_so_after_ten_seconds() -> None:
    with page() as view:
        view.set_content(f'<div class="workbench-dashboard"><div class="wb-waiting">{WAITING}</div></div>')
        late = view.locator(".wb-late")
        opacity = "document.querySelector('.wb-late').computedStyleMap().get('opacity').value"
        assert view.evaluate(opacity) == 0
        view.evaluate("document.getAnimations().forEach(each => { each.currentTime = 10_001; })")
        assert view.evaluate(opacity) == 1 and "Reload" in late.inner_text()
        view.evaluate(
            "document.querySelector('.workbench-dashboard').insertAdjacentHTML('beforeend', '<p class=wb-board>')"
        )
        assert view.locator(".wb-waiting").is_hidden(), "the board is there"
