"""The tuning gap of each arm beside its difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from dashboards.fake import FakeRun

from workbench.ablation.search.optimum import Edge, Gap
from workbench.ablation.verdict.effort import Effort
from workbench.dashboards.panels.tuning_gap import gap_table
from workbench.dashboards.snapshot import Snapshot


def test_a_row_shows_setting_edge_gap_and_difference(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    edge = Edge("training.learning_rate", 9e-3, "the highest tried")
    effort = Effort("gdn", {"training.learning_rate": 9e-3}, {}, 3, 1, False, (edge,), Gap(0.018))
    run.efforts = lambda: {"gdn": effort}  # type: ignore[method-assign]
    (row,) = gap_table(Snapshot(run)).iter_rows(named=True)
    assert (row["setting"], row["edges"]) == ("learning_rate 0.009", "learning rate 0.009, the highest tried")
    assert (row["gap"], row["low"]) == (0.018, None)
    verdict = run.verdict()
    assert verdict is not None
    assert row["difference"] == pytest.approx(verdict.rows[1].difference)
