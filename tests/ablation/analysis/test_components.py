"""Components of the noise: known variances are recovered, intervals cover, parts of a design that are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from dashboards.fake import FakeRun

from workbench.ablation.analysis.components import complete_design, component_table, sentences, variance_terms
from workbench.ablation.spec.protocol import Components
from workbench.dashboards import figure
from workbench.dashboards.panels.components import ComponentShares

INIT, ORDER, OTHER = 0, 1, 2
SIGMAS = {(INIT,): 1.0, (ORDER,): 2.0, (INIT, ORDER): 0.5}
"""Term -> standard deviation of its effects."""


def crossed_values(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a crossed design with the effects of SIGMAS."""
    values = np.zeros(shape)
    for term, sigma in SIGMAS.items():
        levels = [count if factor in term else 1 for factor, count in enumerate(shape)]
        values = values + random.normal(0, sigma, levels)
    return values


class CrossedRun(FakeRun):
    """A finished study whose runs measured ``values`` on documents, two to a cluster."""

    def __init__(self, folder: Path, components: Components, values: dict[str, np.ndarray], documents: np.ndarray):
        super().__init__(folder, tuple(values), seeds=components.runs)
        self.components, self.values, self.documents = components, values, documents

    def reports(self) -> Any:
        sizes = np.full(len(self.documents), 100.0)
        for arm, values in self.values.items():
            for seed, value in enumerate(values.flat):
                if np.isfinite(value):
                    frame = {
                        self.metric.numerator: (value + self.documents) * sizes / self.metric.scale,
                        self.metric.denominator: sizes,
                        "cluster": np.arange(len(sizes)) // 2,
                    }
                    yield arm, seed, pl.DataFrame(frame)


def test_mean_squares_and_variances_of_a_table_by_hand() -> None:
    # rows (6, 8, 10), columns (7, 9): grand mean 8; MS_rows = 2·(4 + 0 + 4)/2 = 8, MS_columns = 3·(1 + 1)/1 = 6;
    # interaction residuals (1, −1), (−2, 2), (1, −1): MS = 12/2 = 6; σ²_rows = (8 − 6)/2, σ²_columns = (6 − 6)/3
    terms = variance_terms(np.array([[6.0, 6.0], [5.0, 11.0], [10.0, 10.0]]))
    assert [terms[frozenset(term)].variance for term in ([0], [1], [0, 1])] == pytest.approx([1.0, 0.0, 6.0])


def test_estimates_are_unbiased() -> None:
    random = np.random.default_rng(0)
    tables = [variance_terms(crossed_values(random, (3, 3, 2)), draws=1) for _ in range(1_500)]
    for term in tables[0]:
        variances = [table[term].variance for table in tables]
        error = np.std(variances) / np.sqrt(len(variances))
        assert np.mean(variances) == pytest.approx(SIGMAS.get(tuple(sorted(term)), 0) ** 2, abs=4 * error + 1e-12)


@pytest.mark.parametrize("term", [(INIT,), (ORDER,), (INIT, ORDER)])
def test_intervals_cover(term: tuple[int, ...]) -> None:
    random, covered = np.random.default_rng(1), []
    for _ in range(600):
        draws_R = variance_terms(crossed_values(random, (4, 4, 2)), draws=400)[frozenset(term)].draws_R
        low, high = np.quantile(draws_R, (0.025, 0.975))
        covered.append(low <= SIGMAS[term] ** 2 <= high)
    assert np.mean(covered) > 0.93


def study(tmp_path: Path, shape: tuple[int, int, int], **arms: np.ndarray) -> CrossedRun:
    components = Components(init=shape[0], order=shape[1], other=shape[2])
    return CrossedRun(tmp_path, components, arms, np.repeat([-0.3, -0.1, 0.1, 0.3], 2))


def shares(run: Any, quantity: str) -> dict[str, float]:
    rows = component_table(run).filter((pl.col("quantity") == quantity) & pl.col("share").is_not_null())
    return dict(rows.select("component", "share").iter_rows())


def test_noise_of_the_data_order_alone(tmp_path: Path) -> None:
    values = np.broadcast_to(np.array([1.0, 1.1, 1.3])[:, None], (3, 3, 2))
    assert shares(study(tmp_path, (3, 3, 2), full=values), "full") == pytest.approx(
        {"init": 0, "order": 1, "other": 0, "combination": 0}, abs=1e-9
    )


def test_components_with_one_seed_have_no_row(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(1, 0.1, (3, 2, 1))
    assert set(shares(study(tmp_path, (3, 2, 1), full=values), "full")) == {"init", "order", "combination"}


def test_noise_that_both_arms_share_is_not_in_their_difference(tmp_path: Path) -> None:
    common = np.broadcast_to(np.array([1.0, 1.1, 1.3])[:, None, None], (3, 3, 1))
    own = np.broadcast_to(np.array([0.0, 0.01, -0.01])[None, :, None], (3, 3, 1))
    run = study(tmp_path, (3, 3, 1), full=common, gdn=common + own)
    assert shares(run, "gdn − full") == pytest.approx({"init": 0, "order": 1, "combination": 0}, abs=1e-9)


def test_documents_add_the_variance_of_their_mean(tmp_path: Path) -> None:
    values = np.broadcast_to(np.array([1.0, 1.1, 1.3])[:, None, None], (3, 3, 1))
    table = component_table(study(tmp_path, (3, 3, 1), full=values)).filter(pl.col("component") == "documents")
    clusters = np.array([-0.3, -0.1, 0.1, 0.3])
    assert table["levels"].item() == 4
    assert table["sd"].item() == pytest.approx(clusters.std(ddof=1) / 2)


def test_runs_that_do_not_differ_have_no_shares(tmp_path: Path) -> None:
    run = study(tmp_path, (2, 2, 1), full=np.ones((2, 2, 1)))
    assert shares(run, "full") == {}
    assert "do not differ" in sentences(component_table(run), run.metric.unit)[0]


def test_a_sentence_names_the_largest_component_first(tmp_path: Path) -> None:
    values = np.broadcast_to(np.array([1.0, 1.1, 1.3])[:, None], (3, 3, 2))
    run = study(tmp_path, (3, 3, 2), full=values)
    [sentence] = sentences(component_table(run), run.metric.unit)
    assert "of its variance data order 100 % (" in sentence


def test_failed_runs_take_the_seed_with_most_failures_out() -> None:
    components = Components(init=3, order=3)
    grid = complete_design(components, [number for number in range(9) if number not in (2, 5)])
    assert grid is not None and grid[..., 0].tolist() == [[0, 1], [3, 4], [6, 7]]


def test_too_few_runs_make_no_design() -> None:
    assert complete_design(Components(init=2), [0]) is None


def test_a_study_with_missing_runs_has_no_table(tmp_path: Path) -> None:
    values = np.full((2, 2, 1), 1.0)
    values[0, 0, 0] = np.nan
    run = study(tmp_path, (2, 2, 1), full=values)
    run.progress = 0.5
    assert len(component_table(run)) == 0


def test_the_panel_draws_every_share(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    run = study(tmp_path, (3, 3, 1), full=random.normal(1, 0.1, (3, 3, 1)), gdn=random.normal(1, 0.1, (3, 3, 1)))
    drawn = figure(run, "components")
    assert [trace.name for trace in drawn.data] == ["full", "gdn", "gdn − full"]
    assert all(len(trace.x) == 3 for trace in drawn.data)


def test_the_panel_is_for_crossed_designs(tmp_path: Path) -> None:
    assert not ComponentShares().applies(FakeRun(tmp_path))
