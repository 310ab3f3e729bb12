"""Whether a run still gets on."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque

from workbench.results.store import RunFolder

SIGNS = ("metrics.jsonl", "events.jsonl", "diagnostics.jsonl", "checkpoint", "report.parquet", "result.json")
"""Files and folders of a run in which progress shows."""
MEDIANS, LONGEST = 20, 3
"""A run is hung after so many times the median, and the longest, time between two of its signs. Our choice."""
LOOK = 5.0
"""Seconds that count at most between two looks: time in which the watching process itself stood still says nothing."""


class Watchdog:
    """Tells when a run has shown no progress for too long: no line of metrics, no event, no checkpoint.

    Too long is ``least`` seconds, or more where the run is slow by nature: :data:`MEDIANS` times the median, or
    :data:`LONGEST` times the longest, time between its signs so far.

    Args:
        folder: the run.
        least: seconds.
    """

    def __init__(self, folder: RunFolder, least: float):
        self.folder, self.least = folder, least
        self.gaps: deque[float] = deque(maxlen=200)
        self.longest = self.quiet = 0.0
        self.signs, self.looked = self._signs(), time.monotonic()

    def silent(self) -> float | None:
        """Seconds without progress where they are too many, else None. Look often."""
        now, signs = time.monotonic(), self._signs()
        self.quiet += min(now - self.looked, LOOK)
        self.looked = now
        if signs != self.signs:
            self.signs = signs
            self.gaps.append(self.quiet)
            self.longest, self.quiet = max(self.longest, self.quiet), 0.0
        if self.quiet <= self.least:
            return None
        slow = max(MEDIANS * statistics.median(self.gaps), LONGEST * self.longest) if self.gaps else 0.0
        return self.quiet if self.quiet > slow else None

    def _signs(self) -> list[tuple[int, int]]:
        found = []
        for name in SIGNS:
            with contextlib.suppress(OSError):
                stat = os.stat(self.folder.path / name)
                found.append((stat.st_size, stat.st_mtime_ns))
        return found
