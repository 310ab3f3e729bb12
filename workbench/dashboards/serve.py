"""The dashboard as a page of its own: Voilà shows one cell, on this machine only and behind a token."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path

from workbench.config import ConfigError

PAGE = Path(__file__).parent / "page"
"""The one cell, and templates that take the place of Voilà's."""
FOLDER = "WORKBENCH_RESULTS"
"""Environment variable by which the page knows what to show."""


def serve(
    what: str | Path, *, ip: str = "127.0.0.1", port: int = 8866, token: str | None = None, browser: bool = True
) -> None:
    """Serve the dashboard of a folder of results, or of one ablation, until interrupted.

    Args:
        what: the folder.
        ip: address to listen on; anything but a loopback address lets other machines in, who need the token.
        port: the first that is free from here on is taken.
        token: that the page asks for; default a new random one, printed as part of the address.
        browser: whether to open one.

    Raises:
        ConfigError: when the folder is not there, or no port is free.
    """
    what = Path(what).resolve()
    if not what.is_dir():
        raise ConfigError.at(str(what), got="no such folder", expected="a folder of results, or of one ablation")
    if token == "":
        raise ConfigError.at(
            "token", got="an empty token", expected="a secret: whoever has it can start and stop training"
        )
    token, port = token or secrets.token_urlsafe(24), _free(ip, port)
    os.environ[FOLDER] = str(what)
    # Voilà hands the kernel's environment on; the program that serves is the one whose packages the page needs
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    print(f"{what} at http://{ip}:{port}/?token={token}   (Ctrl-C ends; training goes on)", flush=True)
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
