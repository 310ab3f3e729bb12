"""Commands that list the registered variants and check this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from workbench.cli.output import console

if TYPE_CHECKING:
    from workbench.registry import Registry


def variants() -> None:
    """List registered mixers, feed-forwards, embeddings, decoding policies, data sources, corpora and launchers."""
    from workbench.ablation.spec.launch import launchers
    from workbench.contract import embeddings, feedforwards, mixers
    from workbench.data import sources
    from workbench.data.corpora import corpora
    from workbench.decoding.policy import policies

    table = Table("kind", "name", "description and settings", "capabilities")
    registries: list[Registry[Any]] = [mixers, feedforwards, embeddings, policies, sources, corpora, launchers]
    for registry in registries:
        for name in registry:
            cls = registry[name]
            capabilities = getattr(cls, "capabilities", None)
            abilities = [word for word in ("causal", "segments", "decode") if getattr(capabilities, word, False)]
            table.add_row(registry.noun, name, f"{_first_line(cls)}\n[dim]{_settings(cls)}[/]", "\n".join(abilities))
    console.print(table)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _settings(cls: Any) -> str:
    return ", ".join(name for name in cls.Config.model_fields if name != "kind")


def doctor() -> None:
    """Check this machine: versions, device, plug-ins, space."""
    import os
    import shutil

    from workbench.contract import feedforwards, mixers
    from workbench.environment import environment
    from workbench.registry import broken_plugins

    where = environment()
    libraries = where.pop("libraries")
    for name, value in {**where, **libraries, "cores": os.cpu_count()}.items():
        console.print(f"{name:12s} {value}", highlight=False)
    console.print(f"{'variants':12s} {', '.join([*mixers, *feedforwards])}", highlight=False)
    free = shutil.disk_usage(".").free / 1e9
    console.print(
        f"{'free disk':12s} {free:.1f} GB{'' if free > 2 else '  (too little: at least 2 GB are needed)'}",
        highlight=False,
    )
    for name, why in broken_plugins.items():
        console.print(f"broken plug-in {name}: {why}", style="bold", markup=False)
    if broken_plugins or free < 2:
        raise typer.Exit(1)
