"""The command line, ``workbench``; ``workbench --help`` lists its commands.

Every command that takes an ablation takes the same YAML file, followed by overrides such as
``base.training.tokens=1_000_000``.
"""

# Commands are plain functions of the modules beside this one. Their imports are inside the
# functions, so that help does not wait for torch.

from __future__ import annotations

import sys
from typing import Any

import typer

from workbench.api.answers import MACHINE as MACHINE_REFUSES
from workbench.api.answers import Error
from workbench.cli.ablations import components, cost, pilot, plan, propose, run, status, stop, watch, worker
from workbench.cli.installed import doctor, schema, variants
from workbench.cli.lifecycle import annotate, extend, journal, rename, rm
from workbench.cli.output import Failure, answering, open_streams, reported_errors, unattended
from workbench.cli.results import (
    archive,
    compare,
    ledger,
    mcp,
    paper_table,
    report,
    scores,
    serve,
    show,
    sql,
    table,
    verdict,
)
from workbench.cli.training import branch, calibrate, evaluate, export, generate, latency_table, prepare, train
from workbench.cli.transfer import coordinates, parametrisation, transfer

COMMANDS = (
    cost,
    unattended(run),
    unattended(propose),
    unattended(train),
    unattended(branch),
    unattended(prepare),
    unattended(latency_table),
    unattended(export),
    unattended(calibrate),
    generate,
    unattended(evaluate),
    parametrisation,
    coordinates,
    transfer,
    unattended(pilot),
    plan,
    unattended(components),
    unattended(worker),
    watch,
    status,
    unattended(stop),
    unattended(extend),
    rename,
    annotate,
    rm,
    journal,
    verdict,
    scores,
    paper_table,
    compare,
    unattended(report),
    unattended(serve),
    mcp,
    unattended(archive),
    table,
    show,
    sql,
    ledger,
    variants,
    doctor,
    schema,
)
"""Every command, in the order of the help; a function's name is its command's, its docstring the help."""

USAGE_ERROR: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
"""Base of what typer raises for a command line that it cannot parse; typer does not export it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in COMMANDS:
    app.command()(answering(command, silent=command is not mcp))


def main() -> None:
    """Run the command line. A user's mistake is reported without a traceback."""
    from workbench.config import ConfigError
    from workbench.files import MACHINE

    open_streams()
    try:
        if "--json" in sys.argv:
            _main_json()
        app()
    except ConfigError as error:
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        print(
            f"workbench: {error.strerror}: {error.filename or ''}. Nothing is lost; fix it and run the command again.",
            file=sys.stderr,
        )
        sys.exit(MACHINE_REFUSES)


def _main_json() -> None:
    """Run the command line; a mistake in it is a JSON object as well."""
    try:
        with reported_errors():
            try:
                code = app(standalone_mode=False)
            except USAGE_ERROR as error:
                what = Error(kind="usage", message=error.format_message(), hint="See `workbench COMMAND --help`.")
                raise Failure(what) from None
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
