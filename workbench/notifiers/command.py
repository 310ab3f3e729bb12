"""A shell command of the reader's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from workbench.config import ConfigError
from workbench.notifiers import Notification, Notifier, NotifierConfig, notifiers

SECONDS = 60
"""Within which the command has to end; then it is killed."""


@notifiers.register
class Command(Notifier):
    """Runs a shell command with the notification as JSON on standard input, and its sentence in WORKBENCH_TEXT.

    Raises (in :meth:`send`):
        RuntimeError: when the command fails.
    """

    class Config(NotifierConfig):
        kind: Literal["command"] = "command"
        command: Annotated[str, Field(min_length=1)]
        """For the shell, such as ``mail -s "$WORKBENCH_TEXT" me@example.org``."""

        argument: ClassVar[str] = "command"

        def refuse_in_files(self) -> None:
            raise ConfigError.at(
                "",
                got="a command",
                expected="desktop or https://…, since sweep files run no commands",
                do="Give it on the command line: workbench run FILE --notify command:'…'.",
            )

    def send(self, notification: Notification) -> None:
        process = subprocess.Popen(
            self.config.command,
            shell=True,
            text=True,
            errors="replace",
            env={**os.environ, "WORKBENCH_EVENT": notification.event, "WORKBENCH_TEXT": notification.text},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(json.dumps(notification.body()), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it has started
            process.communicate()
            raise RuntimeError(f"no end after {SECONDS} s") from None
        if process.returncode:
            last = (errors.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"exit code {process.returncode} {last}".strip())
