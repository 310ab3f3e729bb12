"""The cost card to read: a row per quantity, a column per arm; on a terminal and in a notebook."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from workbench import notebook
from workbench.formatting import MINUS, UNKNOWN, count, duration, flops, share, size
from workbench.results.data_card import repetition, times

__all__ = ["QUANTITIES", "CostCard", "card_rows"]

QUANTITIES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "parameters, no embedding": lambda row: count(row["non_embedding"]),
    "… active per token": lambda row: count(row["active"]),
    "forward FLOPs per token": lambda row: flops(row["flops_per_token"]),
    "training FLOPs": lambda row: flops(row["training_flops"]),
    "decode cache": lambda row: size(row["cache_bytes"]),
    "… without eviction": lambda row: size(row.get("unevicted_bytes")),
    "training tokens": lambda row: count(row["tokens"]),
    "… read from the text": lambda row: times(row["epochs"]) if row.get("epochs") else UNKNOWN,
    "tokens per second": lambda row: count(row.get("tokens_per_second")),
    "training": lambda row: duration(row["seconds_per_trial"]),
    "start-up": lambda row: duration(row.get("startup_seconds")),
    "evaluations while training": lambda row: duration(row.get("evaluation_seconds")),
    "report documents": lambda row: duration(row.get("report_seconds")),
    "tokens of ranks": lambda row: f"{row['token_imbalance']:.2f}" if row.get("token_imbalance") else UNKNOWN,
    "predicted seconds of ranks": lambda row: (
        f"{row['seconds_imbalance']:.2f}" if row.get("seconds_imbalance") else UNKNOWN
    ),
    "memory": lambda row: size(row["memory_bytes"]) + ("" if row.get("memory_measured") else " (estimate)"),
    "disk while running": lambda row: size(row.get("disk_bytes")),
    "tuning trials": lambda row: f"{row['searched']} ({row['tuned']} field{'s' * (row['tuned'] != 1)})",
    "runs, repeats and confirmation too": lambda row: str(row["trials"]),
    "set by the budget": lambda row: row.get("solved") or UNKNOWN,
    "mismatch to budget": lambda row: share(row["residual"]),
    "parameters vs baseline": lambda row: share(row.get("off_parameters")),
    "active vs baseline": lambda row: share(row.get("off_active_parameters")),
    "training FLOPs vs baseline": lambda row: share(row.get("off_flops")),
    "seconds vs baseline": lambda row: share(row.get("off_seconds")),
    "not matched": lambda row: unmatched(row["mismatch"]) or UNKNOWN,
}
"""Label -> text of a row of the cost table."""
NEEDED = {
    *("arm", "non_embedding", "active", "flops_per_token", "training_flops", "cache_bytes", "tokens", "residual"),
    *("mismatch", "seconds_per_trial", "memory_bytes", "searched", "tuned", "trials"),
}
"""Columns without which a table is no cost card."""
IN_SHORT = ("not matched", "parameters, no embedding", "training FLOPs", "decode cache", "memory", "training")
"""What a card of many arms shows."""
MAX_ARMS = 5
"""A notebook shows up to so many arms side by side; more are rows, in short."""


def unmatched(text: str) -> str:
    """What is not matched as people read it: records of earlier versions have ``-12.5%``, newer ones ``−12.5 %``."""
    return re.sub(r"([-+])(\d+\.\d)%", lambda found: f"{MINUS if found[1] == '-' else '+'}{found[2]} %", text)


def card_rows(card: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Label and one text per arm, for every quantity that any arm has; what is not matched comes first.

    Args:
        card: rows of :func:`workbench.ablation.cost.card.cost_table`.
    """
    first, *others = reversed(QUANTITIES)
    rows = [[label, *(QUANTITIES[label](row) for row in card)] for label in (first, *reversed(others))]
    return [row for row in rows if row[0] == first or any(text != UNKNOWN for text in row[1:])]


class CostCard(pl.DataFrame):
    """The table :func:`workbench.ablation.cost.card.cost_table`, which a notebook shows as a card.

    ``pl.DataFrame(card)`` is the plain table.
    """

    def _repr_html_(self, **options: Any) -> str:
        if not {*self.columns} >= NEEDED:
            return super()._repr_html_(**options)
        card = list(self.iter_rows(named=True))
        arms = [row["arm"] for row in card]
        if len(card) <= MAX_ARMS:
            rows = card_rows(card)
            shown = notebook.table(["per trial", *arms], rows)
        else:
            rows = [[row["arm"], *(QUANTITIES[label](row) for label in IN_SHORT)] for row in card]
            shown = notebook.table(["arm", *IN_SHORT], rows)
        read = repetition({row["arm"]: row.get("epochs") for row in card})
        return shown + "".join(notebook.paragraph(line, faint=True) for line in read)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not {*self.columns} >= NEEDED:
            return super().__str__()
        titles = ["per trial", *(str(arm) for arm in self["arm"])]
        lines = [titles, *card_rows(list(self.iter_rows(named=True)))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
