"""Commands that cost, plan, launch, watch and stop an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from workbench.ablation.estimate import describe_total
from workbench.api import ablations as api
from workbench.api.answers import Cost, Error, Launch, Noise, Plan, Proposal, Status, Stopped, plain, plain_rows
from workbench.cli.output import (
    Failure,
    File,
    Folder,
    Notify,
    Overrides,
    Results,
    console,
    note,
    parse_numbers,
    print_line,
    print_text,
)
from workbench.cli.watching import follow, run_until_done
from workbench.results.data_card import describe, repetition, warnings

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun


def cost(file: File, overrides: Overrides = None, results: Results = Path("results")) -> Cost:
    """Print what an ablation costs before anything runs, and what does not match."""
    from workbench.config import ConfigError, Problem

    card = api.cost(file, overrides or (), results, progress=note)
    print_cost(card.arms, card.workers)
    for caution in card.cautions:
        note(caution)
    if card.problems:
        raise ConfigError([Problem(p.field, p.got, p.expected, p.hint) for p in card.problems])
    return card


def run(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: launch.workers of the file.")] = None,
    detach: Annotated[bool, typer.Option(help="Start the workers and return at once.")] = False,
    notify: Notify = None,
) -> Launch:
    """Launch or resume an ablation; watch it; print the verdict and write the report.

    Finished trials are never repeated. Ctrl-C stops the workers after a checkpoint; the same command resumes.
    """
    from workbench.ablation.ablation import Ablation
    from workbench.notifiers import use

    use(notify)
    ablation = Ablation.load(file, overrides or (), results).with_workers(workers)
    launched = ablation.create(note)
    print_cost(launched.record.cost, ablation.workers)
    if caution := launched.record.config.confirmation.caution:
        note(caution)
    print_data(launched.data_cards)
    return work_through(launched, ablation.workers if workers is None else workers, detach)


def work_through(launched: AblationRun, workers: int, detach: bool) -> Launch:
    """Run a launched ablation to its end, print its verdict and write the report; or only start its workers."""
    from workbench.dashboards import write_report

    is_over = run_until_done(launched, workers, detach)
    answer = Launch(
        status=api.status_of(launched),
        cost=plain(launched.record.cost),
        data={arm: [*describe(card), *warnings(card)] for arm, card in launched.data_cards.items()},
    )
    if not is_over:
        return answer
    verdict = api.verdict_of(launched)
    console.rule(f"Verdict: {launched.name}")
    if launched.question:
        console.print(launched.question, style="italic", markup=False)
    if verdict.verdict is None:
        print("No verdict: no confirmation run has ended.")
    else:
        print_text("\n".join([verdict.summary, "", "Details", "", verdict.text, "", *verdict.savings]))
    path = write_report(launched, launched.folder / "report.html")
    print(f"\nReport: {path}")
    return answer.model_copy(update={"verdict": verdict, "report": str(path)})


def pilot(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    seeds: Annotated[int, typer.Option(help="Seeds per arm, different from the ablation's.")] = 8,
    arms: Annotated[
        int, typer.Option(help="Arms beside the baseline, the first ones; they show the correlation of paired seeds.")
    ] = 1,
) -> Plan:
    """Measure the noise before an ablation: its baseline (and an arm) on separate seeds; the report split stays sealed.

    The pilot is an ablation named NAME-pilot; `workbench plan` reads it. Ctrl-C stops it; the same command resumes.
    """
    from workbench.ablation.ablation import Ablation

    small = Ablation.load(file, overrides or (), results).pilot(seeds, arms)
    run_until_done(small.create(note), small.workers)
    return plan(file, overrides, results)


def plan(
    file: File,
    overrides: Overrides = None,
    results: Results = Path("results"),
    pilots: Annotated[
        list[Path] | None, typer.Option("--pilot", help="Ablations that measured the noise. Default: NAME-pilot.")
    ] = None,
    sd: Annotated[float | None, typer.Option(help="Noise from elsewhere: sd over seeds, in the metric's unit.")] = None,
    rho: Annotated[float, typer.Option(help="Correlation of arms over paired seeds, with --sd.")] = 0.0,
) -> Plan:
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
    sentences, frame = seed_plan.sentences(), seed_plan.table()
    print("\n".join(sentences))
    title = "By number of paired seeds: difference shown with 80 % power, expected power for the declared effect"
    table = Table("seeds", f"detectable, {metric.unit}", "expected power", title=title)
    for seeds, detectable, power in frame.iter_rows():
        declared = " ← declared" if seeds == len(config.confirmation.seeds) else ""
        shown = "none possible" if detectable is None else f"{detectable:.3g}"
        table.add_row(f"{seeds}{declared}", shown, "–" if power is None else f"{power:.0%}")
    console.print(table)
    print(f"Declared: {len(config.confirmation.seeds)} seeds.")
    return Plan(declared=len(config.confirmation.seeds), sentences=list(sentences), table=plain_rows(frame))


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
) -> Noise:
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
    explained = sentences(estimates, launched.metric.unit)
    print("\n".join(explained))
    return Noise(table=plain_rows(estimates), sentences=list(explained))


def propose(
    change: Annotated[list[str], typer.Argument(help="Fields of a run: model.pattern=gdn; or YAML files with them.")],
    against: Annotated[Path, typer.Option(help="The baseline as YAML: an ablation or a single run.")],
    why: Annotated[str, typer.Option(help="The reason for the change, kept as a note.")] = "",
    results: Results = Path("results"),
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the ablation to change: margin=0.01.")
    ] = None,
    looks: Annotated[
        str, typer.Option(help="Paired seeds at the looks. Default: the file's sequential design, else 4,6,8.")
    ] = "",
    anytime: Annotated[int | None, typer.Option(help="An anytime-valid design with at most so many seeds.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the ablation. Default: from baseline and change.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    detach: Annotated[bool, typer.Option(help="Start the workers and return at once.")] = False,
) -> Proposal:
    """Decide about one change: run it against a baseline in a declared sequential design; keep, discard or undecided.

    The same call resumes, and answers again once it is decided.
    """
    from workbench.api import proposals

    numbers = parse_numbers("--looks", looks)
    ablation = proposals.prepare(
        change, against, results, fields=fields or (), looks=numbers, anytime=anytime, name=name
    ).with_workers(workers)
    launched = proposals.create(ablation, why, note)
    run_until_done(launched, ablation.workers if workers is None else workers, detach)
    found = proposals.decide(launched)
    print_line(f"{found.decision}: {found.reason}")
    print_line(f"{found.folder}  (proposal {found.number} against this baseline)")
    return found


def worker(folder: Folder) -> Status:
    """Run trials of a launched ablation until none is left. Any number of workers may run at the same time."""
    from workbench.ablation.execution.process import work

    work(folder)
    return api.status(folder)


def watch(folder: Folder) -> Status:
    """Follow a launched ablation from any shell. Ctrl-C stops the watching, not the work."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    try:
        follow(launched)
    except KeyboardInterrupt:
        console.print("\nNo longer watching; the workers continue.")
        return api.status_of(launched)
    if launched.finished:
        console.print(f"Finished. Read it with: workbench verdict {folder}", soft_wrap=True)
        return api.status_of(launched)
    message = "No worker is alive. `workbench run` with the same file resumes."
    console.print(message)
    raise Failure(Error(kind="unfinished", field=str(folder), message=message))


