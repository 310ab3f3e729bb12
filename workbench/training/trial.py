"""A trial is a process: it takes the folder of a run from wherever it stands to its end.

Killed at any moment, it goes on from the last whole checkpoint; finished, it is never repeated.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from workbench.accounting import packed_flops
from workbench.config import ConfigError
from workbench.data import Source, StepLoader, batch_plans, prepare
from workbench.environment import environment
from workbench.evaluation import evaluate
from workbench.files import write_json
from workbench.ops import dispatch
from workbench.results import RunFolder
from workbench.status import Stage, Status
from workbench.training import parallel
from workbench.training.checkpoint import SafeCheckpointIO, latest
from workbench.training.config import RunConfig, TrainingConfig, describe_run
from workbench.training.health import Diverged
from workbench.training.memory import freed_memory_kept
from workbench.training.module import Recorder, Stopped, Training
from workbench.transforms import build, initialise_from

SAMPLED_ROWS = 64
"""Rows of the training stream that say how long documents are."""


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
    """The folder of a run, ready for :func:`train`, its data prepared; an existing one is found again.

    Raises:
        ConfigError: when the folder holds a run of another configuration, or the data cannot be prepared.
    """
    path = Path(path)
    data = prepare(config.data, config.model.vocabulary or 0, cache, progress)
    folder = RunFolder.create(path, describe_run(config, data.fingerprint, arm=arm, stage=stage, **about))
    there = folder.about()
    if there["identity"] != config.identity:
        difference = "; ".join(
            f"{k}: {a!r} there, {b!r} here" for k, (a, b) in config.diff(RunConfig.parse(there["config"])).items()
        )
        raise ConfigError.at(
            "folder",
            got=f"{path}, which holds another run ({difference})",
            expected="a free folder",
            do="Choose another folder, or remove this one.",
        )
    return folder


def train(
    path: str | Path,
    cache: str | Path,
    should_stop: Callable[[], bool] = lambda: False,
    devices: int = 1,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Bring the run in folder ``path`` to its end and return its result; a finished run is only read.

    Args:
        path: folder with ``run.json``.
        cache: folder of prepared data.
        should_stop: asked after every step; True writes a checkpoint and ends with status ``interrupted``.
        devices: GPUs (or CPU processes) that share every batch (:mod:`workbench.training.parallel`). Lightning starts the
            other ranks by running this program again with the same arguments; changes nothing but rounding.
        tell: is given every line of the log as it is written.

    Returns:
        the content of ``result.json``, or ``{"status": "interrupted"}``.

    Raises:
        ConfigError: when the devices are not there, or cannot share a batch.
    """
    folder = RunFolder(path)
    config = RunConfig.parse(folder.about()["config"])
    _check_devices(devices, config)
    same_numbers = repeatable(strict=config.training.deterministic)
    if parallel.is_started_by_another_rank():  # rank 0 keeps the folder
        with same_numbers, freed_memory_kept(), contextlib.suppress(Stopped, Diverged):  # rank 0 tells
            return _train(folder, Path(cache), should_stop, devices, tell)
        return {"status": "ended", "reason": "see rank 0"}
    with same_numbers, freed_memory_kept(), folder.hold() as mine:
        if not mine:
            return {"status": "busy", "reason": "another process is running it"}
        if folder.result():
            return folder.result()
        folder.set_status(Status.RUNNING, pid=os.getpid())
        try:
            return _train(folder, Path(cache), should_stop, devices, tell)
        except Stopped as stop:
            folder.set_status(Status.INTERRUPTED, str(stop))
            folder.event("interrupted", reason=str(stop))
            return {"status": Status.INTERRUPTED, "reason": str(stop)}
        except Diverged as error:
            return _finish(folder, Status.DIVERGED, str(error), step=error.step)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return _finish(folder, Status.OUT_OF_MEMORY, f"{type(error).__name__}: {error}".split("\n")[0])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
                return _finish(folder, Status.CRASHED, _explain(error))
            # not a result: once there is space again the run goes on from its last checkpoint
            return _note(folder, Status.INTERRUPTED, f"the disk is full ({error}); free some space and start again")
        except Exception as error:
            traceback.print_exc()
            return _finish(folder, Status.CRASHED, _explain(error))


