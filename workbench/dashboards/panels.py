"""What each panel of the dashboard shows: blocks, made from a snapshot and the reader's settings alone.

A block is a figure with the table behind it, a table to sort and mark, or text. How blocks get to the page is the business
of :mod:`workbench.dashboards.widget`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import figures, markup, style, tables
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables import Spent, XAxis, YAxis
from workbench.results.store import RunFolder

LOG_BYTES = 20_000
"""How much of the end of a log is shown."""


@dataclass
class Settings:
    """What the reader has chosen."""

    x: XAxis = "tokens"
    y: YAxis = "loss"
    smoothing: float = 0.0
    log_x: bool = False
    log_y: bool = False
    tuning: str = "slices"
    spent: Spent = "training_flops"
    size: Any = "non_embedding"
    mechanism: str = "over training"
    diagnostic: str = ""
    pinned: set[str] = field(default_factory=set)
    """Arms ("arm NAME") and runs that stay on top of tables."""
    hidden: set[str] = field(default_factory=set)
    """Arms and runs that no figure shows."""
    selected: set[str] = field(default_factory=set)
    """Runs drawn as lines of their own."""
    log: str = ""
    """The run whose log is open."""
    inside: dict[str, Any] = field(default_factory=dict)
    """Arm -> its mechanism maps, once somebody asked for them."""


@dataclass
class Figure:
    """A figure and the table that it draws."""

    name: str
    figure: go.Figure
    table: pl.DataFrame
    note: str = ""


@dataclass
class Grid:
    """A table to sort, filter, pin, hide and select in.

    ``rows`` hold, in this order, the key of a row, its colour (or ""), and cells: text to show, or (text, value to sort by).
    """

    name: str
    heads: list[tuple[str, bool]]
    """Heading and whether it holds numbers."""
    rows: list[tuple[str, str, list[Any]]]
    table: pl.DataFrame
    marks: tuple[str, ...] = ()
    """Which of pinned, hidden, selected can be set."""
    action: str = ""
    """What a button in each row does: "log", "open"."""
    empty: str = "Nothing yet."


@dataclass
class Text:
    """HTML, already escaped."""

    name: str
    html: str
    table: pl.DataFrame | None = None


Block = Figure | Grid | Text
Panel = Callable[[Snapshot, Settings], list[Block]]


def ablations(run: Snapshot, settings: Settings) -> list[Block]:
    """Every ablation in the folder of results."""
    return [overview(Path(run.folder).parent)]


def overview(results: Path) -> Grid:
    """The ablations below ``results`` as a table in which one can be opened."""
    table = tables.overview_table(results)
    heads = [
        ("ablation", False),
        ("state", False),
        ("runs", True),
        ("arms", True),
        ("verdict", False),
        ("question", False),
        ("created", True),
    ]
    rows = [
        (
            row["folder"],
            "",
            [
                row["ablation"],
                row["state"],
                (f"{row['ended']} of {row['planned']}", row["ended"]),
                (str(row["arms"]), row["arms"]),
                row["verdict"],
                row["question"],
                row["created"][:16],
            ],
        )
        for row in table.iter_rows(named=True)
    ]
    return Grid(
        "ablations",
        heads,
        rows,
        table,
        action="open",
        empty=f"No ablation in {results}. `workbench run sweeps/quickstart.yaml` makes the first.",
    )


NOTHING = {"tuning": "nothing is tuned", "confirmation": "no trial to confirm"}
"""Stage -> why none of its runs is planned."""


def progress(run: Snapshot, settings: Settings) -> list[Block]:
    """How far each arm is; the place where arms are pinned and hidden."""
    whole = run.whole
    table, looks = tables.progress_table(whole), style.looks(whole)
    heads = [
        ("arm", False),
        ("stage", False),
        ("done", True),
        ("running", True),
        ("failed", True),
        ("pruned", True),
        ("left", True),
        ("progress", True),
        ("time left, one worker", True),
    ]
    rows = []
    for arm in whole.arms:
        mine = table.filter(pl.col("arm") == arm)
        for row in mine.iter_rows(named=True):
            counts = [(str(row[name]), row[name]) for name in ("done", "running", "failed", "pruned", "left")]
            left = style.duration(row["seconds_left"]) if row["left"] else "–"
            come = NOTHING[row["stage"]] if row["share"] is None else f"{100 * row['share']:.0f} %"
            rows.append(
                (
                    f"arm {arm}",
                    looks[arm].colour,
                    [arm, row["stage"], *counts, (come, row["share"]), (left, row["seconds_left"])],
                )
            )
    verdict = Text("verdict", "<h3>Verdict</h3>" + markup.verdict_html(whole), tables.effect_table(whole))
    return [Grid("arms", heads, rows, table, marks=("pinned", "hidden")), verdict]


def cost(run: Snapshot, settings: Settings) -> list[Block]:
    """What each arm costs and whether that is matched; what the data are."""
    data = Text("data", "<h3>Data</h3>" + markup.data_html(run))
    return [Text("cost", markup.cost_html(run), tables.cost_table(run)), data]


def curves(run: Snapshot, settings: Settings) -> list[Block]:
    """Loss over training."""
    drawn = figures.loss_curves(
        run,
        settings.x,
        settings.y,
        smoothing=settings.smoothing,
        log_x=settings.log_x,
        log_y=settings.log_y,
        single=settings.selected,
    )
    table = tables.curve_table(run, settings.x, settings.y, smoothing=settings.smoothing)
    note = "One line an arm: the mean over its runs; the band spans the smallest to the largest. Thin lines are runs chosen in Runs."
    return [Figure("curves", drawn.update_layout(height=470), table, note)]


def effects(run: Snapshot, settings: Settings) -> list[Block]:
    """Paired differences to the baseline, and the verdict in words."""
    return [
        Figure("effects", figures.effects(run), tables.effect_table(run)),
        Text("verdict", markup.verdict_html(run)),
    ]


TUNING: dict[str, tuple[Callable[[Any], go.Figure], Callable[[Any], pl.DataFrame], str]] = {
    "slices": (
        figures.tuning,
        tables.tuning_table,
        "The chosen trial is ringed; a cross marks one that was stopped or failed.",
    ),
    "parallel": (figures.parallel, tables.tuning_table, "One line a trial; drag along an axis to pick a range."),
    "importances": (
        figures.importances,
        tables.importance_table,
        "PED-ANOVA within each arm; bars hold 90 % of a bootstrap over trials.",
    ),
    "best of k": (
        figures.best_of,
        tables.best_of_table,
        "Expected best of k of an arm's trials: flat lines say that more tuning would change little.",
    ),
}
"""View -> its figure, its table, and how to read it."""


def tuning(run: Snapshot, settings: Settings) -> list[Block]:
    """What tuning tried and found."""
    draw, table, note = TUNING[settings.tuning]
    return [Figure(f"tuning-{settings.tuning.replace(' ', '-')}", draw(run), table(run), note)]


def frontier(run: Snapshot, settings: Settings) -> list[Block]:
    """Quality against what it costs."""
    note = "The dotted line joins the arms that no other beats on both axes; bars span the runs."
    drawn = figures.frontier(run, settings.spent).update_layout(height=470)
    return [Figure("frontier", drawn, tables.frontier_table(run, settings.spent), note)]


def scaling(run: Snapshot, settings: Settings) -> list[Block]:
    """Quality over sizes."""
    note = "Every ablation in this folder whose arms have the same names and are measured alike, on data of one sort, is a size."
    drawn, table = figures.scaling(run, settings.size), tables.scaling_table(run, settings.size)
    blocks: list[Block] = [Figure("scaling", drawn.update_layout(height=470), table, note)]
    laws = tables.scaling_laws(table, settings.size)
    if not laws:
        told = f"A fitted law needs confirmation runs at {tables.SIZES} sizes or more."
        return [*blocks, Text("laws", f"<p class='wb-note'>{told}</p>")]
    x = {"non_embedding": "parameters", "training_flops": "FLOPs"}[settings.size]
    said = "".join(
        f"<li>{markup.arm_name(run, arm)}: {law.told(x, run.metric.unit)}.</li>" for arm, law in laws.items()
    )
    warning = (
        f"The band holds the noise over seeds, not that the law may be the wrong one; past the largest size it is "
        f"drawn on to {figures.BEYOND:g} times it."
    )
    return [*blocks, Text("laws", f"<h3>Fitted laws</h3><ul>{said}</ul><p class='wb-note'>{warning}</p>")]


def mechanisms(run: Snapshot, settings: Settings) -> list[Block]:
    """What happens inside layers, as far as runs stored it; and what task examples show."""
    if settings.mechanism == "recall":
        return _recall(run)
    if settings.mechanism == "attention":
        if not settings.inside:
            return [
                Text(
                    "inside",
                    "<p>Press “Look inside”: one run of each arm is opened at its last checkpoint, and its layers "
                    "are asked which inputs each position reads.</p>",
                )
            ]
        return [
            Text(f"inside-{i}", f"<p>{markup.arm_name(run, arm)}: {shown}</p>")
            if isinstance(shown, str)
            else Figure(f"inside-{arm}-{name}", shown[0], shown[1], f"{arm}, {name}")
            for i, (arm, maps) in enumerate(settings.inside.items())
            if arm in run.arms
            for name, shown in maps.items()
        ]
    table = tables.diagnostic_table(run)
    if not len(table):
        return [Text("nothing", "<p>No run of this ablation has stored diagnostics of its layers.</p>")]
    name = settings.diagnostic if settings.diagnostic in table["name"] else table["name"].unique().sort()[0]
    mine = table.filter(pl.col("name") == name)
    if settings.mechanism == "layers":
        return [Figure(f"{name}-layers", figures.diagnostic_map(run, name), mine, "Mean over an arm's runs.")]
    note = "Mean over layers; the band spans the layers."
    return [Figure(name, figures.diagnostic_curves(run, name), mine, note)]


def _recall(run: Snapshot) -> list[Block]:
    views = run.views
    blocks: list[Block] = [
        Figure(
            name,
            getattr(figures, name)(run, *labels),
            tables.recall_table(run, *labels),
            "Right answers among the report examples, the mean over confirmation runs.",
        )
        for name, labels in views.items()
    ]
    if any("pairs" in labels for labels in views.values()):
        blocks.append(Figure("recall-state", figures.recall_state(run), tables.state_table(run)))
    return blocks or [Text("nothing", "<p>This ablation trains on text: there are no answers to recall.</p>")]


def failures(run: Snapshot, settings: Settings) -> list[Block]:
    """Runs that failed, with their logs one click away."""
    table, looks = tables.failure_table(run), style.looks(run)
    heads = [
        ("arm", False),
        ("stage", False),
        ("seed", True),
        ("status", False),
        ("step", True),
        ("hyperparameters", False),
        ("reason", False),
    ]
    rows = [
        (
            row["run"] or "",
            looks[row["arm"]].colour if row["arm"] in looks else "",
            [
                row["arm"],
                row["stage"],
                _seed(row["seed"]),
                row["status"].replace("_", " "),
                _step(row["step"]),
                markup.hyperparameters(row["hyperparameters"]),
                row["reason"] or "–",
            ],
        )
        for row in table.iter_rows(named=True)
    ]
    return [Grid("failures", heads, rows, table, action="log", empty="No run has failed."), *_log(run, settings)]


def every_run(run: Snapshot, settings: Settings) -> list[Block]:
    """Every run: sort, filter, pin, hide, select."""
    whole = run.whole
    table, looks = whole.runs(), style.looks(whole)
    short = run.metric.short
    heads = [
        ("arm", False),
        ("stage", False),
        ("seed", True),
        ("status", False),
        ("step", True),
        ("tokens", True),
        ("time", True),
        ("loss (nats/token)", True),
        (f"selection ({short})", True),
        (f"report ({short})", True),
        ("tokens/s", True),
        ("hyperparameters", False),
    ]
    rows = [
        (
            row["run"],
            looks[row["arm"]].colour if row["arm"] in looks else "",
            [
                row["arm"],
                row["stage"] + (", chosen" if row["selected"] else ""),
                _seed(row["seed"]),
                row["status"].replace("_", " "),
                _step(row["step"]),
                (style.count(row["tokens"]), row["tokens"]),
                (style.duration(row["seconds"]), row["seconds"]),
                *((style.bits(row[name]), row[name]) for name in ("loss", "selection_value", "report_value")),
                (style.count(row["tokens_per_second"]), row["tokens_per_second"]),
                markup.hyperparameters(row["hyperparameters"]),
            ],
        )
        for row in table.iter_rows(named=True)
    ]
    grid = Grid(
        "runs", heads, rows, table, marks=("pinned", "hidden", "selected"), action="log", empty="No run has begun."
    )
    return [grid, *_log(whole, settings)]


def _seed(value: int | None) -> tuple[str, int | None]:
    return "–" if value is None else str(value), value  # a name, no amount


def _step(value: int | None) -> tuple[str, int | None]:
    return "–" if value is None else f"{value:,}", value


def _log(run: Snapshot, settings: Settings) -> list[Block]:
    if not settings.log:
        return []
    path = RunFolder(Path(run.folder) / "runs" / settings.log).path / "log.txt"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - LOG_BYTES))
            text = file.read().decode(errors="replace")
        told = escape(text) or "(the run printed nothing)"
    except OSError:
        told = "There is no log: the run has not started, or its folder is gone."
    head = f"<h3>Log of {escape(settings.log)}</h3>"
    return [Text("log", f"{head}<pre tabindex='0'>{told}</pre>")]


PANELS: dict[str, Panel] = {
    "Ablations": ablations,
    "Progress": progress,
    "Cost": cost,
    "Curves": curves,
    "Effects": effects,
    "Tuning": tuning,
    "Frontier": frontier,
    "Scaling": scaling,
    "Mechanisms": mechanisms,
    "Failures": failures,
    "Runs": every_run,
}
"""Name of a panel -> what makes its blocks."""
