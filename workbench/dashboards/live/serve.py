"""The dashboard as a page of its own: a Voilà server with one cell, on this machine only and protected by a token."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from jupyter_core.utils import ensure_async

from workbench.config import ConfigError, require
from workbench.registry import import_variables

PAGE = Path(__file__).parent / "page"
"""A notebook of one cell, and templates that replace those of Voilà; in ``login`` one of Jupyter Server's."""
RESULTS_VARIABLE, FOLDER_VARIABLE = "WORKBENCH_RESULTS", "WORKBENCH_FOLDER"
"""Environment variables: what the page shows, and the folder in which relative paths begin."""
MAX_PORT = 65_535
PORTS_TRIED = 50
CHECK_SECONDS, UNUSED_SECONDS = 15, 120
"""Between two looks for kernels without a page, and how long one may be without: opening takes a while."""


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
        ConfigError: when the folder does not exist, the address is not one of this machine, or no port is free.
    """
    what = Path(what).resolve()
    require(0 < port <= MAX_PORT, "port", got=port, expected=f"1 to {MAX_PORT}")
    if not what.is_dir():
        raise ConfigError.at(str(what), got="no such folder", expected="a folder of results, or of one ablation")
    if token == "":
        raise ConfigError.at(
            "token", got="an empty token", expected="a secret: whoever has it can start and stop training"
        )
    token, port = token or secrets.token_urlsafe(24), _free(ip, port)
    os.environ[RESULTS_VARIABLE] = str(what)
    os.environ[FOLDER_VARIABLE] = os.getcwd()  # the kernel starts in the folder of the page's notebook
    os.environ |= import_variables()
    # the kernel inherits this environment, and must be started by the Python that runs the server
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    from jupyter_core.paths import jupyter_config_path
    from jupyter_server.log import log_request
    from tornado.ioloop import IOLoop, PeriodicCallback
    from traitlets import default
    from voila.app import Voila

    class Page(Voila):
        @default("config_file_paths")
        def _config_file_paths_default(self) -> list[str]:
            return jupyter_config_path()  # Voilà's own begin with the current folder, whose voila.py it would run

        def setup_template_dirs(self) -> None:
            super().setup_template_dirs()
            self.template_paths.insert(0, str(PAGE))

        def start(self) -> None:
            # unlike Tornado's own, this log leaves out the token of an address
            self.tornado_settings = {"log_function": partial(log_request, record_prometheus_metrics=False)}
            super().start()

        def listen(self) -> None:
            def announce() -> None:  # once it listens
                address = f"http://{ip}:{self.port}/?token={token}"
                print(f"{what} at {address}   (Ctrl-C stops the server; training continues)", flush=True)

            self.app.settings["jinja2_env"].loader.searchpath.insert(0, str(PAGE / "login"))
            unused = UnusedKernels(self.kernel_manager)
            IOLoop.current().add_callback(announce)
            PeriodicCallback(unused.shut_down, 1000 * CHECK_SECONDS).start()
            super().listen()

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


class UnusedKernels:
    """Shuts down kernels without a page: Voilà starts one for every reload and closed pages leave theirs behind.

    Args:
        manager: of the kernels.
    """

    def __init__(self, manager: Any):
        self.manager = manager
        self._checks: dict[str, int] = {}  # kernel -> checks in a row that found no connection

    async def shut_down(self) -> None:
        """Shut down what has had no connection for :data:`UNUSED_SECONDS`. Call it every :data:`CHECK_SECONDS`."""
        unused = [name for name in self.manager.list_kernel_ids() if not self._connections(name)]
        self._checks = {name: self._checks.get(name, 0) + 1 for name in unused}
        for name, checks in self._checks.items():
            if checks > UNUSED_SECONDS / CHECK_SECONDS:
                with contextlib.suppress(KeyError):  # it has ended by itself
                    await ensure_async(self.manager.shutdown_kernel(name, now=True))

    def _connections(self, name: str) -> int:
        return int(self.manager.kernel_model(name)["connections"])


def _free(ip: str, port: int) -> int:
    """The first free port from ``port`` on."""
    for candidate in range(port, min(port + PORTS_TRIED, MAX_PORT + 1)):
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
            try:
                probe.bind((ip, candidate))
            except (socket.gaierror, UnicodeError):
                break
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    break
                continue
            return candidate
    else:
        expected = f"a free port, from this one to {min(port + PORTS_TRIED - 1, MAX_PORT)}"
        raise ConfigError.at("port", got=port, expected=expected, do="Choose another one.")
    do = "127.0.0.1 admits this machine only."
    raise ConfigError.at("ip", got=ip, expected="an address of this machine", do=do)
