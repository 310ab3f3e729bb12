"""What a dashboard consists of: panels, one class and one file each, and the blocks that they show.

A panel is registered by the name in its ``Config``; dashboard, report and export iterate over the registry. One in this
repository is a file in ``workbench/dashboards/panels/``; one of another package is a module that an entry point of the
group ``workbench.plugins`` names, or a file given to :func:`workbench.plug_in`. Example::

    @panels.register
    class Throughput(FigurePanel):
        \"\"\"Training speed of each arm.\"\"\"

        class Config(PanelConfig):
            kind: Literal["throughput"] = "throughput"
            log_y: bool = Field(False, title="log y")

        settings: Config
        title = "Throughput"

        def table(self, run):
            return run.runs().group_by("arm").agg(pl.col("tokens_per_second").median())

        def figure(self, run, table):
            figure = figure_of([go.Bar(x=table["arm"].to_list(), y=table["tokens_per_second"].to_list())])
            return figure.update_yaxes(type="log" if self.settings.log_y else "linear")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import plotly.graph_objects as go
import polars as pl
from markupsafe import Markup

from workbench.config import Config, ConfigError
from workbench.dashboards.names import named_figure, named_table
from workbench.paper import PaperCell, PaperColumn, PaperTable
from workbench.registry import Registry

if TYPE_CHECKING:
    from workbench.dashboards.snapshot import Snapshot
    from workbench.dashboards.view import RunView


@dataclass
class Figure:
    """A figure and the table that it draws."""

    name: str
    figure: go.Figure
    table: pl.DataFrame
    note: str = ""


class Column(NamedTuple):
    """A column of a :class:`Grid`."""

    title: str
    numeric: bool = False
    colour: str = ""
    hidden: bool = False
    """Whether it is shown only where the reader asks for it."""


class Cell(NamedTuple):
    """A cell of a :class:`Grid`."""

    text: str
    value: Any = None
    """What the column is sorted by; None sorts last."""
    tone: str = ""
    """CSS class: ``better``, ``worse``, ``failed``, ..."""


class Row(NamedTuple):
    """A row of a :class:`Grid`."""

    key: str
    colour: str
    """Of the dot before the first cell; empty for none."""
    cells: Sequence[Cell | str]
    children: Sequence[Row] = ()
    """Rows that belong to this one, shown where the reader unfolds it or a filter finds them."""
    values: Mapping[str, Any] = {}
    """What a filter compares, by column name; default the cells by the titles of the columns."""
    marks: tuple[str, ...] | None = None
    """The marks of this row, where they are not those of the table."""
    unfolded: bool = False


@dataclass
class Grid:
    """A table to read; in the dashboard also to sort, to filter and to mark rows in."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    table: pl.DataFrame
    """The same content as data, for export."""
    title: str = ""
    marks: tuple[str, ...] = ()
    """Which of ``pinned``, ``hidden`` and ``selected`` a row can be marked as."""
    action: str = ""
    """A button in each row that has no rows below it: ``details`` (opens the page of the run), ``open`` (opens the
    ablation)."""
    frozen: int = 0
    """So many columns stay in sight when a table that is wider than the page is scrolled; rows have one line then, and
    the reader chooses columns."""
    note: str = ""
    """A sentence above the table."""
    query: str = ""
    """The filter that ``rows`` satisfy (:mod:`workbench.results.filters`)."""
    problem: str = ""
    """What is wrong with the filter that the reader has written."""
    total: int | None = None
    """Number of rows without the filter; default those of ``rows``."""
    empty: str = "Nothing yet."
    sortable: bool = True
    paper: PaperTable | None = None
    """The table as it is printed in a paper; default what is on screen (:attr:`printed`)."""

    @property
    def printed(self) -> PaperTable:
        """The table as LaTeX and Markdown show it."""
        if self.paper is not None:
            return self.paper
        shown = [i for i, column in enumerate(self.columns) if not column.hidden]
        columns = [PaperColumn(self.columns[i].title, self.columns[i].numeric) for i in shown]
        cells = [[row.cells[i] for i in shown] for row in self.rows]
        rows = [[PaperCell(cell if isinstance(cell, str) else cell.text) for cell in row] for row in cells]
        return PaperTable(columns, rows, self.table, self.title, self.name)


