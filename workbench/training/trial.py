"""A trial trains one run in its folder, in three parts: :func:`prepare`, :func:`fit`, :func:`report`.

Killed at any moment, it resumes from the last complete checkpoint; a finished run is never repeated.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from workbench.accounting import packed_flops
from workbench.config import ConfigError, require
from workbench.data import MeasuredSplit, RowStream, Source, StepLoader
from workbench.data import prepare as prepare_data
from workbench.environment import environment
from workbench.evaluation import Decoder, Results, check_suites
from workbench.files import MACHINE, write_json
from workbench.model import LanguageModel
from workbench.ops import dispatch
from workbench.ops.scaled_linear import check_device
from workbench.results import RunFolder
from workbench.results.data_card import repetition
from workbench.results.loggers import open_loggers
from workbench.results.scores import READS, ScoreTable
from workbench.status import Stage, Status
from workbench.training import parallel
from workbench.training.average import averaged
from workbench.training.checkpoint import checkpoints_in, latest, random_state, set_random_state, step_of
from workbench.training.checkpointer import Checkpointer
from workbench.training.config import RunConfig, describe_run
from workbench.training.growth import grow
from workbench.training.health import Diverged
from workbench.training.latency import check_loads
from workbench.training.loop import Stopped, train_loop
from workbench.training.memory import retain_freed_memory
from workbench.training.metric_log import MetricLog
from workbench.training.step import TrainStep, build_step
from workbench.training.suites import (
    measure_run,
    measures_suites,
    new_decoder,
    record_opening,
    run_settings,
    suite_conditions,
    suite_split,
)
from workbench.training.throughput import Throughput
from workbench.training.weight_transforms import ScheduledTransforms
from workbench.transforms import build_transforms, initialise_from

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
"""Of the message of the plain RuntimeError that torch raises where a CPU has no memory left."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of errors of a full disk."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
"""Signals on which a run writes a checkpoint and ends. SIGHUP: its terminal is closed; SIGUSR2: a scheduler is about to
preempt it, which Slurm sends to every process of a job; SIGXCPU: its CPU time is used up."""
RANKS_END = 60
"""Seconds in which the other ranks of a run end after the first; what then still runs is terminated."""
SAMPLED_ROWS = 64
"""Rows of the training stream from which the lengths of documents are estimated."""


def new_run(
    path: str | Path,
    cache: str | Path,
    config: RunConfig,
    *,
    arm: str = "",
    stage: str = Stage.CONFIRMATION,
    progress: Callable[[str], None] | None = None,
    **about: Any,
) -> RunFolder:
    """Create the folder of a run with its data prepared, ready for :func:`train`; an existing folder is opened.

    Raises:
        ConfigError: when the folder contains a run of another configuration, or the data cannot be prepared.
    """
    path, cache = Path(path), Path(cache)
    if path.resolve() == cache.resolve():
        raise ConfigError.at(
            "folder", got=str(path), expected="another folder than that of prepared data", do="Choose another name."
        )
    if _is_self_contained(RunFolder(path), config, cache):
        return RunFolder(path)
    data = prepare_data(config.data, config.model.vocabulary or 0, cache, progress)
    check_suites(config.evaluation, suite_conditions(config, data))
    if progress:
        for line in repetition({arm: config.epochs(data)}):
            progress(line)
    folder = RunFolder.create(path, describe_run(config, data.fingerprint, arm=arm, stage=stage, **about))
    existing = folder.record()
    if existing.identity != config.identity:
        changes = config.diff(RunConfig.parse(existing.config)).items()
        difference = "; ".join(f"{name}: {old!r} in the folder, {new!r} here" for name, (old, new) in changes)
        raise ConfigError.at(
            "folder",
            got=f"{path}, which contains another run ({difference})",
            expected="a new folder, or one of this run",
            do="Choose another folder, or remove this one.",
        )
    return folder


