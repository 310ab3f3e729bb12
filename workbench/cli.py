"""The command line, ``workbench``; ``workbench --help`` lists its commands.

Every command that takes an ablation takes the same YAML file, followed by overrides such as
``base.training.tokens=1_000_000``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun
    from workbench.registry import Registry

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

File = Annotated[Path, typer.Argument(help="Ablation as YAML, such as sweeps/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to change: base.model.width=256.")]
Results = Annotated[Path, typer.Option(help="Folder of all results.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a launched ablation, such as results/quickstart.")]


@app.command()
def cost(file: File, overrides: Overrides = None, results: Results = Path("results")) -> None:
    """What an ablation costs, before anything runs; and what does not match."""
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.cost import check_budget

    ablation = Ablation.load(file, overrides or (), results)
    table = ablation.cost(progress=_note)
    _print_cost(table, ablation.workers)
    check_budget(ablation.config, table)


@app.command()
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

    ablation = Ablation.load(file, overrides or (), results)
    launched = ablation.create(_note)
    import polars as pl

    _print_cost(pl.DataFrame(launched.about["cost"], infer_schema_length=None), ablation.workers)
    if _work_off(launched, ablation.workers if workers is None else workers, detach):
        _conclude(launched)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="One training run as YAML, such as sweeps/runs/full_340m.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change: training.tokens=1_000_000.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the run; default results/runs/<file>.")] = None,
    devices: Annotated[int, typer.Option(help="GPUs, or CPU processes, that share every batch.")] = 1,
    stage: Annotated[
        str, typer.Option(help="confirmation opens the report split at the end; tuning does not.")
    ] = "tuning",
) -> None:
    """Train one model in the foreground. Ctrl-C stops after a checkpoint; the same command goes on."""
    from workbench.training import parallel
    from workbench.training.config import RunConfig
    from workbench.training.trial import new_run

    leads = not parallel.is_started_by_another_rank()
    config = RunConfig.load(file, overrides or ())
    path = folder or Path("results") / "runs" / file.stem
    new_run(path, path.parent / "cache", config, arm=file.stem, stage=stage, progress=_note if leads else None)
    _train_in_foreground(path, devices, leads)


@app.command()
def branch(
    run: Annotated[Path, typer.Argument(help="Folder of a run with training.keep_trunk=true that has begun to decay.")],
    tokens: Annotated[int, typer.Argument(help="Tokens of the longer run, from its beginning.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of the longer run; default RUN-TOKENS.")] = None,
    decay: Annotated[float | None, typer.Option(help="Share of its steps spent decaying; default as before.")] = None,
    devices: Annotated[int, typer.Option(help="GPUs, or CPU processes, that share every batch.")] = 1,
) -> None:
    """Train to a longer horizon from the trunk of a shorter run, which is not trained again."""
    from workbench.training import parallel
    from workbench.training.branch import branch as begin

    leads = not parallel.is_started_by_another_rank()
    path = folder or run.with_name(f"{run.name}-{tokens}")
    begin(run, path, path.parent / "cache", tokens, decay, _note if leads else None)
    _train_in_foreground(path, devices, leads)


def _train_in_foreground(path: Path, devices: int, leads: bool) -> None:
    """Train the run in folder ``path``, telling how it goes; Ctrl-C stops after a checkpoint."""
    import signal

    from workbench.metric import Metric
    from workbench.results import RunFolder
    from workbench.training.trial import train as train_run

    about = RunFolder(path).about()
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    unit = Metric(**about["metric"]).short

    def tell(row: dict[str, Any]) -> None:
        left = (about["tokens"] - row["tokens"]) / max(1e-9, row["tokens_per_second"])
        console.print(
            f"step {row['step']}/{about['steps']}  loss {row['loss']:.4f}  {_human(row['tokens_per_second'])} tokens/s  "
            f"{_human(row['flops_per_second'])}FLOP/s  {_duration(left)} left"
            + (f"  {row['selection_value']:.4f} {unit} (selection)" if "selection_value" in row else ""),
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    result = train_run(
        path, path.parent / "cache", should_stop=lambda: bool(asked), devices=devices, tell=tell if leads else None
    )
    if not leads:
        return
    reason = f": {result['reason']}" if result.get("reason") else ""
    console.print(f"{result['status']}{reason}  ({path})", highlight=False, soft_wrap=True)
    if result["status"] != "done":
        raise typer.Exit(130 if result["status"] == "interrupted" else 1)


@app.command()
def prepare(
    file: Annotated[Path, typer.Argument(help="A training run, whose data and vocabulary are taken.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change: data.corpus.path=texts.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of prepared data.")] = Path("results/runs/cache"),
) -> None:
    """Make the data of a run before any training needs them: text deduplicated, split and tokenized, or measured examples."""
    from workbench.data import prepare as prepare_data
    from workbench.training.config import RunConfig

    config = RunConfig.load(file, overrides or ())
    data = prepare_data(config.data, config.model.vocabulary or 0, cache, _note)
    splits = {
        name: {k: v for k, v in split.items() if not isinstance(v, list)} for name, split in data.card["splits"].items()
    }
    columns = list(dict.fromkeys(key for split in splits.values() for key in split))
    shown = Table("split", *(column.replace("_", " ") for column in columns), title=str(data.folder))
    for name, split in splits.items():
        shown.add_row(name, *(_human(split.get(column)) if column in split else "" for column in columns))
    console.print(shown)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or one of its checkpoints.")],
    folder: Annotated[Path, typer.Argument(help="Where to write config.json, weights and tokenizer.")],
    format: Annotated[str, typer.Option(help="workbench, or llama for software that knows only that.")] = "workbench",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Write a trained model as a folder in the manner of Hugging Face."""
    from workbench.config import ConfigError, nearest
    from workbench.training.export import export as write

    for name, value, valid in (("format", format, ("workbench", "llama")), ("dtype", dtype, ("fp32", "bf16"))):
        if value not in valid:
            raise ConfigError.at(name, got=value, expected=" or ".join(valid), do=nearest(value, valid))
    console.print(str(write(run, folder, format=format, dtype=dtype)), soft_wrap=True)  # type: ignore[arg-type]


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="An export of this workbench or a plain Llama checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    seed: int = 0,
) -> None:
    """Go on from a text with an exported model."""
    from workbench.pretrained import generate as go_on
    from workbench.pretrained import load

    model, tokenizer = load(folder)
    print(prompt + go_on(model, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed))


