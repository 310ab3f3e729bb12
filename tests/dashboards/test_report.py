"""The report: one file, complete, escaped, and silent on the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards.fake import FakeRun

from workbench.dashboards import write_report

CHROMIUM = Path("/usr/bin/chromium")
ODD = "<img src=x onerror=alert(1)>"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def text_of(path: Path) -> str:
    """The page without plotly.js."""
    page = path.read_text(encoding="utf-8")
    return page[: page.index("<script>")] + page[page.index("</head>") :]


def test_report_says_it_all_and_escapes(tmp_path: Path) -> None:
    path = write_report(FakeRun(tmp_path, arms=("full", ODD)), tmp_path / "new" / "report.html")
    page = text_of(path)
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Verdict",
        "Difference to the baseline",
        "Training",
        "Selection loss",
        "Tuning",
        "Cost",
        "Data",
        "Failures",
        "Every run",
    ]
    for word in ("baseline", "worse", "is worse than full by", "tokens +9.0%", "No run has failed.", "1.2 M", "3.4 GB"):
        assert word in page
    assert "Is &lt;i&gt;gdn&lt;/i&gt; better &amp; cheaper?" in page
    assert "<img" not in page and "<i>" not in page and "<b>" not in page and "alert(1)</script>" not in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_report_of_an_unfinished_run_says_so(tmp_path: Path) -> None:
    page = text_of(write_report(FakeRun(tmp_path, progress=0.5, confirmed=False), tmp_path / "report.html"))
    assert "Not finished: 0 of 12 runs have ended." in page
    assert "The verdict comes when" in page and "tuning trials" in page


def test_report_names_failures(tmp_path: Path) -> None:
    page = text_of(write_report(FakeRun(tmp_path, status="out_of_memory"), tmp_path / "report.html"))
    assert "out of memory" in page and "loss &lt;nan&gt; &amp; more" in page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield started
        started.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_in_a_browser(browser: Any, tmp_path: Path, scheme: str) -> None:
    path = write_report(FakeRun(tmp_path, arms=("full", "gdn", ODD)), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    page.wait_for_selector("#tuning .main-svg")
    assert page.locator("#effects").get_by_text("worse").count() == 2
    assert page.locator("#curves .xtitle").text_content() == "training tokens"
    page.get_by_role("button", name="Time").click()
    page.wait_for_function("document.querySelector('#curves .xtitle').textContent == 'training time (s)'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280, "nothing sticks out"
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert complaints == []
    page.close()
