"""Detects runs that make no progress."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Callable

from workbench.results.store import RunFolder

__all__ = ["Watchdog"]

PROGRESS_FILES = (
    "metrics.jsonl",
    "events.jsonl",
    "diagnostics.jsonl",
    "checkpoint",
    "report.parquet",
    "suites",
    "suites/journal.jsonl",
    "result.json",
)
"""Files and folders of a run that change as it progresses."""
MEDIAN_FACTOR, LONGEST_FACTOR = 20, 3
"""A run is hung after this many times the median, and the longest, interval between two changes. Our choice."""
MAX_GAP = 5.0
"""Longer gaps between two calls, in seconds, are clipped to this: the watching process itself was suspended."""


class Watchdog:
    """Detects that a run has made no progress for too long: no line of metrics, no event, no checkpoint.

    Too long is ``least`` seconds, or more if the run is regularly slow: :data:`MEDIAN_FACTOR` times the median, or
    :data:`LONGEST_FACTOR` times the longest, interval between its changes so far.

    Args:
        run: the run.
        least: seconds.
        clock: monotonic seconds.
    """

    def __init__(self, run: RunFolder, least: float, clock: Callable[[], float] = time.monotonic):
        self.run, self.least, self.clock = run, least, clock
        self.intervals: deque[float] = deque(maxlen=200)
        self.longest = self.quiet = 0.0
        self.state, self.checked_at = self._state(), clock()

    def silent_seconds(self) -> float | None:
        """Seconds without progress if they are too many, else None. Call it often."""
        now, state = self.clock(), self._state()
        self.quiet += min(now - self.checked_at, MAX_GAP)
        self.checked_at = now
        if state != self.state:
            self.state = state
            self.intervals.append(self.quiet)
            self.longest, self.quiet = max(self.longest, self.quiet), 0.0
        if self.quiet <= self.least:
            return None
        limit = 0.0
        if self.intervals:
            limit = max(MEDIAN_FACTOR * statistics.median(self.intervals), LONGEST_FACTOR * self.longest)
        return self.quiet if self.quiet > limit else None

    def _state(self) -> list[tuple[int, int]]:
        """Sizes and times of the files that show progress."""
        state = []
        for name in PROGRESS_FILES:
            with contextlib.suppress(OSError):
                stat = os.stat(self.run.path / name)
                state.append((stat.st_size, stat.st_mtime_ns))
        return state
