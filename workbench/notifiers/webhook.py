"""A POST request with the notification as JSON."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from workbench.config import ConfigError, require
from workbench.notifiers import Notification, Notifier, NotifierConfig, notifiers

SECONDS = 10
"""For the answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An address that moves the request elsewhere gets nothing."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@notifiers.register
class Webhook(Notifier):
    """Posts the notification to an address. ``text`` is the field that Slack, Mattermost and similar services show.

    Raises (in :meth:`send`):
        RuntimeError: when the server refuses it or does not answer; names the host alone.
    """

    class Config(NotifierConfig):
        kind: Literal["webhook"] = "webhook"
        url: str
        """Where to post to, such as ``https://host/path``; http only with ``--notify``."""

        argument: ClassVar[str] = "url"

        def model_post_init(self, _context: Any) -> None:
            try:
                parts = urlsplit(self.url)
                valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
                valid = valid and self.url.isascii() and self.url.isprintable() and " " not in self.url
            except ValueError:
                valid, parts = False, urlsplit("")
            require(valid, "url", got="another form", expected="https://host/path")  # not repeated: it may hold a key
            require("@" not in parts.netloc, "url", got="an address with a password", expected="https://host/path")

        def refuse_in_files(self) -> None:
            if urlsplit(self.url).scheme != "https":
                raise ConfigError.at(
                    "", got="http://…", expected="https://…", do="Or on the command line: --notify http://…"
                )

    def send(self, notification: Notification) -> None:
        data = json.dumps(notification.body()).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "workbench"}
        host = urlsplit(self.config.url).hostname
        try:
            request = urllib.request.Request(self.config.url, data, headers, method="POST")
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS):
                pass
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{host} answered {error.code}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RuntimeError(f"{host} does not answer: {type(reason).__name__}") from None