def _is_self_contained(folder: RunFolder, config: RunConfig, cache: Path) -> bool:
    """Whether the folder has the run of this configuration, which needs nothing more from elsewhere: no text and
    tokenizer once they are prepared, no initial weights once there is a checkpoint, and nothing once it has ended."""
    if not folder.exists():
        return False
    record, ended = folder.record(), bool(folder.result())
    started, known = ended or bool(checkpoints_in(folder.path / "checkpoint")), RunConfig.parse(record.config).start
    if started and config.start and known and known.fingerprint and not Path(config.start.folder).exists():
        config = config.pinned({config.start.source: known.fingerprint})
    if record.identity != config.identity or record.config != config.pinned().plain():
        return False
    try:
        return ended or bool(Source.open(cache, record.data))
    except ConfigError:
        return False


def train(
    path: str | Path,
    cache: str | Path,
    should_stop: Callable[[], bool] = lambda: False,
    devices: int = 1,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train the run in folder ``path`` to its end and return its result; the result of a finished run is only read.

    Args:
        path: folder with ``run.json``.
        cache: folder of prepared data.
        should_stop: asked after every step; True writes a checkpoint and ends with status ``interrupted``.
        devices: GPUs (or CPU processes) that share every batch (:mod:`workbench.training.parallel`). The other ranks
            are started by running this program again with the same arguments. Changes results by rounding only.
        on_row: called with every line of metrics.jsonl as it is written.

    Returns:
        The content of ``result.json``, or ``{"status": "interrupted", …}``.

    Raises:
        ConfigError: when fewer devices are available, or they cannot share a batch.
    """
    folder = RunFolder(path)
    config = RunConfig.parse(folder.record().config)
    _check_devices(devices, config)
    with deterministic_algorithms(strict=config.training.deterministic), retain_freed_memory():
        if not parallel.is_rank_zero():  # rank 0 holds the folder and reports how the run ended
            with contextlib.suppress(Stopped, Diverged):
                _train(folder, Path(cache), should_stop, devices, on_row)
            return {"status": "ended", "reason": "see rank 0"}
        with folder.lock() as acquired:
            if not acquired:
                return {"status": "busy", "reason": "another process is training it"}
            if folder.result():
                return folder.settle()
            folder.set_status(Status.RUNNING, pid=os.getpid())
            try:
                return _train(folder, Path(cache), should_stop, devices, on_row)
            except Stopped as stop:
                folder.set_status(Status.INTERRUPTED, str(stop))
                folder.event("interrupted", reason=str(stop))
                return {"status": Status.INTERRUPTED, "reason": str(stop)}
            except Diverged as error:
                return _finish(folder, Status.DIVERGED, str(error), step=error.step)
            except (MemoryError, torch.OutOfMemoryError) as error:
                return _finish(folder, Status.OUT_OF_MEMORY, _first_line(error))
            except Unavailable as error:
                return _interrupt(folder, str(error))
            except OSError as error:
                is_full = error.errno in FULL or "No space left" in str(error)
                if error.errno not in MACHINE and not is_full:
                    return _finish(folder, Status.CRASHED, _explain(error))
                # not a result: the run resumes from its last checkpoint once the file system answers
                what = "the disk is full" if is_full else "a file cannot be read or written"
                return _interrupt(folder, f"{what} ({error}); mend that and start again")
            except Exception as error:
                if CPU_OUT_OF_MEMORY in str(error):
                    return _finish(folder, Status.OUT_OF_MEMORY, _first_line(error))
                traceback.print_exc()
                return _finish(folder, Status.CRASHED, _explain(error))


def _train(
    folder: RunFolder,
    cache: Path,
    should_stop: Callable[[], bool],
    devices: int,
    on_row: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    trial = prepare(folder, cache, devices, should_stop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trial.config.training.steps:
            fit(trial, should_stop, on_row)
        else:
            place(trial, on_row)
    results = open_report_split(trial) if trial.stage == Stage.CONFIRMATION else None
    trial.measure("end", should_stop)
    return report(trial, results)


class Unavailable(Exception):
    """What a run needs cannot be read: no result, the run resumes once it can."""


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    """Around reading a checkpoint, data or initial weights: a ConfigError says nothing about the model there."""
    try:
        yield
    except ConfigError as error:
        raise Unavailable(str(error)) from error


@dataclass
class Trial:
    """A run with all that training needs, on the host; no device or process group has been used yet. ``model`` is that
    of the phase at which training begins or resumes."""

    folder: RunFolder
    config: RunConfig
    stage: Stage
    data: Source
    model: LanguageModel
    stream: RowStream
    """Training rows."""
    seen_flops: list[float]
    """Training FLOPs per token of every phase, counting attention within documents only."""
    checkpoint: Path | None
    """To resume from."""
    devices: int
    train_step: TrainStep | None = None
    """The step of the model, once it is on its device; None in a run that trains nothing."""
    decoder: Decoder | None = None
    """Reads documents through the decoding policy, where there is one."""

    def evaluate(self, split: MeasuredSplit, step: int) -> Results:
        """Measure the primary metric on ``split`` and add its rows to the folder; every rank takes part. With
        ``ema.evaluate`` instead, what is measured is the average of the weights."""
        results = self._primary(split, averages=self._measures_averages)
        if parallel.is_rank_zero():
            self.folder.add_evaluations(step, split, map(asdict, results.rows))
            if self.decoder is not None and self.config.decoding is not None:
                table = ScoreTable(self.folder.suites_path, READS, self.config.decoding.plain())
                if not table.has(step, split, self.config.data.kind):
                    table.add(step, split, self.config.data.kind, self.decoder.scores())
        return results

    def selection_values(self, step: int) -> dict[str, float]:
        """The primary metric on the selection split after ``step``, by the names of a line of metrics.jsonl."""
        ema, metric = self.config.training.ema, self.config.data.metric
        values = {"selection_value": self.evaluate("selection", step).value(metric)}
        if ema is not None and ema.evaluate == "beside":
            values["selection_value_ema"] = self._primary("selection", averages=True).value(metric)
        return values

    def measure(self, moment: int | Literal["end"], should_stop: Callable[[], bool]) -> None:
        """Run the suites that are due after a step or at the end, on the weights that :meth:`evaluate` measures; every
        rank takes part.

        A suite that fails is an event of the run and no failure of it: `workbench evaluate` measures again.

        Raises:
            Stopped: when asked to stop; the tables keep what was measured.
        """
        due = self.config.suites_at(moment)
        if not due or not measures_suites(self.folder):
            return
        with self._weights(averages=self._measures_averages):
            model = parallel.plain_model(self.model)

            def measure_due() -> str | None:
                """On rank 0: why it stopped, if it was asked to."""
                assert model is not None
                step = self.config.training.steps if moment == "end" else moment
                state = random_state()  # libraries seed the global generators, which a variant may draw from
                for suite in due:
                    split = suite_split(self.folder, suite) if moment == "end" else "selection"
                    try:
                        measure_run(
                            self.folder,
                            self.config,
                            self.data,
                            model,
                            suite,
                            split,
                            step,
                            should_stop,
                            decoder=self.decoder,
                        )
                    except Stopped as stop:
                        return str(stop)
                    except Exception as error:
                        if not isinstance(error, ConfigError):
                            traceback.print_exc()
                        self.folder.event("suite_failed", suite=suite.label, step=step, reason=_first_line(error))
                set_random_state(state)
                return None

            stopped = parallel.of_rank_zero(measure_due)
        if stopped is not None:
            raise Stopped(stopped)

    @property
    def _measures_averages(self) -> bool:
        ema = self.config.training.ema
        return ema is not None and ema.evaluate == "instead"

    def _primary(self, split: MeasuredSplit, *, averages: bool) -> Results:
        with self._weights(averages=averages):
            if self.decoder is not None:
                self.decoder.reset()
            settings = run_settings(self.config, self.decoder)
            return self.config.primary_suite.run(self.model, self.data, split, settings)

    def _weights(self, *, averages: bool) -> contextlib.AbstractContextManager[None]:
        if not averages:
            return contextlib.nullcontext()
        assert self.train_step is not None
        return averaged(self.model, self.train_step.optimiser)


def prepare(folder: RunFolder, cache: Path, devices: int, should_stop: Callable[[], bool] = lambda: False) -> Trial:
    """Load the data, build the model, find the checkpoint to resume from; without one, apply ``start``."""
    record = folder.record()
    config = RunConfig.parse(record.config)
    training = config.training
    with _needed():
        checkpoint, damaged = latest(folder.path / "checkpoint")
    if parallel.is_rank_zero():
        where = environment()
        earlier = folder.environment().get("codes", []) if checkpoint else []
        codes = list(dict.fromkeys([*earlier, where["code"]]))  # a run may be resumed by other code
        write_json(folder.path / "environment.json", {**where, "codes": codes, "devices": devices})
    dispatch.reset()
    # nothing of ours draws from the global generators; a variant may, and must get the same numbers every time
    other_seed = config.seed_of("other")
    random.seed(other_seed)
    np.random.seed(other_seed % 2**32)
    torch.manual_seed(other_seed)

    with _needed():
        data = Source.open(cache, record.data)
    phase = config.phase_at(step_of(checkpoint) if checkpoint else 0)
    model = LanguageModel(phase.model, seed=config.seed_of("init"))
    stream = config.stream(data)
    rows = [stream.row(number) for number in range(SAMPLED_ROWS)]
    document_lengths = [int(n) for row in rows for n in np.unique(row[2], return_counts=True)[1]]
    if parallel.is_rank_zero():
        step = step_of(checkpoint) if checkpoint else 0
        for reason in damaged:
            folder.event("damaged_checkpoint", reason=reason)
        folder.truncate_after(step)
        epochs = stream.epochs(training.rows)
        folder.event("resumed" if checkpoint else "started", step=step, devices=devices, epochs=epochs)
        sample = stream.batch(range(SAMPLED_ROWS))
        inspected = model.embedding.inspect(sample.tokens_BT, sample.segments_BT)
        if inspected and not checkpoint:
            folder.event("embedding", **inspected)
    if config.start is not None and not checkpoint:
        with _needed():
            source = config.start.checked_folder(config.seed)
        missing = initialise_from(model, source, build_transforms(config.start.transforms))
        if parallel.is_rank_zero():
            folder.event("weights_loaded", folder=str(source), random_weights=missing)
        require(
            training.steps or not missing,
            "start.folder",
            got=f"{source}, without {', '.join(missing[:4])}",
            expected="weights of every parameter, as nothing is trained",
        )
    seen_flops = [packed_flops(phase.model, document_lengths) for phase in config.phases]
    decoder = new_decoder(config, data, folder, should_stop)
    return Trial(folder, config, record.stage, data, model, stream, seen_flops, checkpoint, devices, decoder=decoder)


def fit(trial: Trial, should_stop: Callable[[], bool], on_row: Callable[[dict[str, Any]], None] | None) -> None:
    """Train the model of ``trial`` to its last step; afterwards it is on its device."""
    config, folder, training = trial.config, trial.folder, trial.config.training
    fabric = parallel.launch(trial.devices, training.ranks, expert_parallel=training.expert_parallel)
    checkpoint = fabric.broadcast(trial.checkpoint)
    step = step_of(checkpoint) if checkpoint else 0
    check_loads(config, fabric.device)
    train_step, compiled = build_step(trial.model, config.of(config.phase_at(step)), fabric)
    trial.train_step = train_step
    throughput = Throughput(config, trial.seen_flops)
    loader = StepLoader(
        trial.stream,
        config.batch_plan,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        steps=training.steps,
        rank=fabric.global_rank,
        world=trial.devices,
    )
    train_step.step_lengths = loader.lengths
    checkpointer = Checkpointer(folder, config, train_step, loader, throughput)
    if checkpoint:
        checkpointer.restore(checkpoint)
    log = MetricLog(folder, config, on_row)

    def on_first_step() -> None:
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()  # once, so that start-up includes the work of the first step
        seconds = throughput.end_first_step(compiled=compiled)
        if parallel.is_rank_zero():
            folder.event("first_step", seconds=seconds)
            folder.add_to_environment(paths=dispatch.recorded())

    def record(step: int) -> None:
        """Let the batch plan learn from a step."""
        if loader.plan.learns:
            assert trial.train_step is not None
            loader.record(step - 1, trial.train_step.measurements(loader.lengths(step - 1)))

    with contextlib.closing(iter(loader)) as batches:
        for phase in config.phases:
            if step > phase.last:
                continue
            if step == phase.first > 0:
                throughput.tick(step)
                with throughput.paused():
                    train_step, compiled = grow(train_step, config, fabric)
                train_step.step_lengths = loader.lengths
                checkpointer.train_step = trial.train_step = train_step
                trial.model = train_step.model
                if parallel.is_rank_zero():
                    folder.event("grown", step=step, parameters=sum(p.numel() for p in trial.model.parameters()))
            train_loop(
                training,
                train_step,
                batches,
                after=step,
                until=phase.last,
                record=record,
                throughput=throughput,
                log=log,
                checkpointer=checkpointer,
                weight_transforms=ScheduledTransforms(config.of(phase), train_step),
                evaluate=trial.selection_values,
                measure=lambda step: trial.measure(step, should_stop),
                measure_at={moment for suite in config.evaluation for moment in suite.when if moment != "end"},
                should_stop=should_stop,
                on_first_step=on_first_step,
            )
            step = phase.last


def place(trial: Trial, on_row: Callable[[dict[str, Any]], None] | None) -> None:
    """Instead of :func:`fit` in a run that trains nothing: the model on its device, and one line of metrics, the metric
    on the selection split. Nothing is checkpointed: the weights are those of ``start``."""
    trial.model = trial.model.requires_grad_(False).eval().to(parallel.launch(1).device)
    if trial.folder.metrics():  # of an earlier process
        return
    start = time.perf_counter()
    row = {"step": 0, "tokens": 0, "loss": None, "flops": 0.0, **trial.selection_values(0)}
    row["seconds"] = time.perf_counter() - start
    trial.folder.add_metrics(row)
    trial.folder.add_to_environment(paths=dispatch.recorded())
    if on_row:
        on_row(row)


def report(trial: Trial, results: Results | None) -> dict[str, Any]:
    """Write the result of the run; ``results`` are those of :func:`open_report_split` in a confirmation run."""
    folder, config = trial.folder, trial.config
    if not parallel.is_rank_zero():
        return {}
    metrics = folder.metrics()
    numbers: dict[str, Any] = {
        "step": config.training.steps,
        "seconds": metrics[-1]["seconds"],
        "loss": metrics[-1]["loss"],
        "selection_value": [row["selection_value"] for row in metrics if row.get("selection_value") is not None][-1],
    }
    if (epochs := trial.stream.epochs(config.training.rows)) is not None:
        numbers["epochs"] = epochs
    if config.training.ema is not None and config.training.ema.evaluate == "beside":
        numbers["selection_value_ema"] = [row for row in metrics if "selection_value_ema" in row][-1][
            "selection_value_ema"
        ]
    if results is not None:
        numbers["report_value"] = results.value(config.data.metric)
        numbers["report_checksum"] = folder.write_report(results.report())
    return _finish(folder, Status.DONE, _caution(config, folder), **numbers)


def open_report_split(trial: Trial) -> Results:
    """Measure the model on the report split. Only confirmation runs may, and nothing else in the workbench opens it.

    A run whose run.json names another split measures that one instead.
    The opening is in the ledger of the results, beside the cache of prepared data, before the first document is read.
    """
    assert trial.stage == Stage.CONFIRMATION
    split = trial.folder.record().split
    if split == "report" and parallel.is_rank_zero():
        record_opening(trial.folder, trial.data)
    return trial.evaluate(split, trial.config.training.steps)


@contextlib.contextmanager
def deterministic_algorithms(*, strict: bool) -> Iterator[None]:
    """Deterministic operations where torch has them; ``strict`` raises on all others and disables choices by timing."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if strict:
        import torch._inductor.config as inductor

        # read when the first product is made on a CUDA device; without it cuBLAS may add in another order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        inductor.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        if strict:
            inductor.deterministic = False


def _check_devices(devices: int, config: RunConfig) -> None:
    available = torch.cuda.device_count()
    if devices < 1 or (available and devices > available):
        raise ConfigError.at("devices", got=devices, expected=f"1 to {available or 'any number of CPU processes'}")
    if config.training.batch_size % devices:
        nearest = max(devices, round(config.training.batch_size / devices) * devices)
        raise ConfigError.at(
            "training.batch_size",
            got=config.training.batch_size,
            expected=f"a multiple of the {devices} devices",
            do=f"Nearest: {nearest}.",
        )
    config.check_experts(devices)
    if config.training.fp8 is not None:
        check_device(torch.device("cuda" if available else "cpu"), config.training.fp8)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _explain(error: Exception) -> str:
    return f"{_first_line(error)}; see log.txt"


def _finish(folder: RunFolder, status: Status, reason: str | None, **numbers: Any) -> dict[str, Any]:
    folder.finish(status, reason, **numbers)
    return folder.result()


def _interrupt(folder: RunFolder, reason: str) -> dict[str, Any]:
    try:
        folder.set_status(Status.INTERRUPTED, reason)
    except OSError:
        print(reason, file=sys.stderr)  # not even a status can be written
    return {"status": Status.INTERRUPTED, "reason": reason}


def interventions(row: Mapping[str, Any], steps: int) -> list[str]:
    """What guards have done, in words; nothing where there was no reason.

    Args:
        row: last line of metrics.jsonl.
        steps: of the run.
    """
    skipped, rolled_back, undone = (row.get(name, 0) for name in ("skipped", "rolled_back", "undone"))
    words = [f"guards skipped {skipped} of {steps} steps"] if skipped else []
    if rolled_back:
        words.append(f"guards rolled back {rolled_back} time{'s' * (rolled_back > 1)}, undoing {undone} steps")
    return words


def _caution(config: RunConfig, folder: RunFolder) -> str | None:
    """What a reader of the result must know, if anything."""
    cautions = [f"not causal: {name} sees later tokens" for name in config.model.lacking("causal")]
    cautions += [f"{name} sees the other documents of a row" for name in config.model.lacking("segments")]
    cautions += interventions(folder.metrics()[-1], config.training.steps)
    rows = folder.diagnostics()
    collapsed = [row["layer"] for row in rows if row["step"] == rows[-1]["step"] and row["values"].get("collapsed")]
    if collapsed:
        cautions.append(f"router collapsed in layer {', '.join(map(str, collapsed))}: most experts get no token")
    return "; ".join(cautions) or None


def stop_signals(numbers: Sequence[signal.Signals]) -> list[int]:
    """The list to which this process adds each of these signals that it gets, except ignored ones (`nohup`)."""
    received: list[int] = []
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    return received


def run_in_process(path: str, cache: str, threads: int, devices: int = 1, loggers: Sequence[str] = ()) -> None:
    """Entry point of a trial's process: log to the run's folder; stop on :data:`STOP_SIGNALS`, or when the parent
    process is gone.

    Args:
        path: the run's folder.
        cache: folder of prepared data.
        threads: of this process.
        devices: as of :func:`train`; the other ranks are processes that this one starts.
        loggers: where the metrics are copied to (:mod:`workbench.results.loggers`).
    """
    import multiprocessing

    log = os.open(Path(path) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    signals = stop_signals(STOP_SIGNALS)
    faulthandler.register(signal.SIGUSR1)  # a worker that suspects a hang requests stack traces in log.txt
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the worker decides
    parent = multiprocessing.parent_process()
    others = []
    if devices > 1 and parallel.is_rank_zero():
        others = parallel.start_other_ranks(devices, run_in_process, path, cache, threads, devices)
    used = loggers if parallel.is_rank_zero() else ()
    with open_loggers(used, RunFolder(path)) as on_row:
        train(path, cache, lambda: bool(signals) or (parent is not None and not parent.is_alive()), devices, on_row)
    for process in others:
        process.join(RANKS_END)
