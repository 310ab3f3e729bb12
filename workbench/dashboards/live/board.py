"""The part of the dashboard that draws in the browser; ``board.js`` is its counterpart there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

HERE = Path(__file__).parent
SCRIPT = (
    "const loadPlotly = () => {\nconst plotlyModule = {exports: {}};\n(function (module, exports, define) {"
    + get_plotlyjs()
    + "\n})(plotlyModule, plotlyModule.exports, undefined);\nreturn plotlyModule.exports;\n};\n"
    + (HERE / "board.js").read_text(encoding="utf-8")
)
"""Plotly.js, isolated from other versions on the page, then the board. Plotly.js runs only when the first figure is
drawn: anywidget gives up on a module that takes longer than two seconds to load, as Plotly.js does on a busy system."""


class Board(anywidget.AnyWidget):
    """Draws blocks in the browser. Sends a whole panel when its blocks change in kind, else only changed traces.

    Args:
        on_event: called with what the reader does: ``{"event": "mark", ...}`` or ``{"event": "act", ...}``.
    """

    _esm = SCRIPT
    _css = HERE / "board.css"

    def __init__(self, on_event: Callable[[dict[str, Any]], None]):
        self._on_event = on_event
        self.shown: list[dict[str, Any]] = []
        """The blocks on the page, as plain data."""
        self._figures: dict[str, tuple[list[str], str]] = {}  # block id -> its traces and its layout as JSON
        self.sent = 0
        """Bytes of the last message to the page."""
        super().__init__(layout={"width": "100%", "min_height": "560px"})
        self.on_msg(self._on_message)

    def show(self, blocks: list[dict[str, Any]]) -> None:
        """Update the page to ``blocks``; what has not changed is not sent."""
        previous = {block["id"]: block for block in self.shown}
        is_patch = [(b["id"], b["kind"]) for b in self.shown] == [(b["id"], b["kind"]) for b in blocks]
        figures: dict[str, tuple[list[str], str]] = {}
        patches: list[dict[str, Any]] = []
        for block in blocks:
            name = block["id"]
            if block["kind"] != "figure":
                is_patch = is_patch and block == previous.get(name)
                continue
            plain = block["figure"].to_plotly_json()
            traces, layout = [to_json_plotly(trace) for trace in plain["data"]], to_json_plotly(plain["layout"])
            figures[name] = traces, layout
            old_traces, old_layout = self._figures.get(name, ([], ""))
            if not is_patch or len(old_traces) != len(traces):
                is_patch = False
                continue
            changed = {str(i): new for i, (new, old) in enumerate(zip(traces, old_traces)) if new != old}
            if changed or layout != old_layout:
                patches.append({"id": name, "traces": changed, "layout": layout if layout != old_layout else None})
        self.shown, self._figures = blocks, figures
        if not is_patch:
            self._send_all()
        for patch in patches if is_patch else ():
            self._send_json({"patch": patch})

    def _send_all(self) -> None:
        blocks = []
        for block in self.shown:
            if block["kind"] == "figure":
                traces, layout = self._figures[block["id"]]
                block = {**block, "figure": {"data": traces, "layout": layout}}
            blocks.append(block)
        self._send_json({"blocks": blocks})

    def _send_json(self, message: dict[str, Any]) -> None:
        """Figures are sent as the JSON by which they were compared, so that nothing is encoded twice."""
        text = json.dumps(message)
        self.sent = len(text)
        self.send({"text": text})

    def _on_message(self, widget: Any, message: dict[str, Any], buffers: Any) -> None:
        if message.get("event") == "ready":  # a view was opened, the first or a further one
            self._send_all()
        else:
            self._on_event(message)
