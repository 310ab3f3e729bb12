"""A notification of the desktop."""

from __future__ import annotations

import shutil
import subprocess
from typing import Literal

from workbench.config import ConfigError
from workbench.notifiers import Notification, Notifier, NotifierConfig, notifiers

SECONDS = 10
SCRIPT = ("on run argv", "display notification (item 2 of argv) with title (item 1 of argv)", "end run")


@notifiers.register
class Desktop(Notifier):
    """Shows the notification on the desktop: ``notify-send`` (Linux), ``osascript`` (macOS).

    Raises (in :meth:`send`):
        ConfigError: where there is neither.
        CalledProcessError: when no desktop runs.
    """

    class Config(NotifierConfig):
        kind: Literal["desktop"] = "desktop"

    def check(self) -> None:
        self._program()

    def send(self, notification: Notification) -> None:
        title = f"workbench: {notification.name} {notification.event}"
        command = [*self._program(), title, notification.text]
        subprocess.run(command, timeout=SECONDS, check=True, capture_output=True)

    def _program(self) -> list[str]:
        if program := shutil.which("notify-send"):
            return [program, "--app-name=workbench", "--"]
        if program := shutil.which("osascript"):
            return [program, *(part for line in SCRIPT for part in ("-e", line))]
        raise ConfigError.at(
            "notify",
            got="desktop, without notify-send or osascript",
            expected="a desktop",
            do="Install libnotify (notify-send), or use command:… or https://….",
        )