def trainer_for(training: TrainingConfig, devices: int, callback: L.Callback) -> L.Trainer:
    """Lightning's loop for a run: nothing of its own is written, shown or caught."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its greetings say nothing about the run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_steps=training.steps,
            max_epochs=1,
            accumulate_grad_batches=training.accumulate,
            accelerator="auto",
            devices=devices,
            strategy=parallel.Sharded(devices) if devices > 1 else "auto",
            precision="bf16-mixed" if training.precision == "bf16" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=[callback],
            plugins=[SafeCheckpointIO(), parallel.environment()],
        )
    # SIGTERM is for should_stop alone: Lightning's handler may end the process before a checkpoint, and talks to other
    # ranks from inside the handler
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _check_devices(devices: int, config: RunConfig) -> None:
    there = torch.cuda.device_count()
    if devices < 1 or (there and devices > there):
        raise ConfigError.at("devices", got=devices, expected=f"1 to {there or 'as many CPU processes as you like'}")
    if config.training.batch_size % devices:
        nearest = max(devices, round(config.training.batch_size / devices) * devices)
        raise ConfigError.at(
            "training.batch_size",
            got=config.training.batch_size,
            expected=f"a multiple of the {devices} devices",
            do=f"Nearest: {nearest}.",
        )


@contextlib.contextmanager
def repeatable(*, strict: bool) -> Iterator[None]:
    """Deterministic operations where torch has them; ``strict`` refuses the others, and whatever is chosen by a stopwatch."""
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


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}; see log.txt"


def _finish(folder: RunFolder, status: Status, reason: str | None, **numbers: Any) -> dict[str, Any]:
    folder.finish(status, reason, **numbers)
    return folder.result()


def _note(folder: RunFolder, status: Status, reason: str) -> dict[str, Any]:
    try:
        folder.set_status(status, reason)
    except OSError:
        print(reason, file=sys.stderr)  # not even a status can be written
    return {"status": status, "reason": reason}


def _train(
    folder: RunFolder,
    cache: Path,
    should_stop: Callable[[], bool],
    devices: int,
    tell: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    leads = not parallel.is_started_by_another_rank()
    about = folder.about()
    config = RunConfig.parse(about["config"])
    data = Source.open(cache, about["data"])
    training = config.training
    if leads:
        write_json(folder.path / "environment.json", {**environment(), "devices": devices})
    dispatch.reset()
    # nothing of ours draws from the global generators; a variant may, and must get the same numbers every time
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)

    module = Training(config)
    stream = data.stream(context=training.context, seed=config.seed)
    rows = [stream.row(number) for number in range(SAMPLED_ROWS)]
    seen_flops = packed_flops(config.model, [int(n) for row in rows for n in np.unique(row[2], return_counts=True)[1]])
    examined: dict[str, Any] = {}
    if leads:
        tokens, _, segments, _ = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        examined = module.model.embedding.inspect(tokens, segments)
    recorder = Recorder(folder, config, data.selection, should_stop, tell, seen_flops)
    loader = StepLoader(
        stream,
        batch_plans[training.batch_plan.kind](training.batch_plan),
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        steps=training.steps,
        rank=parallel.own_rank(),
        world=devices,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_for(training, devices, recorder)
        checkpoint, damaged = latest(folder.path / "checkpoint")
        step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        if leads:
            for line in damaged:
                folder.event("damaged_checkpoint", reason=line)
            folder.forget_metrics_after(step)
            folder.event("resumed" if checkpoint else "started", step=step, devices=devices)
            if examined and not checkpoint:
                folder.event("embedding", **examined)
        if config.start is not None and not checkpoint:
            missing = initialise_from(module.model, config.start.folder, build(config.start.transforms))
            if leads:
                folder.event("weights_loaded", folder=config.start.folder, random_weights=missing)
        if step < training.steps or devices > 1:
            trainer.fit(module, train_dataloaders=loader, ckpt_path=str(checkpoint) if checkpoint else None)
        else:  # only the last evaluation was lost
            module.load_state_dict(SafeCheckpointIO().load_checkpoint(checkpoint)["state_dict"])
        module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    report = None
    if about["stage"] == Stage.CONFIRMATION:  # the report split is opened here and nowhere else
        sealed = about.get("split", "report") == "report"
        measured = data.report if sealed else data.selection
        report = evaluate(
            module.model,
            measured,
            batch_size=training.batch_size,
            context=training.context,
            precision=training.precision,
        )
    if not leads:
        return {"status": "ended", "reason": "see rank 0"}
    metrics = folder.metrics()
    numbers: dict[str, Any] = {
        "step": training.steps,
        "seconds": metrics[-1]["seconds"],
        "loss": metrics[-1]["loss"],
        "selection_value": [row["selection_value"] for row in metrics if row.get("selection_value") is not None][-1],
    }
    if report is not None:
        import polars as pl

        numbers["report_value"] = config.data.metric.of(report)
        frame = pl.DataFrame({"document": range(len(measured)), **report})
        temporary = folder.path / ".report.tmp"
        frame.write_parquet(temporary)
        os.replace(temporary, folder.path / "report.parquet")
    return _finish(folder, Status.DONE, _caution(config, folder), **numbers)


def _caution(config: RunConfig, folder: RunFolder) -> str | None:
    """What a reader of the result must know, if anything."""
    cautions = [f"not causal: {name} sees later tokens" for name in config.model.lacking("causal")]
    cautions += [f"{name} sees the other documents of a row" for name in config.model.lacking("segments")]
    said = folder.diagnostics()
    collapsed = [row["layer"] for row in said if row["step"] == said[-1]["step"] and row["values"].get("collapsed")]
    if collapsed:
        cautions.append(f"router collapsed in layer {', '.join(map(str, collapsed))}: most experts get no token")
    return "; ".join(cautions) or None


def run_in_process(path: str, cache: str, threads: int) -> None:
    """Entry point of a trial's own process: log to the run's folder, stop on SIGTERM or when the parent is gone."""
    import multiprocessing

    log = os.open(Path(path) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    faulthandler.register(signal.SIGUSR1)  # a worker that takes it for hung asks where it stands; it says so in the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the worker decides
    parent = multiprocessing.parent_process()
    train(path, cache, should_stop=lambda: bool(asked) or (parent is not None and not parent.is_alive()))