@dataclass
class Text:
    """HTML."""

    name: str
    html: Markup
    title: str = ""


Block = Figure | Grid | Text


def with_names(blocks: Sequence[Block], names: Mapping[str, str]) -> list[Block]:
    """Blocks with display names of arms: in figures, and in the column "arm" and the headings of tables. Keys of rows
    and tables as data keep the names of the arms in the file.

    Args:
        blocks: what a panel shows.
        names: arm -> display name.
    """
    changed = {arm: name for arm, name in names.items() if name != arm}
    return [_named(block, changed) for block in blocks] if changed else list(blocks)


def _named(block: Block, names: Mapping[str, str]) -> Block:
    if isinstance(block, Figure):
        return replace(block, figure=named_figure(block.figure, names))
    if isinstance(block, Text):
        return block
    columns = [column._replace(title=names.get(column.title, column.title)) for column in block.columns]
    arms = {i for i, column in enumerate(block.columns) if column.title == "arm"}

    def cell(value: Cell | str) -> Cell | str:
        if isinstance(value, str):
            return names.get(value, value)
        return value._replace(text=names.get(value.text, value.text))

    rows = [row._replace(cells=[cell(c) if i in arms else c for i, c in enumerate(row.cells)]) for row in block.rows]
    paper = None if block.paper is None else named_table(block.paper, names)
    return replace(block, columns=columns, rows=rows, paper=paper)


class PanelConfig(Config):
    """Base of a panel's settings. ``kind`` is the registered name of the panel.

    The dashboard makes a control of each field: buttons or a list of a ``Literal`` (labels: :attr:`Panel.labels`), a
    box to tick of a ``bool``, a slider of a ``float`` with bounds, a list of a ``str`` for which :meth:`Panel.choices`
    names options, a line of text of another ``str`` with a title. The field's ``title`` is its label, its docstring the
    tooltip. Fields with these names have no control: ``selected``, the rows that the reader marked to be drawn;
    ``run``, the run whose page is open.
    """

    kind: str


class Panel(ABC):
    """A part of the dashboard. The class docstring says what it answers.

    Args:
        settings: what the reader has chosen; default the defaults.
    """

    Config: ClassVar[type[PanelConfig]]
    title: ClassVar[str]
    tab: ClassVar[str] = ""
    """The tab that holds the panel; default a tab for this panel alone. Panels of one tab are views to choose from."""
    order: ClassVar[int] = 1000
    """Position among the panels."""
    labels: ClassVar[Mapping[str, str]] = {}
    """Option of a setting -> its label."""
    report: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Heading of a section of the report -> settings with which the panel fills it. Empty: not in the report."""
    report_order: ClassVar[int | None] = None
    """Position among the sections of the report; default :attr:`order`."""
    report_switch: ClassVar[str] = ""
    """A setting with options, all of which the report draws, with buttons to choose."""
    button: ClassVar[str] = ""
    """Label of a button that calls :meth:`prepare`."""
    actions: ClassVar[Mapping[str, str]] = {}
    """Label of a button that calls :meth:`act` -> its tooltip."""

    def __init__(self, settings: Any = None):
        self.settings: Any = settings if settings is not None else self.Config()

    def names(self, run: RunView) -> Mapping[str, str]:
        """Arm -> display name in what the panel shows; nothing where the panel itself writes display names."""
        return run.names

    def applies(self, run: RunView) -> bool:
        """Whether there is any point in offering this panel for an ablation, however far it has come."""
        return bool(run.arms)

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        """Options of settings that depend on the run."""
        return {}

    def count(self, run: Snapshot) -> int | None:
        """Number of things that wait to be read here, shown in the tab; None where there is nothing to count."""
        return None

    def prepare(self, run: Snapshot) -> None:  # noqa: B027 (optional)
        """Compute what takes too long to be computed at every refresh, and keep it in the panel."""

    def act(self, label: str, run: Snapshot) -> str:
        """Do what one of :attr:`actions` is for; returns what was done, in a sentence.

        Raises:
            ConfigError: where it cannot be done; shown where the button was pressed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no button {label!r}")

    def follow(self, settings: Any, field: str, run: Snapshot) -> Any:
        """The settings after the reader has changed ``field`` in them: where others follow from it, with these."""
        return settings

    @abstractmethod
    def blocks(self, run: Snapshot) -> list[Block]:
        """What the panel shows."""


