"""The part of the dashboard that draws in the browser; ``board.js`` is its other half."""

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
    "const held = {exports: {}};\n(function (module, exports, define) {"
    + get_plotlyjs()
    + "\n})(held, held.exports, undefined);\nconst Plotly = held.exports;\n"
    + (HERE / "board.js").read_text(encoding="utf-8")
)
"""Plotly.js once a dashboard, kept away from other versions on the page, then the board."""


class Board(anywidget.AnyWidget):
    """Draws blocks in the browser. Sends whole panels when they change in kind, else the traces that changed."""

    _esm = SCRIPT
    _css = HERE / "board.css"

    def __init__(self, answer: Callable[[dict[str, Any]], None]):
        self._answer = answer
        self._shown: list[dict[str, Any]] = []
        self._figures: dict[str, tuple[list[str], str]] = {}
        self.sent = 0
        """Bytes of the last message to the page."""
        super().__init__(layout={"width": "100%", "min_height": "560px"})
        self.on_msg(self._heard)

    def show(self, blocks: list[dict[str, Any]]) -> None:
        """Bring the page to ``blocks``; what has not changed is not sent."""
        before = {block["id"]: block for block in self._shown}
        figures: dict[str, tuple[list[str], str]] = {}
        same = [(b["id"], b["kind"]) for b in self._shown] == [(b["id"], b["kind"]) for b in blocks]
        patches: list[dict[str, Any]] = []
        for block in blocks:
            if block["kind"] != "figure":
                same = same and block == before.get(block["id"])
                continue
            plain = block["figure"].to_plotly_json()
            texts = [to_json_plotly(trace) for trace in plain["data"]], to_json_plotly(plain["layout"])
            figures[block["id"]] = texts
            old = self._figures.get(block["id"])
            if not same or old is None or len(old[0]) != len(texts[0]):
                same = False
                continue
            changed = {str(i): new for i, (new, was) in enumerate(zip(texts[0], old[0])) if new != was}
            layout = texts[1] if texts[1] != old[1] else None
            if changed or layout:
                patches.append({"id": block["id"], "traces": changed, "layout": layout})
        self._shown, self._figures = blocks, figures
        if not same:
            self._send_all()
        for patch in patches if same else ():
            self._tell({"patch": patch})

    def _send_all(self) -> None:
        self._tell(
            {
                "blocks": [
                    block
                    if block["kind"] != "figure"
                    else {**block, "figure": dict(zip(("data", "layout"), self._figures[block["id"]]))}
                    for block in self._shown
                ]
            }
        )

    def _tell(self, message: dict[str, Any]) -> None:
        """Figures go as the JSON text that they were compared by: the page reads it, nobody writes it twice."""
        text = json.dumps(message)
        self.sent = len(text)
        self.send({"text": text})

    def _heard(self, widget: Any, message: dict[str, Any], buffers: Any) -> None:
        if message.get("event") == "ready":  # a view has come up, the first or another one
            self._send_all()
        else:
            self._answer(message)
