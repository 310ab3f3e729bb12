"""Commands that read results: verdict, comparison, report, dashboard, archive, table of all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from workbench.api import results as api
from workbench.api.ablations import verdict as verdict_of_folder
from workbench.api.answers import (
    Comparison,
    Ledger,
    Query,
    RunPage,
    RunTable,
    Scores,
    Served,
    VerdictAnswer,
    Written,
    plain_rows,
)
from workbench.cli.output import Folder, Results, console, print_line, print_table, print_text, written
from workbench.formatting import count, wrapped

if TYPE_CHECKING:
    from workbench.dashboards.tables.run import RunDetails


def verdict(
    folder: Folder,
    against: Annotated[
        Path | None, typer.Option(help="An ablation of somebody else, such as an archive: compare with it, unpaired.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="With --against: its arm. Default: its baseline.")] = None,
) -> VerdictAnswer:
    """Print the verdict: which arm is better, by how much, with what certainty.

    With --against, every arm is compared with an arm of another ablation instead, over seeds that are no pairs. It is
    refused unless metric, task, data and report documents are the same.
    """
    found = verdict_of_folder(folder, against, arm)
    if found.against is not None:
        print_text(found.against.text)
        return found
    if found.verdict is None:
        console.print("No verdict yet: confirmation runs are missing.")
    else:
        shown = [f"{arm} is shown as {name}." for arm, name in found.names.items() if name != arm]
        details = [found.text, "", *found.savings, "", *found.notes, *shown]
        print_text("\n".join([found.summary, "", "Details", "", *details]).rstrip())
    return found


def scores(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a launched ablation or of a run, such as results/quickstart.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write the table there as well: .tex, .md, .csv or .parquet.")
    ] = None,
    arms: Annotated[bool, typer.Option("--arms", help="Arms as rows, tasks as columns.")] = False,
    lengths: Annotated[bool, typer.Option("--lengths", help="Lengths of the context apart.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Every metric of a task, not only its first.")] = False,
) -> Scores:
    """Print what evaluation suites measured: a mean over seeds with half its interval, for every task and arm."""
    from workbench.ablation.run import AblationRun
    from workbench.dashboards import RunView, SingleRuns, export_table, provenance_line
    from workbench.dashboards import paper_table as paper_table_of
    from workbench.dashboards import table as table_of
    from workbench.results.tables import failed_suites

    launched: RunView = SingleRuns(folder) if (folder / "run.json").exists() else AblationRun(folder)
    settings = {"rows": "arms" if arms else "tasks", "by_length": lengths, "every_metric": metrics}
    printed = paper_table_of(launched, "suite_scores", **settings)
    if printed.rows:
        rows = [[cell.text for cell in row] for row in printed.rows]
        print_table([column.title for column in printed.columns], rows, repeated=1 if arms else 2)
    else:
        console.print("No suite has measured a run at its end. `workbench evaluate` does.", soft_wrap=True)
    for sentence in failed_suites(launched.runs()):
        console.print(sentence, soft_wrap=True)
    if not printed.rows:
        return Scores(rows=[])
    file = None if output is None else str(export_table(printed, output, provenance_line(launched)))
    if file is not None:
        console.print(file, soft_wrap=True)
    return Scores(rows=plain_rows(table_of(launched, "suite_scores", **settings)), file=file)


def paper_table(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="File: .tex (booktabs) or .md; .csv or .parquet with every digit.")],
) -> Written:
    """Write the verdict as a table for a paper: rounded to its intervals, the best arm in bold."""
    from workbench.ablation.run import AblationRun

    return written(AblationRun(folder).paper_table(output))


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Finished ablations of the same arms at other sizes or horizons.")
    ],
    x: Annotated[str, typer.Option(help="Variable of the scaling law: flops, parameters or tokens.")] = "flops",
    at: Annotated[float | None, typer.Option(help="Where to extrapolate the law to.")] = None,
) -> Comparison:
    """Compare ablations: whether the order of the arms holds over scales and horizons, and each arm's scaling law."""
    found = api.compare(folders, x, at)
    print(found.text)
    return found


def report(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option(help="File. Default: report.html in the folder; of an archive, results/reports/NAME.html."),
    ] = None,
) -> Written:
    """Write the self-contained HTML report."""
    from workbench.ablation.run import AblationRun
    from workbench.dashboards import write_report
    from workbench.dashboards.report.render import report_path

    launched = AblationRun(folder)
    return written(write_report(launched, output or report_path(launched)))


