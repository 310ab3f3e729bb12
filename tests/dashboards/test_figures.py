"""Every figure draws its table, and nothing that a run can be makes one fail."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import polars as pl
import pytest
from dashboards.fake import FakeRun

from workbench.dashboards import figures, panels, snapshot, style, tables

ARCHIVE = Path(__file__).parents[2] / "results" / "ablations" / "needle"
ODD = '<img src=x onerror=alert(1)> & "co"'


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


EDGE_CASES = {
    "no runs": {"trials": 0},
    "one arm": {"arms": ("full",)},
    "all failed": {"status": "diverged"},
    "markup": {"arms": ("full", ODD)},
    "fifty arms": {"arms": tuple(f"arm {i}" for i in range(50)), "trials": 2, "points": 5},
    "just begun": {"progress": 0.0, "confirmed": False},
    "under way": {"progress": 0.5, "confirmed": False},
    "nothing tuned": {"tuned": ()},
    "one seed": {"seeds": 1},
}


@pytest.mark.parametrize("case", EDGE_CASES)
def test_no_state_of_a_run_fails(case: str, tmp_path: Path) -> None:
    run = snapshot.Snapshot(FakeRun(tmp_path, **EDGE_CASES[case]))
    drawn = [
        figures.loss_curves(run, x, y) for x in ("tokens", "flops", "seconds") for y in ("loss", "selection_value")
    ]
    drawn += [figures.effects(run), figures.tuning(run)]
    for figure in drawn:
        assert all(axis.title.text for axis in figure.select_xaxes()), "every axis has a title"
        assert figure.layout.yaxis.title.text
        figure.to_json()
    figures.cost(run).to_json()
    figures.failures(run).to_json()
    assert len(tables.progress_table(run)) == 2 * len(run.arms)
    assert 0 <= tables.state(run)["share"] <= 1


@pytest.mark.parametrize("x", ["tokens", "flops", "seconds"])
@pytest.mark.parametrize("y", ["loss", "selection_value"])
def test_loss_curves_draw_their_table(run: FakeRun, x: str, y: str) -> None:
    table, figure = tables.curve_table(run, x, y), figures.loss_curves(run, x, y)
    bands, lines = figure.data[:2], figure.data[2:]
    for arm, band, line in zip(run.arms, bands, lines, strict=True):
        mine = table.filter(pl.col("arm") == arm)
        assert line.name == arm and len(mine)
        assert list(line.x) == mine[x].to_list() and list(line.y) == mine["mean"].to_list()
        assert list(band.y) == mine["high"].to_list() + mine["low"].to_list()[::-1]


def test_curve_table_is_the_mean_over_seeds(run: FakeRun) -> None:
    table = tables.curve_table(run)
    held = run.curves().filter(pl.col("stage") == "confirmation")
    expected = held.group_by("arm", "tokens").agg(pl.col("loss").mean()).sort("arm", "tokens")
    assert table["mean"].to_list() == pytest.approx(expected["loss"].to_list())
    assert set(table["runs"]) == {3} and set(table["stage"]) == {"confirmation"}


def test_curves_are_bounded_and_keep_their_shape(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, points=5_000, trials=1, arms=("full",))
    table = tables.curve_table(run)
    assert len(table) == tables.POINTS
    assert (table["tokens"][0], table["tokens"][-1]) == (1_000, 5_000_000)
    ends = run.curves().filter((pl.col("stage") == "confirmation") & (pl.col("step") == 5_000))
    assert table["mean"][-1] == pytest.approx(ends["loss"].mean())


def test_curves_without_confirmation_say_that_they_are_tuning(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, progress=0.5, confirmed=False)
    assert set(tables.curve_table(run)["stage"]) == {"tuning"}
    assert "tuning" in figures.loss_curves(run).data[-1].name


def test_points_that_are_no_numbers_are_left_out(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = run.curves().with_columns(loss=pl.when(pl.col("step") == 7).then(float("nan")).otherwise("loss"))
    monkeypatch.setattr(run, "curves", lambda: spoilt)
    table = tables.curve_table(run)
    assert 7_000 not in table["tokens"].to_list() and table["mean"].is_finite().all()


def test_effects_draw_the_verdict(run: FakeRun) -> None:
    row = tables.effect_table(run).row(1, named=True)
    bootstrap, interval, marker, word = figures.effects(run).data
    assert list(bootstrap.x) == [row["bootstrap_low"], row["bootstrap_high"]]
    assert list(interval.x) == [row["low"], row["high"]]
    assert list(marker.x) == [row["difference"]]
    assert bootstrap.line.width < interval.line.width
    assert row["verdict"] == "worse" and "worse" in word.text[0]


def test_failed_arms_carry_their_word(tmp_path: Path) -> None:
    figure = figures.effects(FakeRun(tmp_path, status="diverged"))
    assert "failed" in figure.data[-1].text[0] and not len(figure.data[-2].x)


def test_tuning_draws_its_table(run: FakeRun) -> None:
    table, figure = tables.tuning_table(run), figures.tuning(run)
    mine = table.filter((pl.col("arm") == "full") & (pl.col("hyperparameter") == "lr"))
    assert list(figure.data[0].x) == mine["value"].to_list()
    assert list(figure.data[0].y) == mine["selection_value"].to_list()
    ring = figure.data[2]
    assert list(ring.x) == table.filter(pl.col("selected") & (pl.col("hyperparameter") == "lr"))["value"].to_list()
    assert figure.layout.xaxis.type == "log" and figure.layout.xaxis2.type == "category"


def test_trials_without_a_number_yet_are_not_drawn(tmp_path: Path) -> None:
    figure = figures.tuning(FakeRun(tmp_path, progress=0.5, confirmed=False))
    assert set(figure.data[0].y) == {None} and "yet" in figure.layout.annotations[0].text


def test_failed_trials_are_crosses(tmp_path: Path) -> None:
    assert set(figures.tuning(FakeRun(tmp_path, status="diverged")).data[0].marker.symbol) == {"x"}


def test_cost_and_failures_draw_their_tables(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, status="out_of_memory")
    cells = dict(zip(figures.cost(run).data[0].header.values, figures.cost(run).data[0].cells.values))
    assert list(cells["<b>parameters</b>"]) == ["1.2 M"] * 2
    assert list(cells["<b>cache, one sequence</b>"]) == ["3.4 GB"] * 2
    assert list(cells["<b>time, one run, estimate</b>"]) == ["2 min"] * 2
    reasons = figures.failures(run).data[0].cells.values[-1]
    assert len(reasons) == len(tables.failure_table(run)) == 12
    assert reasons[0] == "loss &lt;nan&gt; &amp; more"


def test_names_are_escaped(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, arms=("full", ODD))
    for figure in (figures.loss_curves(run), figures.effects(run), figures.tuning(run), figures.cost(run)):
        assert "<img" not in figure.to_json().replace("\\u003c", "<")


def test_one_colour_an_arm() -> None:
    looks = list(style.arm_styles([str(i) for i in range(40)]).values())
    assert len(set(looks)) == 40
    assert looks[0].colour == looks[8].colour and looks[0].dash != looks[8].dash


def test_importing_is_light() -> None:
    heavy = ("torch", "lightning", "optuna", "ipywidgets")
    code = (
        "import sys; from workbench.dashboards import write_report, effects, curve_table;"
        f"sys.exit(','.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_human_numbers() -> None:
    assert [style.count(n) for n in (0, 17, 999, 1_000, 999_999, 1_234_567, -2_000)] == [
        "0",
        "17",
        "999",
        "1 k",
        "1 M",
        "1.2 M",
        "-2 k",
    ]
    assert [style.size(3.4e9), style.flops(4.1e9), style.size(None)] == ["3.4 GB", "4.1 GFLOPs", "–"]
    assert [style.duration(s) for s in (0, 59.7, 120, 3600, 5400)] == ["0.0 s", "1 min", "2 min", "1 h", "1 h 30 min"]
    assert style.bits(-0.00001, signed=True) == "+0.0000"


class Sized(FakeRun):
    """A finished ablation whose size is in its folder's name."""

    def __init__(self, folder: Path):
        super().__init__(folder, trials=1)
        self.name, self.size = folder.name, float(folder.name)

    def cost(self) -> pl.DataFrame:
        return pl.DataFrame(
            {"arm": self.arms, "non_embedding": [self.size] * 2, "training_flops": [6 * self.size**2] * 2}
        )

    def runs(self) -> pl.DataFrame:
        noise = pl.col("seed").cast(pl.Float64) * 1e-4 + pl.when(pl.col("arm") == "gdn").then(0.05).otherwise(0.0)
        return super().runs().with_columns(report_value=0.5 + 20 * self.size**-0.3 + noise)


