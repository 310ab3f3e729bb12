"""The live dashboard, in JupyterLab and as a page of its own.

Controls are ipywidgets; a :class:`~workbench.dashboards.live.board.Board` draws the blocks of the open panel in the
browser and is sent only what changed. Panels come from the registry (:mod:`workbench.dashboards.panel`); only the
panels to open at first are named here.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ipywidgets as widgets

from workbench.compat import answer_beside_cells
from workbench.config import ConfigError
from workbench.dashboards.export import IMAGES, SIZES, Width, export_figure, exported_tables
from workbench.dashboards.live.board import Board
from workbench.dashboards.live.chosen import chosen_rows_and_columns
from workbench.dashboards.live.controls import controls_of, labelled
from workbench.dashboards.panel import Block, Figure, Grid, Panel, Row, Text, ordered_panels, with_names
from workbench.dashboards.report.render import exports_path, report_path, write_report
from workbench.dashboards.snapshot import Neighbours, Snapshot
from workbench.dashboards.tables.progress import overall_progress
from workbench.dashboards.templates import caption, render
from workbench.dashboards.view import PlannedRun, ResultsFolder, RunView
from workbench.files import read_json
from workbench.paper import export_table, provenance_line
from workbench.status import RETRYABLE

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation

EXPORTS: dict[str, str] = {
    **{f"{kind} {width}": f"{kind.upper()}, {width}" for kind in IMAGES for width in SIZES},
    "tex": "LaTeX",
    "md": "Markdown",
    "csv": "CSV",
    "parquet": "Parquet",
    "html": "HTML report",
}
"""Ending of a file, of an image also its width -> its name in the list of formats."""
WAITING = render("waiting.html")
"""Stands where the board will be; after ten seconds without a board it asks the reader to reload the page."""


def dashboard(what: RunView | Ablation | str | Path = "results", refresh: float = 2.0) -> Dashboard:
    """A live view for JupyterLab; show it as the last value of a cell.

    Args:
        what: a launched ablation, which may be running in other processes; one that has not been launched; the folder
            of an ablation; or the folder of all results, whose ablations are listed.
        refresh: seconds between refreshes.

    Raises:
        ConfigError: when ``what`` is a folder that does not exist.
    """
    return Dashboard(what, refresh)


class Dashboard(widgets.VBox):
    """State, time left and actions, above one panel.

    A background thread refreshes it until the run has finished or :meth:`stop` is called. Errors are shown in the
    header; the panel keeps what it last showed.

    Args:
        what: see :func:`dashboard`.
        refresh: seconds between refreshes; with 0 there is no thread, and the caller calls :meth:`refresh_once`.
        panel: name of the panel that is open at first; default the one that suits the state of the run.
        launches: what the launch button starts, where ``what`` is the view of an ablation that is not launched.
    """

    def __init__(
        self,
        what: RunView | Ablation | str | Path,
        refresh: float = 2.0,
        panel: str | None = None,
        launches: Ablation | None = None,
    ):
        self.run: RunView
        """The run that is shown."""
        self.ablation: Ablation | None = None
        """What the launch button starts; None where it resumes :attr:`run`."""
        self.refresh = refresh
        self.marks: dict[str, set[str]] = {"pinned": set(), "hidden": set(), "selected": set()}
        """Rows that the reader has marked: arms ("arm NAME") and runs."""
        self.queries: dict[str, str] = {}
        """Table -> the filter that the reader has written."""
        self.columns: dict[str, list[str]] = {}
        """Table -> titles of the columns that the reader has chosen."""
        self.blocks: list[Block] = []
        """What the open panel shows."""
        self._lock, self._stopped = threading.RLock(), threading.Event()
        self._snapshot: Snapshot | None = None
        self._state = ""  # of the run, as the header shows it
        self._panels: dict[str, Panel] = {cls.Config.model_fields["kind"].default: cls() for cls in ordered_panels()}
        self._controls: dict[str, dict[str, Any]] = {}  # panel -> field of its settings -> control
        self._is_showing = False  # whether controls change because the page does, not the reader
        self._rows: dict[str, list[Any]] = {}  # panel -> its controls and its button
        self._heading = widgets.HTML(layout={"min_height": "104px"})
        self.message = widgets.HTML(layout={"min_height": "32px"})
        self.board = Board(self._on_event)
        self.tabs = widgets.ToggleButtons(style={"button_width": "auto"})
        self.views = widgets.ToggleButtons(style={"button_width": "170px"})
        """The panels of the open tab, where there are several."""
        row = {"flex_flow": "row wrap", "align_items": "center"}
        self._settings_row = widgets.HBox(layout={**row, "min_height": "42px", "grid_gap": "12px"})
        self._has_chosen = False  # the reader has chosen a panel
        self._is_choosing = False  # tabs and views are being changed, not by the reader
        self._was_finished: bool | None = None
        waiting = widgets.HTML(WAITING)
        waiting.add_class("wb-waiting")
        self._make_actions()
        self._open(what)
        if launches is not None:
            self.ablation, self.workers.value = launches, launches.workers
        super().__init__(
            [
                self._heading,
                self._actions,
                self.message,
                self.tabs,
                self._settings_row,
                waiting,
                self.board,
            ],
            layout={"width": "100%", "overflow": "visible"},
        )
        self.add_class("workbench-dashboard")
        answer_beside_cells(self)
        self.tabs.observe(self._on_tab, "value")
        self.views.observe(self._on_view, "value")
        with self._unchosen():
            self._set_tabs()
            self._open_panel(panel or self._suitable_panel())
        self._has_chosen = panel is not None
        self.refresh_once()
        self._thread = threading.Thread(target=self._keep_refreshing, name="dashboard", daemon=True)
        if refresh > 0:
            self._thread.start()

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def sent(self) -> int:
        """Bytes of the last message to the page."""
        return self.board.sent

    @property
    def header(self) -> str:
        """The HTML above the panels."""
        return self._heading.value

    @property
    def panel(self) -> Panel:
        """The open panel."""
        return self._panels[self.panel_name]

    @property
    def panel_name(self) -> str:
        """The name of the open panel."""
        return self.views.value or "overview"

    def controls(self) -> dict[str, Any]:
        """Field of the open panel's settings -> its control."""
        return self._controls[self.panel_name]

    def open_panel(self, name: str) -> None:
        """Open the panel ``name``, which stays open when the run ends.

        Raises:
            ConfigError: when it does not apply to this run.
        """
        self._open_panel(name)
        self._has_chosen = True

    def _open_panel(self, name: str) -> None:
        for tab, panels in self._tabs().items():
            if name in panels:
                self.tabs.value = tab
                self.views.value = name
                return
        raise ConfigError.at("panel", got=name, expected=f"one of {', '.join(self._panels)} that applies to this run")

    def show(self, what: RunView | Ablation | str | Path) -> None:
        """Show another ablation in this dashboard."""
        with self._lock:
            self._open(what)
            for (
                name,
                panel,
            ) in self._panels.items():  # settings with a control remain; marks, open pages and maps do not
                names = self._controls.get(name, {})
                settings = {field: getattr(panel.settings, field) for field in names}
                self._panels[name] = type(panel)(panel.Config(**settings))
            self._controls.clear()
            self._rows.clear()
            for rows in self.marks.values():
                rows.clear()
            self.queries.clear()
            self.columns.clear()
            self._snapshot = self._was_finished = None
            with self._unchosen():
                self._set_tabs()
                self._open_panel(self._suitable_panel())
            self._has_chosen = False
        self.refresh_once()
        self._wake()

    def _open(self, what: Any) -> None:
        from workbench.ablation.run import AblationRun

        self.ablation = None
        if isinstance(what, str | Path):
            folder = Path(what).resolve()
            if not folder.is_dir():
                expected = "a folder of results, or of one ablation"
                raise ConfigError.at(str(what), got="no such folder", expected=expected)
            self.run = AblationRun(folder) if (folder / "ablation.json").exists() else ResultsFolder(folder)
        elif hasattr(what, "launch"):
            self.ablation = what
            launched = read_json(what.folder / "ablation.json").get("identity") == what.config.identity
            self.run = AblationRun(what.folder) if launched else PlannedRun(what)
            self.workers.value = what.workers
        else:
            self.run = what
        if isinstance(self.run, AblationRun):
            self.workers.value = self.run.record.workers

    def _suitable_panel(self) -> str:
        """The panel to open at first."""
        if not self.run.arms:
            return "overview"
        if self.run.launched and self.run.finished:
            return "verdict"
        return "curves" if self.run.launched or self.run.lines() else "cost"

    # -- tabs and settings -------------------------------------------------------------------------------------------

    def _tabs(self) -> dict[str, list[str]]:
        """Tab -> names of its panels that apply to this run."""
        tabs: dict[str, list[str]] = {}
        run = self._snapshot or self.run
        for name, panel in self._panels.items():
            if panel.applies(run):
                tabs.setdefault(panel.tab or panel.title, []).append(name)
        return tabs

    def _set_tabs(self) -> None:
        """Offer the panels that apply to the run, with the number of rows where a panel counts them; the open one stays
        open."""
        options, tips = [], []
        for tab, names in self._tabs().items():
            counts = [self._panels[name].count(self._snapshot) for name in names] if self._snapshot else []
            number = sum(filter(None, counts))
            options.append((f"{tab} ({number})" if number else tab, tab))
            first = inspect.cleandoc(self._panels[names[0]].__doc__ or "").partition("\n\n")[0]
            tips.append(" ".join(first.split()))
        if options == list(self.tabs.options):
            return
        tab, view = self.tabs.value, self.views.value
        with self._unchosen():
            self.tabs.options, self.tabs.tooltips = options, tips
            if tab in dict(options).values():
                self.tabs.value = tab
            self._show_views()
            if view in dict(self.views.options).values():
                self.views.value = view

    @contextmanager
    def _unchosen(self) -> Iterator[None]:
        """Within, tabs and views change without the reader; the caller draws afterwards."""
        before, self._is_choosing = self._is_choosing, True
        try:
            yield
        finally:
            self._is_choosing = before

    def _show_views(self) -> None:
        names = self._tabs().get(self.tabs.value, [])
        self.views.options = [(self._panels[name].title, name) for name in names]

    def _on_tab(self, change: Any) -> None:
        self._has_chosen = self._has_chosen or not self._is_choosing
        with self._unchosen():
            self._show_views()
        if not self._is_choosing:
            self._redraw()

    def _on_view(self, change: Any) -> None:
        self._has_chosen = self._has_chosen or not self._is_choosing
        if not self._is_choosing:
            self._redraw()

    def _show_controls(self, run: Snapshot) -> None:
        name, panel = self.panel_name, self.panel
        choices = panel.choices(run)
        if name not in self._controls:
            self._controls[name] = controls_of(panel, choices, self._set)
            self._rows[name] = list(self._controls[name].values())
            if panel.button:
                self._rows[name].append(_button(panel.button, panel.__doc__ or "", self.prepare))
            for label, tooltip in panel.actions.items():
                self._rows[name].append(_button(label, tooltip, partial(self.act, label)))
        for field, options in choices.items():
            control = self._controls[name][field]
            is_offered = getattr(panel.settings, field) in options
            if [option for _, option in control.options] != options or (options and not is_offered):
                self._is_showing = True  # the first of the new options is not what the reader chose
                control.options = labelled(panel, options)
                self._is_showing = False
                if is_offered:
                    self._show_settings()
                else:
                    panel.settings = panel.settings.changed(**{field: control.value or ""})
        usable = [control for control in self._rows[name] if getattr(control, "options", True)]
        row = (*([self.views] if len(self.views.options) > 1 else []), *usable)
        if row != self._settings_row.children:
            self._settings_row.children = row
            answer_beside_cells(self._settings_row)

    def _set(self, field: str, value: Any) -> None:
        """Change a setting of the open panel."""
        if self._is_showing:
            return
        panel = self.panel
        settings = panel.settings.changed(**{field: value if value is not None else ""})
        if settings == panel.settings:
            return
        if self._snapshot is not None:
            try:
                settings = panel.follow(settings, field, self._snapshot)
            except ConfigError as error:  # a file that another page has removed or damaged
                self._log(str(error))
                self._show_settings()
                return
        panel.settings = settings
        if hasattr(settings, "selected"):
            self.marks["selected"] = set(settings.selected)
        self._show_settings()
        self._redraw()

    def _show_settings(self) -> None:
        """Let the controls of the open panel show its settings."""
        for field, control in self._controls.get(self.panel_name, {}).items():
            value = getattr(self.panel.settings, field)
            known = [option for _, option in control.options] if hasattr(control, "options") else [value]
            if control.value != value and value in known:
                control.value = value

    # -- actions -----------------------------------------------------------------------------------------------------

    def _make_actions(self) -> None:
        self.workers = widgets.BoundedIntText(value=2, min=1, max=64, description="workers", layout={"width": "140px"})
        launch_tip = "Start this ablation, or resume it: finished runs are not repeated"
        self.launch_button = _button("Launch", launch_tip, self.launch)
        stop_tip = "Workers write checkpoints and end; “Resume” continues"
        self.stop_button = _button("Stop", stop_tip, self.stop_workers)
        self.workers.observe(lambda change: self._enable_actions(), "value")
        formats = [(text, kind) for kind, text in EXPORTS.items()]
        self.export_kind = widgets.Dropdown(options=formats, layout={"width": "130px"})
        self.export_button = _button("Export", "Write what this panel shows to a file", self.export)
        gap = widgets.HTML(layout={"width": "24px"})
        self._actions = widgets.HBox(
            [self.launch_button, self.workers, self.stop_button, gap, self.export_kind, self.export_button],
            layout={"flex_flow": "row wrap", "align_items": "center"},
        )

    def launch(self) -> None:
        """Start or resume the ablation with the chosen number of workers. Returns at once."""

        def start() -> None:
            from workbench.ablation.ablation import Ablation
            from workbench.ablation.run import AblationRun

            ablation = self.ablation
            if ablation is None:
                if not isinstance(self.run, AblationRun):
                    expected = "an ablation to be open"
                    raise ConfigError.at("launch", got="no ablation", expected=expected, do="Open one in Ablations.")
                name = self.run.record.config.name
                if name != self.run.folder.name:
                    do = f"Rename the folder to {name}: a launch would create another one."
                    raise ConfigError.at("name", got=self.run.folder.name, expected=name, do=do)
                ablation = Ablation(self.run.record.config, self.run.results)
            run = ablation.launch(self.workers.value, self._log)
            with self._lock:
                self.run, self._snapshot = run, None
                self._set_tabs()
                if self.panel_name == "cost":
                    with self._unchosen():
                        self._open_panel("curves")
            state = "Every run has already ended." if run.finished else f"{len(run.workers())} workers are running."
            caution = run.record.config.confirmation.caution
            self._log(" ".join([state, *([caution] if caution else []), *run.record.announced]))
            self._wake()

        self._do("Launching: preparing data, checking costs …", start)

    def stop_workers(self) -> None:
        """Ask the workers to stop after a checkpoint. Returns at once."""

        def stop() -> None:
            from workbench.ablation.run import AblationRun

            left = self.run.stop() if isinstance(self.run, AblationRun) else []
            stopped = "Stopped; “Resume” continues from the checkpoints."
            self._log(f"{len(left)} workers have not ended yet." if left else stopped)

        self._do("Stopping: running trials write a checkpoint …", stop)

    def prepare(self) -> None:
        """Let the open panel compute what its button is for. Returns at once."""
        panel = self.panel

        def compute() -> None:
            if self._snapshot is not None:
                panel.prepare(self._snapshot)
            self._log("")
            self._redraw()

        self._do(f"{panel.button} …", compute)

    def act(self, label: str) -> None:
        """Let the open panel do what its button ``label`` is for. Returns at once."""
        panel = self.panel

        def do() -> None:
            if self._snapshot is not None:
                self._log(panel.act(label, self._snapshot))
            self._show_settings()
            self._redraw()

        self._do(f"{label} …", do)

    def export(self) -> None:
        """Write what the panel shows to :func:`workbench.dashboards.report.render.exports_path`. Returns at once."""
        kind = self.export_kind.value

        def write() -> None:
            if not self.run.arms:
                expected = "an ablation to be open"
                raise ConfigError.at("export", got="no ablation", expected=expected, do="Open one in Ablations.")
            files = self.write(kind)
            self._log(f"Wrote {', '.join(path.name for path in files)} in {files[0].parent}")

        self._do(f"Exporting {EXPORTS[kind]} …", write)

    def write(self, kind: str) -> list[Path]:
        """Write the figures or tables of the open panel, or the report; returns the files.

        Args:
            kind: pdf, svg or png (one of :data:`workbench.dashboards.export.SIZES` may follow: ``pdf column``), tex,
                md, csv, parquet, or html (the report).

        Raises:
            ConfigError: when the panel has nothing of that kind, or there is no browser to draw images.
        """
        snapshot = self._snapshot or Snapshot(self.run)
        if kind == "html":
            return [write_report(snapshot, report_path(snapshot))]
        line, folder = provenance_line(snapshot), exports_path(snapshot)
        kind, _, width = kind.partition(" ")

        def path(name: str) -> Path:
            return folder / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}.{kind}"

        if kind in IMAGES:
            drawn = [block for block in self.blocks if isinstance(block, Figure)]
            size = cast(Width, width or "page")
            files = [export_figure(block.figure, path(block.name), line, size) for block in drawn]
        else:
            tables = exported_tables(self.blocks, kind)
            files = [export_table(table, path(name), line) for name, table in tables.items()]
        if not files:
            what = "figure" if kind in IMAGES else "table"
            got = f"the panel {self.panel.title}, which shows no {what}"
            raise ConfigError.at("export", got=got, expected=f"a panel with a {what}")
        return files

    def _do(self, text: str, action: Callable[[], None]) -> None:
        """Run ``action`` in a thread and show how it ends."""
        self._log(text)

        def work() -> None:
            try:
                action()
            except Exception as error:  # shown where the button was pressed
                self._log(f"{type(error).__name__}: {error}")
            self.refresh_once()

        threading.Thread(target=work, name="dashboard action", daemon=True).start()

    def _on_event(self, message: dict[str, Any]) -> None:
        """The reader marked a row of a table, filtered it, chose columns, or pressed a button."""
        key = message["key"]
        if message["event"] == "mark":
            rows = self.marks[message["mark"]]
            (rows.add if message["on"] else rows.discard)(key)
        elif message["event"] == "filter":
            self.queries[key] = str(message["text"])
        elif message["event"] == "columns":
            self.columns[key] = [str(title) for title in message["shown"]]
        elif message["action"] in ("details", "close"):
            if "run" in self.panel.Config.model_fields:
                self.panel.settings = self.panel.settings.changed(run=key if message["action"] == "details" else "")
        elif message["action"] == "open":
            try:
                if key not in map(str, Neighbours(self.run.results).folders()):  # a page may ask for any folder
                    raise ConfigError.at(key, got="no ablation in this folder of results", expected="one of its rows")
                self.show(key)
            except ConfigError as error:
                self._log(str(error))
            return
        self._redraw()

    # -- drawing -----------------------------------------------------------------------------------------------------

    def refresh_once(self) -> bool:
        """Read the run and redraw what changed. Returns whether it may still change; never raises."""
        with self._lock:
            try:
                if not self.run.exists:
                    self._status(f"The folder {self.run.folder} was deleted; the panel shows what was read last.")
                    return True
                self._snapshot = Snapshot(self.run, self._snapshot)
                self._set_tabs()
                if self._snapshot.finished and self._was_finished is False and not self._has_chosen:
                    with self._unchosen():
                        self._open_panel(self._suitable_panel())
                self._was_finished = self._snapshot.finished
                self._draw()
                self._show_header(self._snapshot)
                return not self._snapshot.finished
            except Exception as error:  # a file read while it was written, or a damaged one: shown, and tried again
                self._status(f"This refresh failed ({type(error).__name__}: {error}); trying again.")
                return True

    def stop(self) -> None:
        """Stop refreshing; the page keeps what it shows."""
        self._stopped.set()

    def close(self) -> None:
        """Stop refreshing and remove the view."""
        self.stop()
        super().close()

    def _keep_refreshing(self) -> None:
        while not self._stopped.wait(self.refresh):
            if not self.refresh_once():
                return

    def _wake(self) -> None:
        """Start the refreshing thread again after a finished run has ended it."""
        if self.refresh > 0 and not self._stopped.is_set() and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._keep_refreshing, name="dashboard", daemon=True)
            self._thread.start()

    def _redraw(self, change: Any = None) -> None:
        with self._lock:
            try:
                self._draw()
            except Exception as error:
                self._status(f"Drawing failed ({type(error).__name__}: {error}).")

    def _draw(self) -> None:
        run = self._snapshot
        if run is None or self.views.value is None:
            return
        panel = self.panel
        self._show_controls(run)
        if "selected" in panel.Config.model_fields:
            panel.settings = panel.settings.changed(selected=tuple(sorted(self.marks["selected"])))
        hidden = self.marks["hidden"]
        shown = run.filtered([arm for arm in run.arms if f"arm {arm}" not in hidden], hidden)
        self.blocks = [self._chosen(block) for block in with_names(panel.blocks(shown), panel.names(run))]
        source = Text("provenance", caption(provenance_line(run))) if run.arms else None
        self.board.show([self._plain(block) for block in [*self.blocks, *([source] if source else [])]])

    def _chosen(self, block: Block) -> Block:
        """A block with the rows and columns that the reader has chosen."""
        name = f"{self.panel_name} {block.name}"
        if not isinstance(block, Grid) or not (name in self.queries or name in self.columns):
            return block
        return chosen_rows_and_columns(block, self.queries.get(name, ""), self.columns.get(name))

    def _plain(self, block: Block) -> dict[str, Any]:
        """A block as the board takes it."""
        plain: dict[str, Any] = {"id": f"{self.panel_name} {block.name}"}
        if isinstance(block, Figure):
            height = block.figure.layout.height or 400
            block.figure.update_layout(uirevision=self._axes(), height=height)
            label = f"{block.name}: figure of {len(block.table)} numbers; the table behind it can be exported"
            return {**plain, "kind": "figure", "figure": block.figure, "note": block.note, "label": label}
        if isinstance(block, Grid):
            return {
                **plain,
                "kind": "grid",
                "title": block.title,
                "columns": block.columns,
                "rows": [_plain_row(row) for row in block.rows],
                "total": len(block.rows) if block.total is None else block.total,
                "query": block.query,
                "problem": block.problem,
                "note": block.note,
                "frozen": block.frozen,
                "marks": block.marks,
                "marked": {mark: sorted(self.marks[mark]) for mark in block.marks},
                "action": block.action,
                "empty": block.empty,
                "sortable": block.sortable,
            }
        return {**plain, "kind": "text", "title": block.title, "html": block.html}

    def _axes(self) -> str:
        """Changes with the axes: the reader's zoom survives new data, but not new axes."""
        settings = self.panel.settings.plain()
        return repr({name: value for name, value in settings.items() if isinstance(value, str | bool)})

    def _show_header(self, run: Snapshot) -> None:
        if not run.arms:
            self._heading.value = render("heading.html", name=run.name, below=str(run.results), progress=None)
        else:
            progress = overall_progress(run)
            self._state = state = progress.state
            self._heading.value = render(
                "heading.html",
                name=run.name,
                below=run.question,
                progress=progress,
                state=f"{state} (no worker is alive; “Resume” starts them again)" if state == "not running" else state,
            )
        self._enable_actions()

    def _enable_actions(self) -> None:
        """Enable the buttons that can act on the run as it is, under the name of what they would do."""
        run = self._snapshot
        if run is None or not run.arms or run.archived:  # an archive cannot be trained further
            self.launch_button.disabled = self.stop_button.disabled = self.workers.disabled = True
            return
        state = self._state
        self.stop_button.disabled = state not in ("running", "starting")
        can_launch = self.ablation is not None or run.launched
        if state == "finished":  # failures that say nothing about the model are run again
            can_launch = can_launch and bool(run.runs()["status"].is_in(RETRYABLE).any())
        elif state in ("running", "starting"):
            can_launch = state == "running" and self.workers.value > len(run.workers())
        names = {
            "not launched": "Launch",
            "finished": "Retry failed" if can_launch else "Launch",
            "running": "Add workers",
        }
        self.launch_button.description = names.get(state, "Resume")
        self.launch_button.disabled = not can_launch
        self.workers.disabled = not can_launch and state != "running"

    def _status(self, text: str) -> None:
        """Show ``text`` in the header, in place of the state."""
        self._heading.value = render("heading.html", name=self.run.name or "Ablations", below=text, progress=None)

    def _log(self, text: str) -> None:
        """Show ``text`` below the buttons."""
        with suppress(Exception):  # the page may be gone
            self.message.value = escape(text)


def _plain_row(row: Row) -> dict[str, Any]:
    """A row as the board takes it; what is empty is left out."""
    plain: dict[str, Any] = {"key": row.key, "cells": row.cells}
    if row.colour:
        plain["colour"] = row.colour
    if row.marks is not None:
        plain["marks"] = row.marks
    if row.children:
        plain["children"] = [_plain_row(child) for child in row.children]
        plain["unfolded"] = row.unfolded
    return plain


def _button(text: str, tooltip: str, action: Callable[[], None]) -> widgets.Button:
    button = widgets.Button(description=text, tooltip=tooltip, layout={"width": "110px"})
    button.on_click(lambda _: action())
    return button
