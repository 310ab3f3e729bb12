"""The live dashboard for JupyterLab: the report's figures, redrawn while the ablation runs."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import plotly.graph_objects as go

from workbench.dashboards import figures, markup, style
from workbench.dashboards.tables import Snapshot, state

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

HEIGHTS = {"Curves": 460, "Effects": 400, "Tuning": 420, "Cost": 360, "Failures": 200}
"""Pixels of each panel; fixed, so that nothing jumps when data arrive."""

STYLE = """<style>
.workbench-dashboard table { border-collapse: collapse; font-variant-numeric: tabular-nums; line-height: 1.5; }
.workbench-dashboard th, .workbench-dashboard td { text-align: left; padding: 3px 18px 3px 0; vertical-align: top;
  border-bottom: 1px solid rgba(128,128,128,.25); }
.workbench-dashboard .number { text-align: right; white-space: nowrap; }
.workbench-dashboard .bar { height: 6px; border-radius: 3px; background: rgba(128,128,128,.22); overflow: hidden;
  max-width: 640px; }
.workbench-dashboard .bar div { height: 100%; background: #0072B2; transition: width .4s; }
</style>"""


def dashboard(run: AblationRun, refresh: float = 2.0) -> Dashboard:
    """A live view of ``run`` for JupyterLab; show it as the last value of a cell.

    Args:
        run: the run, which may go on in other processes.
        refresh: seconds between looks at its folder.
    """
    return Dashboard(run, refresh)


class Dashboard(widgets.VBox):
    """State and time left above the panels Curves, Effects, Tuning, Cost and Failures.

    A background thread refreshes it until the run has finished or :meth:`stop` is called. What goes wrong while
    refreshing is told in the header; the panels keep what they last showed.

    Args:
        run: the run.
        refresh: seconds between refreshes; 0 starts no thread, :meth:`refresh_once` then is up to you.
    """

    def __init__(self, run: AblationRun, refresh: float = 2.0):
        self.run, self.refresh = run, refresh
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._snapshot: Snapshot | None = None
        self._header = widgets.HTML(layout={"min_height": "104px"})
        self.x_axis = widgets.ToggleButtons(
            options=[("Tokens", "tokens"), ("FLOPs", "flops"), ("Time", "seconds")], style={"button_width": "84px"}
        )
        self.y_axis = widgets.ToggleButtons(
            options=[("Training loss", "loss"), (f"Selection {run.metric.name}", "selection_value")],
            style={"button_width": "124px"},
        )
        self._tables = {name: widgets.HTML() for name in ("Cost", "Failures")}
        self._panels = {name: widgets.Box(layout={"height": f"{height}px", "overflow": "auto", "width": "100%",
                                                  "flex": "0 0 auto", "display": "block"})
                        for name, height in HEIGHTS.items()}  # fmt: skip
        self.plots: dict[str, go.FigureWidget] = {}
        """Panel -> its figure."""
        choice = widgets.HBox([self.x_axis, self.y_axis], layout={"flex_flow": "row wrap", "grid_gap": "16px"})
        children: list[Any] = [self._header]
        for name, panel in self._panels.items():
            children += [widgets.HTML(f"<h3 style='margin:10px 0 0;font-weight:600'>{name}</h3>")]
            children += [choice, panel] if name == "Curves" else [panel]
        super().__init__(children, layout={"width": "100%"})
        self.add_class("workbench-dashboard")
        for name, table in self._tables.items():
            self._panels[name].children = [table]
        self.refresh_once()
        self.x_axis.observe(self._redraw, "value")
        self.y_axis.observe(self._redraw, "value")
        self._thread = threading.Thread(target=self._keep_refreshing, name=f"dashboard {run.name}", daemon=True)
        if refresh > 0:
            self._thread.start()

    def refresh_once(self) -> bool:
        """Read the run and redraw what changed. Returns whether there may be more to come; raises nothing."""
        with self._lock:
            try:
                if not self.run.folder.exists():
                    self._say(f"The folder {self.run.folder} is gone; the panels show what was last read.")
                    return False
                self._snapshot = snapshot = Snapshot(self.run, self._snapshot)
                self._draw(snapshot)
                self._head(snapshot)
                return not snapshot.finished
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

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        self._fit_soon()
        return super()._repr_mimebundle_(**kwargs)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _keep_refreshing(self) -> None:
        while not self._stopped.wait(self.refresh):
            if not self.refresh_once():
                return

    def _redraw(self, change: Any = None) -> None:
        with self._lock:
            if self._snapshot is not None:
                try:
                    self._draw(self._snapshot)
                except Exception as error:
                    self._say(f"Drawing failed ({type(error).__name__}: {error}).")

    def _draw(self, run: Snapshot) -> None:
        self._show("Curves", figures.loss_curves(run, self.x_axis.value, self.y_axis.value))
        self._show("Effects", figures.effects(run))
        self._show("Tuning", figures.tuning(run))
        self._tables["Cost"].value = markup.cost_html(run)
        self._tables["Failures"].value = markup.failure_html(run)

    def _show(self, name: str, new: go.Figure) -> None:
        new.update_layout(autosize=True, height=max(HEIGHTS[name] - 16, new.layout.height if name != "Curves" else 0))
        old = self.plots.get(name)
        same = old is not None and len(old.data) == len(new.data)
        if old is None or not same or (name == "Tuning" and _axes(old) != _axes(new)):
            # the first tuning trials bring their axes with them
            self.plots[name] = go.FigureWidget(new.data, new.layout)
            self._panels[name].children = [self.plots[name]]
            if old is not None:
                old.close()
                self._fit_soon()
            return
        with old.batch_update():
            for mine, theirs in zip(old.data, new.data):
                for part in ("x", "y", "text", "hovertext", "customdata", "name", "mode"):
                    _change(mine, theirs, part)
                for part in ("symbol", "color"):
                    if theirs.marker[part] is not None:
                        _change(mine.marker, theirs.marker, part)
            old.layout.annotations = new.layout.annotations
            for axis in ("xaxis", "yaxis"):
                _change(old.layout[axis].title, new.layout[axis].title, "text")
            for part in ("range", "zeroline"):
                _change(old.layout.xaxis, new.layout.xaxis, part)

    def _fit_soon(self) -> None:
        """Plotly measures a figure before the page holds it, and takes it to be 700 pixels wide: let it look again."""
        for delay in (0.4, 2.0):
            timer = threading.Timer(delay, self._fit)
            timer.daemon = True
            timer.start()

    def _fit(self) -> None:
        with self._lock:
            for plot in self.plots.values():
                plot.layout.autosize = False
                plot.layout.autosize = True

    def _head(self, run: Snapshot) -> None:
        stands = state(run)
        left = f", about {style.duration(stands['seconds_left'])} left" if stands["seconds_left"] else ""
        waiting = " (no worker is alive; run.start_workers() goes on)" if stands["word"] == "not running" else ""
        self._header.value = (
            f"{STYLE}<div style='font-size:20px;font-weight:600;line-height:1.5'>{escape(run.name)}</div>"
            f"<div style='opacity:.75'>{escape(run.question) or '&nbsp;'}</div>"
            f"<div>{escape(stands['word'])}{waiting}: {stands['ended']} of {stands['planned']} runs{left}</div>"
            f"<div class='bar'><div style='width:{100 * stands['share']:.1f}%'></div></div>"
        )

    def _say(self, text: str) -> None:
        self._header.value = (
            f"{STYLE}<div style='font-size:20px;font-weight:600;line-height:1.5'>{escape(self.run.name)}</div>"
            f"<div>{escape(text)}</div>"
        )


def _axes(figure: go.Figure) -> list[tuple[Any, ...]]:
    """What must be the same in the tuning panel for data to be exchanged in place."""
    return [(axis.type, axis.title.text) for axis in figure.select_xaxes()]


def _change(old: Any, new: Any, part: str) -> None:
    """Set one property where it differs."""
    before, after = old[part], new[part]
    same = before is after or (type(before) is type(after) and not hasattr(after, "dtype") and before == after)
    if not same:
        old[part] = after
