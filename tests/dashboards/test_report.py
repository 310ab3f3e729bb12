"""The report: one file, complete, escaped, and silent on the network."""

from __future__ import annotations

import html
import re
from pathlib import Path

import polars as pl
import pytest
from dashboards.browser import needs_browser
from dashboards.browser import page as page_of
from dashboards.fake import FakeRun
from ruamel.yaml import YAML

from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig
from workbench.dashboards import write_report
from workbench.dashboards.panel import Column, Grid, Row
from workbench.dashboards.report.render import _block

ODD = "<img src=x onerror=alert(1)>"


def text_of(path: Path) -> str:
    """The page without plotly.js."""
    page = path.read_text(encoding="utf-8")
    return page[: page.index("<script ")] + page[page.index("</head>") :]


@pytest.fixture
def page(tmp_path: Path) -> str:
    return text_of(write_report(FakeRun(tmp_path, arms=("full", ODD)), tmp_path / "new" / "report.html"))


def test_sections_are_in_order(page: str) -> None:
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Verdict",
        "Differences to the baseline",
        "Training",
        "Selection",
        "What the difference is worth",
        "Tuning",
        "Tuning gap",
        "Stability",
        "Cost",
        "Failures",
        "Every run",
    ]


@pytest.mark.parametrize(
    "text", ["baseline", "worse", "is worse than full by", "tokens +9.0 %", "No run has failed.", "1.2 M", "3.4 GB"]
)
def test_the_report_is_complete(page: str, text: str) -> None:
    assert text in page


def test_everything_is_escaped(page: str) -> None:
    assert "Is &lt;i&gt;gdn&lt;/i&gt; better &amp; cheaper?" in page
    for markup in ("<img", "<i>", "<b>", "alert(1)</script>"):
        assert markup not in page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_only_the_report_is_written(tmp_path: Path) -> None:
    write_report(FakeRun(tmp_path), tmp_path / "new" / "report.html")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


def test_an_unfinished_run_is_reported_as_such(tmp_path: Path) -> None:
    page = text_of(write_report(FakeRun(tmp_path, progress=0.5, confirmed=False), tmp_path / "report.html"))
    assert "Not finished: 0 of 12 runs have ended." in page
    assert "The verdict follows when" in page and "tuning trials" in page


def test_failures_are_reported_with_their_reason(tmp_path: Path) -> None:
    page = text_of(write_report(FakeRun(tmp_path, status="out_of_memory"), tmp_path / "report.html"))
    assert "out of memory" in page and "loss &lt;nan&gt; &amp; more" in page


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_in_a_browser(tmp_path: Path, scheme: str) -> None:
    path = write_report(FakeRun(tmp_path, arms=("full", "gdn", ODD)), tmp_path / "report.html")
    with page_of(color_scheme=scheme) as view:
        requests: list[str] = []
        complaints: list[str] = []
        view.on("request", lambda request: requests.append(request.url))
        view.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        view.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        view.goto(path.as_uri())
        view.wait_for_selector("#tuning .main-svg")
        assert view.locator("#effects").get_by_text("worse").count() == 2
        assert view.locator("#curves .xtitle").text_content() == "training tokens"
        view.locator("button[data-for=curves]", has_text="Time").click()
        view.wait_for_function("document.querySelector('#curves .xtitle').textContent == 'training time (s)'")
        assert view.evaluate("document.documentElement.scrollWidth") <= 1280, "nothing sticks out"
        assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert complaints + view.errors == []


NEEDLE = Path(__file__).parents[2] / "results/ablations/needle"


def test_a_reader_sees_what_was_compared_declared_and_changed_and_can_run_it_again(tmp_path: Path) -> None:
    path = write_report(AblationRun(NEEDLE), tmp_path / "report.html")
    page = text_of(path)
    assert path.stat().st_size < 3e6
    assert "No arm is better than full" in page
    section = page[page.index("<h2>What was compared") : page.index("<h2>Differences")]
    assert "model.mixers.sliding.window: 32" in section
    assert "data.lengths: [80, 96, 128, 192]" in section
    assert "Declared at launch, 2026-11-27" in section and "Changed after the launch" in section
    assert "workbench run needle-again.yaml" in section
    file = re.search("<pre>(.*?)</pre>", section, flags=re.S)
    assert file
    again = AblationConfig.parse(YAML(typ="safe").load(html.unescape(file[1])))
    assert again.changed(name="needle").identity == AblationRun(NEEDLE).record.config.identity


def test_a_report_names_no_database(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    launch = {"storage": "postgresql://user:secret@host/db"}
    run.configuration = {"name": "a", "arms": {arm: {} for arm in run.arms}, "launch": launch}
    assert "secret" not in text_of(write_report(run, tmp_path / "report.html"))


@needs_browser
@pytest.mark.browser
def test_on_paper_figures_are_as_wide_as_the_page(tmp_path: Path) -> None:
    path = write_report(FakeRun(tmp_path), tmp_path / "report.html")
    with page_of() as view:
        view.goto(path.as_uri())
        view.locator(".js-plotly-plot").first.wait_for()
        view.evaluate("dispatchEvent(new Event('beforeprint'))")
        widths = view.evaluate(
            "[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().width)"
        )
        assert max(widths) <= 680
        view.evaluate("dispatchEvent(new Event('afterprint'))")
        view.wait_for_function("document.querySelector('.main-svg').getBoundingClientRect().width > 800")
        assert not view.errors


def test_a_table_has_its_note_and_no_hidden_column() -> None:
    columns = [Column("arm"), Column("tokens", numeric=True, hidden=True)]
    grid = Grid(
        "runs", columns, [Row("a", "", ["full", "12345"])], pl.DataFrame(), note="The same everywhere: <tokens>."
    )
    text = str(_block([grid], "runs", []))
    assert '<p class="caption">The same everywhere: &lt;tokens&gt;.</p>' in text and ">full</td>" in text
    assert "<th" in text and "12345" not in text and ">tokens</th>" not in text
