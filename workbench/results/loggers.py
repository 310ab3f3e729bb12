"""Copies of a run's metrics for TensorBoard, Weights & Biases, MLflow or Trackio, while it trains.

The files of the run stay the record (:mod:`workbench.results.store`); a logger gets the run's configuration and what a
line of metrics.jsonl has, never a value of the report split. A resumed run continues its own curves. A logger that
fails is an event of the run and no failure of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from workbench.config import ConfigError, flatten
from workbench.distribution import install_extra
from workbench.files import locked
from workbench.results.record import RunRecord
from workbench.results.store import RunFolder
from workbench.status import Status

__all__ = ["LoggerName", "check_loggers", "open_loggers"]

LoggerName: TypeAlias = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Logger(Protocol):
    """The part of Lightning's loggers that is used."""

    def log_hyperparams(self, params: dict[str, Any]) -> None: ...
    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...
    def finalize(self, status: str) -> None: ...


def _tensorboard(run: RunFolder, record: RunRecord) -> Logger:
    """Event files in the run's folder: ``tensorboard --logdir results/NAME/runs``."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(run.path, name="", version="tensorboard")


def _wandb(run: RunFolder, record: RunRecord) -> Logger:
    """A project per ablation, a group per arm."""
    from lightning.pytorch.loggers import WandbLogger

    class Finishing(WandbLogger):
        """Lightning leaves the end to the end of the process, which a trial's process does not wait for."""

        def finalize(self, status: str) -> None:
            super().finalize(status)
            self.experiment.finish(exit_code=int(status != SUCCESS))

    identifier = run.logger_ids().get("wandb") or secrets.token_hex(8)
    run.set_logger_id("wandb", identifier)
    about: dict[str, Any] = {"group": record.arm or None, "job_type": str(record.stage), "resume": "allow"}
    about["settings"] = {"console": "off"}  # what the process prints is no metric
    return Finishing(run.path.name, run.path, id=identifier, project=_project(record), **about)


def _mlflow(run: RunFolder, record: RunRecord) -> Logger:
    """An experiment per ablation, at MLFLOW_TRACKING_URI or in ``mlflow.db`` of the ablation's folder (of the run's
    folder, for a run of its own)."""
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    root = run.path.parent.parent if record.ablation else run.path
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    with locked(root / "mlflow.lock"):  # several processes must not create the tables
        client, identifier = MlflowClient(uri), run.logger_ids().get("mlflow")
        try:
            known = identifier is not None and client.get_run(identifier).info.lifecycle_stage == "active"
        except MlflowException:  # of another server
            known = False
        tags = {"arm": record.arm, "stage": str(record.stage), "seed": str(record.seed)}
        files = str(root / "mlflow") if uri.startswith("sqlite:") else None  # by default a folder where it was started
        logger = MLFlowLogger(
            _project(record), run.path.name, uri, tags, artifact_location=files, run_id=identifier if known else None
        )
        if known:
            client.update_run(identifier, status="RUNNING")
        run.set_logger_id("mlflow", str(logger.run_id))
    return logger


class _Trackio:
    """Trackio has no logger of Lightning's: its own three calls. A project per ablation."""

    def __init__(self, run: RunFolder, record: RunRecord):
        import trackio

        self._module = trackio
        known = run.logger_ids().get("trackio")
        opened = trackio.init(
            project=_project(record),
            name=known or run.path.name,
            group=record.arm or None,
            resume="allow" if known else "never",
        )
        run.set_logger_id("trackio", opened.name)  # another than asked for where an earlier run has that name

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self._module.config.update(params)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._module.log(metrics, step=step)

    def finalize(self, status: str) -> None:
        self._module.finish()


LOGGERS: dict[str, Callable[[RunFolder, RunRecord], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _Trackio,
}
"""Logger -> how it is opened. The name is that of the package."""
PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")
"""User and password in an address, such as that of a server of MLflow: errors repeat it, and events are kept."""
EXTRAS = ("tensorboard",)
"""Loggers whose package is an extra of this distribution."""
SUCCESS, FAILED, STOPPED = "success", "failed", "KILLED"
"""How a run ended, in the words of Lightning's loggers, and MLflow's for one that can be resumed."""
ENDS = {Status.DONE: SUCCESS, Status.PRUNED: SUCCESS, Status.INTERRUPTED: STOPPED, Status.KILLED: STOPPED}


def _project(record: RunRecord) -> str:
    return record.ablation or "workbench"


def _about(record: RunRecord) -> dict[str, Any]:
    """Arm, stage, seed and every field of the configuration; characters that MLflow refuses in a name are replaced."""
    fields = {**flatten(record.config), **record.hyperparameters} if record.config else record.hyperparameters
    named = {name.replace("[", ".").replace("]", ""): value for name, value in fields.items()}
    return {**named, "arm": record.arm, "stage": str(record.stage), "seed": record.seed}


def check_loggers(names: Sequence[str], path: str = "launch.loggers") -> None:
    """Check that the packages of loggers are installed.

    Raises:
        ConfigError: naming the first one that is not.
    """
    for name in names:
        if name not in LOGGERS or importlib.util.find_spec(name) is None:
            known = name in LOGGERS
            raise ConfigError.at(
                path,
                got=f"{name}, which is not installed" if known else name,
                expected="an installed package" if known else " or ".join(LOGGERS),
                do=f"{_install(name)}, or leave it out: every value is in metrics.jsonl." if known else "",
            )


def _install(name: str) -> str:
    return install_extra(name) if name in EXTRAS else f"pip install {name}"


@contextlib.contextmanager
def open_loggers(names: Sequence[str], run: RunFolder) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """Open loggers for a run while inside.

    Args:
        names: of :data:`LOGGERS`.
        run: the folder of the run.

    Yields:
        what is to be called with every line of metrics.jsonl; None without loggers.
    """
    record, opened = run.record(), dict[str, Logger]()

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever another library raises: the run is not to suffer from it
            opened.pop(name, None)
            reason = PASSWORD.sub("", f"{type(error).__name__}: {error}")
            run.event("logger_failed", logger=name, reason=reason[:500])
            return None

    for name in names:
        logger = attempt(name, functools.partial(LOGGERS[name], run, record))
        if logger is not None:
            opened[name] = logger
            attempt(name, functools.partial(logger.log_hyperparams, _about(record)))

    def log(row: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for name, logger in list(opened.items()):
            attempt(name, functools.partial(logger.log_metrics, numbers, step=row["step"]))

    try:
        yield log if opened else None
    finally:
        end = ENDS.get(Status(run.status()["status"]), FAILED)
        for name, logger in list(opened.items()):
            attempt(name, functools.partial(logger.finalize, end))
