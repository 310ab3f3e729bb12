"""The report: one HTML file that opens anywhere, without network, on a light or a dark screen and on paper."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from workbench.dashboards import figures, markup, style
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables import XAxis, curve_table, effect_table, state

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView

X_NAMES = {"tokens": "Tokens", "flops": "FLOPs", "seconds": "Time"}


def write_report(run: RunView, path: str | Path) -> Path:
    """Write the report of ``run``, finished or not, to ``path``; readers see the old file or the whole new one.

    Args:
        run: the run.
        path: of the HTML file; its folder is made where missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(report_html(run), encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def report_html(run: RunView) -> str:
    """The report as HTML."""
    run = Snapshot(run)
    stands = state(run)
    arms = ", ".join(markup.arm_name(run, arm) for arm in run.arms)
    unfinished = (
        ""
        if stands["word"] == "finished"
        else (
            f'<p class="note">Not finished: {stands["ended"]} of {stands["planned"]} runs have ended. '
            "Everything below may still change.</p>"
        )
    )
    falls_back = "tuning" in curve_table(run)["stage"]
    curves = "One line an arm: the mean over confirmation seeds; the band spans the smallest to the largest." + (
        " Arms marked so show their tuning trials, as no confirmation run of theirs has begun." * falls_back
    )
    sections = [
        ("Verdict", markup.verdict_html(run)),
        *([("Difference to the baseline", _plot("effects", figures.effects(run)))] if len(effect_table(run)) else []),
        ("Training", f"<p>{curves}</p>\n" + _switch({x: figures.loss_curves(run, x) for x in get_args(XAxis)})),
        (
            f"Selection {escape(run.metric.name)}",
            _plot("selection", figures.loss_curves(run, "tokens", "selection_value")),
        ),
        *_recall(run),
        (
            "Tuning",
            f"<p>Selection {escape(run.metric.name)} of each trial. The chosen one is ringed, a cross marks a trial that was stopped "
            "or failed.</p>\n" + _plot("tuning", figures.tuning(run)),
        ),
        ("Cost", markup.cost_html(run)),
        ("Data", markup.data_html(run)),
        ("Failures", markup.failure_html(run)),
        ("Every run", markup.runs_html(run)),
    ]
    body = "\n".join(f"<section><h2>{head}</h2>\n{content}\n</section>" for head, content in sections)
    source = " · ".join(f"{escape(str(k))} {escape(str(v))}" for k, v in run.provenance().items())
    question = escape(run.question.strip()) or "No question was stated."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(run.name)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
<header><h1>{escape(run.name)}</h1>
<p class="question">{question}</p>
<p class="arms">{arms}</p>
{unfinished}</header>
{body}
<footer>{source}</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _recall(run: RunView) -> list[tuple[str, str]]:
    """The figures that the data source names for its labels, none for text."""
    told = "<p>Right answers among the report examples, by what the examples are like: the mean over confirmation runs.</p>\n"
    return [("Recall", told + _plot(name, getattr(figures, name)(run, *labels))) for name, labels in run.views.items()]


def _plot(name: str, *drawn: go.Figure) -> str:
    """A place for a figure, which the script fills; several figures are switched by buttons."""
    height = max(figure.layout.height or 400 for figure in drawn)
    data = "[" + ",".join(str(figure.to_json()) for figure in drawn) + "]"
    safe = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")  # inert inside <script>
    return (
        f'<div class="plot" id="{name}" style="height:{height}px"></div>\n'
        f'<script type="application/json" data-for="{name}">{safe}</script>'
    )


def _switch(drawn: dict[XAxis, go.Figure]) -> str:
    buttons = "".join(
        f'<button type="button" data-for="curves" data-index="{i}" aria-pressed="{json.dumps(not i)}">'
        f"{X_NAMES[x]}</button>"
        for i, x in enumerate(drawn)
    )
    return f'<div class="switch" role="group" aria-label="horizontal axis">{buttons}</div>\n' + _plot(
        "curves", *drawn.values()
    )


STYLE = (
    """
:root { --ink: #222; --soft: #666; --line: #ddd; --page: #fff; --wash: #f5f5f3; --good: #00694c; --bad: #a84300; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e2; --soft: #a0a09c; --line: #3a3a3a; --page: #161617; --wash: #212122; --good: #4fcfa4;
    --bad: #ff9a5c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 FONT; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 32px 64px; }
h1 { font-size: 30px; font-weight: 600; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; font-weight: 600; margin: 0 0 12px; }
.question { font-size: 18px; color: var(--soft); margin: 0 0 10px; max-width: 46em; overflow-wrap: anywhere; }
.arms { margin: 0; overflow-wrap: anywhere; }
.note { background: var(--wash); border-left: 3px solid var(--soft); padding: 8px 14px; }
section { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 22px; }
p { max-width: 56em; margin: 0 0 12px; }
.table { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); vertical-align: bottom; white-space: pre-line; }
td { overflow-wrap: break-word; max-width: 36em; }
td:nth-child(-n+4) { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
th.number { white-space: pre-line; }
.word { font-weight: 600; }
.better { color: var(--good); } .worse, .failed { color: var(--bad); }
.baseline { font-weight: 400; color: var(--soft); }
.sentences { margin: 14px 0; padding-left: 18px; max-width: 60em; }
.switch { display: inline-flex; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.switch button { font: inherit; font-size: 14px; color: var(--soft); background: none; border: 0; padding: 4px 16px;
  cursor: pointer; }
.switch button[aria-pressed=true] { background: var(--wash); color: var(--ink); font-weight: 600; }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 14px; font-size: 12.5px;
  color: var(--soft); overflow-wrap: anywhere; }
@media print {
  :root { --ink: #222; --soft: #555; --line: #ccc; --page: #fff; --wash: #f5f5f3; --good: #00694c; --bad: #a84300; }
  main { padding: 0; max-width: none; }
  .switch { display: none; }
  section { break-inside: avoid-page; } section:last-of-type { break-inside: auto; } tr { break-inside: avoid; }
  .table { overflow: visible; } table { font-size: 11px; } th, td { padding-right: 10px; }
  td:nth-child(-n+4) { white-space: normal; }
}
"""
).replace("FONT", style.FONT)

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const shown = {}, all = {};
const ink = printing => dark.matches && !printing ? "#d6d6d4" : "#333";
function draw(name, printing) {
  const figure = structuredClone(all[name][shown[name]]);
  figure.layout.font = {...figure.layout.font, color: ink(printing)};
  figure.layout.hoverlabel = {...figure.layout.hoverlabel, bgcolor: dark.matches ? "#2a2a2b" : "#fff",
    font: {color: ink(false)}};
  figure.layout.autosize = true;
  Plotly.react(name, figure.data, figure.layout,
    {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]});
}
const drawAll = printing => Object.keys(all).forEach(name => draw(name, printing));
for (const source of document.querySelectorAll("script[data-for]")) {
  all[source.dataset.for] = JSON.parse(source.textContent);
  shown[source.dataset.for] = 0;
}
for (const button of document.querySelectorAll("button[data-for]"))
  button.addEventListener("click", () => {
    shown[button.dataset.for] = Number(button.dataset.index);
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    draw(button.dataset.for);
  });
dark.addEventListener("change", () => drawAll());
addEventListener("beforeprint", () => drawAll(true));
addEventListener("afterprint", () => drawAll());
drawAll();
"""
