"""The live dashboard, in JupyterLab and as a page of its own: what is running, what it costs, what comes out.

Controls are ipywidgets; a :class:`~workbench.dashboards.board.Board` draws the blocks of the chosen panel in the browser and is sent only what changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from workbench.config import ConfigError
from workbench.dashboards import panels, style
from workbench.dashboards.board import Board
from workbench.dashboards.export import IMAGES, TABLES, export_figure, export_table, provenance_line
from workbench.dashboards.figures import SPENT_TITLES
from workbench.dashboards.panels import PANELS, Figure, Grid, Settings, Text
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables import diagnostic_table, state
from workbench.dashboards.view import PlannedRun

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.run import AblationRun

EXPORTS: dict[str, str] = {
    "png": "PNG",
    "svg": "SVG",
    "pdf": "PDF",
    "csv": "CSV",
    "tex": "LaTeX",
    "md": "Markdown",
    "html": "HTML report",
}


def dashboard(what: AblationRun | Ablation | str | Path = "results", refresh: float = 2.0) -> Dashboard:
    """A live view for JupyterLab; show it as the last value of a cell.

    Args:
        what: a launched ablation, which may go on in other processes; one that is not launched yet; the folder of an
            ablation; or the folder of all results, whose ablations are listed.
        refresh: seconds between looks at the folder.

    Raises:
        ConfigError: when ``what`` is a folder that is not there.
    """
    return Dashboard(what, refresh)


CONTROLLED = ("x", "y", "smoothing", "log_x", "log_y", "tuning", "spent", "size", "mechanism")
"""Settings that a control shows."""


class Dashboard(widgets.VBox):
    """State, time left and what can be done, above one panel of :data:`workbench.dashboards.panels.PANELS`.

    A background thread refreshes it until the run has finished or :meth:`stop` is called. What goes wrong is told in the
    header; panels keep what they last showed.

    Args:
        what: see :func:`dashboard`.
        refresh: seconds between refreshes; 0 starts no thread, :meth:`refresh_once` then is up to you.
        panel: which panel is open at first; default the one that fits.
    """

    def __init__(self, what: AblationRun | Ablation | str | Path, refresh: float = 2.0, panel: str | None = None):
        self.run: Any = None
        """The run that is shown, None while there is only a folder of results."""
        self.ablation: Any = None
        """What the launch button starts."""
        self.refresh = refresh
        self.settings = Settings()
        self._lock, self._stopped = threading.RLock(), threading.Event()
        self._snapshot: Snapshot | None = None
        self._blocks: list[panels.Block] = []
        self._heading = widgets.HTML(layout={"min_height": "104px"})
        self.message = widgets.HTML(layout={"min_height": "24px"})
        self.board = Board(self._heard)
        self._make_controls()
        self._take(what)
        self.panel = widgets.ToggleButtons(options=list(PANELS), style={"button_width": "104px"})
        self.panel.value = panel or self._fitting()
        super().__init__(
            [self._heading, self._actions, self.message, self.panel, self._choices, self.board],
            layout={"width": "100%", "overflow": "visible"},
        )
        self.add_class("workbench-dashboard")
        self.refresh_once()
        self.panel.observe(self._redraw, "value")
        self._thread = threading.Thread(target=self._keep_refreshing, name="dashboard", daemon=True)
        if refresh > 0:
            self._thread.start()

    @property
    def sent(self) -> int:
        """Bytes of the last message to the page."""
        return self.board.sent

    @property
    def header(self) -> str:
        """What stands above the panels, as HTML."""
        return self._heading.value

    def refresh_once(self) -> bool:
        """Read the run and redraw what changed. Returns whether there may be more to come; raises nothing."""
        with self._lock:
            try:
                if self.run is None:
                    self._draw()
                    return True
                if not self.run.exists:
                    self._say(f"The folder {self.run.folder} is gone; the panel shows what was last read.")
                    return True
                self._snapshot = Snapshot(self.run, self._snapshot)
                self._draw()
                self._head(self._snapshot)
                return not self._snapshot.finished
            except Exception as error:  # a look in the middle of a write, or a damaged file: told, and tried again
                self._say(f"This refresh failed ({type(error).__name__}: {error}); trying again.")
                return True

    def stop(self) -> None:
        """Stop refreshing; what is shown stays."""
        self._stopped.set()

    def close(self) -> None:
        """Stop refreshing and remove the view."""
        self.stop()
        super().close()

    def show(self, what: AblationRun | Ablation | str | Path) -> None:
        """Show another ablation in this dashboard."""
        with self._lock:
            self._take(what)
            # what the controls say goes on; marks and maps were of the other ablation
            self.settings = Settings(**{name: getattr(self.settings, name) for name in CONTROLLED})
            self.panel.value = self._fitting()
            self._snapshot = None
        self.refresh_once()
        self._wake()

    # -- controls ----------------------------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        def toggle(options: list[Any], width: int, name: str) -> widgets.ToggleButtons:
            made = widgets.ToggleButtons(options=options, style={"button_width": f"{width}px"})
            made.observe(lambda change: self._set(**{name: change["new"]}), "value")
            return made

        def tick(text: str, name: str) -> widgets.Checkbox:
            made = widgets.Checkbox(description=text, indent=False, layout={"width": "auto"})
            made.observe(lambda change: self._set(**{name: change["new"]}), "value")
            return made

        def button(text: str, tip: str, act: Callable[[], None], width: str = "110px") -> widgets.Button:
            made = widgets.Button(description=text, tooltip=tip, layout={"width": width})
            made.on_click(lambda _: act())
            return made

        self.x_axis = toggle([("Tokens", "tokens"), ("FLOPs", "flops"), ("Time", "seconds")], 66, "x")
        self.y_axis = toggle([("Training loss", "loss"), ("Selection", "selection_value")], 106, "y")
        self.smoothing = widgets.FloatSlider(
            min=0,
            max=0.98,
            step=0.02,
            description="smoothing",
            readout_format=".2f",
            continuous_update=False,
            layout={"width": "228px"},
        )
        self.smoothing.observe(lambda change: self._set(smoothing=change["new"]), "value")
        self.log_x, self.log_y = tick("log x", "log_x"), tick("log y", "log_y")
        self.tuning_view = toggle(list(panels.TUNING), 110, "tuning")
        self.spent = widgets.Dropdown(
            options=[(title, name) for name, title in SPENT_TITLES.items()],
            description="against",
            layout={"width": "420px"},
        )
        self.spent.observe(lambda change: self._set(spent=change["new"]), "value")
        self.size = toggle([("Parameters", "non_embedding"), ("FLOPs", "training_flops")], 100, "size")
        self.mechanism = toggle(["over training", "layers", "recall", "attention"], 110, "mechanism")
        self.diagnostic = widgets.Dropdown(options=[], description="diagnostic", layout={"width": "240px"})
        self.diagnostic.observe(lambda change: self._set(diagnostic=change["new"] or ""), "value")
        self.look_button = button("Look inside", "Open the last checkpoint of one run of each arm", self.look_inside)
        self._choices = widgets.HBox(
            layout={"min_height": "42px", "flex_flow": "row wrap", "grid_gap": "12px", "align_items": "center"}
        )
        self._controls: dict[str, list[Any]] = {
            "Curves": [self.x_axis, self.y_axis, self.smoothing, self.log_x, self.log_y],
            "Tuning": [self.tuning_view],
            "Frontier": [self.spent],
            "Scaling": [self.size],
            "Mechanisms": [self.mechanism, self.diagnostic, self.look_button],
        }
        self.workers = widgets.BoundedIntText(value=2, min=1, max=64, description="workers", layout={"width": "140px"})
        self.launch_button = button(
            "Launch", "Start this ablation, or go on with it: finished runs are not repeated", self.launch
        )
        self.stop_button = button("Stop", "Workers write checkpoints and end; “Go on” continues", self.stop_workers)
        self.export_kind = widgets.Dropdown(
            options=[(text, kind) for kind, text in EXPORTS.items()], layout={"width": "130px"}
        )
        self.export_button = button("Export", "Write what this panel shows to a file", self.export)
        self._actions = widgets.HBox(
            [
                self.launch_button,
                self.workers,
                self.stop_button,
                widgets.HTML(layout={"width": "24px"}),
                self.export_kind,
                self.export_button,
            ],
            layout={"flex_flow": "row wrap", "align_items": "center"},
        )

    def _take(self, what: Any) -> None:
        from workbench.ablation.run import AblationRun

        self.ablation = None
        if isinstance(what, str | Path):
            folder = Path(what).resolve()
            if not folder.is_dir():
                raise ConfigError.at(
                    str(what), got="no such folder", expected="a folder of results, or of one ablation"
                )
            self.results = folder
            self.run = AblationRun(folder) if (folder / "ablation.json").exists() else None
            if self.run is not None:
                self.results = folder.parent
        elif hasattr(what, "launch"):
            from workbench.files import read_json

            self.ablation, self.results = what, what.results.resolve()
            launched = read_json(what.folder / "ablation.json").get("identity") == what.config.identity
            self.run = AblationRun(what.folder) if launched else PlannedRun(what)
            self.workers.value = what.workers
        else:
            self.run, self.results = what, Path(what.folder).parent
        if isinstance(self.run, AblationRun):
            self.workers.value = self.run.about.get("workers") or self.workers.value

    def _fitting(self) -> str:
        """The panel to begin with."""
        return "Ablations" if self.run is None else "Cost" if isinstance(self.run, PlannedRun) else "Curves"

    def _set(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.settings, name, value)
        self._redraw()

    # -- what can be done --------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the ablation, or go on with it, with as many workers as the field says. Returns at once."""

        def start() -> None:
            from workbench.ablation.ablation import Ablation

            if self.run is None:
                raise ConfigError.at(
                    "launch", got="no ablation", expected="an ablation to be open", do="Open one in Ablations."
                )
            ablation = self.ablation or Ablation.parse(self.run.about["config"], self.run.folder.parent)
            run = ablation.launch(self.workers.value)
            with self._lock:
                self.run, self._snapshot = run, None
                if self.panel.value == "Cost":
                    self.panel.value = "Curves"
            self._tell(
                "Everything had ended already." if run.finished else f"{len(run.workers())} workers are at work."
            )
            self._wake()

        self._do("Launching: data are prepared, costs are checked …", start)

    def stop_workers(self) -> None:
        """Ask the workers to stop after a checkpoint. Returns at once."""

        def halt() -> None:
            left = self.run.stop() if self.run is not None and not isinstance(self.run, PlannedRun) else []
            self._tell(
                f"{len(left)} workers have not ended yet." if left else "Stopped; “Go on” continues from checkpoints."
            )

        self._do("Stopping: running trials write a checkpoint …", halt)

    def export(self) -> None:
        """Write what the panel shows to ``exports/`` in the ablation's folder, in the chosen format. Returns at once."""
        kind = self.export_kind.value

        def write() -> None:
            if self._snapshot is None:
                raise ConfigError.at(
                    "export", got="no ablation", expected="an ablation to be open", do="Open one in Ablations."
                )
            files = self.write(kind)
            self._tell(f"Wrote {', '.join(path.name for path in files)} in {files[0].parent}")

        self._do(f"Exporting {EXPORTS[kind]} …", write)

    def write(self, kind: str) -> list[Path]:
        """Write the figures or tables of this panel, or the report; returns the files.

        Args:
            kind: png, svg, pdf, csv, tex, md, or html (the report).

        Raises:
            ConfigError: when the panel has nothing of that sort, or no browser can draw.
        """
        assert self._snapshot is not None
        if kind == "html":
            from workbench.dashboards.report import write_report

            return [write_report(self._snapshot, Path(self.run.folder) / "report.html")]
        line, folder = provenance_line(self._snapshot), Path(self.run.folder) / "exports"
        found = []
        for block in self._blocks:
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in block.name)
            if kind in IMAGES and isinstance(block, Figure):
                found.append(export_figure(block.figure, folder / f"{name}.{kind}", line))
            elif kind in TABLES and block.table is not None:
                found.append(export_table(block.table, folder / f"{name}.{kind}", line))
        if not found:
            sort = "figure" if kind in IMAGES else "table"
            raise ConfigError.at(
                "export", got=f"the panel {self.panel.value}, which shows no {sort}", expected=f"a panel with a {sort}"
            )
        return found

    def look_inside(self) -> None:
        """Draw what the layers of one run of each arm read. Returns at once."""

        def look() -> None:
            from workbench.dashboards.attention import inside

            if self._snapshot is None:
                return
            self.settings.inside = inside(self._snapshot)
            self._tell("")
            self._redraw()

        self._do("Opening checkpoints …", look)

    def _do(self, text: str, action: Callable[[], None]) -> None:
        """Carry ``action`` out beside the kernel's own thread, telling what comes of it."""
        self._tell(text)

        def carry_out() -> None:
            try:
                action()
            except Exception as error:  # told where the button was pressed
                self._tell(f"{type(error).__name__}: {error}")
            self.refresh_once()

        threading.Thread(target=carry_out, name="dashboard action", daemon=True).start()

    def _heard(self, message: dict[str, Any]) -> None:
        """What a reader did on the board."""
        if message["event"] == "mark":
            marked: set[str] = getattr(self.settings, message["mark"])
            (marked.add if message["on"] else marked.discard)(message["key"])
        elif message["action"] == "log":
            self.settings.log = "" if self.settings.log == message["key"] else message["key"]
        elif message["action"] == "open":
            try:
                self.show(message["key"])
            except ConfigError as error:
                self._tell(str(error))
            return
        self._redraw()

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _keep_refreshing(self) -> None:
        while not self._stopped.wait(self.refresh):
            if not self.refresh_once():
                return

    def _wake(self) -> None:
        """Go on refreshing where a finished run has ended it."""
        if self.refresh > 0 and not self._stopped.is_set() and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._keep_refreshing, name="dashboard", daemon=True)
            self._thread.start()

    def _redraw(self, change: Any = None) -> None:
        with self._lock:
            try:
                self._draw()
            except Exception as error:
                self._say(f"Drawing failed ({type(error).__name__}: {error}).")

    def _draw(self) -> None:
        name = self.panel.value
        self._choices.children = self._controls.get(name, [])
        if self._snapshot is None:
            if self.run is None:
                self._head_of_results()
                self._blocks = [panels.overview(self.results)]
                self.board.show([self._plain(block) for block in self._blocks])
            return
        shown = self._snapshot.showing(
            [arm for arm in self._snapshot.arms if f"arm {arm}" not in self.settings.hidden], self.settings.hidden
        )
        if name == "Mechanisms":
            known = sorted(diagnostic_table(self._snapshot)["name"].unique())
            if list(self.diagnostic.options) != known:
                self.diagnostic.options = known
        self._blocks = PANELS[name](shown, self.settings)
        source = Text("provenance", f"<p class='wb-note'>{escape(provenance_line(self._snapshot))}</p>")
        self.board.show([self._plain(block) for block in [*self._blocks, source]])

    def _plain(self, block: panels.Block) -> dict[str, Any]:
        place = {"id": f"{self.panel.value} {block.name}"}
        if isinstance(block, Figure):
            # zoom and hidden traces outlive new data, not new axes
            chosen = (
                self.settings.x,
                self.settings.y,
                self.settings.log_x,
                self.settings.log_y,
                self.settings.spent,
                self.settings.size,
            )
            block.figure.update_layout(uirevision=repr(chosen), height=block.figure.layout.height or 400)
            return {
                **place,
                "kind": "figure",
                "figure": block.figure,
                "note": block.note,
                "label": f"{block.name}: figure of {len(block.table)} numbers; the table behind it can be exported",
            }
        if isinstance(block, Grid):
            marked = {mark: sorted(getattr(self.settings, mark)) for mark in block.marks}
            return {
                **place,
                "kind": "grid",
                "heads": block.heads,
                "rows": block.rows,
                "marks": block.marks,
                "marked": marked,
                "action": block.action,
                "empty": block.empty,
            }
        return {**place, "kind": "text", "html": block.html}

    def _head(self, run: Snapshot) -> None:
        stands = state(run)
        left = f", about {style.duration(stands['seconds_left'])} left" if stands["seconds_left"] else ""
        word = "not launched" if isinstance(self.run, PlannedRun) else stands["word"]
        waiting = " (no worker is alive; “Go on” starts them again)" if word == "not running" else ""
        self._title(
            run.name,
            run.question,
            (
                f"<div>{escape(word)}{waiting}: {stands['ended']} of {stands['planned']} runs{left}</div>"
                "<div style='height:6px;border-radius:3px;background:rgba(128,128,128,.22);overflow:hidden;max-width:640px'>"
                f"<div style='height:100%;background:#0072B2;width:{100 * stands['share']:.1f}%'></div></div>"
            ),
        )
        self.stop_button.disabled = word != "running"
        self.launch_button.description = "Launch" if word in ("not launched", "finished") else "Go on"
        self.launch_button.disabled = self.run.archived  # what is kept for good is not trained on

    def _head_of_results(self) -> None:
        self._title("Ablations", str(self.results))
        self.stop_button.disabled = self.launch_button.disabled = True

    def _title(self, name: str, below: str, more: str = "") -> None:
        self._heading.value = (
            f"<div style='font-size:20px;font-weight:600;line-height:1.5'>{escape(name)}</div>"
            f"<div style='opacity:.75'>{escape(below) or '&nbsp;'}</div>{more}"
        )

    def _say(self, text: str) -> None:
        self._title(getattr(self.run, "name", "Ablations"), text)

    def _tell(self, text: str) -> None:
        with suppress(Exception):  # a message to a page that is gone
            self.message.value = escape(text)
