"""Commands that cost, plan, launch, watch and stop an ablation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from workbench.cli.output import File, Folder, Overrides, Results, console, note, print_text
from workbench.cli.watching import follow, run_until_done
from workbench.formatting import count, duration, flops, share, size
from workbench.results.data_card import describe, repetition, times, warnings

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun


def cost(file: File, overrides: Overrides = None, results: Results = Path("results")) -> None:
    """Print what an ablation costs before anything runs, and what does not match."""
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.cost.card import check_budget

    ablation = Ablation.load(file, overrides or (), results)
    table = ablation.cost(progress=note)
    print_cost(table, ablation.workers)
    check_budget(ablation.arms, table)


def run(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: launch.workers of the file.")] = None,
    detach: Annotated[bool, typer.Option(help="Start the workers and return at once.")] = False,
) -> None:
    """Launch or resume an ablation; watch it; print the verdict and write the report.

    Finished trials are never repeated. Ctrl-C stops the workers after a checkpoint; the same command resumes.
    """
    from workbench.ablation.ablation import Ablation

    ablation = Ablation.load(file, overrides or (), results).with_workers(workers)
    launched = ablation.create(note)
    print_cost(launched.cost(), ablation.workers)
    print_data(launched.data_cards)
    if run_until_done(launched, ablation.workers if workers is None else workers, detach):
        _conclude(launched)


def pilot(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    seeds: Annotated[int, typer.Option(help="Seeds per arm, different from the ablation's.")] = 8,
    arms: Annotated[
        int, typer.Option(help="Arms beside the baseline, the first ones; they show the correlation of paired seeds.")
    ] = 1,
) -> None:
    """Measure the noise before an ablation: its baseline (and an arm) on separate seeds; the report split stays sealed.

    The pilot is an ablation named NAME-pilot; `workbench plan` reads it. Ctrl-C stops it; the same command resumes.
    """
    from workbench.ablation.ablation import Ablation

    small = Ablation.load(file, overrides or (), results).pilot(seeds, arms)
    run_until_done(small.create(note), small.workers)
    plan(file, overrides, results)


def plan(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    pilots: Annotated[
        list[Path] | None, typer.Option("--pilot", help="Ablations that measured the noise. Default: NAME-pilot.")
    ] = None,
    sd: Annotated[float | None, typer.Option(help="Noise from elsewhere: sd over seeds, in the metric's unit.")] = None,
    rho: Annotated[float, typer.Option(help="Correlation of arms over paired seeds, with --sd.")] = 0.0,
) -> None:
    """Print how many seeds the question needs, given a pilot's noise and its uncertainty."""
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
            folders = pilots or [results / f"{config.name}-pilot"]
            noise = pilot_of(values_of([AblationRun(folder) for folder in folders]), config.order[0])
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
    metric = ablation.arms.metric
    seed_plan = plan_seeds(
        noise,
        arms=len(config.order) - 1,
        alpha=config.alpha,
        effect=config.protocol.effect,
        margin=config.margin,
        unit=metric.unit,
        upper=metric.upper,
    )
    print("\n".join(seed_plan.sentences()))
    title = "By number of paired seeds: difference shown with 80 % power, expected power for the declared effect"
    table = Table("seeds", f"detectable, {metric.unit}", "expected power", title=title)
    for seeds, detectable, power in seed_plan.table().iter_rows():
        declared = " ← declared" if seeds == len(config.confirmation.seeds) else ""
        shown = "none possible" if detectable is None else f"{detectable:.3g}"
        table.add_row(f"{seeds}{declared}", shown, "–" if power is None else f"{power:.0%}")
    console.print(table)
    print(f"Declared: {len(config.confirmation.seeds)} seeds.")


def components(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    init: Annotated[int, typer.Option(help="Seeds of the initial weights.")] = 3,
    order: Annotated[int, typer.Option(help="Seeds of the data order.")] = 3,
    other: Annotated[int, typer.Option(help="Seeds of everything else: dropout, router noise, sampling.")] = 2,
    arms: Annotated[
        int, typer.Option(help="Arms beside the baseline, the first ones; adds the noise of paired differences.")
    ] = 0,
) -> None:
    """Measure what the noise consists of: every combination of a few seeds of each component is one run.

    The runs are an ablation named NAME-components on the pilot's documents. Ctrl-C stops it; the same command resumes.
    """
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.analysis.components import component_table, sentences

    study = Ablation.load(file, overrides or (), results).components(init, order, other, arms)
    launched = study.create(note)
    run_until_done(launched, study.workers)
    headers = ("quantity", "component", "levels", f"sd, {launched.metric.unit}", "95 %", "share", "95 %")
    table = Table(*headers, title="Components of the noise")
    estimates = component_table(launched)
    for row in estimates.iter_rows(named=True):
        known = row["share"] is not None
        table.add_row(
            row["quantity"],
            row["component"],
            str(row["levels"]),
            f"{row['sd']:.2g}",
            f"{row['sd_low']:.2g} to {row['sd_high']:.2g}",
            f"{100 * row['share']:.0f} %" if known else "–",
            f"{100 * row['share_low']:.0f} to {100 * row['share_high']:.0f} %" if known else "–",
        )
    console.print(table)
    print("\n".join(sentences(estimates, launched.metric.unit)))


