"""Every figure draws its table, and no state of a run makes a panel fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from dashboards.fake import FakeRun

import workbench as wb
from workbench.ablation.design import Design
from workbench.config import ConfigError
from workbench.dashboards import figure, table
from workbench.dashboards.panel import Grid, make_panel, ordered_panels
from workbench.dashboards.panels.curves import MAX_POINTS
from workbench.dashboards.panels.scaling import scaling_laws
from workbench.dashboards.snapshot import Neighbours, Snapshot
from workbench.dashboards.tables.progress import overall_progress
from workbench.metric import BITS_PER_BYTE

ODD = '<img src=x onerror=alert(1)> & "co"'
STATES: dict[str, dict[str, Any]] = {
    "no runs": {"trials": 0},
    "one arm": {"arms": ("full",)},
    "all failed": {"status": "diverged"},
    "markup": {"arms": ("full", ODD)},
    "fifty arms": {"arms": tuple(f"arm {i}" for i in range(50)), "trials": 2, "points": 5},
    "just started": {"progress": 0.0, "confirmed": False},
    "running": {"progress": 0.5, "confirmed": False},
    "nothing tuned": {"tuned": ()},
    "one seed": {"seeds": 1},
}
CURVES = [{"x": x, "y": y} for x in ("tokens", "flops", "seconds") for y in ("loss", "selection_value")]


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


def blocks(run: Any, kind: str, **settings: Any) -> list[Any]:
    return make_panel(kind, **settings).blocks(Snapshot.of(run))


# -- any state of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("panel", ["curves", "effects", "tuning"])
def test_every_axis_has_a_title(state: str, panel: str, tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, **STATES[state]), panel)
    assert all(axis.title.text for axis in [*drawn.select_xaxes(), drawn.layout.yaxis])


@pytest.mark.parametrize("settings", CURVES)
@pytest.mark.parametrize("state", STATES)
def test_curves_have_titles_on_all_axes(state: str, settings: dict[str, Any], tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, **STATES[state]), "curves", **settings)
    assert drawn.layout.xaxis.title.text and drawn.layout.yaxis.title.text


@pytest.mark.parametrize("state", STATES)
def test_progress_has_a_row_for_each_arm_and_stage(state: str, tmp_path: Path) -> None:
    run = FakeRun(tmp_path, **STATES[state])
    assert len(table(run, "progress")) == 2 * len(run.arms)


@pytest.mark.parametrize("state", STATES)
def test_the_share_that_is_done_is_a_share(state: str, tmp_path: Path) -> None:
    assert 0 <= overall_progress(Snapshot(FakeRun(tmp_path, **STATES[state]))).share <= 1


@pytest.mark.parametrize("panel", ["curves", "effects", "tuning", "frontier", "importances", "best_of"])
def test_names_are_escaped(panel: str, tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, arms=("full", ODD)), panel)
    assert "<img" not in drawn.to_json().replace("\\u003c", "<")


# -- settings --------------------------------------------------------------------------------------------------------


def test_an_unknown_setting_is_refused(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match="smoothing"):
        figure(run, "curves", smoothing=1.0)


def test_an_unknown_panel_is_refused(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match="Nearest valid name: 'curves'"):
        figure(run, "curve")


def test_a_panel_without_a_figure_says_so(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match="has no figure"):
        figure(run, "runs")


# -- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", CURVES)
def test_lines_draw_the_mean(run: FakeRun, settings: dict[str, Any]) -> None:
    rows, lines = table(run, "curves", **settings), figure(run, "curves", **settings).data[4:]
    for arm, line in zip(run.arms, lines, strict=True):
        curve = rows.filter((pl.col("arm") == arm) & pl.col("whole"))
        assert (line.name, list(line.x), list(line.y)) == (arm, curve[settings["x"]].to_list(), curve["mean"].to_list())


@pytest.mark.parametrize("settings", CURVES)
def test_bands_draw_the_range(run: FakeRun, settings: dict[str, Any]) -> None:
    rows, bands = table(run, "curves", **settings), figure(run, "curves", **settings).data[:2]
    for arm, band in zip(run.arms, bands, strict=True):
        curve = rows.filter((pl.col("arm") == arm) & pl.col("whole"))
        assert list(band.y) == curve["high"].to_list() + curve["low"].to_list()[::-1]


def test_curves_are_the_mean_over_seeds(run: FakeRun) -> None:
    points = run.curves().filter(pl.col("stage") == "confirmation")
    expected = points.group_by("arm", "tokens").agg(pl.col("loss").mean()).sort("arm", "tokens")
    assert table(run, "curves")["mean"].to_list() == pytest.approx(expected["loss"].to_list())


def test_a_mean_goes_on_thin_where_its_first_run_has_ended(run: FakeRun) -> None:
    rows = table(run, "curves", x="seconds").filter(pl.col("arm") == "full")
    ends = (
        run.curves().filter(pl.col("stage") == "confirmation").group_by("run").agg(pl.col("seconds").max())["seconds"]
    )
    assert rows.filter("whole")["seconds"].max() <= ends.min() < rows["seconds"].max() == ends.max()
    data = figure(run, "curves", x="seconds").data
    rest, line = data[2], data[4]
    assert rest.x[0] == line.x[-1] and rest.x[-1] == pytest.approx(ends.max())
    assert rest.line.width < 1 < line.line.width and not rest.showlegend


def test_an_archive_offers_no_panels_of_what_it_does_not_keep(run: FakeRun) -> None:
    names = {"diagnostics", "layers", "attention"}
    offered = {cls.Config.model_fields["kind"].default for cls in ordered_panels() if cls().applies(run)}
    assert names <= offered
    run.archived = True
    offered = {cls.Config.model_fields["kind"].default for cls in ordered_panels() if cls().applies(run)}
    assert not names & offered


def test_an_archive_without_curves_says_so(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.archived = True
    monkeypatch.setattr(run, "lines", list)
    (annotation,) = figure(run, "curves").layout.annotations
    assert annotation.text == "This archive was written before archives kept curves."


def test_curves_count_their_runs(run: FakeRun) -> None:
    assert set(table(run, "curves")["runs"]) == {3}


def test_long_curves_have_a_bounded_number_of_points(tmp_path: Path) -> None:
    assert len(table(FakeRun(tmp_path, points=5_000, trials=1, arms=("full",)), "curves")) == MAX_POINTS


def test_long_curves_keep_both_ends(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, points=5_000, trials=1, arms=("full",))
    rows = table(run, "curves")
    last = run.curves().filter((pl.col("stage") == "confirmation") & (pl.col("step") == 5_000))
    assert (rows["tokens"][0], rows["tokens"][-1]) == (1_000, 5_000_000)
    assert rows["mean"][-1] == pytest.approx(last["loss"].mean())


def test_curves_without_confirmation_are_marked_as_tuning(tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, progress=0.5, confirmed=False), "curves")
    assert drawn.data[-1].name == "gdn (tuning trials)"


def test_points_that_are_not_numbers_are_left_out(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = run.curves().with_columns(loss=pl.when(pl.col("step") == 7).then(float("nan")).otherwise("loss"))
    monkeypatch.setattr(run, "curves", lambda: curves)
    rows = table(run, "curves")
    assert 7_000 not in rows["tokens"].to_list() and rows["mean"].is_finite().all()


def test_selected_runs_are_lines_of_their_own(run: FakeRun) -> None:
    assert figure(run, "curves", selected=["tuning-1-2"]).data[-1].name == "tuning-1-2"


# -- effects ---------------------------------------------------------------------------------------------------------


def test_effects_draw_the_verdict(run: FakeRun) -> None:
    row = table(run, "effects").row(1, named=True)
    _, bootstrap, interval, marker, _ = figure(run, "effects").data
    assert list(bootstrap.x) == [row["bootstrap_low"], row["bootstrap_high"]]
    assert list(interval.x) == [row["low"], row["high"]]
    assert list(marker.x) == [row["difference"]]


def test_effects_draw_the_interval_over_all_looks(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, seeds=6, looks=(4, 6, 8))
    row = table(run, "effects").row(1, named=True)
    repeated, _, interval, *_ = figure(run, "effects").data
    assert list(repeated.x) == [row["repeated_low"], row["repeated_high"]]
    assert repeated.x[0] < interval.x[0] and interval.x[1] < repeated.x[1]


def test_effects_are_labelled_with_the_verdict(run: FakeRun) -> None:
    assert "worse" in figure(run, "effects").data[-1].text[0]


def test_failed_arms_are_labelled_and_have_no_marker(tmp_path: Path) -> None:
    *_, marker, label = figure(FakeRun(tmp_path, status="diverged"), "effects").data
    assert "failed" in label.text[0] and not len(marker.x)


# -- tuning ----------------------------------------------------------------------------------------------------------


def test_slices_draw_their_table(run: FakeRun) -> None:
    rows = table(run, "tuning").filter((pl.col("arm") == "full") & (pl.col("hyperparameter") == "lr"))
    points = figure(run, "tuning").data[0]
    assert list(points.x) == rows["value"].to_list()
    assert list(points.y) == rows["selection_value"].to_list()


def test_chosen_trials_are_circled(run: FakeRun) -> None:
    rows = table(run, "tuning").filter(pl.col("selected") & (pl.col("hyperparameter") == "lr"))
    assert list(figure(run, "tuning").data[2].x) == rows["value"].to_list()


def test_axes_of_slices_follow_the_values(run: FakeRun) -> None:
    layout = figure(run, "tuning").layout
    assert (layout.xaxis.type, layout.xaxis2.type) == ("log", "category")


def test_trials_without_a_value_yet_are_not_drawn(tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, progress=0.5, confirmed=False), "tuning")
    assert set(drawn.data[0].y) == {None} and "yet" in drawn.layout.annotations[0].text


def test_failed_trials_are_crosses(tmp_path: Path) -> None:
    assert set(figure(FakeRun(tmp_path, status="diverged"), "tuning").data[0].marker.symbol) == {"x"}


def test_an_ablation_that_tunes_nothing_says_so(tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, trials=0), "tuning")
    assert "Nothing is tuned" in drawn.layout.annotations[0].text


# -- tables ----------------------------------------------------------------------------------------------------------


def test_costs_are_written_for_people(run: FakeRun) -> None:
    grid = blocks(run, "cost")[0]
    texts = {row.cells[0]: row.cells[1].text for row in grid.rows}
    assert texts["parameters"] == "1.2 M"
    assert texts["cache, one sequence"] == "3.4 GB"
    assert texts["training, one run, estimate"] == "2 min"


def test_costs_of_many_arms_have_one_row_per_arm(tmp_path: Path) -> None:
    grid = blocks(FakeRun(tmp_path, arms=tuple("abcdefgh")), "cost")[0]
    assert [row.cells[0] for row in grid.rows] == list("abcdefgh")


def test_failures_have_a_reason(tmp_path: Path) -> None:
    grid = blocks(FakeRun(tmp_path, status="out_of_memory"), "failures")[0]
    assert [row.cells[-2] for row in grid.rows] == ["loss <nan> & more"] * 12


def test_progress_tells_why_no_run_is_planned(tmp_path: Path) -> None:
    grid: Grid = blocks(FakeRun(tmp_path, trials=0), "progress")[0]
    assert {row.cells[1]: row.cells[7].text for row in grid.rows} == {
        "tuning": "nothing is tuned",
        "confirmation": "0 %",
    }


def test_a_seed_is_a_name(run: FakeRun) -> None:
    assert {row.cells[4].text for row in blocks(run, "runs", rows="runs")[0].rows} == {"0", "1", "2", "1000"}


# -- savings ---------------------------------------------------------------------------------------------------------


def test_savings_have_a_row_for_each_arm_and_measure(run: FakeRun) -> None:
    assert table(run, "savings")["measure"].to_list() == ["flops", "tokens", "seconds"]


def test_savings_wait_for_the_verdict(tmp_path: Path) -> None:
    unfinished = FakeRun(tmp_path, progress=0.5)
    assert not len(table(unfinished, "savings"))
    assert "The verdict follows" in figure(unfinished, "savings").layout.annotations[0].text


def test_savings_are_drawn_with_their_intervals(run: FakeRun) -> None:
    points, numbers, *_ = figure(run, "savings").data
    assert len(points.x) == len(numbers.text) == 1
    assert numbers.text[0].strip() == f"{points.x[0]:.2f}×"


# -- scaling ---------------------------------------------------------------------------------------------------------


DESIGN = Design(BITS_PER_BYTE, "report", {"full": "d", "gdn": "d"}, {"full": {}, "gdn": {}})


class Sized(FakeRun):
    """A finished ablation whose size is in its folder's name."""

    def __init__(self, folder: Path):
        super().__init__(folder, trials=1)
        self.name, self.size = folder.name, float(folder.name)
        self.design = DESIGN

    def cost(self) -> pl.DataFrame:
        return pl.DataFrame(
            {"arm": self.arms, "non_embedding": [self.size] * 2, "training_flops": [6 * self.size**2] * 2}
        )

    def runs(self) -> pl.DataFrame:
        noise = pl.col("seed").cast(pl.Float64) * 1e-4 + pl.when(pl.col("arm") == "gdn").then(0.05).otherwise(0.0)
        return super().runs().with_columns(report_value=0.5 + 20 * self.size**-0.3 + noise)