def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of all results, or of one ablation.")] = Path("results"),
    ip: Annotated[
        str, typer.Option(help="Address to listen on; anything but loopback admits other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The first free port from this one on is used.")] = 8866,
    token: Annotated[str | None, typer.Option(help="Required by the page. Default: a new random one.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> Served:
    """Serve the dashboard as a web page, by default to this machine only, and behind a token."""
    from workbench.dashboards.live.serve import serve as serve_page

    if any((folder / "ablations").glob("*/ablation.json")):
        console.print(f"Archives: workbench serve {folder / 'ablations'}", soft_wrap=True)
    serve_page(folder, ip=ip, port=port, token=token, browser=browser)
    return Served(folder=str(folder.absolute()))


def mcp(
    results: Annotated[Path, typer.Argument(help="Folder of all results.")] = Path("results"),
    http: Annotated[bool, typer.Option(help="Listen on this machine's loopback address instead.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port, with --http.")] = 8867,
    token: Annotated[str | None, typer.Option(help="With --http. Default: a new random one.")] = None,
) -> Served:
    """Serve tools of the Model Context Protocol: over standard input and output, or with --http behind a token."""
    from workbench.api.server import serve_http, serve_stdio

    if http:
        serve_http(results, port, token, lambda line: typer.echo(line, err=True))
    else:
        serve_stdio(results)
    return Served(folder=str(results.absolute()))


def archive(
    folder: Folder,
    into: Annotated[Path, typer.Argument(help="Folder to write, such as results/ablations/quickstart.")],
) -> Written:
    """Write the part of a finished ablation that is worth committing: configuration, runs, measurements, verdict."""
    from workbench.ablation.analysis.archive import archive as write_archive
    from workbench.ablation.run import AblationRun

    return written(write_archive(AblationRun(folder), into))


def sql(
    query: Annotated[str, typer.Argument(help="One SELECT over runs, scores, evaluations, ablations, verdicts.")],
    results: Results = Path("results"),
    csv: Annotated[bool, typer.Option(help="CSV instead of a table.")] = False,
) -> Query:
    """Print the rows of a SQL statement over all results. Nothing is written."""
    import polars as pl

    from workbench.api.sql import query as answer

    found = answer(query, results)
    if csv:
        columns = {name: [row[name] for row in found.rows] for name in found.columns}
        flat = {
            name: [json.dumps(value) if isinstance(value, list | dict) else value for value in values]
            for name, values in columns.items()
        }
        print(pl.DataFrame(flat, strict=False).write_csv(), end="")
        return found
    print_table(found.columns, [[_cell(row[name]) for name in found.columns] for row in found.rows])
    return found


def ledger(
    results: Annotated[Path, typer.Argument(help="Folder of all results.")] = Path("results"),
    openings: Annotated[bool, typer.Option(help="Every opening instead of a line for each launch.")] = False,
    csv: Annotated[bool, typer.Option(help="Every opening as CSV.")] = False,
) -> Ledger:
    """List who opened which report documents with which runs, and verify that nothing was changed.

    A chain that is broken exits with an error that names the line; every other line is listed all the same.
    """
    from workbench.ablation.analysis.looks import launch_table, opening_table, verify

    frame = opening_table(results) if openings or csv else launch_table(results)
    if csv:
        print(frame.write_csv(), end="")
    elif len(frame):
        rows = [["" if value is None else str(value) for value in row] for row in frame.iter_rows()]
        print_table([name.replace("_", " ") for name in frame.columns], rows)
    else:
        console.print(f"No report document has been opened in {results}.", soft_wrap=True)
    lines = verify(results)
    if not csv:
        console.print(f"{lines} lines, every one with the hash of the line before.", soft_wrap=True)
    return api.ledger(results)


def table(
    ablations: Annotated[
        list[str] | None,
        typer.Argument(help="Names in the folder of results, or paths: of ablations, archives, folders of them."),
    ] = None,
    results: Results = Path("results"),
    runs: Annotated[bool, typer.Option("--runs", help="One line per run instead of one per arm.")] = False,
    where: Annotated[
        str, typer.Option(help="Rows to print: words and comparisons, all of which hold: 'gdn lr>0.002 report<2.8'.")
    ] = "",
    columns: Annotated[str, typer.Option(help="Columns to print, separated by commas: arm,seed,report,lr.")] = "",
    csv: Annotated[bool, typer.Option(help="Every column of every run as CSV.")] = False,
) -> RunTable:
    """Print the arms of ablations, one line each: mean ± standard deviation over seeds and the chosen setting.

    Columns that are the same in every row are printed once, above the table.
    """
    import polars as pl

    from workbench.results.filters import find_column
    from workbench.results.listing import columns_of

    listed = api.listing(results, ablations or (), where, runs or csv)
    answer = api.run_table(listed)
    if csv:
        frames = [part.records.insert_column(0, pl.lit(part.folder.name).alias("ablation")) for part in listed]
        print(pl.concat(frames).write_csv() if frames else "", end="")
    elif not listed:
        from workbench.ablation.run import ablation_folders

        archives = results / "ablations"
        hint = f" Archives: workbench table {archives}." if ablation_folders(archives) else ""
        missing = (
            f"No row satisfies {where!r}." if where else f"No run below {results}. `workbench run` creates some.{hint}"
        )
        console.print(missing, soft_wrap=True)
    every = columns_of(row for part in listed for row in (part.runs if runs else part.arms))
    wanted = [find_column(name, every) for name in columns.split(",") if name.strip()] if every and not csv else []
    for part in () if csv else listed:
        print_rows(part, runs, wanted)
    return answer


def show(
    run: Annotated[
        str,
        typer.Argument(
            help="Folder or name of a run, or the beginning of its name: tuning-gdn, quickstart/tuning-gdn."
        ),
    ],
    results: Results = Path("results"),
    lines: Annotated[int, typer.Option(min=0, help="Lines of the end of its log.")] = 20,
) -> RunPage:
    """Print everything about one run: differences to the baseline, values, events, environment, end of the log."""
    from workbench.api import runs

    found = runs.details(run, results)
    answer = runs.run_page(found, lines)
    print_run(found, answer.log)
    return answer


def print_run(found: RunDetails, log: Sequence[str] | None) -> None:
    """Print the page of a run.

    Args:
        found: the run.
        log: the end of its log; None if there is none.
    """
    from workbench.dashboards.series import SERIES
    from workbench.dashboards.tables.run import value_text
    from workbench.results.details import clock

    print_line(f"{found.title}\n{found.row['run']}\n")
    _print_section("", list(found.facts.items()))
    for what, path in found.paths.items():  # whole, to be copied
        print_line(f"{what} {path}")
    changed = [(field, value_text(theirs), value_text(own)) for field, theirs, own in found.differences]
    title = f"\nConfiguration: what differs from the baseline {found.baseline}"
    _print_section(title, changed, ("field", found.baseline, "this run"))
    print_text(f"\n{found.compared}")
    last = [(series.title or series.label.lower(), found.last.get(name)) for name, series in SERIES.items()]
    _print_section("\nRecorded, last values", [(title, _short(value)) for title, value in last if value is not None])
    measured = [row for row in found.measured if row["value"] is not None]
    names = ("split", "suite", "task", "metric", "value", "n", "step")
    rows = [[_short(row[name]) for name in names] for row in measured]
    _print_section("\nMeasured, last values", rows, names)
    _print_section("\nEvents", [(clock(at), event, about) for at, event, about in found.events])
    _print_section("\nEnvironment", [(name, value_text(value)) for name, value in found.environment.items()])
    print_line("\nLog")
    print_line(found.why_no_log if log is None else "\n".join(log) or "The run has printed nothing.")


def _print_section(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> None:
    """Print a title and aligned rows; nothing where there are no rows."""
    if not rows:
        return
    if title:
        print_line(title)
    titles = columns or [""] * len(rows[0])
    listed = Table(
        *(Column(name, overflow="fold") for name in titles), box=None, pad_edge=False, show_header=bool(columns)
    )
    for row in rows:
        listed.add_row(*row)
    console.print(listed, highlight=False)


def _cell(value: object) -> str:
    """Six digits of a number; text as it is."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    """Four digits of a number, or the number in thousands, millions, …; text as it is."""
    if isinstance(value, int | float):
        return count(value) if abs(value) >= 1e5 else f"{value:.4g}"
    return "" if value is None else str(value)


GAP = "  "


def print_rows(listed: api.Listed, by_run: bool, wanted: Sequence[str] = ()) -> None:
    """Print the arms or the runs of an ablation as a table that fits the terminal.

    Args:
        listed: the ablation.
        by_run: whether one line is a run.
        wanted: columns to print, empty where this ablation lacks them; default those that differ between rows, as many
            as fit.
    """
    from workbench.results.listing import cell_text, columns_of, constants

    rows = listed.runs if by_run else listed.arms
    names = [name for name in columns_of(rows) if not name.endswith("_sd")]
    everywhere = {} if wanted else constants(rows, keep=("arm", "report", "selection", "runs", "seed"))
    shown = list(wanted) or [
        name for name in names if name not in everywhere and any(row[name] is not None for row in rows)
    ]
    texts = {name: [cell_text(name, row) if name in row else "" for row in rows] for name in shown}
    left = [name for name in shown if all(isinstance(row.get(name), str | None) for row in rows)]
    widths = {name: max(len(name), *map(len, texts[name])) for name in shown}
    missing = []
    while not wanted and len(shown) > 2 and sum(widths[name] + len(GAP) for name in shown) - len(GAP) > console.width:
        missing.append(shown.pop())
    unit = listed.metric.unit
    head = [f"{listed.folder.name}: {listed.state}; report and selection in {unit}, lower is better"]
    known = {name: value for name, value in everywhere.items() if value not in (None, 0, False)}
    if known:
        head.append(f"Everywhere: {', '.join(f'{name} {cell_text(name, known)}' for name in known)}.")
    print_line(wrapped("\n".join(head), console.width))
    lines = [[name.replace("_", " ") for name in shown], *zip(*(texts[name] for name in shown), strict=True)]
    for line in lines:
        padded = (
            f"{text:{'<' if name in left else '>'}{widths[name]}}" for name, text in zip(shown, line, strict=True)
        )
        print_line(GAP.join(padded).rstrip())
    if missing:
        print_line(wrapped(f"More columns: {', '.join(reversed(missing))} (--columns).", console.width))
    print_line("")
