"""The command line, ``workbench``; ``workbench --help`` lists its commands.

Every command that takes an ablation takes the same YAML file, followed by overrides such as
``base.training.tokens=1_000_000``.
"""

# Commands are plain functions of the modules beside this one. Their imports are inside the
# functions, so that help does not wait for torch.

from __future__ import annotations

import sys

import typer

from workbench.cli.ablations import components, cost, pilot, plan, run, stop, watch, worker
from workbench.cli.installed import doctor, variants
from workbench.cli.output import open_streams, unattended
from workbench.cli.results import archive, compare, ledger, paper_table, report, scores, serve, table, verdict
from workbench.cli.training import branch, calibrate, evaluate, export, generate, latency_table, prepare, train
from workbench.cli.transfer import coordinates, parametrisation, transfer

COMMANDS = (
    cost,
    unattended(run),
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
    unattended(stop),
    verdict,
    scores,
    paper_table,
    compare,
    unattended(report),
    unattended(serve),
    unattended(archive),
    table,
    ledger,
    variants,
    doctor,
)
"""Every command, in the order of the help; a function's name is its command's, its docstring the help."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the command line. A user's mistake is reported without a traceback."""
    from workbench.config import ConfigError
    from workbench.files import MACHINE

    open_streams()
    try:
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
        sys.exit(1)
