"""The page's server: what it refuses, and kernels that nobody looks at."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from workbench import cli
from workbench.config import ConfigError
from workbench.dashboards.live.serve import CHECK_SECONDS, UNUSED_SECONDS, UnusedKernels, serve


class Kernels:
    """A kernel manager: kernel -> open pages."""

    def __init__(self, **connections: int):
        self.connections = connections

    def list_kernel_ids(self) -> list[str]:
        return list(self.connections)

    def kernel_model(self, name: str) -> dict[str, Any]:
        return {"connections": self.connections[name]}

    async def shutdown_kernel(self, name: str, now: bool) -> None:
        del self.connections[name]


def check(unused: UnusedKernels, times: int) -> None:
    for _ in range(times):
        asyncio.run(unused.shut_down())


CHECKS = int(UNUSED_SECONDS / CHECK_SECONDS)


def test_a_kernel_without_a_page_is_shut_down() -> None:
    kernels = Kernels(used=1, unused=0)
    check(UnusedKernels(kernels), CHECKS + 1)
    assert kernels.connections == {"used": 1}


def test_a_page_may_take_a_while_to_connect() -> None:
    kernels = Kernels(slow=0)
    unused = UnusedKernels(kernels)
    check(unused, CHECKS)
    kernels.connections["slow"] = 1
    check(unused, CHECKS)
    kernels.connections["slow"] = 0
    check(unused, CHECKS)
    assert kernels.connections == {"slow": 0}


def test_an_empty_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token"):
        serve(tmp_path, token="")


@pytest.mark.parametrize("port", [0, 80_800])
def test_a_port_beyond_its_range_is_one_error(tmp_path: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"port: got {port}; expected 1 to 65535"):
        serve(tmp_path, port=port)


def test_a_port_in_use_at_the_end_of_the_range_is_one_error(tmp_path: Path) -> None:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", 65_535))
        except OSError:
            pytest.skip("another program has the port")
        with pytest.raises(ConfigError, match="a free port, from this one to 65535"):
            serve(tmp_path, port=65_535)


@pytest.mark.parametrize("ip", ["192.0.2.1", "no such host.invalid"])
def test_an_address_of_another_machine_is_one_error(tmp_path: Path, ip: str) -> None:
    with pytest.raises(ConfigError, match=r"ip: got .*an address of this machine"):
        serve(tmp_path, ip=ip)


@pytest.mark.parametrize("port", ["80800", "0", "-1"])
def test_a_port_beyond_its_range_is_refused(port: str) -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.output


def test_the_current_folder_configures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Voilà would run a `voila.py` there, which may be a stranger's."""
    voila = pytest.importorskip("voila.app")
    pages: list[Any] = []
    monkeypatch.setattr(voila.Voila, "launch_instance", classmethod(lambda cls, arguments: pages.append(cls)))
    monkeypatch.setattr("os.environ", {**os.environ})
    monkeypatch.chdir(tmp_path)
    serve(tmp_path, browser=False)
    assert pages[0]().config_file_paths
    assert str(tmp_path) not in pages[0]().config_file_paths