def worker(folder: Folder) -> None:
    """Run trials of a launched ablation until none is left. Any number of workers may run at the same time."""
    from workbench.ablation.execution.process import work

    work(folder)


def watch(folder: Folder) -> None:
    """Follow a launched ablation from any shell. Ctrl-C stops the watching, not the work."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    try:
        follow(launched)
    except KeyboardInterrupt:
        console.print("\nNo longer watching; the workers continue.")
        return
    if launched.finished:
        console.print(f"Finished. Read it with: workbench verdict {folder}", soft_wrap=True)
    else:
        console.print("No worker is alive. `workbench run` with the same file resumes.")
        raise typer.Exit(1)


def stop(folder: Folder) -> None:
    """Stop the workers of an ablation; running trials write a checkpoint first."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    count = len(launched.workers())
    remaining = launched.stop()
    console.print(f"{count - len(remaining)} worker(s) stopped.")
    if remaining:
        console.print(f"Still writing a checkpoint: process {', '.join(map(str, remaining))}.")


ARM_WIDTH = 16
"""Terminal columns per arm of the cost table; arms that do not fit go into a further table."""


def print_cost(frame: Any, workers: int) -> None:
    """Print a cost card (:func:`workbench.ablation.cost.card.cost_table`)."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "parameters, no embedding": lambda row: count(row["non_embedding"]),
        "… active per token": lambda row: count(row["active"]),
        "forward FLOPs per token": lambda row: flops(row["flops_per_token"]),
        "training FLOPs": lambda row: flops(row["training_flops"]),
        "decode cache": lambda row: size(row["cache_bytes"]),
        "… without eviction": lambda row: size(row.get("unevicted_bytes")),
        "training tokens": lambda row: count(row["tokens"]),
        "… read from the text": lambda row: times(row["epochs"]) if row.get("epochs") else "–",
        "tokens per second": lambda row: count(row.get("tokens_per_second")),
        "time": lambda row: duration(row["seconds_per_trial"]),
        "tokens of ranks": lambda row: f"{row['token_imbalance']:.2f}" if row.get("token_imbalance") else "–",
        "memory": lambda row: size(row["memory_bytes"]) + ("" if row.get("memory_measured") else " (estimate)"),
        "disk while running": lambda row: size(row.get("disk_bytes")),
        "tuning trials": lambda row: f"{row['searched']} ({row['tuned']} field{'s' * (row['tuned'] != 1)})",
        "runs, repeats and confirmation too": lambda row: str(row["trials"]),
        "set by the budget": lambda row: row.get("solved") or "–",
        "mismatch to budget": lambda row: share(row["residual"]),
        "parameters vs baseline": lambda row: share(row.get("off_parameters")),
        "active vs baseline": lambda row: share(row.get("off_active_parameters")),
        "training FLOPs vs baseline": lambda row: share(row.get("off_flops")),
        "seconds vs baseline": lambda row: share(row.get("off_seconds")),
        "not matched": lambda row: row["mismatch"] or "–",
    }
    arms_per_table = max(1, (console.width - 32) // ARM_WIDTH)
    for part in frame.iter_slices(arms_per_table):
        arms = (Column(arm, justify="right", overflow="fold") for arm in part["arm"])
        table = Table(Column("per trial", no_wrap=True), *arms, title="Cost")
        for name, text in rows.items():
            table.add_row(name, *(text(row) for row in part.iter_rows(named=True)))
        console.print(table)
    for line in repetition({row["arm"]: row.get("epochs") for row in frame.iter_rows(named=True)}):
        console.print(line, soft_wrap=True)
    if frame["seconds_total"].null_count() == 0:
        total = frame["seconds_total"].sum() / max(1, workers)
        console.print(
            f"Total training time: about {duration(total)} with {workers} worker(s), without start-up and evaluation."
        )


def print_data(cards: Mapping[str, Any]) -> None:
    """Print what is measured, and how much of it is also in training; arms with the same data share the lines."""
    arms_of: dict[tuple[str, ...], list[str]] = {}
    for arm, card in cards.items():
        arms_of.setdefault((*describe(card), *(f"Caution: {line}" for line in warnings(card))), []).append(arm)
    for lines, arms in arms_of.items():
        if len(arms_of) > 1:
            console.print(f"Data of {', '.join(arms)}", soft_wrap=True)
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)


def _conclude(launched: AblationRun) -> None:
    """Print the verdict and write the report."""
    from workbench.ablation.analysis.savings import savings_sentences
    from workbench.dashboards import write_report

    verdict = launched.verdict()
    console.rule(f"Verdict: {launched.name}")
    if launched.question:
        console.print(launched.question, style="italic", markup=False)
    summary = None if verdict is None else launched.summary(verdict)
    if verdict is None or summary is None:
        print("No verdict: no confirmation run has ended.")
    else:
        print_text("\n".join([str(summary), "", "Details", "", str(verdict), "", *savings_sentences(launched)]))
    path = write_report(launched, launched.folder / "report.html")
    print(f"\nReport: {path}")
    if summary is None or summary.failed:
        raise typer.Exit(1)
