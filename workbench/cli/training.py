"""Commands for a single model: train, branch off a longer run, prepare data, export, calibrate, generate."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from workbench.api.answers import Error, Evaluated, Generated, Prepared, Run, Written, plain, plain_rows
from workbench.cli.output import Failure, Notify, console, note, parse_numbers, print_line, print_table, written
from workbench.cli.watching import training_bar
from workbench.formatting import count
from workbench.notifiers import FAILURES, Event, Notification, notify
from workbench.results.data_card import warnings
from workbench.status import Stage, Status

if TYPE_CHECKING:
    import polars as pl

    from workbench.results import RunFolder

EVENTS: dict[Status, Event] = {
    Status.DONE: "finished",
    **FAILURES,
}
"""How a run ended -> what is notified of; a run that was asked to stop is nothing new."""


def train(
    file: Annotated[Path, typer.Argument(help="One training run as YAML, such as sweeps/runs/full_340m.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change: training.tokens=1_000_000.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the run; default results/runs/<file>.")] = None,
    devices: Annotated[int, typer.Option(help="GPUs, or CPU processes, that share every batch.")] = 1,
    stage: Annotated[
        Stage, typer.Option(help="confirmation opens the report split at the end; tuning does not.")
    ] = Stage.TUNING,
    logger: Annotated[
        list[str] | None, typer.Option(help="Copy metrics to tensorboard, wandb, mlflow or trackio as well.")
    ] = None,
    notify: Notify = None,
) -> Run | None:
    """Train one model in the foreground. Ctrl-C stops after a checkpoint; the same command resumes."""
    from workbench.notifiers import use
    from workbench.results.loggers import check_loggers
    from workbench.training import parallel
    from workbench.training.config import RunConfig
    from workbench.training.trial import new_run

    check_loggers(logger or (), "--logger")
    notifiers = use(notify)
    is_rank_zero = parallel.is_rank_zero()
    config = RunConfig.load(file, overrides or ())
    path = folder or Path("results") / "runs" / file.stem
    new_run(path, path.parent / "cache", config, arm=file.stem, stage=stage, progress=note if is_rank_zero else None)
    return _train_in_foreground(path, devices, is_rank_zero, logger or (), notifiers)


def branch(
    run: Annotated[Path, typer.Argument(help="Folder of a run with training.keep_trunk=true whose decay has started.")],
    tokens: Annotated[int, typer.Argument(help="Tokens of the new run, counted from its start.")],
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the new run; default RUN-TOKENS, then the options given.")
    ] = None,
    decay: Annotated[float | None, typer.Option(help="Share of its steps spent decaying. Default: as in RUN.")] = None,
    decay_shape: Annotated[str | None, typer.Option(help="linear, sqrt or cosine. Default: as in RUN.")] = None,
    devices: Annotated[int, typer.Option(help="GPUs, or CPU processes, that share every batch.")] = 1,
) -> Run | None:
    """Train with another horizon or decay from the trunk of a run, which is not trained again."""
    from workbench.training import parallel
    from workbench.training.branch import branch as begin

    is_rank_zero = parallel.is_rank_zero()
    given = [str(option) for option in (decay, decay_shape) if option is not None]
    path = folder or run.with_name("-".join((run.name, str(tokens), *given)))
    begin(run, path, path.parent / "cache", tokens, decay, decay_shape, note if is_rank_zero else None)
    return _train_in_foreground(path, devices, is_rank_zero)


def _train_in_foreground(
    path: Path, devices: int, is_rank_zero: bool, loggers: Sequence[str] = (), notifiers: Sequence[Any] = ()
) -> Run | None:
    """Train the run in folder ``path`` and print its progress; Ctrl-C stops after a checkpoint. None on other ranks
    than the first."""
    import signal

    from workbench.results import RunFolder
    from workbench.results.loggers import open_loggers
    from workbench.training.trial import STOP_SIGNALS, stop_signals
    from workbench.training.trial import train as train_run

    record = RunFolder(path).record()
    if is_rank_zero:
        RunFolder(path).reopen()  # a crash says nothing about the model
    signals, before = stop_signals((signal.SIGINT, signal.SIGUSR1, *STOP_SIGNALS)), len(RunFolder(path).events())
    names = loggers if is_rank_zero else ()
    bar = training_bar(path.name, record.steps, record.metric.short) if is_rank_zero else contextlib.nullcontext()
    with open_loggers(names, RunFolder(path)) as log, bar as show:

        def on_row(row: dict[str, Any]) -> None:
            if log is not None:
                log(row)
            if show is not None:
                show(row)

        result = train_run(
            path,
            path.parent / "cache",
            should_stop=lambda: bool(signals),
            devices=devices,
            on_row=on_row if is_rank_zero else None,
        )
    if not is_rank_zero:
        return None
    for row in RunFolder(path).events()[before:]:
        if row.get("event") == "logger_failed":
            note(f"Logger {row['logger']} failed: {row['reason']}. Every value is in metrics.jsonl.")
    reason = f": {result['reason']}" if result.get("reason") else ""
    print_line(f"{result['status']}{reason}  ({path})")
    status, why = str(result["status"]), result.get("reason")
    if event := EVENTS.get(Status(status)):
        text = f"{path.name}: {status}{reason if event == 'diverged' else ''}"
        step = int(result.get("step") or max((row.get("step", 0) for row in RunFolder(path).metrics()), default=0))
        message = Notification(event, "run", path.name, text, step, record.steps, int(event != "finished"))
        notify(message, notifiers, note)
    return Run(folder=str(path.absolute()), status=status, reason=why, result=plain(result))


def prepare(
    file: Annotated[Path, typer.Argument(help="A training run, for its data and vocabulary.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change: data.corpus.path=texts.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of prepared data.")] = Path("results/runs/cache"),
) -> Prepared:
    """Prepare the data of a run before training: deduplicated, split and tokenized text, or the examples of a task."""
    from workbench.data import prepare as prepare_data
    from workbench.training.config import RunConfig

    config = RunConfig.load(file, overrides or ())
    data = prepare_data(config.data, config.model.vocabulary or 0, cache, note)
    splits = {
        name: {k: v for k, v in split.items() if not isinstance(v, list)} for name, split in data.card["splits"].items()
    }
    columns = list(dict.fromkeys(key for split in splits.values() for key in split))
    table = Table("split", *(column.replace("_", " ") for column in columns), title=str(data.folder))
    for name, split in splits.items():
        table.add_row(name, *(count(split.get(column)) if column in split else "" for column in columns))
    console.print(table)
    cautions = warnings(data.card)
    for line in cautions:
        console.print(f"Caution: {line}", soft_wrap=True)
    return Prepared(folder=str(Path(data.folder).absolute()), splits=plain(splits), warnings=cautions)


def latency_table(
    file: Annotated[Path, typer.Argument(help="A training run as YAML, or an ablation, for its base model.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields of the run to change: model.width=512.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the documents: '1024 4096'. Default: powers of two up to the context.")
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="Blocks per query: '4 8 16'. Default: powers of two to twice the configured number.")
    ] = "",
    output: Annotated[Path, typer.Option(help="File of the table.")] = Path("results/latency.json"),
) -> Written:
    """Measure how long the layers of a model take on this device, by document length and blocks per query.

    Budget tuners and batch plans read the table. It belongs to this device and this configuration.
    """
    from workbench.config import apply_overrides, expand_dotted, read_yaml
    from workbench.training.config import RunConfig
    from workbench.training.latency import measure_latencies

    fields = read_yaml(file)
    run = RunConfig.parse(apply_overrides(expand_dotted(fields.get("base", fields)), overrides or ()))
    context = run.training.context
    powers = [2**power for power in range(5, context.bit_length()) if context >> 6 <= 2**power < context]
    table = measure_latencies(
        run, parse_numbers("lengths", lengths) or [*powers, context], parse_numbers("budgets", budgets), note
    )
    table.save(output)
    return written(output, table.fingerprint)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, one of its checkpoints, or an ablation.")],
    folder: Annotated[Path, typer.Argument(help="Where to write config.json, weights and tokenizer.")],
    format: Annotated[
        str, typer.Option(help="workbench; llama or qwen3 for software that knows only these.")
    ] = "workbench",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    weights: Annotated[
        str, typer.Option(help="measured: those that the results are of; trained; average: with training.ema.")
    ] = "measured",
    best: Annotated[
        bool, typer.Option("--best", help="Of an ablation: the best arm's run that is best on the selection split.")
    ] = False,
    arm: Annotated[str | None, typer.Option(help="Of an ablation, with --best: this arm instead of the best.")] = None,
) -> Written:
    """Write a trained model as a folder in the layout of Hugging Face."""
    from workbench.ablation.run import AblationRun
    from workbench.config import ConfigError, nearest, require
    from workbench.training.export import export as write

    for name, value, valid in (
        ("format", format, ("workbench", "llama", "qwen3")),
        ("dtype", dtype, ("fp32", "bf16")),
        ("weights", weights, ("measured", "trained", "average")),
    ):
        if value not in valid:
            raise ConfigError.at(name, got=value, expected=" or ".join(valid), do=nearest(value, valid))
    if (run / "ablation.json").is_file():
        require(
            best, "--best", got="an ablation", expected="--best, or the folder of one of its runs", do=f"{run}/runs"
        )
        run = AblationRun(run).best(arm)
        print_line(f"{run.name}:")
    else:
        require(arm is None, "--arm", got=arm, expected="nothing for a single run")
    return written(write(run, folder, format=format, dtype=dtype, weights=weights))  # type: ignore[arg-type]


def generate(
    folder: Annotated[Path, typer.Argument(help="An export of this workbench or an importable checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Sample from the fewest tokens of at least this probability.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string before which the text ends; may be given several times.")
    ] = None,
    policy: Annotated[
        str,
        typer.Option(help="What a decoding step reads: a name, or YAML such as '{kind: two_level, tokens: 512}'."),
    ] = "dense",
    cache: Annotated[
        str, typer.Option(help="Type of what is cached: model (that of the weights), bf16, int8, fp8.")
    ] = "model",
    graphs: Annotated[str, typer.Option(help="Whether steps are replayed from a CUDA graph: auto, on, off.")] = "auto",
    compiled: Annotated[bool, typer.Option(help="Compile the steps, which takes a minute at the first one.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
    seed: int = 0,
) -> Generated:
    """Continue a text with an exported model. Rate, bytes, memory and what the policy read follow on standard error."""
    from workbench.config import apply_overrides
    from workbench.decoding import Engine, Sampling
    from workbench.environment import choose_device
    from workbench.pretrained import load
    from workbench.pretrained.folder import provenance

    settings = apply_overrides({}, [f"policy={policy}"])["policy"]
    on = choose_device(device)
    model, tokenizer = load(folder)
    model.to(on)
    options: dict[str, Any] = {"graphs": graphs, "compiled": compiled, "cache_dtype": cache}
    engine = Engine(model, tokenizer, policy=settings, **options)
    sampling = Sampling(
        max_tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop or ()), seed=seed
    )
    stream = engine.complete(prompt, sampling)
    context, length = provenance(folder).get("context"), stream.metrics.prompt_tokens + tokens
    if context is not None and length > context:
        typer.secho(f"Up to {length} tokens; the model was trained on {context}.", dim=True, err=True)
    print(prompt, end="", flush=True)
    continuation = []
    for text in stream:
        print(text, end="", flush=True)
        continuation.append(text)
    print()
    typer.secho(stream.metrics.summary(), dim=True, err=True)
    return Generated(prompt=prompt, text="".join(continuation), metrics=stream.metrics.plain())


def calibrate(
    folder: Annotated[Path, typer.Argument(help="An export of this workbench or an importable checkpoint.")],
    corpus: Annotated[
        str,
        typer.Argument(help="Texts that the model is not judged on: a name, or YAML: '{kind: files, path: texts}'."),
    ],
    rows: Annotated[int, typer.Option(help="Sequences.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
) -> Written:
    """Measure which key channels matter, for decoding policies with a token index; kept beside the weights."""
    from workbench.config import apply_overrides
    from workbench.decoding.calibration import calibrate as measure

    settings = apply_overrides({}, [f"corpus={corpus}"])["corpus"]
    return written(measure(folder, settings, rows=rows, context=context, device=device))


def evaluate(
    folder: Annotated[Path, typer.Argument(help="An ablation, a finished run, or an exported model.")],
    suites: Annotated[
        list[str] | None,
        typer.Argument(help="Names, YAML such as '{kind: ruler, lengths: [4096]}', or files with `evaluation:`."),
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Folder of the tables of an exported model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU if there is one.")] = None,
) -> Evaluated:
    """Measure trained models with evaluation suites. Ctrl-C keeps what was measured; the same command goes on.

    Without suites, those of the runs' configuration. What a run was judged on is left as it is.
    """
    import signal

    import polars as pl

    from workbench.results.scores import read_scores
    from workbench.training.loop import Stopped
    from workbench.training.suites import evaluate_export, evaluate_run, finished_runs, parse_suites

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signals.append(number))
    options: dict[str, Any] = {"device": device, "should_stop": lambda: bool(signals), "progress": note}
    configs = parse_suites(suites or ())
    try:
        if (folder / "config.json").is_file():
            tables = into or Path("results") / "suites" / folder.name
            evaluate_export(folder, tables, configs, **options)
            scores = read_scores(tables).with_columns(arm=pl.lit(folder.name))
        else:
            runs = finished_runs(folder)
            for run in runs:
                note(f"run {run.path.name}")
                evaluate_run(run.path, configs, **options)
            scores = _readable_scores(runs)
    except Stopped as stop:
        print_line(f"interrupted: {stop}")
        raise Failure(Error(kind="interrupted", message=str(stop))) from None
    return Evaluated(rows=_print_scores(scores))


def _readable_scores(runs: list[RunFolder]) -> pl.DataFrame:
    """The scores of a run, or of runs of one ablation, without those that are sealed until it ends."""
    import polars as pl

    from workbench.ablation.run import AblationRun

    ablation = runs[0].path.absolute().parent.parent
    if not (ablation / "ablation.json").is_file():
        return runs[0].scores().with_columns(arm=pl.lit(runs[0].path.name))
    return AblationRun(ablation).scores().filter(pl.col("run").is_in([run.path.name for run in runs]))


def _print_scores(scores: pl.DataFrame) -> list[dict[str, Any]]:
    """Print the scores of every task after the newest step, a column per arm with its mean over runs; the rows."""
    import polars as pl

    newest = pl.col("step") == pl.col("step").max().over("suite", "split")
    of_tasks = scores.filter(pl.col("document").is_null() & newest)
    if of_tasks.is_empty():
        print_line("Measured. Values of the report split can be read once the ablation has ended.")
        return []
    key = ["suite", "split", "task", "metric"]
    wide = of_tasks.group_by(*key, "arm", maintain_order=True).agg(pl.col("value").mean()).pivot("arm", index=key)
    arms = wide.columns[len(key) :]
    rows = []
    for row in wide.iter_rows(named=True):
        values = ("" if row[arm] is None else f"{row[arm]:.4f}" for arm in arms)
        rows.append([*(row[name] for name in key), *values])
    print_table([*key, *arms], rows, repeated=len(key))
    return plain_rows(wide)
