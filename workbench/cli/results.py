"""Commands that read what has been run: verdict, report, dashboard, archive, all runs; and judge the verdict itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from workbench.cli.output import Folder, Results, console, note


def verdict(folder: Folder) -> None:
    """Who is better, by how much, with what certainty."""
    from workbench.ablation.analysis.diagnostics import notes
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    found = launched.verdict()
    if found is None:
        console.print("No verdict yet: confirmation runs are missing.")
        raise typer.Exit(1)
    print("\n".join([str(found), "", *notes(launched)]).rstrip())


def calibrate(
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("results/calibration"),
    ablations: Annotated[int, typer.Option(min=20, help="Synthetic ablations a scenario.")] = 1000,
    train: Annotated[int, typer.Option(help="Train the pool of real runs anew, on so many seeds (two runs each).")] = 0,
) -> None:
    """Judge the judge: false positives of ablations of equal arms, power where an effect is planted."""
    import polars as pl

    from workbench.ablation.analysis.calibration import train_pool, write

    path = output / "pool.parquet"
    pool = train_pool(train, note) if train else pl.read_parquet(path) if path.exists() else None
    found = write(output, ablations, pool, note)
    shown = Table(
        "ablations", "of", "claims", "finds the first arm", "calls it equivalent", title="The verdict on known answers"
    )
    for row in found["synthetic_tables"] + found["resampled_runs"]:
        shown.add_row(
            row["name"],
            str(row["rates"]["claims"]["of"]),
            *(_rate(row["rates"][name]) for name in ("claims", "found", "equivalent")),
        )
    console.print(shown)
    if pool is None:
        console.print("No pool of real runs there; --train 48 makes one.")
    print(output / "calibration.json")


def _rate(rate: dict[str, Any]) -> str:
    text = f"{rate['rate']:.3f} ({rate['low']:.3f}–{rate['high']:.3f})"
    return text if "expected" not in rate else f"{text}, wanted {rate['expected']:.3f}{'' if rate['within'] else ' !'}"


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Finished ablations of the same arms at other sizes or horizons.")
    ],
    x: Annotated[str, typer.Option(help="What a scaling law is fitted over: flops, parameters or tokens.")] = "flops",
    at: Annotated[float | None, typer.Option(help="Where to carry the law on to.")] = None,
) -> None:
    """Does the order of the arms hold over scales and horizons? And where does each arm's scaling law lead?"""
    from workbench.ablation.analysis.compare import compare as over_scales
    from workbench.ablation.run import AblationRun

    print(over_scales([AblationRun(folder) for folder in folders], x, at))


def report(
    folder: Folder, output: Annotated[Path | None, typer.Option(help="File; default report.html there.")] = None
) -> None:
    """Write the self-contained HTML report."""
    from workbench.ablation.run import AblationRun
    from workbench.dashboards import write_report

    launched = AblationRun(folder)
    console.print(str(write_report(launched, output or launched.folder / "report.html")), soft_wrap=True)


def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of all results, or of one ablation.")] = Path("results"),
    ip: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback let other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The first that is free from here on is taken.")] = 8866,
    token: Annotated[str | None, typer.Option(help="What the page asks for; default a new random one.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """The dashboard as a page of its own, on this machine only and behind a token."""
    from workbench.dashboards.live.serve import serve as serve_page

    serve_page(folder, ip=ip, port=port, token=token, browser=browser)


def archive(
    folder: Folder,
    into: Annotated[Path, typer.Argument(help="Folder to write, such as results/ablations/quickstart.")],
) -> None:
    """Keep of a finished ablation what is worth committing: configuration, runs, measurements, verdict; no checkpoints."""
    from workbench.ablation.analysis.archive import archive as keep
    from workbench.ablation.run import AblationRun

    console.print(str(keep(AblationRun(folder), into)), soft_wrap=True)


def table(
    results: Results = Path("results"), csv: Annotated[bool, typer.Option(help="All columns as CSV.")] = False
) -> None:
    """All runs of all ablations."""
    from workbench.results.tables import table as all_runs

    frame = all_runs(results)
    if not len(frame):
        console.print(f"No run below {results}. `workbench run` makes some.", soft_wrap=True)
        raise typer.Exit(1)
    if csv:
        print(frame.write_csv(), end="")
        return
    columns = [
        "ablation",
        "arm",
        "stage",
        "seed",
        "status",
        "tokens",
        "loss",
        "metric",
        "selection_value",
        "report_value",
    ]
    shown = Table(*columns)
    for row in frame.select(columns).iter_rows():
        shown.add_row(*("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    console.print(shown)