@app.command()
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
    _work_off(small.create(_note), small.workers)
    plan(file, overrides, results)


@app.command()
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
    from workbench.ablation.planner import Pilot, pilot_of, plan_seeds, values_of
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
    except ValueError as error:
        if isinstance(error, ConfigError) and not pilots and sd is None:
            raise ConfigError.at("--pilot", got="no pilot", expected="the noise of the metric over seeds",
                                 do="Run `workbench pilot` with this file, name an earlier ablation, or give --sd.") from None  # fmt: skip
        if isinstance(error, ConfigError):
            raise
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


@app.command()
def worker(folder: Folder) -> None:
    """Take trials of a launched ablation until none is left. Any number may work at the same time."""
    from workbench.ablation.run import AblationRun

    AblationRun(folder).work()


@app.command()
def watch(folder: Folder) -> None:
    """Follow a launched ablation from any shell. Ctrl-C stops the watching, not the work."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    try:
        _watch(launched)
    except KeyboardInterrupt:
        console.print("\nNo longer watching; the work goes on.")
        return
    if launched.finished:
        console.print(f"Finished. Read it with: workbench verdict {folder}", soft_wrap=True)
    else:
        console.print("No worker is at work. `workbench run` with the same file goes on.")
        raise typer.Exit(1)


@app.command()
def stop(folder: Folder) -> None:
    """Stop the workers of an ablation; running trials write a checkpoint first."""
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    count = len(launched.workers())
    left = launched.stop()
    console.print(f"{count - len(left)} worker(s) stopped.")
    if left:
        console.print(f"Still writing a checkpoint: process {', '.join(map(str, left))}.")


@app.command()
def verdict(folder: Folder) -> None:
    """Who is better, by how much, with what certainty."""
    from workbench.ablation.checks import notes
    from workbench.ablation.run import AblationRun

    launched = AblationRun(folder)
    found = launched.verdict()
    if found is None:
        console.print("No verdict yet: confirmation runs are missing.")
        raise typer.Exit(1)
    print("\n".join([str(found), "", *notes(launched)]).rstrip())


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("results/calibration"),
    ablations: Annotated[int, typer.Option(min=20, help="Synthetic ablations a scenario.")] = 1000,
    train: Annotated[int, typer.Option(help="Train the pool of real runs anew, on so many seeds (two runs each).")] = 0,
) -> None:
    """Judge the judge: false positives of ablations of equal arms, power where an effect is planted."""
    import polars as pl

    from workbench.ablation.calibration import train_pool, write

    path = output / "pool.parquet"
    pool = train_pool(train, _note) if train else pl.read_parquet(path) if path.exists() else None
    found = write(output, ablations, pool, _note)
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


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Finished ablations of the same arms at other sizes or horizons.")
    ],
    x: Annotated[str, typer.Option(help="What a scaling law is fitted over: flops, parameters or tokens.")] = "flops",
    at: Annotated[float | None, typer.Option(help="Where to carry the law on to.")] = None,
) -> None:
    """Does the order of the arms hold over scales and horizons? And where does each arm's scaling law lead?"""
    from workbench.ablation.compare import compare as over_scales
    from workbench.ablation.run import AblationRun

    print(over_scales([AblationRun(folder) for folder in folders], x, at))