class SizedNeighbours(Neighbours):
    """Ablations of several sizes beside one another."""

    def snapshot(self, folder: Path) -> Snapshot:
        return Snapshot(Sized(folder))


def sized(results: Path, count: int, *further: str) -> Snapshot:
    """Ablations of so many sizes, each ten times the one before, and of ``further`` sizes."""
    folders = [results / str(100 * 10**i) for i in range(count)] + [results / size for size in further]
    for folder in folders:
        folder.mkdir()
        (folder / "ablation.json").touch()
    run = Snapshot(Sized(folders[0]))
    run.neighbours = SizedNeighbours(results)
    return run


def test_every_size_is_a_row(tmp_path: Path) -> None:
    rows = table(sized(tmp_path, 4), "scaling")
    assert rows["values"].list.len().to_list() == [3] * 8


def test_what_is_no_size_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sized(tmp_path, 3, "1010", "50000", "70000")
    others = {"50000": {"design": replace(DESIGN, data={"full": "other", "gdn": "other"})}, "70000": {"progress": 0.5}}

    class Others(SizedNeighbours):
        def snapshot(self, folder: Path) -> Snapshot:
            size = Sized(folder)
            for name, value in others.get(folder.name, {}).items():
                setattr(size, name, value)
            return Snapshot(size)

    run.neighbours = Others(tmp_path)
    assert table(run, "scaling")["ablation"].unique(maintain_order=True).to_list() == ["100", "1000", "10000"]
    (left_out,) = (block.html for block in blocks(run, "scaling") if block.name == "left-out")
    assert "1010: of the size of 1000." in left_out
    assert "50000: other data (other, not d)." in left_out
    assert "70000: not finished." in left_out


