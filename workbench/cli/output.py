"""What commands share: their common arguments and the console."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from workbench.formatting import wrapped

if TYPE_CHECKING:
    from typing_extensions import Buffer

console = Console(markup=False)
"""Text is printed as it is: a path may contain brackets."""

File = Annotated[Path, typer.Argument(help="Ablation as YAML, such as sweeps/quickstart.yaml, or the folder of one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to change: base.model.width=256.")]
Results = Annotated[Path, typer.Option(help="Folder of all results.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a launched ablation, such as results/quickstart.")]


class _Lossy(io.FileIO):
    """A descriptor that drops what it cannot write."""

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Prepare standard output and error: closed ones (`>&-`) are nowhere, and characters that a terminal lacks are
    replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def unattended(command: Callable[..., None]) -> Callable[..., None]:
    """A command that does its work whether or not its output can be written: a reader that has gone (`| head`), a
    closed terminal or a full disk behind a redirection ends nothing.

    A command without this decorator is there for its output, and ends with it.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
                raw = _Lossy(stream.fileno(), "w", closefd=False)
                encoding = stream.encoding
                lossy = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="replace", line_buffering=True)
                setattr(sys, name, lossy)
        command(*arguments, **options)

    return run


def print_line(line: str) -> None:
    """Print without markup or wrapping."""
    typer.echo(line)


def print_text(text: str) -> None:
    """Print sentences wrapped at words: to the width of the terminal, or to 100 columns where there is none."""
    print_line(wrapped(text, console.width if console.is_terminal else 100))


def note(line: str) -> None:
    """Print a line about a step, or a whole sentence."""
    typer.secho(line if line.endswith(".") else f"{line} …", dim=True)
