"""What commands share: their common arguments, the console, numbers as people read them."""

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


def human(value: float | None, unit: str = "") -> str:
    if value is None:
        return "not measured"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.2%}"
