"""The page of one run."""

from __future__ import annotations

from typing import Any

import pytest
from dashboards.fake import FakeRun

from workbench.dashboards.run_page import run_page
from workbench.dashboards.snapshot import Snapshot
from workbench.results.details import baseline_run, differences

pytestmark = pytest.mark.process


def page(run: Any, arm: str, seed: int) -> dict[str, Any]:
    """Blocks of the page of an arm's confirmation run, by name."""
    rows = run.runs().to_dicts()
    name = next(row["run"] for row in rows if (row["arm"], row["stage"], row["seed"]) == (arm, "confirmation", seed))
    return {block.name: block for block in run_page(Snapshot(run), name)}


def test_it_shows_everything_about_a_finished_run(real_runs: Any) -> None:
    run = real_runs["finished"]
    blocks = page(run, run.arms[1], 1)
    head = blocks["run"].html
    assert f"{run.arms[1]} · confirmation · seed 1" in head and "Copy path" in head and "checkpoint" in head
    fields = blocks["configuration"].table["field"].to_list()
    assert "model.pattern" in fields and not [field for field in fields if "seed" in field]
    assert "seed 1" in blocks["configuration"].note
    titles = [annotation.text for annotation in blocks["recorded"].figure.layout.annotations]
    assert {"learning rate", "Gradient norm", "training speed (FLOPs per second)"} <= set(titles)
    assert "training loss (nats per token)" in titles
    assert blocks["events"].table["event"].to_list()[:2] == ["assigned", "started"]
    assert {"device", "python"} <= set(blocks["environment"].table["what"])
    assert "<pre" in blocks["log"].html


def test_the_run_of_the_baseline_differs_from_none(real_runs: Any) -> None:
    run = real_runs["finished"]
    assert (
        page(run, run.baseline, 0)["configuration"].empty
        == "This is the run of the baseline that others are compared with."
    )


def test_an_archive_says_what_it_does_not_keep(real_runs: Any) -> None:
    run = real_runs["archived"]
    blocks = page(run, run.arms[1], 0)
    assert "An archive keeps no logs." in blocks["log"].html and "events" not in blocks
    assert blocks["configuration"].table["field"].to_list() == ["model.mixers.sliding.window", "model.pattern"]


@pytest.mark.parametrize("state", ["launched", "interrupted", "failed"])
def test_every_state_has_a_page(real_runs: Any, state: str) -> None:
    run = real_runs[state]
    for name in run.runs()["run"]:
        assert run_page(Snapshot(run), name)


def test_names_are_escaped(tmp_path: Any) -> None:
    run = FakeRun(tmp_path, ("full", "<b>"), status="crashed")
    (head, *_) = run_page(Snapshot(run), "tuning-1-0")
    assert "&lt;b&gt;" in head.html and "loss &lt;nan&gt; &amp; more" in head.html


def test_a_run_is_compared_with_the_baseline_of_its_seed(tmp_path: Any) -> None:
    runs = FakeRun(tmp_path).runs()
    assert baseline_run(runs, "full", 2)["run"] == "confirmation-0-2"  # type: ignore[index]
    assert baseline_run(runs, "full", 1000)["run"] == "confirmation-0-0"  # type: ignore[index]
    tuning = FakeRun(tmp_path, confirmed=False).runs()
    assert baseline_run(tuning, "full", 1000)["run"] == "tuning-0-1", "the chosen trial"  # type: ignore[index]
    assert baseline_run(tuning, "none", 0) is None


def test_only_fields_that_differ_are_listed() -> None:
    ours = {"model": {"width": 8, "at": {}}, "seed": 1, "only": [1, 2]}
    theirs = {"model": {"width": 4, "at": {}}, "seed": 2}
    assert differences(ours, theirs) == [("model.width", 4, 8), ("only[0]", None, 1), ("only[1]", None, 2)]
