"""A real headless Chromium, where one is installed, and servers to point it at."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")


@contextlib.contextmanager
def page(width: int = 1280, height: int = 900, **settings: Any) -> Iterator[Any]:
    """A page whose ``errors`` collects the errors of its scripts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": width, "height": height}, **settings)
        opened.set_default_timeout(120_000)
        opened.errors = []
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        try:
            yield opened
        finally:
            browser.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(*arguments: str, address: str, where: Path = ROOT, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of this environment's Python that answers at ``address`` while inside."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=where,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 180
        while not answers(address):
            assert process.poll() is None and time.monotonic() < until, f"nothing answers at {address}"
            time.sleep(0.2)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def answers(address: str) -> int:
    """The status code at ``address``; 0 where nobody listens."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def voila(results: Path) -> Iterator[str]:
    """``workbench serve``, started in the folder above ``results``; yields its address, token and all."""
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with server(
        "workbench",
        "serve",
        str(results),
        "--port",
        str(port),
        "--token",
        "t",
        "--no-browser",
        address=f"{base}/voila/static/none",
        where=results.parent,
    ):
        yield f"{base}/?token=t"


@contextlib.contextmanager
def lab(where: Path) -> Iterator[str]:
    """JupyterLab in the folder ``where``; yields its address without a path."""
    port, settings = free_port(), where / ".lab"
    base = f"http://127.0.0.1:{port}"
    extension = settings / "@jupyterlab" / "notebook-extension"
    extension.mkdir(parents=True)  # render every cell, visible or not
    (extension / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    arguments = [
        "jupyter",
        "lab",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=t",
        "--allow-root",
        f"--ServerApp.root_dir={where}",
    ]
    with server(
        *arguments,
        address=f"{base}/api?token=t",
        where=where,
        JUPYTERLAB_SETTINGS_DIR=str(settings),
        JUPYTERLAB_WORKSPACES_DIR=str(settings),
        JUPYTER_CONFIG_DIR=str(settings),
    ):
        yield base


def choose(view: Any, panel: str) -> None:
    view.locator(".widget-toggle-button", has_text=re.compile(rf"^{panel}( \(\d+\))?$")).click()


def header(view: Any, text: str, patience: float = 60) -> None:
    """Wait until the dashboard holds ``text``."""
    view.locator(".workbench-dashboard").filter(has_text=re.compile(text)).first.wait_for(timeout=1000 * patience)
