"""An ablation against one of somebody else: nothing is paired, and only equal quantities are compared."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from workbench.ablation.analysis.against import LABEL, against
from workbench.ablation.run import AblationRun
from workbench.ablation.verdict.statistics import exchange_p, welch
from workbench.api.ablations import verdict
from workbench.config import ConfigError
from workbench.distribution import ROOT

ARCHIVES = ROOT / "results" / "ablations"


def test_the_interval_is_welchs() -> None:
    rng = np.random.default_rng()
    first, second = rng.normal(0, 1, 5), rng.normal(1, 3, 9)
    found, expected = welch(first, second, 0.1), stats.ttest_ind(first, second, equal_var=False)
    interval = expected.confidence_interval(0.9)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert welch([1.0], [2.0, 3.0]).p == 1.0 and welch([1.0, 1.0], [2.0, 2.0]).p == 1.0


def test_an_exchange_of_seeds_is_exact_where_there_are_few() -> None:
    values = np.random.default_rng().normal(size=9)
    gaps = []
    for chosen in itertools.combinations(range(9), 4):
        others = [i for i in range(9) if i not in chosen]
        gaps.append(abs(values[list(chosen)].mean() - values[others].mean()))
    assert exchange_p(values[:4], values[4:]) == pytest.approx(np.mean(np.array(gaps) >= gaps[0] - 1e-12))
    rng = np.random.default_rng()
    assert exchange_p(rng.normal(0, 1, 30), rng.normal(3, 1, 30)) < 1e-3, "a sample of many splits"


def test_every_arm_is_compared_with_one_of_the_other() -> None:
    found = against(AblationRun(ARCHIVES / "scmoe"), AblationRun(ARCHIVES / "balance"), "loss")
    assert [row.arm for row in found.rows] == ["interleaved", "scmoe", "strict"] and found.reference == "loss"
    row = found.rows[1]
    assert row.word == "better" and row.high is not None and row.high < 0 and row.p <= row.p_holm < 0.05
    assert any(text.startswith("model.feedforward") for text in row.differs)
    assert LABEL in str(found) and "exploratory" in str(found)


def test_a_rate_has_an_interval_inside_its_range() -> None:
    found = against(AblationRun(ARCHIVES / "needle"), AblationRun(ARCHIVES / "needle"))
    gdn = next(row for row in found.rows if row.arm == "gdn")
    assert gdn.low is not None and gdn.high is not None and -1 <= gdn.low < gdn.high <= 1
    assert found.bounded and all(row.word == "undecided" for row in found.rows), "three seeds decide nothing"


def test_other_quantities_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="measured in"):
        against(AblationRun(ARCHIVES / "scmoe"), AblationRun(ARCHIVES / "needle"))
    with pytest.raises(ConfigError, match="Nearest valid name: 'loss'"):
        against(AblationRun(ARCHIVES / "scmoe"), AblationRun(ARCHIVES / "balance"), "los")
    other = Path(shutil.copytree(ARCHIVES / "balance", tmp_path / "balance"))
    report = pl.read_parquet(other / "report.parquet")
    report.with_columns(pl.col("bytes") + 1).write_parquet(other / "report.parquet")
    with pytest.raises(ConfigError, match="report documents of scmoe, of the same sizes"):
        against(AblationRun(ARCHIVES / "scmoe"), AblationRun(other))
    record = json.loads((other / "ablation.json").read_text())
    record["data"] = dict.fromkeys(record["data"], "another")
    (other / "ablation.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="other data \\(another, not"):
        against(AblationRun(ARCHIVES / "scmoe"), AblationRun(other))


def test_the_answer_has_both() -> None:
    answer = verdict(ARCHIVES / "scmoe", ARCHIVES / "balance", "loss")
    assert answer.verdict is not None and answer.against is not None and answer.against.label == LABEL
    assert answer.against.rows[0]["arm"] == "interleaved" and verdict(ARCHIVES / "scmoe").against is None
    with pytest.raises(ConfigError, match="arm"):
        verdict(ARCHIVES / "scmoe", None, "loss")
