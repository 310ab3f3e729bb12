"""Notifications of an ablation, sent by its workers."""

from __future__ import annotations

from collections.abc import Callable

from workbench.ablation.execution.roster import Roster
from workbench.ablation.folder import AblationFolder
from workbench.ablation.verdict.measurements import verdict
from workbench.ablation.verdict.summary import summarise
from workbench.config import ConfigError
from workbench.notifiers import FAILURES, Event, Notification, from_environment, notify
from workbench.status import ENDED, FAILED, Status

__all__ = ["Notifications"]


class Notifications:
    """Sends what happens to an ablation to those who asked for it; each event once.

    Args:
        folder: the ablation.
        warn: called with one line for each notification that could not be sent.
    """

    def __init__(self, folder: AblationFolder, warn: Callable[[str], None]):
        self._folder, self._warn = folder, warn

    def run_ended(self, run: str, status: Status, reason: str | None) -> None:
        """A run has ended. The first that diverges and the first that fails are notified of. Only the former with its
        reason: that of a failure may name files of this machine."""
        event = FAILURES.get(status)
        if event is not None:
            self._send(
                event,
                f"{run} is {status.replace('_', ' ')}" + (f": {reason}" if reason and event == "diverged" else ""),
            )

    def finished(self) -> None:
        """Every planned run has ended."""
        self._send("finished", "")

    def stopped(self, reason: str) -> None:
        """A worker cannot go on, for a reason that names nothing of this machine."""
        self._send("stopped", reason)

    def _send(self, event: Event, reason: str) -> None:
        try:
            record = self._folder.record()
            configs = [*record.config.launch.notify, *from_environment()]
            if not configs or not Roster(self._folder).is_first(event):
                return
            status = self._folder.runs()["status"]
            ended, failed = (int(status.is_in(names).sum()) for names in (ENDED, FAILED))
            planned = sum(sum(stages.values()) for stages in record.planned.values())
            headline = self._headline() if event == "finished" else ""
            counts = f"{ended} of {planned} runs ended" + (f", {failed} failed" if failed else "")
            text = f"{record.name}: {event}, {'. '.join(filter(None, [counts, reason, headline]))}"
            message = Notification(event, "ablation", record.name, text, ended, planned, failed, headline)
            notify(message, configs, self._warn)
        except Exception as error:  # a damaged file, a folder that was removed: no reason for a worker to end
            self._warn(f"no notification of {event} ({type(error).__name__}: {error})")

    def _headline(self) -> str:
        try:
            found = verdict(self._folder, self._folder.record())
        except ConfigError:
            return ""
        return "" if found is None or not found.rows else summarise(found).headline
