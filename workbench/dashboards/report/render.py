"""The report: one HTML file that opens anywhere, without network, on a light or a dark screen and on paper."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from ruamel.yaml import YAML

from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Figure, Grid, Panel, ordered_panels, with_names
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.progress import overall_progress
from workbench.dashboards.templates import caption, render
from workbench.dashboards.view import RunView
from workbench.files import replacing


def report_path(run: RunView) -> Path:
    """Where the report of ``run`` is written by default: in its folder; of an archive, which is committed without the
    2 MB of a report, in ``results/reports``."""
    return Path("results/reports", f"{run.folder.name}.html") if run.archived else run.folder / "report.html"


def exports_path(run: RunView) -> Path:
    """Where tables and figures of ``run`` are exported to: ``exports/`` in its folder; of an archive, which is
    committed, ``results/exports/NAME``."""
    return Path("results/exports", run.folder.name) if run.archived else run.folder / "exports"


def write_report(run: RunView, path: str | Path) -> Path:
    """Write the report of ``run``, finished or not, to ``path``; readers see the old file or the whole new one.

    Args:
        run: the run.
        path: of the HTML file; its folder is created if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(report_html(run), encoding="utf-8", errors="replace")
    return path


def report_html(run: RunView) -> str:
    """The report as HTML: the sections of every panel that declares some and applies to ``run``."""
    run = Snapshot.of(run)
    panels = sorted(
        ordered_panels(), key=lambda panel: panel.order if panel.report_order is None else panel.report_order
    )
    sections = [
        (heading, _section(panel, run, settings))
        for panel in panels
        for heading, settings in panel.report.items()
        if panel().applies(run)
    ]
    if run.configuration:
        sections.insert(1, ("What was compared", [_design(run)]))
    return render(
        "report.html",
        run=run,
        styles=style.arm_styles(run),
        progress=overall_progress(run),
        sections=sections,
        provenance=" · ".join(f"{name} {text}" for name, text in run.provenance().items()),
        plotly=_packed_plotly(),
    )


@cache
def _packed_plotly() -> str:
    """plotly.js, compressed; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"))).decode("ascii")


def _design(run: Snapshot) -> Markup:
    """What the arms are, what was declared, what was changed afterwards, and how to run it again."""
    # how it was launched concerns one machine, and may name a database with its password
    configuration = {name: value for name, value in run.configuration.items() if name not in ("launch", "deviation")}
    verdict, text = run.verdict(), io.StringIO()
    YAML().dump({**configuration, "name": f"{run.name}-again"}, text)
    return render(
        "design.html",
        styles=style.arm_styles(run),
        arms={arm: _settings(configuration["arms"][arm]) for arm in run.arms},
        base=_settings(configuration.get("base", {})),
        declared=verdict.declared if verdict else [],
        deviations=run.deviations(),
        command=f"workbench run {shlex.quote(f'{run.name}-again.yaml')}",
        file=text.getvalue(),
    )


def _settings(fields: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Fields of a run in dotted form: ``model.pattern: sliding``."""
    return [
        line
        for name, value in fields.items()
        for line in (
            _settings(value, f"{prefix}{name}.")
            if isinstance(value, Mapping) and value
            else [f"{prefix}{name}: {value if isinstance(value, str) and value else json.dumps(value)}"]
        )
    ]


def _section(panel: type[Panel], run: Snapshot, settings: Mapping[str, Any]) -> list[Markup]:
    """The blocks of a panel; a figure once for each option of the panel's ``report_switch``."""
    switch = panel.report_switch
    options = get_args(panel.Config.model_fields[switch].annotation) if switch else (None,)
    drawn = [panel(panel.Config(**{**settings, **({switch: option} if switch else {})})) for option in options]
    variants = [with_names(each.blocks(run), each.names(run)) for each in drawn]
    labels = [panel.labels.get(option, option) for option in options] if switch else []
    name = "-".join([panel.Config.model_fields["kind"].default, *map(str, settings.values())])
    return [_block(blocks, f"{name}-{i}" if i else name, labels) for i, blocks in enumerate(zip(*variants))]


def _block(variants: Sequence[Block], name: str, labels: Sequence[str]) -> Markup:
    """One block as HTML; a figure in all its ``variants``."""
    block = variants[0]
    if isinstance(block, Figure):
        figures = [each.figure for each in variants if isinstance(each, Figure)]
        text = caption(block.note) if block.note else Markup()
        return text + _plot(name, figures, labels)
    title = Markup("<h3>{}</h3>\n").format(block.title) if block.title else Markup()
    if isinstance(block, Grid):
        shown = [i for i, column in enumerate(block.columns) if not column.hidden]
        return title + render("grid.html", grid=block, shown=shown, text=cell_text, tone=cell_tone)
    return title + block.html


def cell_text(cell: Cell | str) -> str:
    """What a cell shows."""
    return cell if isinstance(cell, str) else cell.text


def cell_tone(cell: Cell | str) -> str:
    """The CSS class of a cell."""
    return "" if isinstance(cell, str) else cell.tone


def _plot(name: str, figures: Sequence[go.Figure], labels: Sequence[str]) -> Markup:
    """A container that the page's script fills; with several figures, buttons to choose one."""
    height = max(figure.layout.height or 400 for figure in figures)
    text = "[" + ",".join(str(figure.to_json()) for figure in figures) + "]"
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")  # inert inside <script>
    return render("plot.html", id=name, height=height, options=labels, figures=Markup(safe))
