"""What commands share: their common arguments and the console."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(markup=False)
"""Text is printed as it is: a path may contain brackets."""

File = Annotated[Path, typer.Argument(help="Ablation as YAML, such as sweeps/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to change: base.model.width=256.")]
Results = Annotated[Path, typer.Option(help="Folder of all results.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a launched ablation, such as results/quickstart.")]


def print_line(line: str) -> None:
    """Print without markup or wrapping. A terminal that has been closed does not end the work."""
    with contextlib.suppress(OSError):
        typer.echo(line)


def note(line: str) -> None:
    """Print a line about a step, or a whole sentence."""
    with contextlib.suppress(OSError):
        typer.secho(line if line.endswith(".") else f"{line} …", dim=True)
