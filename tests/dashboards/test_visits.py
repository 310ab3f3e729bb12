"""Visits of the page of `workbench serve`: no kernel is left behind, and no figure can be uploaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from dashboards.browser import ROOT, free_port, needs_browser, page, server
from dashboards.test_no_uploads import buttons

pytestmark = [needs_browser, pytest.mark.browser]

VISITS = 13
PROGRAM = """
import sys
from workbench.dashboards.live import serve
serve.CHECK_SECONDS, serve.UNUSED_SECONDS = 1, {unused}
serve.serve(sys.argv[1], port=int(sys.argv[2]), token="t", browser=False)
"""
UNUSED_SECONDS = 45
"""A page on a busy machine is opened within this time."""


def kernels(server_process: int) -> int:
    """Kernels that a server has."""
    children = psutil.Process(server_process).children(recursive=True)
    commands = []
    for child in children:
        try:
            commands.append(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return sum("ipykernel_launcher" in command for command in commands)


def until(condition: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.5)
    return False


@pytest.mark.slow
def test_visits_leave_no_kernel_behind(tmp_path: Path) -> None:
    results, port = ROOT / "results" / "ablations" / "needle", free_port()
    program = tmp_path / "served.py"
    program.write_text(PROGRAM.format(unused=UNUSED_SECONDS))
    address = f"http://127.0.0.1:{port}"
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    with server("served", str(results), str(port), address=f"{address}/voila/static/none", **environment) as process:
        with page() as view:
            for _ in range(VISITS - 1):
                view.goto(f"{address}/?token=t", wait_until="commit")
            view.goto("about:blank")
            assert until(lambda: kernels(process.pid) == 0, 4 * UNUSED_SECONDS), "pages that were left early have none"
            view.goto(f"{address}/?token=t", wait_until="commit")
            view.locator(".wb-board .modebar-btn").first.wait_for(state="attached", timeout=240_000)
            assert not [name for name in buttons(view) if "share" in name or "cloud" in name]
            assert view.locator(".wb-waiting").is_hidden()
            assert until(lambda: kernels(process.pid) == 1, 4 * UNUSED_SECONDS), "only the open page has one"
        assert until(lambda: kernels(process.pid) == 0, 4 * UNUSED_SECONDS), "a closed page has none"


def test_the_address_is_printed_when_it_answers_and_the_login_page_is_ours(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "workbench", "serve", str(tmp_path), "--port", str(free_port()), "--no-browser"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(" at ")[1].split()[0]
            with urllib.request.urlopen(address.partition("?")[0], timeout=60) as answer:
                text = answer.read().decode()
            assert "workbench serve" in text and "password" not in text.replace('"password"', "").lower()
        finally:
            process.terminate()
