"""The functions of this package as tools of the Model Context Protocol, over standard input and output or on a loopback
address behind a token. Needs the extra ``mcp``."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from workbench.api import ablations, lifecycle, proposals, runs
from workbench.api import results as read
from workbench.api.answers import (
    Comparison,
    Cost,
    Error,
    NotesAnswer,
    Proposal,
    Query,
    RunPage,
    Status,
    Stopped,
    Variants,
    VerdictAnswer,
    error_document,
)
from workbench.config import ConfigError, require
from workbench.distribution import install_extra
from workbench.files import MACHINE

if TYPE_CHECKING:
    from mcp.server import MCPServer

__all__ = ["Tools", "build", "serve_http", "serve_stdio"]

INSTRUCTIONS = """
Fair ablations of language-model architectures. An ablation is a YAML file; `cost` checks it before anything runs,
`launch` starts it and returns at once, `status` and `verdict` read it by its name. `propose` decides about one change
against a baseline: keep, discard or undecided; call it again while it is running. Lower values are better. A verdict
that is exploratory is no confirmation. Report values are hidden until an ablation has ended.
""".strip()
Tool = TypeVar("Tool", bound=Callable[..., Any])
Scope: TypeAlias = MutableMapping[str, Any]
Send: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[None]]


def _reporting(function: Tool) -> Tool:
    """A tool whose mistakes are answered as ``--json`` answers them."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        from mcp.types import CallToolResult, TextContent

        try:
            return function(*arguments, **named)
        except ConfigError as mistake:
            error = Error.of(mistake)
        except OSError as problem:
            if problem.errno not in MACHINE:
                raise
            error = Error.of_machine(problem)
        return CallToolResult(content=[TextContent(type="text", text=error_document(error))], is_error=True)

    return call  # type: ignore[return-value]


def _require_plain(name: str, field: str, expected: str) -> None:
    """Refuse what is no single name in a folder, such as a path that leads out of it."""
    require(bool(name) and name not in (".", "..") and Path(name).name == name, field, got=name, expected=expected)


class Tools:
    """The tools of one folder of results. Their docstrings are what a client is shown.

    Args:
        results: folder of all results; ablations are named by their folder in it.
    """

    def __init__(self, results: str | Path):
        self.results = Path(results).absolute()

    def _folder(self, name: str) -> Path:
        _require_plain(name, "name", f"the name of an ablation in {self.results}")
        return self.results / name

    @_reporting
    def variants(self) -> Variants:
        """List what can be compared: mixers, feed-forwards, embeddings, decoding policies, data, launchers."""
        return read.variants()

    @_reporting
    def cost(self, file: str, overrides: list[str] | None = None, measure: bool = False) -> Cost:
        """What an ablation (a YAML file) costs per arm, and what does not match between the arms. Overrides are
        `path.to.field=value`. `measure` times a few real steps, which takes a minute."""
        return ablations.cost(file, overrides or (), self.results, measure)

    @_reporting
    def launch(self, file: str, overrides: list[str] | None = None, workers: int | None = None) -> Status:
        """Launch or resume an ablation (a YAML file); returns at once. Finished runs are never repeated."""
        return ablations.launch(file, overrides or (), self.results, workers)

    @_reporting
    def status(self, name: str) -> Status:
        """How far an ablation has come: runs ended of those planned, time elapsed and left."""
        return ablations.status(self._folder(name))

    @_reporting
    def stop(self, name: str) -> Stopped:
        """Stop the workers of an ablation after a checkpoint; launching it again resumes."""
        return ablations.stop(self._folder(name))

    @_reporting
    def verdict(self, name: str) -> VerdictAnswer:
        """The verdict of an ablation: which arm is better, by how much, how certain. Null while runs are missing."""
        return ablations.verdict(self._folder(name))

    @_reporting
    def show(self, name: str, run: str, log_lines: int = 20) -> RunPage:
        """Everything known about one run of an ablation (its name, or the beginning of it): differences to the
        baseline, last values, events, environment, the end of its log. `sql` lists the runs."""
        _require_plain(run, "run", "the name of a run of the ablation, or the beginning of it")
        return runs.show(self._folder(name) / run, self.results, log_lines)

    @_reporting
    def compare(self, names: list[str], x: str = "flops", at: float | None = None) -> Comparison:
        """Finished ablations of the same arms side by side, and scaling laws over x: flops, parameters or tokens."""
        return read.compare([self._folder(name) for name in names], x, at)

    @_reporting
    def sql(self, query: str) -> Query:
        """Rows of one SELECT over the tables ablations, verdicts, runs, evaluations and scores of all ablations."""
        from workbench.api.sql import query as select

        return select(query, self.results)

    @_reporting
    def propose(
        self,
        change: list[str],
        against: str,
        why: str = "",
        fields: list[str] | None = None,
        looks: list[int] | None = None,
        workers: int | None = None,
    ) -> Proposal:
        """Run a change (`path.to.field=value` of a run) against a baseline (a YAML file) in a declared sequential
        design. Returns at once with `running`; the same call later answers keep, discard or undecided."""
        ablation = proposals.prepare(change, against, self.results, fields=fields or (), looks=looks or ())
        run = proposals.create(ablation.with_workers(workers), why)
        if not run.finished:
            run.start_workers(workers)
        return proposals.decide(run)

    @_reporting
    def annotate(self, name: str, text: str = "", tags: list[str] | None = None) -> NotesAnswer:
        """Add a note or tags to an ablation, and list what there is. Changes no result."""
        return lifecycle.annotate(self._folder(name), text, tags or ())


NAMES = ("variants", "cost", "launch", "status", "stop", "verdict", "show", "compare", "sql", "propose", "annotate")
"""Methods of :class:`Tools` that are tools."""


def build(results: str | Path) -> MCPServer:
    """The server of one folder of results.

    Raises:
        ConfigError: if the extra is not installed.
    """
    try:
        from mcp.server import MCPServer
    except ImportError:
        raise ConfigError.at("mcp", got="no package `mcp`", expected="the extra mcp", do=install_extra("mcp")) from None
    tools, server = Tools(results), MCPServer("workbench", instructions=INSTRUCTIONS, log_level="WARNING")
    for name in NAMES:
        server.add_tool(getattr(tools, name))
    return server


def serve_stdio(results: str | Path) -> None:
    """Serve over standard input and output until the client closes it. What tools print goes to standard error."""
    build(results).run("stdio")


def serve_http(results: str | Path, port: int, token: str | None, announce: Callable[[str], None]) -> None:
    """Serve at ``http://127.0.0.1:port/mcp`` until interrupted.

    Args:
        results: folder of all results.
        port: of the loopback address.
        token: every request needs the header ``Authorization: Bearer TOKEN``; default a new random one.
        announce: called with the address and the token.

    Raises:
        ConfigError: if the extra is not installed, or the token is empty.
    """
    require(token != "", "token", got="an empty token", expected="a secret: whoever has it can start training")
    server, token = build(results), token or secrets.token_urlsafe(24)
    import uvicorn

    announce(f"http://127.0.0.1:{port}/mcp   Authorization: Bearer {token}")
    uvicorn.run(guarded(server.streamable_http_app(), token), host="127.0.0.1", port=port, log_level="warning")


def guarded(app: Any, token: str) -> Callable[..., Awaitable[None]]:
    """An ASGI application that answers 401 to requests without the token."""
    wanted = f"Bearer {token}".encode()

    async def call(scope: Scope, receive: Any, send: Send) -> None:
        given = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, wanted):
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"www-authenticate", b"Bearer")]})
        await send({"type": "http.response.body", "body": b"This server needs its token."})

    return call
