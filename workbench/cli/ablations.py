"""Commands that cost, plan, launch, watch and stop an ablation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from workbench.cli.output import File, Folder, Overrides, Results, console, note
from workbench.cli.watching import follow, work_off
from workbench.formatting import count, duration, flops, share, size

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun


def cost(file: File, overrides: Overrides = None, results: Results = Path("results")) -> None:
    """What an ablation costs, before anything runs; and what does not match."""
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.matching.cost_card import check_budget

    ablation = Ablation.load(file, overrides or (), results)
    table = ablation.cost(progress=note)
    print_cost(table, ablation.workers)
    check_budget(ablation.config, table)


def run(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    workers: Annotated[int | None, typer.Option(help="Worker processes; default as the file says.")] = None,
    detach: Annotated[bool, typer.Option(help="Start the workers and return at once.")] = False,
) -> None:
    """Launch an ablation, or go on with it; watch it; print the verdict and write the report.

    Finished trials are never repeated. Ctrl-C stops the workers after a checkpoint; the same command goes on.
    """
    from workbench.ablation.ablation import Ablation

    ablation = Ablation.load(file, overrides or (), results).shared_by(workers)
    launched = ablation.create(note)
    print_cost(launched.cost(), ablation.workers)
    if work_off(launched, ablation.workers if workers is None else workers, detach):
        _conclude(launched)


def pilot(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    seeds: Annotated[int, typer.Option(help="Seeds an arm, none of the ablation's own.")] = 8,
    arms: Annotated[int, typer.Option(help="Arms beside the baseline, the first ones; they tell the pairing.")] = 1,
) -> None:
    """Measure the noise before an ablation: its baseline (and an arm) on seeds of their own, the report split left sealed.

    The pilot is an ablation named NAME-pilot; `workbench plan` reads it. Ctrl-C stops it; the same command goes on.
    """
    from workbench.ablation.ablation import Ablation

    small = Ablation.load(file, overrides or (), results).pilot(seeds, arms)
    work_off(small.create(note), small.workers)
    plan(file, overrides, results)


def plan(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    pilots: Annotated[
        list[Path] | None, typer.Option("--pilot", help="Ablations whose noise is taken; default NAME-pilot.")
    ] = None,
    sd: Annotated[float | None, typer.Option(help="Noise from elsewhere: sd over seeds, in the metric's unit.")] = None,
    rho: Annotated[float, typer.Option(help="Correlation of arms over paired seeds, with --sd.")] = 0.0,
) -> None:
    """How many seeds the question needs, from a pilot's noise: exact t-power."""
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.analysis.power import Pilot, pilot_of, plan_seeds, values_of
    from workbench.ablation.run import AblationRun
    from workbench.config import ConfigError

    ablation = Ablation.load(file, overrides or (), results)
    config = ablation.config
    try:
        if sd is not None:
            noise = Pilot.assumed(sd, rho)
        else:
            there = pilots or [results / f"{config.name}-pilot"]
            noise = pilot_of(values_of([AblationRun(folder) for folder in there]), config.order[0])
    except ConfigError:
        if pilots or sd is not None:
            raise
        raise ConfigError.at(
            "--pilot",
            got="no pilot",
            expected="the noise of the metric over seeds",
            do="Run `workbench pilot` with this file, name an earlier ablation, or give --sd.",
        ) from None
    except ValueError as error:
        raise ConfigError.at("--pilot", got=str(error), expected="the noise of the metric over seeds") from None
    unit = config.run(config.order[0], seed=config.tuning.seed).data.metric.unit
    found = plan_seeds(
        noise,
        arms=len(config.order) - 1,
        alpha=config.alpha,
        effect=config.protocol.effect,
        margin=config.margin,
        unit=unit,
    )
    print("\n".join(found.sentences()))
    shown = Table("seeds", f"shows, {unit}", title="What so many paired seeds could show (80 % power)")
    for seeds, able in found.table().iter_rows():
        shown.add_row(f"{seeds}{' ← declared' if seeds == len(config.confirmation.seeds) else ''}", f"{able:.3g}")
    console.print(shown)
    print(f"Declared: {len(config.confirmation.seeds)} seeds.")


