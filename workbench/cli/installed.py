"""Commands that list the registered variants, check this machine, and describe answers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from workbench.api import results as api
from workbench.api.answers import MIN_DISK_GB, Doctor, Schemas, Variants, error_schema, schema_of
from workbench.cli.output import console


def variants() -> Variants:
    """List registered mixers, feed-forwards, embeddings, decoding policies, data sources, corpora and launchers."""
    found = api.variants()
    table = Table("kind", "name", "description and settings", "capabilities")
    for variant in found.variants:
        described = Text.assemble(variant.description, (f"\n{', '.join(variant.settings)}", "dim"))
        table.add_row(variant.kind, variant.name, described, "\n".join(variant.capabilities))
    console.print(table)
    return found


def doctor() -> Doctor:
    """Check this machine: versions, device, plug-ins, space."""
    found = api.doctor()
    for name, value in {**found.environment, "variants": ", ".join(found.variants)}.items():
        console.print(f"{name:12s} {value}", highlight=False)
    free = found.free_disk_gb
    few = f"  (too little: at least {MIN_DISK_GB} GB are needed)"
    console.print(f"{'free disk':12s} {free:.1f} GB{'' if free >= MIN_DISK_GB else few}", highlight=False)
    for name, why in found.broken_plugins.items():
        console.print(f"broken plug-in {name}: {why}", style="bold", markup=False)
    return found


def schema(
    command: Annotated[str | None, typer.Argument(help="Name of a command, or error. Default: all of them.")] = None,
) -> Schemas:
    """Print the JSON schema of what commands write with --json."""
    from workbench.config import ConfigError, nearest

    schemas = _schemas()
    if command is not None and command not in schemas:
        raise ConfigError.at("command", got=command, expected="a command, or error", do=nearest(command, schemas))
    found = schemas if command is None else {command: schemas[command]}
    print(json.dumps(found if command is None else found[command], indent=1, ensure_ascii=False))
    return Schemas(schemas=found)


def _schemas() -> dict[str, dict[str, Any]]:
    from workbench.cli.output import ANSWERS

    return {**{name: schema_of(name, kind) for name, kind in ANSWERS.items()}, "error": error_schema()}