class FigurePanel(Panel):
    """A panel of one figure, which draws one table."""

    note: ClassVar[str] = ""
    """How to read the figure."""

    @abstractmethod
    def table(self, run: Snapshot) -> pl.DataFrame:
        """The numbers that the figure draws; the same columns whether or not there is anything to show."""

    @abstractmethod
    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """The figure of ``table``; if that is empty, a sentence that says why."""

    def blocks(self, run: Snapshot) -> list[Block]:
        table = self.table(run)
        return [Figure(self.Config.model_fields["kind"].default, self.figure(run, table), table, self.note)]


panels: Registry[type[Panel]] = Registry("panel", "workbench.dashboards.panels")
"""Every panel by name."""


def ordered_panels() -> list[type[Panel]]:
    """Every panel in the order of the dashboard."""
    return sorted((panels[name] for name in panels), key=lambda panel: panel.order)


def make_panel(kind: str, **settings: Any) -> Panel:
    """The panel registered as ``kind``.

    Raises:
        ConfigError: for an unknown panel or setting.
    """
    config = panels.parse({"kind": kind, **settings})
    return panels[kind](config)


def figure(run: Any, kind: str, **settings: Any) -> go.Figure:
    """The figure of a panel, such as ``figure(run, "curves", x="flops")``.

    Args:
        run: any kind of run, see :class:`workbench.dashboards.view.RunView`.
        kind: name of a panel that has a figure.
        settings: fields of the panel's ``Config``.

    Raises:
        ConfigError: for an unknown panel or setting, or a panel without a figure.
    """
    from workbench.dashboards.snapshot import Snapshot

    panel, snapshot = make_panel(kind, **settings), Snapshot.of(run)
    if not isinstance(panel, FigurePanel):
        drawing = [name for name in panels if issubclass(panels[name], FigurePanel)]
        raise ConfigError.at("kind", got=f"{kind!r}, which has no figure", expected=f"one of {', '.join(drawing)}")
    return named_figure(panel.figure(snapshot, panel.table(snapshot)), panel.names(snapshot))


def table(run: Any, kind: str, **settings: Any) -> pl.DataFrame:
    """The numbers of a panel, such as ``table(run, "effects")``.

    Args:
        run: any kind of run, see :class:`workbench.dashboards.view.RunView`.
        kind: name of a panel; of one with several tables the first.
        settings: fields of the panel's ``Config``.

    Raises:
        ConfigError: for an unknown panel or setting, or a panel that shows no table.
    """
    from workbench.dashboards.snapshot import Snapshot

    panel, snapshot = make_panel(kind, **settings), Snapshot.of(run)
    if isinstance(panel, FigurePanel):
        return panel.table(snapshot)
    for block in panel.blocks(snapshot):
        if not isinstance(block, Text):
            return block.table
    raise ConfigError.at("kind", got=f"{kind!r}, which shows no table", expected="a panel with a table")


def paper_table(run: Any, kind: str, **settings: Any) -> PaperTable:
    """The first table of a panel as it is printed in a paper, such as ``paper_table(run, "suite_scores")``; for
    :func:`workbench.paper.export_table`.

    Args:
        run: any kind of run, see :class:`workbench.dashboards.view.RunView`.
        kind: name of a panel.
        settings: fields of the panel's ``Config``.

    Raises:
        ConfigError: for an unknown panel or setting, or a panel that shows no table.
    """
    from workbench.dashboards.snapshot import Snapshot

    panel, snapshot = make_panel(kind, **settings), Snapshot.of(run)
    for block in panel.blocks(snapshot):
        if isinstance(block, Grid):
            return named_table(block.printed, panel.names(snapshot))
    raise ConfigError.at("kind", got=f"{kind!r}, which shows no table", expected="a panel with a table")