@pytest.mark.parametrize("sizes", [2, 4])
def test_a_law_is_fitted_where_sizes_suffice(sizes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.ablation.run.AblationRun", Sized)
    folders = [tmp_path / str(100 * 10**i) for i in range(sizes)]
    for folder in folders:
        folder.mkdir()
        (folder / "ablation.json").touch()
    run = snapshot.Snapshot(Sized(folders[0]))
    table = tables.scaling_table(run)
    assert table["values"].list.len().to_list() == [3] * 2 * sizes
    laws, figure = tables.scaling_laws(table), figures.scaling(run)
    band, line, points = figure.data[0], figure.data[2], figure.data[4]
    assert len(figure.data) == 6, "traces depend on the arms alone"
    assert list(points.x) == [100 * 10**i for i in range(sizes)]
    shown, told = panels.scaling(run, panels.Settings())
    if sizes == 2:
        assert not laws and not band.x and list(line.y) == list(points.y)
        assert "needs confirmation runs at 3 sizes" in told.html
        return
    assert laws["full"].exponent == pytest.approx(0.3, rel=0.05) and laws["full"].floor == pytest.approx(0.5, rel=0.05)
    assert max(line.x) == pytest.approx(3 * max(points.x)) and len(band.x) == 2 * len(line.x)
    assert line.y[-1] == pytest.approx(laws["full"].at(line.x[-1])[0])
    assert all(low <= middle <= high for middle, high, low in zip(line.y, band.y, band.y[::-1]))
    assert told.html.count("exponent") == 2 and shown.table is not None


def test_what_is_not_tuned_is_said(tmp_path: Path) -> None:
    run = snapshot.Snapshot(FakeRun(tmp_path, trials=0))
    grid = panels.progress(run, panels.Settings())[0]
    cells = {row[2][1]: row[2][7] for row in grid.rows}
    assert cells == {"tuning": ("nothing is tuned", None), "confirmation": ("0 %", 0.0)}
    assert "Nothing is tuned" in figures.tuning(run).layout.annotations[0].text


def test_a_seed_is_a_name(run: FakeRun) -> None:
    grid = panels.every_run(snapshot.Snapshot(run), panels.Settings())[0]
    assert {row[2][2] for row in grid.rows} == {("0", 0), ("1", 1), ("2", 2), ("1000", 1000)}


def test_a_finished_ablation_is_read_once_and_no_snapshot_keeps_the_previous_one_alive(
    run: FakeRun, tmp_path: Path
) -> None:
    shutil.copytree(ARCHIVE, folder := tmp_path / "kept")
    seen = snapshot.snapshot_of(folder)
    assert snapshot.snapshot_of(folder) is seen and seen.verdict() is not None
    os.utime(folder / "ablation.json", (1, 1))
    again = snapshot.snapshot_of(folder)
    assert again is not seen and again.verdict() is seen.verdict(), "nothing that it rests on has changed"
    first = snapshot.Snapshot(run)
    verdict, there = first.verdict(), weakref.ref(first)
    second = snapshot.Snapshot(run, snapshot.Snapshot(run, first))
    del first
    gc.collect()
    assert there() is None and second.verdict() is verdict
