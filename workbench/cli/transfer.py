"""Commands for hyper-parameter transfer: the table of a parametrisation, the coordinate check, the drift of an
optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from workbench.api.answers import Coordinates, Parametrisation, Transfer, plain_rows
from workbench.cli.output import Folder, console, note

Run = Annotated[Path, typer.Argument(help="One training run as YAML, such as sweeps/runs/mup_tiny.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to change: model.width=512.")]
Html = Annotated[Path | None, typer.Option(help="Write the figure to this HTML file.")]


def parametrisation(file: Run, overrides: Overrides = None) -> Parametrisation:
    """Print a model's multipliers, and what every kind of parameter gets: initial values, optimiser settings."""
    from workbench.model.parametrisation_table import parametrisation_notes, parametrisation_table
    from workbench.optimisers import optimisers
    from workbench.training.config import RunConfig

    config = RunConfig.load(file, overrides or ())
    optimiser = optimisers[config.training.optimiser.kind](config.training.optimiser)
    frame = parametrisation_table(
        config.model, optimiser.update_family, optimiser.update_outputs, optimiser.rate_factor
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("parameter", overflow="fold")  # in full at any width of the terminal
    for column in ("initial ×", "rate", "decay", "epsilon"):
        table.add_column(column, justify="right")
    for row in frame.iter_rows(named=True):
        kind = f"{row['role']}, {row['shape']}"
        if row["fan_in"] is not None:
            kind += f", fan-in {row['fan_in']} / {row['base_fan_in']}"
        decay = 0.0 if row["weight_decay"] is None else row["weight_decay"] * config.training.weight_decay
        epsilon = "–" if optimiser.epsilon is None else f"{optimiser.epsilon * row['epsilon']:.3g}"
        name = row["parameter"] + (f"  ({row['layers']})" if row["layers"] > 1 else "")
        rates = [row["learning_rate"] * config.training.learning_rate * part for part in row["part_rates"] or [1.0]]
        rate = ", ".join(f"{rate:.3g}" for rate in rates)
        described = Text.assemble(name, (f"\n{kind}", "dim"))
        table.add_row(described, f"{row['initial']:.4g}", rate, f"{decay:.3g}", epsilon)
    console.print(table)
    console.print("rate: learning rate; decay: weight decay; fan-in: of the model / of the base.", soft_wrap=True)
    notes = list(parametrisation_notes(config.model))
    for line in notes:
        console.print(line, soft_wrap=True)
    if config.training.lr_factors:
        console.print("training.lr_factors multiplies these learning rates where its patterns match.", soft_wrap=True)
    return Parametrisation(table=plain_rows(frame), notes=notes)


def coordinates(
    file: Run,
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="Widths to compare.")] = "64,128,256,512",
    depths: Annotated[str, typer.Option(help="Depths to compare instead, at the file's width.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds.")] = 3,
    against_standard: Annotated[
        bool, typer.Option(help="Draw and print the standard parametrisation beside the file's.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    html: Html = None,
) -> Coordinates:
    """Check that activations and their first changes keep their size over width or depth. Exit status 1 if they do not.

    The base of the file's parametrisation is kept; its learning rate is used at every size.
    """
    from workbench.config import ConfigError
    from workbench.dashboards.figures.transfer import coordinate_figure
    from workbench.training.config import RunConfig
    from workbench.training.coordinates import coordinate_check

    config = RunConfig.load(file, overrides or ())
    listed = depths or widths
    try:
        sizes = [int(size) for size in listed.split(",")]
    except ValueError:
        raise ConfigError.at("depths" if depths else "widths", got=listed, expected="numbers: 64,128,256") from None
    runs = {config.model.parametrisation.kind: config}
    if against_standard:
        standard = config.model.changed(parametrisation={"kind": "standard"})
        runs = {**runs, "standard": config.changed(model=standard)}
    checks: dict[str, Any] = {}
    for name, run in runs.items():
        note(name)
        checks[name] = coordinate_check(
            run,
            sizes,
            "depth" if depths else "width",
            steps=steps,
            seeds=tuple(range(seeds)),
            device=device,
            progress=note,
        )
        table = Table("quantity", "step", "slope", "95 %", "bound", "", title=name)
        for row in checks[name].slopes().iter_rows(named=True):
            span = "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
            verdict = {None: "", True: "flat", False: "not flat"}[row["flat"]]
            bound = "" if row["bound"] is None else f"±{row['bound']:g}"
            table.add_row(row["quantity"], str(row["step"]), f"{row['slope']:+.3f}", span, bound, verdict)
        console.print(table)
    first = next(iter(checks.values()))
    if html is not None:
        figure = coordinate_figure({name: check.table for name, check in checks.items()}, first.over)
        figure.write_html(html, include_plotlyjs=True)
        console.print(str(html), soft_wrap=True)
    slopes = {name: plain_rows(check.slopes()) for name, check in checks.items()}
    return Coordinates(flat=bool(first.is_flat), slopes=slopes)


def transfer(
    folder: Folder,
    field: Annotated[str, typer.Option(help="Tuned field.")] = "training.learning_rate",
    html: Html = None,
) -> Transfer:
    """Report how far the optimum drifts over sizes, and the loss given away by keeping that of the smallest model."""
    from workbench.ablation.analysis.transfer import transfer as over_sizes
    from workbench.ablation.run import AblationRun
    from workbench.dashboards.figures.transfer import transfer_figure

    found = over_sizes(AblationRun(folder), field)
    console.print(str(found), soft_wrap=True)
    if html is not None:
        transfer_figure(found).write_html(html, include_plotlyjs=True)
        console.print(str(html), soft_wrap=True)
    return Transfer(field=found.field, metric=found.unit, table=plain_rows(found.table), text=str(found))
