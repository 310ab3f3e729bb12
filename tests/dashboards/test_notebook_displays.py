"""What a notebook shows for the objects that people look at: it fits the page and breaks no words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from dashboards.browser import needs_browser, page

import workbench as wb
from workbench import notebook

ROOT = Path(__file__).parents[2]
ARCHIVES = ROOT / "results" / "ablations"


@pytest.fixture(scope="module")
def ablation() -> Any:
    return wb.Ablation.load(ROOT / "sweeps" / "quickstart.yaml")


@pytest.fixture(scope="module")
def card(ablation: Any) -> Any:
    return ablation.cost(measure=False)


def words(html: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)))


def test_the_cost_card_starts_with_what_is_not_matched(card: Any, ablation: Any) -> None:
    text = words(card._repr_html_())
    assert text.index("not matched") < text.index("training FLOPs")
    assert all(arm in text for arm in ablation.arms)
    assert str(card).splitlines()[1].startswith("not matched") and repr(card) == str(card)


def test_a_cost_card_is_a_table(card: Any) -> None:
    assert card.filter(pl.col("arm") == card["arm"][0])["parameters"].dtype == pl.Int64
    part = card.select("arm", "parameters")
    assert "parameters" in part._repr_html_() and "parameters" in str(part)


def test_a_cost_card_of_many_arms_has_a_row_per_arm(card: Any) -> None:
    many = type(card)(pl.concat([pl.DataFrame(card)] * 3))
    assert many._repr_html_().count("<tr") == len(many) + 1


def test_a_verdict_is_a_table_with_sentences_to_unfold() -> None:
    verdict = wb.open(ARCHIVES / "scmoe").verdict()
    html = verdict._repr_html_()
    assert html.count("<tr") == 4 and "<details" in html and "better" in html
    assert repr(verdict).startswith("Verdict('interleaved': scmoe better") and "\n" not in repr(verdict)


def test_a_run_shows_its_arms_and_its_verdict() -> None:
    run = wb.open(ARCHIVES / "scmoe")
    text = words(run._repr_html_())
    assert "2.2570 ± 0.0061" in text and run.summary().headline in text


def test_a_run_that_has_not_started_has_a_display(tmp_path: Path, real_runs: Any) -> None:
    assert "not finished" in words(real_runs["launched"]._repr_html_())


def test_texts_are_escaped() -> None:
    html = (
        notebook.table(["<b>"], [["<i>"]], note="<u>") + notebook.details("<s>", ["<q>"]) + notebook.paragraph("<p>x")
    )
    assert not re.search(r"<(b|i|u|s|q)>", html) and "&lt;p&gt;x" in html


@pytest.fixture(scope="module")
def displays(ablation: Any, card: Any) -> dict[str, str]:
    names = ("scmoe", "mqar_delta_family", "transfer", "muon")
    runs = {name: wb.open(ARCHIVES / name) for name in names}
    return {
        "card": card._repr_html_(),
        "layers": ablation.describe(next(iter(ablation.arms)))._repr_html_(),
        **{f"run {name}": run._repr_html_() for name, run in runs.items()},
        **{f"verdict {name}": run.verdict()._repr_html_() for name, run in runs.items()},
    }


@pytest.fixture(scope="module")
def view() -> Iterator[Any]:
    with page() as opened:
        yield opened


@needs_browser
@pytest.mark.browser
def test_every_display_fits_a_notebook(displays: dict[str, str], view: Any) -> None:
    for name, html in displays.items():
        view.set_content(f"<!doctype html><div id=a style='width:{notebook.WIDTH}px'>{html}</div>")
        view.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
        wide = view.evaluate("Math.max(...[...document.querySelectorAll('#a, #a *')].map(node => node.scrollWidth))")
        assert wide <= notebook.WIDTH, name
