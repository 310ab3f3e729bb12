"""Logs of runs."""

from __future__ import annotations

from workbench.dashboards.panel import Block, Text
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import render

MAX_BYTES = 20_000
"""Only the end of a longer log is shown."""


def log_blocks(run: Snapshot, name: str) -> list[Block]:
    """The end of the log of the run ``name``; nothing where that is empty."""
    if name not in run.runs()["run"]:  # a page may ask for any name
        return []
    path = run.folder / "runs" / name / "log.txt"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - MAX_BYTES))
            text = file.read().decode(errors="replace") or "(the run printed nothing)"
    except OSError:
        text = "There is no log: the run has not started, or its folder was deleted."
    return [Text("log", render("log.html", text=text), title=f"Log of {name}")]