@app.command()
def report(
    folder: Folder, output: Annotated[Path | None, typer.Option(help="File; default report.html there.")] = None
) -> None:
    """Write the self-contained HTML report."""
    from workbench.ablation.run import AblationRun
    from workbench.dashboards import write_report

    launched = AblationRun(folder)
    console.print(str(write_report(launched, output or launched.folder / "report.html")), soft_wrap=True)


@app.command()
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
    from workbench.dashboards.serve import serve as serve_page

    serve_page(folder, ip=ip, port=port, token=token, browser=browser)


@app.command()
def archive(
    folder: Folder,
    into: Annotated[Path, typer.Argument(help="Folder to write, such as results/ablations/quickstart.")],
) -> None:
    """Keep of a finished ablation what is worth committing: configuration, runs, measurements, verdict; no checkpoints."""
    from workbench.ablation.archive import archive as keep
    from workbench.ablation.run import AblationRun

    console.print(str(keep(AblationRun(folder), into)), soft_wrap=True)


@app.command()
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


@app.command()
def variants() -> None:
    """Registered mixers, feed-forwards, embeddings, data sources and corpora."""
    from workbench.contract import embeddings, feedforwards, mixers
    from workbench.data import sources
    from workbench.data.corpora import corpora

    shown = Table("sort", "name", "what it is, and its settings", "can")
    registries: list[Registry[Any]] = [mixers, feedforwards, embeddings, sources, corpora]
    for registry in registries:
        for name in registry:
            cls = registry[name]
            can = getattr(cls, "capabilities", None)
            abilities = [word for word in ("causal", "segments", "decode") if getattr(can, word, False)]
            shown.add_row(registry.noun, name, f"{_first_line(cls)}\n[dim]{_settings(cls)}[/]", "\n".join(abilities))
    console.print(shown)


@app.command()
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
        f"{'free disk':12s} {free:.1f} GB{'' if free > 2 else '  (too little: at least 2 GB are wanted)'}",
        highlight=False,
    )
    for name, why in broken_plugins.items():
        console.print(f"broken plug-in {name}: {why}", style="bold", markup=False)
    if broken_plugins or free < 2:
        raise typer.Exit(1)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _settings(cls: Any) -> str:
    return ", ".join(name for name in cls.Config.model_fields if name != "kind")


def _note(line: str) -> None:
    console.print(f"[dim]{line} …[/]")


def _human(value: float | None, unit: str = "") -> str:
    if value is None:
        return "not measured"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}:{rest:02d}"


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:+.2%}"


def _print_cost(frame: Any, workers: int) -> None:
    shown = Table("a trial", *(Column(arm, justify="right") for arm in frame["arm"]), title="Cost")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "parameters, embedding not counted": lambda row: _human(row["non_embedding"]),
        "… active for a token": lambda row: _human(row["active"]),
        "forward FLOPs a token": lambda row: _human(row["flops_per_token"]),
        "training FLOPs": lambda row: _human(row["training_flops"]),
        "decode cache": lambda row: _human(row["cache_bytes"], "B"),
        "… if windows kept every token": lambda row: _human(row.get("unevicted_bytes"), "B"),
        "training tokens": lambda row: _human(row["tokens"]),
        "tokens a second": lambda row: _human(row.get("tokens_per_second")),
        "time": lambda row: _duration(row["seconds_per_trial"]),
        "memory": lambda row: _human(row["memory_bytes"], "B") + ("" if row.get("memory_measured") else " (estimate)"),
        "disk, while it runs": lambda row: _human(row.get("disk_bytes"), "B"),
        "trials": lambda row: str(row["trials"]),
        "set by the budget": lambda row: row.get("solved") or "–",
        "off the budget": lambda row: _share(row["residual"]),
        "against the baseline: parameters": lambda row: _share(row.get("off_parameters")),
        "… active": lambda row: _share(row.get("off_active_parameters")),
        "… training FLOPs": lambda row: _share(row.get("off_flops")),
        "… seconds": lambda row: _share(row.get("off_seconds")),
        "not matched": lambda row: row["mismatch"] or "–",
    }
    for name, text in rows.items():
        shown.add_row(name, *(text(row) for row in frame.iter_rows(named=True)))
    console.print(shown)
    if frame["seconds_total"].null_count() == 0:
        total = frame["seconds_total"].sum() / max(1, workers)
        console.print(
            f"Training in all: about {_duration(total)} with {workers} worker(s), start-up and evaluation not counted."
        )


