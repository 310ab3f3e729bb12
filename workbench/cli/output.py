"""What commands share: their common arguments and the console."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

File = Annotated[Path, typer.Argument(help="Ablation as YAML, such as sweeps/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to change: base.model.width=256.")]
Results = Annotated[Path, typer.Option(help="Folder of all results.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a launched ablation, such as results/quickstart.")]


def note(line: str) -> None:
    console.print(f"[dim]{line} …[/]")