def worker(folder: Folder) -> None:
    """Take trials of a launched ablation until none is left. Any number may work at the same time."""
    from workbench.ablation.run import AblationRun

    AblationRun(folder).work()


def watch(folder: Folder) -> None:
    """Follow a launched ablation from any shell. Ctrl-C stops the watching, not the work."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    try:
        follow(launched)
    except KeyboardInterrupt:
        console.print("\nNo longer watching; the work goes on.")
        return
    if launched.finished:
        console.print(f"Finished. Read it with: workbench verdict {folder}", soft_wrap=True)
    else:
        console.print("No worker is at work. `workbench run` with the same file goes on.")
        raise typer.Exit(1)


def stop(folder: Folder) -> None:
    """Stop the workers of an ablation; running trials write a checkpoint first."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    count = len(launched.workers())
    left = launched.stop()
    console.print(f"{count - len(left)} worker(s) stopped.")
    if left:
        console.print(f"Still writing a checkpoint: process {', '.join(map(str, left))}.")


ARM_WIDTH = 16
"""Columns of a terminal that an arm of the cost table takes; arms that have no room beside the others come below."""


def print_cost(frame: Any, workers: int) -> None:
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "parameters, no embedding": lambda row: count(row["non_embedding"]),
        "… active for a token": lambda row: count(row["active"]),
        "forward FLOPs a token": lambda row: flops(row["flops_per_token"]),
        "training FLOPs": lambda row: flops(row["training_flops"]),
        "decode cache": lambda row: size(row["cache_bytes"]),
        "… if windows kept all": lambda row: size(row.get("unevicted_bytes")),
        "training tokens": lambda row: count(row["tokens"]),
        "tokens a second": lambda row: count(row.get("tokens_per_second")),
        "time": lambda row: duration(row["seconds_per_trial"]),
        "memory": lambda row: size(row["memory_bytes"]) + ("" if row.get("memory_measured") else " (estimate)"),
        "disk, while it runs": lambda row: size(row.get("disk_bytes")),
        "trials": lambda row: str(row["trials"]),
        "set by the budget": lambda row: row.get("solved") or "–",
        "off the budget": lambda row: share(row["residual"]),
        "parameters, to baseline": lambda row: share(row.get("off_parameters")),
        "active, to baseline": lambda row: share(row.get("off_active_parameters")),
        "training FLOPs, to baseline": lambda row: share(row.get("off_flops")),
        "seconds, to baseline": lambda row: share(row.get("off_seconds")),
        "not matched": lambda row: row["mismatch"] or "–",
    }
    beside = max(1, (console.width - 32) // ARM_WIDTH)
    for part in frame.iter_slices(beside):
        arms = (Column(arm, justify="right", overflow="fold") for arm in part["arm"])
        shown = Table(Column("a trial", no_wrap=True), *arms, title="Cost")
        for name, text in rows.items():
            shown.add_row(name, *(text(row) for row in part.iter_rows(named=True)))
        console.print(shown)
    if frame["seconds_total"].null_count() == 0:
        total = frame["seconds_total"].sum() / max(1, workers)
        console.print(
            f"Training in all: about {duration(total)} with {workers} worker(s), start-up and evaluation not counted."
        )


def _conclude(launched: AblationRun) -> None:
    from workbench.dashboards import write_report

    found = launched.verdict()
    console.rule(f"Verdict: {launched.name}")
    if launched.question:
        console.print(launched.question, style="italic", markup=False)
    print(found if found is not None else "No verdict: no confirmation run has ended.")
    path = write_report(launched, launched.folder / "report.html")
    print(f"\nReport: {path}")