def _work_off(launched: AblationRun, workers: int, detach: bool = False) -> bool:
    """Start workers and watch them until all is done; ``detach`` returns False at once.

    Ctrl-C stops the workers. It, and an end before all is done, leave the command with an error code.
    """
    try:
        if not launched.finished:
            launched.start_workers(workers)
        if detach:
            console.print(f"Working in the background. Follow with: workbench watch {launched.folder}", soft_wrap=True)
            return False
        _watch(launched)
    except KeyboardInterrupt:
        console.print("\nStopping: running trials write a checkpoint …")
        left = launched.stop()
        console.print(
            "Still writing a checkpoint, then they end." if left else "Stopped.", "The same command goes on from here."
        )
        raise typer.Exit(130) from None
    if not launched.finished:
        console.print("[bold]Not finished:[/] no worker is left.")
        console.print(_why_stopped(launched), markup=False, highlight=False, soft_wrap=True)
        console.print("The same command goes on from here.")
        raise typer.Exit(1)
    return True


def _watch(launched: AblationRun) -> None:
    """One bar a trial that has not ended, a line for one that has; until all have, or no worker is left."""
    from workbench.config import ConfigError
    from workbench.results.store import ENDED

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}"),
    )  # fmt: skip
    live = console.is_terminal
    told: dict[str, str] = {}
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not live, refresh_per_second=4) as progress:
        while True:
            over = launched.wait(timeout=0.5) or not (launched.workers() or launched.waiting_workers())
            frame = launched.runs()
            done = frame["status"].is_in(ENDED).sum()
            for row in frame.iter_rows(named=True):
                title, numbers = f"{row['arm']} {row['stage']} {_point(row)}", _numbers(row)
                ended = row["status"] in ENDED
                if told.get(row["run"]) != row["status"] and (ended or (row["status"] == "running" and not live)):
                    progress.console.print(
                        f"[{done}/{launched.total}] {title}: {numbers}", markup=False, highlight=False, soft_wrap=True
                    )
                told[row["run"]] = row["status"]
                if ended and row["run"] in bars:
                    progress.remove_task(bars.pop(row["run"]))
                elif live and not ended:
                    if row["run"] not in bars:
                        bars[row["run"]] = progress.add_task(title, total=row["steps"], numbers=numbers)
                    progress.update(bars[row["run"]], completed=row["step"], numbers=numbers)
            if not launched.exists:
                raise ConfigError.at(str(launched.folder), got="a folder that has been removed meanwhile",
                                     expected="the ablation that was being watched")  # fmt: skip
            if over:
                return


def _why_stopped(launched: AblationRun) -> str:
    """What the runs that ended early say; where none says anything, the end of the workers' log."""
    from workbench.results.store import LOST

    frame = launched.runs()
    early = frame.filter(frame["status"].is_in(("interrupted", *LOST)))
    if len(early):
        return "\n".join(f"{row['run']} is {row['status']}: {row['reason']}" for row in early.iter_rows(named=True))
    log = launched.folder / "workers" / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return "\n".join([f"The end of {log}:", *lines[-8:]])


def _point(row: dict[str, Any]) -> str:
    import json

    if row["stage"] == "confirmation":
        return f"seed {row['seed']}"
    return ", ".join(f"{k.rsplit('.', 1)[-1]}={v:.3g}" if isinstance(v, float) else f"{k.rsplit('.', 1)[-1]}={v}"
                     for k, v in json.loads(row["hyperparameters"]).items())  # fmt: skip


def _numbers(row: dict[str, Any]) -> str:
    parts = []
    if row["status"] == "running" and row["loss"] is not None:
        parts = [
            f"loss {row['loss']:.3f}",
            f"{_human(row['tokens_per_second'])} tokens/s",
            f"{_duration(row['seconds_left'])} left",
        ]
    elif row["report_value"] is not None:
        parts = [f"{row['report_value']:.4f} {row['metric']} (report)"]
    elif row["selection_value"] is not None and row["status"] == "done":
        parts = [f"{row['selection_value']:.4f} {row['metric']} (selection)"]
    if row["status"] != "done":
        parts.insert(0, row["status"] + (f" ({row['reason']})" if row["reason"] else ""))
    return ", ".join(parts)


def _conclude(launched: AblationRun) -> None:
    from workbench.dashboards import write_report

    found = launched.verdict()
    console.rule(f"Verdict: {launched.name}")
    if launched.question:
        console.print(launched.question, style="italic", markup=False)
    print(found if found is not None else "No verdict: no confirmation run has ended.")
    path = write_report(launched, launched.folder / "report.html")
    print(f"\nReport: {path}")


def main() -> None:
    """Run the command line; a mistake of the user's is told in words, without a traceback."""
    from workbench.config import ConfigError

    try:
        app()
    except ConfigError as error:
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        import errno

        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(
            f"workbench: {error.strerror}: {error.filename or ''}. Nothing is lost; mend it and start again.",
            file=sys.stderr,
        )
        sys.exit(1)
