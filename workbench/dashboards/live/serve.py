"""The dashboard as a page of its own: a Voilà server with one cell, on this machine only and protected by a token."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path

from workbench.config import ConfigError

PAGE = Path(__file__).parent / "page"
"""A notebook of one cell, and templates that replace those of Voilà."""
RESULTS_VARIABLE = "WORKBENCH_RESULTS"
"""Environment variable that tells the page what to show."""


def serve(
    what: str | Path, *, ip: str = "127.0.0.1", port: int = 8866, token: str | None = None, browser: bool = True
) -> None:
    """Serve the dashboard of a folder of results, or of one ablation, until interrupted.

    Args:
        what: the folder.
        ip: address to listen on; other machines can connect unless it is a loopback address, and need the token.
        port: the first port to try; the next free one is used.
        token: what the page asks for; default a new random one, printed as part of the address.
        browser: whether to open a browser.

    Raises:
        ConfigError: when the folder does not exist, or no port is free.
    """
    what = Path(what).resolve()
    if not what.is_dir():
        raise ConfigError.at(str(what), got="no such folder", expected="a folder of results, or of one ablation")
    if token == "":
        raise ConfigError.at(
            "token", got="an empty token", expected="a secret: whoever has it can start and stop training"
        )
    token, port = token or secrets.token_urlsafe(24), _free(ip, port)
    os.environ[RESULTS_VARIABLE] = str(what)
    # the kernel inherits this environment, and must be started by the Python that runs the server
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    print(f"{what} at http://{ip}:{port}/?token={token}   (Ctrl-C stops the server; training continues)", flush=True)
    from voila.app import Voila

    class Page(Voila):
        def setup_template_dirs(self) -> None:
            super().setup_template_dirs()
            self.template_paths.insert(0, str(PAGE))

    Page.launch_instance(
        [
            str(PAGE / "page.ipynb"),
            f"--Voila.ip={ip}",
            f"--port={port}",
            f"--token={token}",
            "--show_tracebacks=True",
            "--Voila.log_level=WARN",
            *([] if browser else ["--no-browser"]),
        ]
    )


def _free(ip: str, port: int) -> int:
    for candidate in range(port, port + 50):
        with socket.socket() as probe:
            try:
                probe.bind((ip, candidate))
            except OSError:
                continue
            return candidate
    raise ConfigError.at("port", got=port, expected="a free port within the next 50", do="Choose another one.")
