"""Commands that list the registered variants, check this machine, and describe answers."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from workbench.api import results as api
from workbench.api.answers import Doctor, Schemas, Variant, Variants, error_schema, schema_of
from workbench.cli.output import console, print_line


def variants(
    name: Annotated[str | None, typer.Argument(help="One of them, with settings, defaults and source.")] = None,
) -> Variants:
    """List mixers, feed-forwards, embeddings, residuals, decoding policies, data, suites and launchers."""
    found = api.variants(name)
    if name is not None:
        for variant in found.variants:
            print_line(_details(variant))
        return found
    table = Table("name", "description", "paper", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    kinds = dict.fromkeys(variant.kind for variant in found.variants)
    for kind in kinds:
        table.add_row(Text(kind, "bold"))
        for variant in found.variants:
            if variant.kind == kind:
                lacks = _lacks(variant)
                text = f"{variant.description} ({lacks})" if lacks else variant.description
                table.add_row(f"  {variant.name}", text, variant.paper)
    console.print(table)
    print_line("Settings, defaults and the definition of one: workbench variants NAME. Papers are arXiv numbers.")
    return found


CAPABILITIES = {"causal": "not causal", "segments": "documents of a row are not separated", "decode": "no decoding"}
"""Capability -> what it means to lack it."""


def _lacks(variant: Variant) -> str:
    """What a mixer, a feed-forward or an embedding cannot do; "" for everything else."""
    if variant.kind not in ("mixer", "feed-forward", "embedding"):
        return ""
    return ", ".join(lack for word, lack in CAPABILITIES.items() if word not in variant.capabilities)


def _details(variant: Variant) -> str:
    """A page about one variant."""
    lines = [f"{variant.name} ({variant.kind})", "", variant.documentation, "", "Settings and defaults:", ""]
    width = max((len(field["name"]) for field in variant.fields), default=0)
    for field in variant.fields:
        default = json.dumps(field["default"], ensure_ascii=False)
        described = " ".join(field["description"].split())
        lines += [
            f"  {field['name']:{width}}  {default}",
            *textwrap.wrap(described, 100, initial_indent="    ", subsequent_indent="    "),
        ]
    lacks = _lacks(variant)
    lines += ["", *([f"Limits: {lacks}."] if lacks else []), f"Source: {variant.source}", ""]
    return "\n".join(lines)


MARKS = {"ok": "✓", "missing": "✗", "optional": "–"}


def doctor() -> Doctor:
    """Check this machine: what is missing, for what, and how to mend it."""
    found = api.doctor()
    for name, value in {**found.environment, "variants": len(found.variants)}.items():
        console.print(f"{name:12s} {value}", highlight=False)
    console.print()
    for check in found.checks:
        console.print(f"{MARKS[check.state]} {check.name:18s} {check.found}", highlight=False, soft_wrap=True)
        if check.fix:
            console.print(f"    {check.fix}", highlight=False, soft_wrap=True)
    missing = sum(check.state == "missing" for check in found.checks)
    console.print()
    console.print(f"{missing} problem(s)." if missing else "Ready. What has a dash is optional.")
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
