"""Commands that read results: verdict, comparison, report, dashboard, archive, table of all runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from workbench.cli.output import Folder, Results, console, print_text


def verdict(folder: Folder) -> None:
    """Print the verdict: which arm is better, by how much, with what certainty."""
    from workbench.ablation.analysis.diagnostics import notes
    from workbench.ablation.analysis.savings import savings_sentences
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    conclusion = launched.verdict()
    if conclusion is None:
        console.print("No verdict yet: confirmation runs are missing.")
        raise typer.Exit(1)
    summary = launched.summary(conclusion)
    assert summary is not None
    details = [str(conclusion), "", *savings_sentences(launched), "", *notes(launched)]
    print_text("\n".join([str(summary), "", "Details", "", *details]).rstrip())
    if summary.failed:
        raise typer.Exit(1)


def scores(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a launched ablation or of a run, such as results/quickstart.")
    ],
    output: Annotated[Path | None, typer.Option(help="Write the table there as well: .csv, .tex or .md.")] = None,
    arms: Annotated[bool, typer.Option("--arms", help="Arms as rows, tasks as columns.")] = False,
    lengths: Annotated[bool, typer.Option("--lengths", help="Lengths of the context apart.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Every metric of a task, not only its first.")] = False,
) -> None:
    """Print what evaluation suites measured: a mean over seeds with half its interval, for every task and arm."""
    from workbench.ablation.run import AblationRun
    from workbench.dashboards import RunView, SingleRuns, export_table, provenance_line
    from workbench.dashboards import table as table_of

    launched: RunView = SingleRuns(folder) if (folder / "run.json").exists() else AblationRun(folder)
    settings = {"rows": "arms" if arms else "tasks", "by_length": lengths, "every_metric": metrics}
    frame = table_of(launched, "suite_scores", **settings)
    if not len(frame):
        console.print("No suite has measured a run at its end. `workbench evaluate` does.", soft_wrap=True)
        raise typer.Exit(1)
    listed = Table(*frame.columns)
    for row in frame.iter_rows():
        listed.add_row(*row)
    console.print(listed)
    if output is not None:
        console.print(str(export_table(frame, output, provenance_line(launched))), soft_wrap=True)


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Finished ablations of the same arms at other sizes or horizons.")
    ],
    x: Annotated[str, typer.Option(help="Variable of the scaling law: flops, parameters or tokens.")] = "flops",
    at: Annotated[float | None, typer.Option(help="Where to extrapolate the law to.")] = None,
) -> None:
    """Compare ablations: whether the order of the arms holds over scales and horizons, and each arm's scaling law."""
    from workbench.ablation.analysis.compare import compare as over_scales
    from workbench.ablation.run import AblationRun

    print(over_scales([AblationRun(folder) for folder in folders], x, at))


def report(
    folder: Folder,
    output: Annotated[Path | None, typer.Option(help="File. Default: report.html in the folder.")] = None,
) -> None:
    """Write the self-contained HTML report."""
    from workbench.ablation.run import AblationRun
    from workbench.dashboards import write_report

    launched = AblationRun(folder)
    console.print(str(write_report(launched, output or launched.folder / "report.html")), soft_wrap=True)


def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of all results, or of one ablation.")] = Path("results"),
    ip: Annotated[
        str, typer.Option(help="Address to listen on; anything but loopback admits other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The first free port from this one on is used.")] = 8866,
    token: Annotated[str | None, typer.Option(help="Required by the page. Default: a new random one.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Serve the dashboard as a web page, by default to this machine only, and behind a token."""
    from workbench.dashboards.live.serve import serve as serve_page

    serve_page(folder, ip=ip, port=port, token=token, browser=browser)


def archive(
    folder: Folder,
    into: Annotated[Path, typer.Argument(help="Folder to write, such as results/ablations/quickstart.")],
) -> None:
    """Write the part of a finished ablation that is worth committing: configuration, runs, measurements, verdict."""
    from workbench.ablation.analysis.archive import archive as write_archive
    from workbench.ablation.run import AblationRun

    console.print(str(write_archive(AblationRun(folder), into)), soft_wrap=True)


def ledger(
    results: Annotated[Path, typer.Argument(help="Folder of all results.")] = Path("results"),
    openings: Annotated[bool, typer.Option(help="Every opening instead of a line for each launch.")] = False,
    csv: Annotated[bool, typer.Option(help="Every opening as CSV.")] = False,
) -> None:
    """List who opened which report documents with which runs, and verify that nothing was changed.

    A chain that is broken exits with an error that names the line; every other line is listed all the same.
    """
    from workbench.ablation.analysis.looks import launch_table, opening_table, verify

    frame = opening_table(results) if openings or csv else launch_table(results)
    if csv:
        print(frame.write_csv(), end="")
    elif len(frame):
        listed = Table(*(name.replace("_", " ") for name in frame.columns))
        for row in frame.iter_rows():
            listed.add_row(*("" if value is None else str(value) for value in row))
        console.print(listed)
    else:
        console.print(f"No report document has been opened in {results}.", soft_wrap=True)
    lines = verify(results)
    if not csv:
        console.print(f"{lines} lines, every one with the hash of the line before.", soft_wrap=True)


def table(
    results: Results = Path("results"), csv: Annotated[bool, typer.Option(help="All columns as CSV.")] = False
) -> None:
    """Print all runs of all ablations."""
    from workbench.ablation.run import table as all_runs

    frame = all_runs(results)
    if not len(frame):
        console.print(f"No run below {results}. `workbench run` creates some.", soft_wrap=True)
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
    all_columns = Table(*columns)
    for row in frame.select(columns).iter_rows():
        all_columns.add_row(*("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    console.print(all_columns)
