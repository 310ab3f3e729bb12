"""The part of the dashboard that draws in the browser; ``board.js`` is its counterpart there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

HERE = Path(__file__).parent


class Board(anywidget.AnyWidget):
    """Draws blocks in the browser. Sends a whole panel when its blocks change in kind, else only changed traces.

    Args:
        on_event: called with what the reader does: ``{"event": "mark", ...}`` or ``{"event": "act", ...}``.
    """

    _esm = (HERE / "board.js").read_text(encoding="utf-8")
    _css = HERE / "board.css"
    plotly_js = traitlets.Unicode(get_plotlyjs(), read_only=True).tag(sync=True)
    """Source of Plotly.js, which the page runs when it draws its first figure. It is not part of the module: anywidget
    gives up on a module that is not loaded within two seconds, and on a busy machine 4 MB take longer than that."""

    panel = traitlets.Unicode().tag(sync=True)
    """The last message with a whole panel, which a new view draws at once: an answer of the kernel may take long, as
    messages to a kernel wait for the cell that is running."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]):
        self._on_event = on_event
        self.shown: list[dict[str, Any]] = []
        """The blocks on the page, as plain data."""
        self._figures: dict[str, tuple[list[str], str]] = {}  # block id -> its traces and its layout as JSON
        self._lock = threading.RLock()  # a view may ask for everything while a thread shows new blocks
        self.sent = 0
        """Bytes of the last message to the page."""
        super().__init__(layout={"width": "100%", "min_height": "560px"})
        self.on_msg(self._on_message)

    def show(self, blocks: list[dict[str, Any]]) -> None:
        """Update the page to ``blocks``; what has not changed is not sent."""
        with self._lock:
            self._show(blocks)

    def _show(self, blocks: list[dict[str, Any]]) -> None:
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
            self.panel = self._whole()
            self._post(self.panel)
        for patch in patches if is_patch else ():
            self._post(json.dumps({"patch": patch}))

    def _whole(self) -> str:
        """The panel as a message."""
        blocks = []
        for block in self.shown:
            if block["kind"] == "figure":
                traces, layout = self._figures[block["id"]]
                # the JSON by which figures are compared: nothing is encoded twice
                block = {**block, "figure": {"data": traces, "layout": layout}}
            blocks.append(block)
        return json.dumps({"blocks": blocks})

    def _post(self, text: str) -> None:
        self.sent = len(text)
        self.send({"text": text})

    def _on_message(self, widget: Any, message: dict[str, Any], buffers: Any) -> None:
        if message.get("event") == "ready":  # a view was opened, or has missed a message
            with self._lock:
                self._post(self._whole())
        else:
            self._on_event(message)