def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a launched ablation, or of a run.")],
) -> Status:
    """Print in one line how far an ablation or a run has come: runs ended, time elapsed, time left."""
    found = api.status(folder)
    print_line(found.line)
    return found


def stop(folder: Folder) -> Stopped:
    """Stop the workers of an ablation; running trials write a checkpoint first."""
    ended = api.stop(folder)
    console.print(f"{ended.stopped} worker(s) stopped.")
    if ended.remaining:
        console.print(f"Still writing a checkpoint: process {', '.join(map(str, ended.remaining))}.")
    return ended


ARM_WIDTH = 16
"""Terminal columns per arm of the cost table; arms that do not fit go into a further table."""


def print_cost(card: Sequence[dict[str, Any]], workers: int) -> None:
    """Print a cost card, the rows of :func:`workbench.ablation.cost.card.cost_table`."""
    from workbench.ablation.cost.printed import QUANTITIES

    arms_per_table = max(1, (console.width - 32) // ARM_WIDTH)
    for first in range(0, len(card), arms_per_table):
        part = card[first : first + arms_per_table]
        arms = (Column(row["arm"], justify="right", overflow="fold") for row in part)
        table = Table(Column("per trial", no_wrap=True), *arms, title="Cost")
        for name, text in QUANTITIES.items():
            table.add_row(name, *(text(row) for row in part))
        console.print(table)
    for line in repetition({row["arm"]: row.get("epochs") for row in card}):
        console.print(line, soft_wrap=True)
    if total := describe_total(card, workers):
        console.print(total, soft_wrap=True)


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
