"""Copies of a run's metrics for TensorBoard, Weights & Biases, MLflow or Trackio, while it trains.

The files of the run stay the record (:mod:`workbench.results.store`); a logger gets what a line of metrics.jsonl has,
never a value of the report split. A logger that fails is an event of the run and no failure of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

from workbench.config import ConfigError, flatten
from workbench.results.record import RunRecord
from workbench.results.store import RunFolder

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
    """A project per ablation, a group per arm; a resumed run continues its own."""
    from lightning.pytorch.loggers import WandbLogger

    about: dict[str, Any] = {"group": record.arm or None, "job_type": str(record.stage), "resume": "allow"}
    return WandbLogger(run.path.name, run.path, id=_key(run, record), project=_project(record), **about)


def _mlflow(run: RunFolder, record: RunRecord) -> Logger:
    """An experiment per ablation, at MLFLOW_TRACKING_URI or in the run's folder; a resumed run is another MLflow run of
    the same name."""
    from lightning.pytorch.loggers import MLFlowLogger

    tags = {"arm": record.arm, "stage": str(record.stage), "seed": str(record.seed), "run": _key(run, record)}
    return MLFlowLogger(_project(record), run.path.name, tags=tags, save_dir=str(run.path / "mlruns"))


class _Trackio:
    """Trackio has no logger of Lightning's: its own three calls."""

    def __init__(self, run: RunFolder, record: RunRecord):
        import trackio

        self._module = trackio
        trackio.init(project=_project(record), name=run.path.name, resume="allow")

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


def _project(record: RunRecord) -> str:
    return record.ablation or "workbench"


def _key(run: RunFolder, record: RunRecord) -> str:
    """The same for a run and its resumption, another one for a new launch."""
    return "-".join(filter(None, (record.launch, str(record.stage), record.identity, str(record.seed))))


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
                do=f"pip install {name}, or leave it out: every value is in metrics.jsonl." if known else "",
            )


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
            run.event("logger_failed", logger=name, reason=f"{type(error).__name__}: {error}"[:500])
            return None

    about = {"arm": record.arm, "stage": str(record.stage), "seed": record.seed, **flatten(record.hyperparameters)}
    for name in names:
        logger = attempt(name, functools.partial(LOGGERS[name], run, record))
        if logger is not None:
            opened[name] = logger
            attempt(name, functools.partial(logger.log_hyperparams, about))

    def log(row: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for name, logger in list(opened.items()):
            attempt(name, functools.partial(logger.log_metrics, numbers, step=row["step"]))

    try:
        yield log if opened else None
    finally:
        for name, logger in list(opened.items()):
            attempt(name, functools.partial(logger.finalize, "success"))
