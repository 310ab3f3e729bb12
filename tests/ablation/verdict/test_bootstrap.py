"""The crossed bootstrap against closed forms and simulations. Every generator has a fixed seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workbench.ablation.verdict.bootstrap import crossed_bootstrap
from workbench.ablation.verdict.statistics import widening

pytestmark = pytest.mark.filterwarnings("error")


def two_way(rng, seeds, documents, sd_seed, sd_document, sd_interaction):
    """Differences in bits per byte around 0: seed effect + document effect + interaction, (S, D)."""
    return (
        sd_seed * rng.normal(size=(seeds, 1))
        + sd_document * rng.normal(size=documents)
        + sd_interaction * rng.normal(size=(seeds, documents))
    )


def bootstrap_of(differences_SD, **options):
    """The bootstrap of given differences in bits per byte, every document one byte long."""
    differences_SD = np.asarray(differences_SD)
    return crossed_bootstrap(differences_SD, np.zeros_like(differences_SD), np.ones(differences_SD.shape[1]), **options)


def test_bootstrap_variance_of_one_table_is_its_closed_form():
    """Rows, columns and interaction add up exactly; 20,000 replicates leave a relative standard error of 1 %."""
    table = two_way(np.random.default_rng(0), 6, 80, 1.0, 3.0, 5.0)
    rows, columns = table.mean(1), table.mean(0)
    interaction = table - rows[:, None] - columns + table.mean()
    closed = rows.var() / 6 + columns.var() / 80 + interaction.var() / 480
    found = bootstrap_of(table, replicates=20_000)
    assert found.mean == pytest.approx(table.mean())
    assert found.error**2 == pytest.approx(closed, rel=0.04)


def test_bootstrap_variance_is_that_of_the_two_way_model():
    """The expectation over tables of the closed form, term by term; 400 tables leave a standard error of about 2 %."""
    seeds, documents, sds = 12, 40, (1.0, 3.0, 4.0)
    rng = np.random.default_rng(1)
    tables = [two_way(rng, seeds, documents, *sds) for _ in range(400)]
    found = np.mean([bootstrap_of(table, replicates=300, seed=i).error ** 2 for i, table in enumerate(tables)])
    s, d, i = (sd**2 for sd in sds)
    of_seeds = (1 - 1 / seeds) * (s + i / documents) / seeds
    of_documents = (1 - 1 / documents) * (d + i / seeds) / documents
    of_both = (1 - 1 / seeds) * (1 - 1 / documents) * i / (seeds * documents)
    assert found == pytest.approx(of_seeds + of_documents + of_both, rel=0.06)
    true = s / seeds + d / documents + i / (seeds * documents)  # of the mean of a table
    assert np.var([table.mean() for table in tables]) == pytest.approx(true, rel=0.2)
    assert 0.9 * true < found < true + 2 * i / (seeds * documents)  # the interaction counts up to three times


@pytest.mark.parametrize(
    ("documents", "sds", "tables"),
    [(1, (1.0, 0.0, 0.0), 1_500), (30, (1.0, 0.0, 0.5), 1_500), (30, (1.0, 2.0, 2.0), 300), (30, (0.2, 2.0, 2.0), 300)],
)
def test_widened_interval_covers_at_five_seeds(documents, sds, tables):
    """95 % where seeds dominate, and never less where documents do. Standard error 0.006 for 1,500 tables."""
    rng = np.random.default_rng(documents)
    found = [bootstrap_of(two_way(rng, 5, documents, *sds), replicates=500, seed=i) for i in range(tables)]
    covered = np.mean([x.low < 0 < x.high for x in found])
    assert covered > 0.93
    if sds[1] == 0:
        assert covered < 0.97


def test_widening_factor():
    """√(n/(n − 1)) t/z: 2.776 and 1.960 for five seeds; none from 20 seeds on."""
    assert widening(5, 0.95) == pytest.approx(math.sqrt(5 / 4) * 2.7764 / 1.9600, rel=1e-4)
    plain = bootstrap_of(np.tile(np.arange(20.0)[:, None], 30))
    assert (plain.high - plain.mean) / plain.error == pytest.approx(1.96, abs=0.06)


def test_bootstrap_resamples_ratios_of_sums():
    """Two documents, differences 0 and 1 bit, 1 and 3 bytes: draws give 0, 1/4 or 1/3 of a bit a byte."""
    arm_SD, sizes = np.tile([0.0, 1.0], (2, 1)), np.array([1.0, 3.0])
    found = crossed_bootstrap(arm_SD, np.zeros((2, 2)), sizes, replicates=20_000)
    values = np.array([0, 1 / 4, 1 / 4, 1 / 3])
    assert found.mean == pytest.approx(values[1])
    assert found.error == pytest.approx(values.std(), rel=0.03)


def test_bootstrap_edges():
    table = two_way(np.random.default_rng(2), 3, 5, 1.0, 1.0, 1.0)
    assert bootstrap_of(table) == bootstrap_of(table) != bootstrap_of(table, seed=1)
    one = bootstrap_of(table[:1])
    assert (one.low, one.high) == (-math.inf, math.inf)
    zero = bootstrap_of(np.zeros((3, 5)))
    assert (zero.mean, zero.error, zero.low, zero.high) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="arm_SD"):
        crossed_bootstrap(np.ones((3, 5)), np.ones((2, 5)), np.ones(5))
    with pytest.raises(ValueError, match="NaN"):
        bootstrap_of(np.full((3, 5), math.nan))


def test_bootstrap_does_not_depend_on_its_blocks():
    """4,000 replicates of 600 documents take several blocks; their sum of differences is constant by construction."""
    found = bootstrap_of(np.tile([[-1.0], [0.0], [1.0]], 600), replicates=4_000)
    assert found.mean == pytest.approx(0) and found.error == pytest.approx(math.sqrt(2 / 9), rel=0.05)


def test_clusters_are_drawn_whole():
    """Copies of a document are one: the interval of five documents, each ten times, is that of the five."""
    table = two_way(np.random.default_rng(3), 4, 5, 1.0, 2.0, 1.0)
    copies = bootstrap_of(np.repeat(table, 10, axis=1), clusters_D=np.repeat(np.arange(5), 10))
    plain = bootstrap_of(table)
    assert (copies.mean, copies.low, copies.high) == pytest.approx((plain.mean, plain.low, plain.high))


def test_cluster_numbers_must_fit_the_documents():
    with pytest.raises(ValueError, match="clusters_D"):
        bootstrap_of(np.ones((2, 3)), clusters_D=[0, 1])


def clustered_coverage(tables: int, clusters_D: np.ndarray | None) -> float:
    """Share of intervals that hold the population's value, 0, when documents of a cluster share their effect."""
    sizes = np.array([1] * 12 + [2] * 6 + [6, 12])  # documents of each cluster
    rng, cluster_D = np.random.default_rng(4), np.repeat(np.arange(20), sizes)
    held = 0
    for number in range(tables):
        effect_D = rng.normal(size=20)[cluster_D] + 0.3 * rng.normal(size=cluster_D.size)
        table = 0.2 * rng.normal(size=(5, 1)) + effect_D + 0.3 * rng.normal(size=(5, cluster_D.size))
        found = bootstrap_of(table, clusters_D=None if clusters_D is None else cluster_D, replicates=400, seed=number)
        held += found.low < 0 < found.high
    return held / tables


def test_intervals_cover_with_clustered_documents():
    assert clustered_coverage(400, np.array([])) >= 0.93