def test_an_unfinished_ablation_is_no_size(tmp_path: Path) -> None:
    tuning = FakeRun(tmp_path, confirmed=False, progress=0.5)
    assert not len(table(tuning, "scaling"))


def test_two_sizes_make_no_law(tmp_path: Path) -> None:
    run = sized(tmp_path, 2)
    assert not scaling_laws(table(run, "scaling"))
    assert "needs confirmation runs at 3 sizes" in blocks(run, "scaling")[-1].html


def test_a_law_of_three_sizes_is_dashed_and_has_no_interval(tmp_path: Path) -> None:
    band, _, line, *_ = figure(sized(tmp_path, 3), "scaling").data
    assert not band.x and line.line.dash == "dash"


def test_differences_over_sizes_have_a_law_from_four_sizes_on(tmp_path: Path) -> None:
    for count, has_law in ((3, False), (4, True)):
        folder = tmp_path / str(count)
        folder.mkdir()
        band, line, points = blocks(sized(folder, count), "scaling")[1].figure.data
        assert list(points.y) == pytest.approx([0.05] * count)
        assert bool(band.x) == has_law
        assert (max(line.x) > max(points.x)) == has_law


def test_one_size_has_no_differences_over_sizes(tmp_path: Path) -> None:
    assert [block.name for block in blocks(sized(tmp_path, 1), "scaling")] == ["scaling", "laws"]


