"""The tables as HTML, for the report and the dashboard: plain, escaped, readable in print and by screen readers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures import COST_COLUMNS
from workbench.dashboards.tables import cost_table, effect_table, failure_table

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView

NUMBER = "number"
"""Class of cells that are aligned right."""


class Raw(str):
    """Text that is HTML already."""


def html_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> str:
    """An HTML table; everything in it is escaped, save what is :class:`Raw`.

    Args:
        heads: column headings.
        rows: cells of each row; None is shown as a dash.
        numbers: headings of the columns that are aligned right.
    """
    kinds = [f' class="{NUMBER}"' if head in numbers else "" for head in heads]

    def cell(value: Any) -> str:
        return value if isinstance(value, Raw) else escape("–" if value is None else str(value))

    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell(value)}</td>" for kind, value in zip(kinds, row)) + "</tr>\n" for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def arm_name(run: RunView, arm: str) -> Raw:
    """The arm's name behind a dot in its colour."""
    look = style.looks(run).get(arm)
    dot = f'<span class="dot" style="color:{look.colour}" aria-hidden="true">●</span>&nbsp;' if look else ""
    return Raw(dot + escape(arm))


def verdict_html(run: RunView) -> str:
    """The verdict table and its sentences."""
    table = effect_table(run)
    if not len(table):
        return "<p>The verdict comes when every arm has its confirmation runs.</p>"
    level = f"{100 * (1 - run.alpha):g} % interval"
    heads = ["arm", "verdict", run.metric.unit, "difference", level, "p (Holm)", "seeds"]
    rows = [
        (
            arm_name(run, row["arm"]),
            Raw(f'<span class="word {row["verdict"]}">{escape(row["verdict"])}</span>'),
            style.bits(row["value"]),
            style.bits(row["difference"], signed=True),
            "–"
            if row["low"] is None
            else f"{style.bits(row['low'], signed=True)} to {style.bits(row['high'], signed=True)}",
            "–" if row["p_holm"] is None else "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3g}",
            f"{row['seeds']} of {row['seeds'] + row['failed']}",
        )
        for row in table.iter_rows(named=True)
    ]
    sentences = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in table["sentence"])
    return html_table(heads, rows, heads[2:]) + f'\n<ul class="sentences">{sentences}</ul>'


def cost_html(run: RunView) -> str:
    """The cost table, one row a quantity and one column an arm; beyond six arms the other way round."""
    table = cost_table(run)
    if not len(table):
        return "<p>No cost was worked out before launch.</p>"
    shown = {name: look for name, look in COST_COLUMNS.items() if name in table.columns and name != "mismatch"}
    cells = {name: [written(value) for value in table[name]] for name, (_, written) in shown.items()}
    arms = [arm_name(run, arm) for arm in table["arm"]]
    if len(arms) <= 6:
        head = "".join(f'<th class="{NUMBER}">{arm}</th>' for arm in arms)
        body = ""
        for name, (text, _) in shown.items():
            values = "".join(f'<td class="{NUMBER}">{escape(cell)}</td>' for cell in cells[name])
            body += f"<tr><td>{escape(text)}</td>{values}</tr>\n"
        drawn = f"<table><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        drawn = f'<div class="table">{drawn}</div>'
    else:
        heads = [text for text, _ in shown.values()]
        drawn = html_table(["arm", *heads], zip(arms, *cells.values()), heads)
    mismatches: Iterable[str] = table["mismatch"] if "mismatch" in table.columns else []
    told = "".join(f"<li>{arm}: {escape(text)}</li>\n" for arm, text in zip(arms, mismatches) if text)
    allowed = run.allow_mismatch
    reason = f"<p>Allowed because: {escape(str(allowed))}</p>" if allowed else ""
    rest = (
        f'<p>Not matched, against the baseline:</p>\n<ul class="sentences">{told}</ul>'
        if told
        else ("<p>Every arm matches the baseline on every axis.</p>")
    )
    return f"{drawn}\n{rest}{reason}"


def data_html(run: RunView) -> str:
    """The data card: what the splits hold, and how far training overlaps the measured examples."""
    parts = []
    cards: dict[str, list[Raw]] = {}
    for arm, card in run.data_cards.items():
        cards.setdefault(json.dumps(card, sort_keys=True), []).append(arm_name(run, arm))
    for text, arms in cards.items():
        card = json.loads(text)
        splits = {name: {k: v for k, v in split.items() if k != "shards"} for name, split in card["splits"].items()}
        columns = list(dict.fromkeys(key for split in splits.values() for key in split))
        rows = [(name, *(split.get(c) for c in columns)) for name, split in splits.items()]
        heads = [column.replace("_", " ") for column in columns]
        shown = [
            [f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row]
            for row in rows
        ]
        whose = f"<p>Of {', '.join(arms)}:</p>\n" if len(cards) > 1 else ""
        compared = card.get("training_examples_compared")
        told = (
            f"<p>Seen in training: examples that are, token for token, among the first {compared:,} training examples of "
            "seed 0.</p>\n"
            if compared
            else ""
        )
        parts.append(whose + html_table(["split", *heads], shown, heads) + told)
    return "\n".join(parts) or "<p>No data has been prepared.</p>"


def failure_html(run: RunView) -> str:
    """The failures with their reasons."""
    table = failure_table(run)
    if not len(table):
        return "<p>No run has failed.</p>"
    rows = [
        (
            arm_name(run, row["arm"]),
            row["stage"],
            row["seed"],
            row["status"].replace("_", " "),
            row["step"],
            hyperparameters(row["hyperparameters"]),
            row["reason"],
        )
        for row in table.iter_rows(named=True)
    ]
    return html_table(["arm", "stage", "seed", "status", "step", "hyperparameters", "reason"], rows, ("seed", "step"))


def runs_html(run: RunView) -> str:
    """Every run."""
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    table = run.runs().sort(order, pl.col("stage") == "confirmation", "seed", "hyperparameters", maintain_order=True)
    if not len(table):
        return "<p>No run has begun.</p>"
    heads = [
        "arm",
        "stage",
        "seed",
        "status",
        "step",
        "tokens",
        "time",
        "loss\n(nats/token)",
        f"selection\n({run.metric.short})",
        f"report\n({run.metric.short})",
        "hyperparameters",
    ]
    rows = [
        (
            arm_name(run, row["arm"]),
            row["stage"] + (", chosen" if row["selected"] else ""),
            row["seed"],
            row["status"].replace("_", " "),
            f"{row['step']:,} of {row['steps']:,}",
            style.count(row["tokens"]),
            style.duration(row["seconds"]),
            style.bits(row["loss"]),
            style.bits(row["selection_value"]),
            style.bits(row["report_value"]),
            hyperparameters(row["hyperparameters"]),
        )
        for row in table.iter_rows(named=True)
    ]
    return html_table(heads, rows, ["seed", "step", *heads[5:10]])


def hyperparameters(text: str | None) -> str:
    """Tuned values, short: the last part of each name, four digits."""
    values = json.loads(text or "{}")
    return ", ".join(
        f"{name.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{name.rpartition('.')[2]} {value}"
        for name, value in values.items()
    )
