"""Notifiers: what they send, what is refused, and that a failure is one warning."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from workbench.ablation.spec.launch import Launch
from workbench.config import ConfigError
from workbench.notifiers import (
    VARIABLE,
    Notification,
    Notifier,
    NotifierConfig,
    from_environment,
    notifiers,
    notify,
    parse,
    use,
)

ENDED = Notification(
    "finished", "ablation", "mine", "mine: finished, 4 of 4 runs ended", 4, 4, verdict="gdn is better."
)


class Server(HTTPServer):
    """Keeps what it is sent."""

    received: list[tuple[str, Any]]
    code = 200


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            listening.received.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(listening.code)
            self.send_header("Location", self.path + "/elsewhere")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = Server(("127.0.0.1", 0), Handler)
    listening.received = []
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/hooks/s3cret"


def sent(config: Any, message: Notification = ENDED) -> list[str]:
    """The warnings."""
    warnings: list[str] = []
    notify(message, [config], warnings.append)
    return warnings


def test_a_webhook_gets_json(server: Server) -> None:
    assert sent(parse(address(server))) == []
    ((kind, body),) = server.received
    assert kind == "application/json"
    assert body == {
        "schema": 1,
        "program": "workbench",
        "event": "finished",
        "what": "ablation",
        "name": "mine",
        "text": "mine: finished, 4 of 4 runs ended",
        "ended": 4,
        "planned": 4,
        "failed": 0,
        "verdict": "gdn is better.",
    }


@pytest.mark.parametrize("code", [302, 404, 500])
def test_a_refusal_is_one_warning_without_the_address(server: Server, code: int) -> None:
    server.code = code
    (warning,) = sent(parse(address(server)))
    assert f"127.0.0.1 answered {code}" in warning and "s3cret" not in warning
    assert len(server.received) == 1, "it follows no redirection"


def test_a_server_that_does_not_answer_is_one_warning() -> None:
    (warning,) = sent(parse("http://127.0.0.1:1/s3cret"))
    assert "does not answer" in warning and "s3cret" not in warning


def test_a_command_gets_json_and_the_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    assert sent(parse(f"command:cat > '{path}'; echo $WORKBENCH_EVENT: $WORKBENCH_TEXT >> '{path}'")) == []
    body, line = path.read_text().split("}")
    assert json.loads(body + "}") == ENDED.body()
    assert line.strip() == f"finished: {ENDED.text}"


def test_a_command_that_fails_is_one_warning() -> None:
    assert sent(parse("command:echo no mail >&2; exit 3")) == [
        "the notification by command failed (RuntimeError: exit code 3 no mail)"
    ]


def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A PATH with these programs alone, which write their arguments to a file."""
    for name in names:
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "arguments"


@pytest.mark.parametrize("program", ["notify-send", "osascript"])
def test_the_desktop_shows_title_and_sentence(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = programs(tmp_path, monkeypatch, program)
    assert sent(parse("desktop")) == []
    assert arguments.read_text().splitlines()[-2:] == ["workbench: mine finished", ENDED.text]


def test_no_desktop_is_an_error_before_and_a_warning_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="notify-send"):
        use(["desktop"])
    assert len(sent(parse("desktop"))) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("desktp", "Nearest valid name: 'desktop'"),
        ("desktop:loud", "without an argument"),
        ("command:", "command"),
        ("https://", "https://host/path"),
        ("https://me:s3cret@host/", "a password"),
        ("ftp://host/s3cret", "https://host/path"),
        ("https://host:99999/s3cret", "https://host/path"),
    ],
)
def test_a_mistake_names_what_is_expected(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        parse(text)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("notifier", ["command:touch here", "http://host/x", {"kind": "command", "command": "ls"}])
def test_a_file_names_no_command_and_no_unprotected_address(notifier: object) -> None:
    with pytest.raises(ConfigError, match="command line"):
        Launch.parse({"notify": [notifier]})


def test_a_file_names_the_desktop_and_https() -> None:
    launch = Launch.parse({"notify": ["desktop", "https://host/x"]})
    assert Launch.parse(launch.plain()) == launch


def test_notifiers_of_the_command_line_reach_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert use(None) == from_environment() == []
    assert use(["command:ls", "https://host/x"]) == from_environment()


@pytest.mark.parametrize("text", ["{", '"desktop"', "3"])
def test_a_damaged_variable_is_one_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=VARIABLE):
        from_environment()


def test_a_notifier_is_one_class() -> None:
    seen: list[str] = []

    class Page(Notifier):
        class Config(NotifierConfig):
            kind: Literal["page"] = "page"

        def send(self, notification: Notification) -> None:
            seen.append(notification.text)

    notifiers.register(Page)
    try:
        assert sent(parse("page")) == [] and seen == [ENDED.text]
    finally:
        notifiers.unregister("page")


def test_an_address_that_a_client_would_quote_in_an_error_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("https://host/hooks/SECRET TOKEN")
    assert "SECRET" not in str(caught.value)


def test_a_command_that_does_not_end_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.notifiers.command.SECONDS", 0.5)
    marker = tmp_path / "marker"
    notifier = notifiers["command"](parse(f"command:(sleep 2; touch {marker}) & wait"))
    with pytest.raises(RuntimeError, match="no end"):
        notifier.send(ENDED)
    time.sleep(2.5)
    assert not marker.exists()