def test_points_are_joined_where_there_is_no_law(tmp_path: Path) -> None:
    band, _, line, _, points, _ = figure(sized(tmp_path, 2), "scaling").data
    assert not band.x and list(line.y) == list(points.y)


def test_a_law_recovers_exponent_and_floor(tmp_path: Path) -> None:
    law = scaling_laws(table(sized(tmp_path, 4), "scaling"))["full"]
    assert law.exponent == pytest.approx(0.3, rel=0.05) and law.floor == pytest.approx(0.5, rel=0.05)


def test_a_law_is_drawn_beyond_the_largest_size(tmp_path: Path) -> None:
    band, _, line, _, points, _ = figure(sized(tmp_path, 4), "scaling").data
    assert max(line.x) == pytest.approx(3 * max(points.x)) and len(band.x) == 2 * len(line.x)


def test_a_law_lies_within_its_interval(tmp_path: Path) -> None:
    band, _, line, *_ = figure(sized(tmp_path, 4), "scaling").data
    assert all(low <= middle <= high for middle, high, low in zip(line.y, band.y, band.y[::-1]))


def test_laws_are_written_out(tmp_path: Path) -> None:
    assert blocks(sized(tmp_path, 4), "scaling")[-1].html.count("exponent") == 2


def test_arms_are_side_by_side_where_every_length_has_one_number_of_pairs() -> None:
    archive = wb.open(Path(__file__).parents[2] / "results" / "ablations" / "mqar_delta_family_large")
    drawn = figure(archive, "recall_curves")
    assert len(drawn.data) == len(archive.arms), "one plot"
    assert drawn.layout.xaxis.ticktext[0] == "8<br>length 64"
    first = [trace.x[0] for trace in drawn.data]
    assert first == sorted(first) and len(set(first)) == len(first) and max(map(abs, first)) < 0.5
