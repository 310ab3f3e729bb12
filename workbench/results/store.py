"""One training run as a folder.

    run.json            what is run: arm, stage, seed, tuned values, the whole configuration, its identity
    environment.json    where it ran: versions, device, threads, code, and the path each operation took
    status.json         how it stands: status, reason, process
    metrics.jsonl       one line every few steps
    diagnostics.jsonl   what the layers, and behind them the shortcuts, say about themselves, one line each, about 20 times a run:
                        {"step": 40, "layer": 3, "values": {"routing_entropy": 2.1, "load": [1.02, 0.97, ...]}}; a value is a
                        number or a list of numbers (null: not finite), its names are the variant's
    events.jsonl        starts, resumes, stops
    result.json         the final numbers, written once when the run ended
    report.parquet      what was measured on every report document (confirmation runs)
    checkpoint/         see workbench.training.checkpoint
    log.txt             what the process printed

Everything that replaces a file does so atomically; everything that grows is appended line by line, and a last line torn
by a crash is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench.files import locked, read_json, read_jsonl, write_json
from workbench.status import RETRYABLE, Status


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any]) -> RunFolder:
        """The folder of a run that may or may not have been started before."""
        folder = cls(path)
        path.mkdir(parents=True, exist_ok=True)
        if not folder.about():
            write_json(path / "run.json", about)
        return folder

    def about(self) -> dict[str, Any]:
        return read_json(self.path / "run.json")

    def result(self) -> dict[str, Any]:
        """The final numbers, empty while there are none."""
        return read_json(self.path / "result.json")

    def status(self) -> dict[str, Any]:
        """``{"status": …, "reason": …, …}``. A run that says it is running while no process holds it was killed."""
        state = read_json(self.path / "status.json") or {"status": Status.WAITING}
        if state["status"] != Status.RUNNING or self.is_held():
            return state
        state = read_json(self.path / "status.json")  # it may have ended between the two looks
        if state.get("status", Status.RUNNING) == Status.RUNNING:
            state = {
                **state,
                "status": Status.KILLED,
                "reason": "its process disappeared; it resumes from its checkpoint",
            }
        return state

    def set_status(self, status: Status, reason: str | None = None, **more: Any) -> None:
        write_json(self.path / "status.json", {"status": Status(status), "reason": reason, "at": time.time(), **more})

    def finish(self, status: Status, reason: str | None = None, **numbers: Any) -> None:
        """Write the final numbers, then the status: whoever sees the status finds the numbers."""
        write_json(self.path / "result.json", {"status": status, "reason": reason, **numbers})
        self.set_status(status, reason)
        self.event(status, reason=reason)

    def reopen(self) -> None:
        """Forget a result that says nothing about the model (a crash), so that the run goes on."""
        status = self.result().get("status")
        if status in RETRYABLE:
            self.event("reopened", was=status)
            (self.path / "result.json").unlink()
            self.set_status(Status.INTERRUPTED, "tried again")

    def environment(self) -> dict[str, Any]:
        """Where the run ran last, empty before it did."""
        return read_json(self.path / "environment.json")

    def add_to_environment(self, **more: Any) -> None:
        """Write down what is known about where it runs only once it does."""
        write_json(self.path / "environment.json", {**self.environment(), **more})

    def event(self, name: str, **more: Any) -> None:
        self._append("events.jsonl", {"event": name, "at": time.time(), **more})

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", row)

    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "metrics.jsonl")

    def add_diagnostics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._append("diagnostics.jsonl", row)

    def diagnostics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "diagnostics.jsonl")

    def forget_metrics_after(self, step: int) -> None:
        """Drop lines and diagnostics beyond ``step``: a resumed run writes them again."""
        for name in ("metrics.jsonl", "diagnostics.jsonl"):
            kept = [row for row in read_jsonl(self.path / name) if row["step"] <= step]
            temporary = self.path / f".{name}.tmp"
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, self.path / name)

    def hold(self) -> contextlib.AbstractContextManager[bool]:
        """Lock the run for this process; False where another process is running it."""
        return locked(self.path / "lock", patience=1.0)  # somebody's look holds it for a moment

    def is_held(self) -> bool:
        if not (self.path / "lock").exists():
            return False
        with locked(self.path / "lock", patience=0) as free:
            return not free

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        line = (json.dumps(row) + "\n").encode()
        with open(path, "ab+") as file:
            if file.tell() > 0:  # a line torn by a crash must not swallow this one
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    whole = file.read()
                    file.truncate(whole.rfind(b"\n") + 1)
            file.write(line)
