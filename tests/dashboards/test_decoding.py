"""The panel of decoding policies: quality against tokens, choices over steps, bytes and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from dashboards.fake import FakeRun

from workbench.dashboards import figure, table
from workbench.dashboards.panel import make_panel
from workbench.dashboards.tables.suites import suite_table
from workbench.results.tables import SCORES_SCHEMA

TOKENS = {"quest": 16.0, "lagged": 8.0}


class PolicyRun(FakeRun):
    """Two policies that read a part, beside one that reads everything."""

    def scores(self) -> pl.DataFrame:
        rows: list[dict[str, Any]] = []
        for run in self._each():
            if run["stage"] != "confirmation" or run["arm"] not in TOKENS:
                continue
            about = {k: run[k] for k in ("arm", "stage", "run", "seed")} | {"step": self.points, "split": "report"}
            about |= {"suite": "reads", "task": "mqar", "higher_is_better": False}
            whole = {"tokens": TOKENS[run["arm"]], "bytes": 100.0, "host_bytes": 10.0, "milliseconds per step": 3.0}
            rows += [about | {"metric": name, "value": value, "count": 4.0} for name, value in whole.items()]
            for document, (position, layer) in enumerate([(2, 0), (2, 1), (3, 0), (3, 1)]):
                labels = {"document": document, "position": position, "layer": layer}
                rows.append(about | labels | {"metric": "overlap", "value": 0.1 * position + 0.2 * layer, "count": 1.0})
        return pl.DataFrame(rows, schema={**SCORES_SCHEMA, "position": pl.Int64, "layer": pl.Int64}, orient="row")


@pytest.fixture
def run(tmp_path: Path) -> PolicyRun:
    return PolicyRun(tmp_path, ("dense", "quest", "lagged"), suites=True)


def test_quality_is_listed_against_the_tokens_that_a_step_keeps(run: PolicyRun) -> None:
    rows = {row["arm"]: row for row in table(run, "decoding").iter_rows(named=True)}
    assert {arm: row["tokens"] for arm, row in rows.items()} == {"dense": None, **TOKENS}
    assert all(row["low"] <= row["value"] <= row["high"] and row["runs"] == 3 for row in rows.values())


def test_what_reads_everything_is_a_line(run: PolicyRun) -> None:
    drawn = figure(run, "decoding")
    assert [list(trace.x) for trace in drawn.data] == [[], [16.0], [8.0]]
    assert len(drawn.layout.shapes) == 1


def test_shares_are_means_over_layers(run: PolicyRun) -> None:
    rows = table(run, "decoding", show="overlap").filter(pl.col("arm") == "quest")
    assert rows.select("position", pl.col("value").round(9)).rows() == [(2, 0.3), (3, 0.4)]


def test_a_share_that_nothing_has_is_empty(run: PolicyRun) -> None:
    assert not len(table(run, "decoding", show="hit_rate"))


@pytest.mark.parametrize(
    ("show", "parts"), [("bytes", {"bytes", "host_bytes"}), ("milliseconds", {"milliseconds per step"})]
)
def test_bars_have_their_parts(run: PolicyRun, show: str, parts: set[str]) -> None:
    assert set(table(run, "decoding", show=show)["part"]) == parts
    assert len(figure(run, "decoding", show=show).data) == len(parts)


def test_other_runs_have_no_such_panel(tmp_path: Path, run: PolicyRun) -> None:
    panel = make_panel("decoding")
    assert panel.applies(run)
    assert not panel.applies(FakeRun(tmp_path, suites=True)) and not panel.applies(FakeRun(tmp_path))


def test_reads_are_no_scores_of_a_suite(run: PolicyRun) -> None:
    from workbench.dashboards.snapshot import Snapshot

    assert not len(suite_table(Snapshot(run)))
