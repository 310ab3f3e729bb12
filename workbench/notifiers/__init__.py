"""Notifications at the end of an ablation or a run: by a command, a webhook, or on the desktop.

A notifier is one file beside this one. A notification that cannot be sent is one warning; nothing else suffers from it.
Notifications say what ended and how: no paths, no configuration, nothing of the machine.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from workbench.config import Config, ConfigError, nearest, require
from workbench.registry import Registry
from workbench.status import Status

__all__ = ["VARIABLE", "Notification", "Notifier", "NotifierConfig", "from_environment", "notifiers", "notify", "parse"]

VARIABLE = "WORKBENCH_NOTIFY"
"""Environment variable with notifiers as a JSON list of texts, beside those of ``launch.notify``. ``--notify`` sets it
for the workers that it starts, so that an address with a key in it is saved nowhere."""

Event: TypeAlias = Literal["finished", "diverged", "failed", "stopped"]
FAILURES: dict[Status, Event] = {
    Status.DIVERGED: "diverged",
    Status.CRASHED: "failed",
    Status.OUT_OF_MEMORY: "failed",
}
"""How a run failed -> what is notified of; a lost run is resumed and no event."""


@dataclass(frozen=True)
class Notification:
    """What ended."""

    event: Event
    """``finished``; ``diverged`` and ``failed``: the first run that did; ``stopped``: workers that cannot go on."""
    what: Literal["ablation", "run"]
    name: str
    """Of the ablation or the run."""
    text: str
    """All of this in one sentence."""
    ended: int = 0
    """Runs that have ended; of a single run its steps."""
    planned: int = 0
    """Runs planned; of a single run its steps."""
    failed: int = 0
    """Runs that diverged, crashed or ran out of memory."""
    verdict: str = ""
    """The headline of the verdict of a finished ablation."""

    def body(self) -> dict[str, Any]:
        """The notification as plain data, fit for JSON."""
        return {"schema": 1, "program": "workbench", **asdict(self)}


class NotifierConfig(Config):
    """Base of a notifier's configuration; a notifier's nested ``Config`` adds ``kind`` and its own fields."""

    kind: str

    argument: ClassVar[str] = ""
    """The field that the text after ``KIND:`` sets."""

    def refuse_in_files(self) -> None:
        """Raise a ConfigError where a sweep file must not name this notifier, because a sweep may be a stranger's."""


class Notifier(ABC):
    """One way to notify. Built as ``cls(config)``."""

    Config: ClassVar[type[NotifierConfig]]

    def __init__(self, config: Any):
        self.config = config

    def check(self) -> None:  # noqa: B027 (optional)
        """Raise a ConfigError where it cannot work on this machine."""

    @abstractmethod
    def send(self, notification: Notification) -> None:
        """Send within seconds, or raise. The text of an error contains no part of an address that may be secret."""


notifiers: Registry[type[Notifier]] = Registry("notifier", "workbench.notifiers")
"""Every notifier by name."""


def parse(data: object) -> Any:
    """A notifier's configuration, from a mapping with its ``kind`` or from a text: ``desktop``, ``command:notify.sh``,
    ``https://host/path``.

    Raises:
        ConfigError: for an unknown kind or a mistake in its fields.
    """
    if not isinstance(data, str):
        return notifiers.parse(data)
    kind, colon, rest = data.partition(":")
    if rest.startswith("//"):
        kind, colon, rest = "webhook", ":", data
    if kind not in notifiers:
        expected = "desktop, command:COMMAND or https://…"
        raise ConfigError.at("", got=kind, expected=expected, do=nearest(kind, notifiers))
    field = notifiers[kind].Config.argument
    require(not colon or field, "", got=data, expected=f"{kind}, without an argument")
    return notifiers.parse({"kind": kind, **({field: rest} if colon else {})})


def from_environment() -> list[Any]:
    """The configurations in :data:`VARIABLE`.

    Raises:
        ConfigError: where it holds something else.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        texts = json.loads(text) if text else []
    except ValueError:
        texts = None
    if not isinstance(texts, list):
        raise ConfigError.at(VARIABLE, got="something else", expected='a JSON list, such as ["desktop"]')
    return [parse(one) for one in texts]


def use(texts: Sequence[str] | None) -> list[Any]:
    """The configurations of ``--notify``, which workers started from now on use as well.

    Raises:
        ConfigError: for a mistake, or where one cannot work on this machine.
    """
    try:
        configs = [parse(text) for text in texts or ()]
        for config in configs:
            notifiers[config.kind](config).check()
    except ConfigError as error:
        raise error.under("--notify") from None
    if texts:
        os.environ[VARIABLE] = json.dumps(list(texts))
    return configs


def notify(notification: Notification, configs: Iterable[Any], warn: Callable[[str], None]) -> None:
    """Send a notification with every notifier.

    Args:
        notification: what ended.
        configs: of the notifiers.
        warn: called with one line for each that failed.
    """
    for config in configs:
        try:
            notifiers[config.kind](config).send(notification)
        except Exception as error:  # whatever a command or a server does: the run is not to suffer from it
            warn(f"the notification by {config.kind} failed ({type(error).__name__}: {error})"[:500])
