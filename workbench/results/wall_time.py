"""Wall time of a run, from its events: start-up, training and evaluation of every process that trained it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from workbench.status import ENDED, Status

__all__ = ["WallTime"]

ENDS = (*ENDED, Status.INTERRUPTED)
"""Events with which a process has ended its work on a run."""


class WallTime(NamedTuple):
    """Wall time of a run in seconds."""

    startup: float = 0.0
    """Until the first step of each of its processes had ended: process, data, model, compilation."""
    ended: float = 0.0
    """Of the processes that have logged their end, or were followed by another one."""
    began: float | None = None
    """When the last process began, as seconds since 1970; None once it has logged its end."""
    latest: float = 0.0
    """Time of the last event."""
    lost: float = 0.0
    """Of processes whose work a later one does not continue, because it began at the first step again; part of
    ``ended``."""

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Self:
        """From the lines of ``events.jsonl``. A process begins when a worker takes the run (``assigned``); in a run of
        its own when it has loaded data and model (``started``, ``resumed``)."""
        startup = ended = latest = lost = 0.0
        began: float | None = None
        is_assigned = False
        for event in events:
            name, at = event.get("event"), event.get("at")
            if not isinstance(at, int | float) or not isinstance(name, str):
                continue
            if name == "assigned" or (name in ("started", "resumed") and not is_assigned):
                if began is not None:  # it was killed
                    ended += max(0.0, latest - began)
                began = at
            if name == "started" and ended > 0.0:  # not "resumed": what came before is lost
                startup, lost = 0.0, ended
            if name == "first_step" and began is not None:
                startup += max(0.0, at - began)
            elif name in ENDS and began is not None:
                ended += max(0.0, at - began)
                began = None
            is_assigned, latest = name == "assigned", at
        return cls(startup, ended, began, latest, lost)

    def seconds(self, now: float | None = None) -> float:
        """The wall time so far.

        Args:
            now: seconds since 1970 where a process is at work; None where none is.
        """
        if self.began is None:
            return self.ended
        return self.ended + max(0.0, (self.latest if now is None else now) - self.began)
