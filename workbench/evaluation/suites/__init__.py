"""Evaluation suites, one file per suite. Each measures a model on a split and adds rows to one long table.

A row is (suite, task, metric, value, n). A metric is identified by its unit ("bits per byte"); ``n`` is the number of
documents or examples behind the value. A suite may also return numerators and denominators of single documents, so that
seeds can be compared by paired resampling of documents.

Legend: B rows, T tokens in a row, D documents.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from workbench.config import Config
from workbench.data import Batch, MeasuredSplit, Source, Split, evaluation_batches
from workbench.metric import Metric
from workbench.model import LanguageModel
from workbench.registry import Registry

__all__ = [
    "DocumentSuite",
    "Evaluation",
    "Results",
    "Settings",
    "Suite",
    "SuiteConfig",
    "device_batches",
    "evaluate",
    "inference",
    "suites",
]


class SuiteConfig(Config):
    """Base of a suite's configuration. ``kind`` is the registered name."""

    kind: str


@dataclass(frozen=True)
class Settings:
    """How a model is run during evaluation."""

    batch_size: int
    """Rows of a batch."""
    context: int
    """Tokens of a row; a document starts a fresh context of at most this length."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass."""


@dataclass(frozen=True)
class Evaluation:
    """One row of the long table."""

    suite: str
    task: str
    metric: str
    """Unit of the metric: "bits per byte"."""
    value: float
    n: int
    """Documents or examples behind the value."""


@dataclass(frozen=True)
class Results:
    """What one or several suites measured."""

    rows: tuple[Evaluation, ...]
    documents: Mapping[tuple[str, str], Mapping[str, np.ndarray]] = field(default_factory=dict)
    """(suite, task) -> columns over the documents of that task: numerators, denominators and labels, (D,) each."""

    def value(self, metric: Metric) -> float:
        """The value of a metric.

        Raises:
            KeyError: when no suite measured it.
        """
        for row in self.rows:
            if (row.suite, row.task, row.metric) == (metric.suite, metric.task, metric.unit):
                return row.value
        raise KeyError(f"no row for {metric.suite}/{metric.task}/{metric.unit}")

    def report(self) -> pl.DataFrame:
        """The documents of all tasks: columns suite, task, document (its index), then those of the suites."""
        frames = [
            pl.DataFrame({"document": range(len(next(iter(columns.values())))), **columns}).select(
                pl.lit(suite).alias("suite"), pl.lit(task).alias("task"), pl.all()
            )
            for (suite, task), columns in self.documents.items()
        ]
        return pl.concat(frames, how="diagonal") if frames else pl.DataFrame()


class Suite(ABC):
    """One way to measure a model. Built as ``cls(config)``."""

    Config: ClassVar[type[SuiteConfig]]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def run(self, model: LanguageModel, data: Source, split: MeasuredSplit, settings: Settings) -> Results:
        """Measure ``model`` on a split of ``data``. Draws no random numbers from global generators."""


class DocumentSuite(Suite):
    """A suite whose metrics are ratios of sums over the documents of the split."""

    metrics: ClassVar[tuple[Metric, ...]]
    """The metrics of its rows."""

    @abstractmethod
    def measure(self, model: LanguageModel, documents: Split, settings: Settings) -> dict[str, np.ndarray]:
        """Columns over the documents, (D,) each, with the numerators and denominators of :attr:`metrics`."""

    def run(self, model: LanguageModel, data: Source, split: MeasuredSplit, settings: Settings) -> Results:
        suite, task = self.config.kind, data.card["kind"]
        columns = self.measure(model, getattr(data, split), settings)
        rows = list(self.rows(task, columns))
        for labels, cell in _cells(columns, data.Config.views.values()):
            rows += self.rows(f"{task}/{labels}", cell)
        return Results(tuple(rows), {(suite, task): columns})

    def rows(self, task: str, columns: Mapping[str, np.ndarray]) -> Iterator[Evaluation]:
        """One row per metric."""
        n = len(next(iter(columns.values())))
        for metric in self.metrics:
            yield Evaluation(self.config.kind, task, metric.unit, metric.of(columns), n)


def _cells(
    columns: Mapping[str, np.ndarray], views: Iterable[tuple[str, ...]]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The documents of every combination of labels: "depth=50,length=256" and the columns of these documents."""
    for names in {tuple(sorted(labels)) for labels in views}:
        table = list(zip(*(columns[name].tolist() for name in names)))
        for values in sorted(set(table)):
            chosen = np.array([row == values for row in table])
            labels = ",".join(f"{name}={_number(value)}" for name, value in zip(names, values))
            yield labels, {name: column[chosen] for name, column in columns.items()}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def inference(model: LanguageModel, settings: Settings) -> Iterator[None]:
    """Evaluation mode, no gradients, the precision of ``settings``; the model's mode is restored at the end."""
    training = model.training
    device = model.embedding.weight.device.type
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
            yield
    finally:
        model.train(training)


def device_batches(
    model: LanguageModel, documents: Split, settings: Settings
) -> Iterator[tuple[Batch, tuple[Tensor, Tensor, Tensor]]]:
    """Batches of all documents on the CPU, and their tokens, targets and segments on the model's device."""
    device = model.embedding.weight.device
    for batch in evaluation_batches(documents, batch_size=settings.batch_size, context=settings.context):
        yield batch, (batch.tokens_BT.to(device), batch.targets_BT.to(device), batch.segments_BT.to(device))


suites: Registry[type[Suite]] = Registry("evaluation suite", "workbench.evaluation.suites")


def evaluate(
    model: LanguageModel,
    data: Source,
    split: MeasuredSplit,
    suite_configs: Sequence[SuiteConfig],
    settings: Settings,
) -> Results:
    """Measure a model with several suites.

    Args:
        model: the model; its mode is left as it was.
        data: prepared data.
        split: which documents; ``report`` is for confirmation runs only.
        suite_configs: the suites, in the order of their rows.
        settings: batches and precision.
    """
    results = [suites[config.kind](config).run(model, data, split, settings) for config in suite_configs]
    documents = {key: columns for result in results for key, columns in result.documents.items()}
    return Results(tuple(row for result in results for row in result.rows), documents)
