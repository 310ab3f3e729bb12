"""The tools of the MCP server answer what the command line answers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from workbench.ablation.run import AblationRun
from workbench.api.server import NAMES, build, guarded, serve_http
from workbench.config import ConfigError
from workbench.files import write_json

ROOT = Path(__file__).parents[2]
ARCHIVES = ROOT / "results/ablations"
Call = Callable[..., tuple[int, dict[str, Any]]]


def session(results: Path, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """The results of some calls, in the same process."""

    async def talk() -> list[Any]:
        async with Client(build(results)) as client:
            tools = (await client.list_tools()).tools
            assert {tool.name for tool in tools} == set(NAMES) and all(tool.description for tool in tools)
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return asyncio.run(talk())


def test_the_tools_answer_as_the_command_line_does(call: Call) -> None:
    pair = ["mqar_delta_family", "mqar_delta_family_large"]  # on other data: not comparable
    found, compared, rows = session(
        ARCHIVES,
        ("verdict", {"name": "growth"}),
        ("compare", {"names": pair}),
        ("sql", {"query": "select count(*) as n from ablations"}),
    )
    assert found.structured_content == call("verdict", ARCHIVES / "growth")[1]["data"]
    refused = json.loads(compared.content[0].text)["error"]
    assert refused == call("compare", *(ARCHIVES / name for name in pair))[1]["error"]
    assert "mqar_delta_family_large: other data" in json.dumps(refused)
    assert rows.structured_content["rows"][0]["n"] == len(list(ARCHIVES.glob("*/ablation.json")))


def test_a_mistake_is_the_error_of_json() -> None:
    for name, arguments, field in (
        ("verdict", {"name": "growht"}, str(ARCHIVES / "growht")),
        ("status", {"name": "../growth"}, "name"),
        ("sql", {"query": "drop table runs"}, "query"),
        ("show", {"name": "scmoe", "run": "../growth"}, "run"),
        ("show", {"name": "scmoe", "run": ""}, "run"),
    ):
        (answer,) = session(ARCHIVES, (name, arguments))
        assert answer.is_error
        error = json.loads(answer.content[0].text)["error"]
        assert (error["kind"], error["field"]) == ("mistake", field)


@pytest.mark.process
def test_a_proposal_is_launched_and_read(fields: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.yaml", fields)
    change = {"change": ["training.learning_rate=2e-3"], "against": str(tmp_path / "sweep.yaml"), "looks": [4]}
    (cost,) = session(tmp_path / "results", ("cost", {"file": str(tmp_path / "sweep.yaml")}))
    assert [row["arm"] for row in cost.structured_content["arms"]] == ["full", "sliding"]
    (started,) = session(tmp_path / "results", ("propose", change))
    assert started.structured_content["decision"] == "running", started.content
    run = AblationRun(started.structured_content["folder"])
    assert run.wait(500)
    status, decided = session(tmp_path / "results", ("status", {"name": run.name}), ("propose", change))
    assert status.structured_content["state"] == "finished"
    assert decided.structured_content["decision"] in ("keep", "discard", "undecided")


@pytest.mark.process
def test_a_finished_ablation_is_launched_and_stopped_without_harm(
    finished: AblationRun, fields: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "sweep.yaml", fields)
    launched, stopped, noted = session(
        finished.results,
        ("launch", {"file": str(tmp_path / "sweep.yaml")}),
        ("stop", {"name": finished.name}),
        ("annotate", {"name": finished.name}),
    )
    assert launched.structured_content["state"] == "finished", launched.content
    assert stopped.structured_content["remaining"] == []
    assert noted.structured_content["names"] == {"full": "full", "sliding": "sliding"}


@pytest.mark.process
def test_it_speaks_over_standard_output() -> None:
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "workbench", "mcp", str(ARCHIVES)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    async def talk() -> Any:
        async with Client(stdio_client(server)) as client:
            return await client.call_tool("variants", {})

    found = asyncio.run(talk())
    assert "gdn" in {variant["name"] for variant in found.structured_content["variants"]}


@pytest.mark.parametrize(("given", "status"), [(b"Bearer secret", 200), (b"Bearer other", 401), (b"", 401)])
def test_http_needs_the_token(given: bytes, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", given)] if given else []
    asyncio.run(guarded(app, "secret")({"type": "http", "headers": headers}, None, send))
    assert sent[0]["status"] == status


def test_an_empty_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="an empty token"):
        serve_http(ARCHIVES, 8867, "", print)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    with pytest.raises(ConfigError, match="the extra mcp"):
        build(ARCHIVES)
