"""Evaluation suites, one file per suite. A suite lists its tasks and measures a model on one task at a time.

Every result ends in one long table, a file per suite in the folder of the run (:mod:`workbench.results.scores`):

    run, arm, stage, seed, step, split, suite, task, document, metric, value, count, higher_is_better, upper, cluster,
    labels…

``document`` is null in the row of all documents together. ``count`` is the denominator behind ``value`` (bytes,
answers, 1 per example), so that the value of all documents is the mean of theirs, weighted by ``count``, for every
metric that is a ratio of sums. Labels (length, depth, subject) are further columns: a table by length is a group-by.

A suite is one file in this package, or a plug-in::

    @suites.register
    class Colours(Suite):
        \"\"\"Share of colours that the model names right.\"\"\"

        class Config(SuiteConfig):
            \"\"\"Names of colours.\"\"\"

            kind: Literal["colours"] = "colours"
            path: str
            \"\"\"A text file, one colour a line.\"\"\"

        def tasks(self, conditions):  # also called before training: whatever is missing is an error then
            require(Path(self.config.path).is_file(), "path", got=self.config.path, expected="a text file")
            return ["colours"]

        def measure(self, model, task, conditions, journal):
            right, length = [], []
            for number, colour in enumerate(Path(self.config.path).read_text().split()):
                answer = journal.get(number)  # measured before the process was killed
                if answer is None:
                    answer = journal.add(number, self.names(model, colour))
                right.append(answer)
                length.append(len(colour))
            documents = pl.DataFrame({"length": length})
            return Measured([Score("accuracy", right, higher_is_better=True, upper=1)], documents)

A suite whose metrics are ratios of sums over the documents of a data source, such as ``loss`` and ``answers``, derives
from :class:`DocumentSuite` and only returns columns. It measures the data of the run, or, with ``data`` in its
configuration, any other source: a model of text on MQAR or needles is ``{kind: answers, data: {kind: mqar, …}}``.

Legend: B rows, T tokens in a row, D documents.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import polars as pl
import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from tokenizers import Tokenizer
from torch import Tensor

from workbench.config import Config, ConfigError, require
from workbench.data import Batch, MeasuredSplit, Source, SourceConfig, Split, evaluation_batches, prepare, sources
from workbench.evaluation.decoded import DecodedModel, Decoder
from workbench.evaluation.scores import Measured, Score
from workbench.metric import Metric
from workbench.model import LanguageModel
from workbench.registry import Registry

__all__ = [
    "Conditions",
    "DocumentConfig",
    "DocumentSuite",
    "Evaluation",
    "Journal",
    "Measured",
    "NoJournal",
    "Results",
    "Score",
    "Settings",
    "Suite",
    "SuiteConfig",
    "device_batches",
    "inference",
    "suites",
]

T = TypeVar("T")


class SuiteConfig(Config):
    """Base of a suite's configuration. ``kind`` is the registered name."""

    kind: str
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=80)] = None
    """Name of the suite in tables and of its file. Default: the kind. Two suites of one kind need different names."""
    when: Annotated[
        tuple[Annotated[int, Field(ge=1)] | Literal["end"], ...],
        Field(min_length=1),
        BeforeValidator(lambda value: (value,) if isinstance(value, int | str) else value),
    ] = ("end",)
    """When it measures a run: after optimiser steps, at the end, or both: [1000, 2000, end]."""
    split: Literal["selection", "report"] = "report"
    """The documents at the end of a run: those that it is judged on, or those that tuning looks at. After a step, and
    in tuning runs, always the latter. Matters only to suites that draw on the splits of the run's data."""

    @property
    def label(self) -> str:
        """Its name, or else its kind."""
        return self.name or self.kind

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data that its results depend on."""
        return {name: value for name, value in self.plain().items() if name not in ("name", "when", "split")}

    def check(self, vocabulary: int, context: int) -> None:
        """Check that the suite fits a model of ``vocabulary`` token ids that is trained on rows of ``context`` tokens.

        Raises:
            ConfigError: if it does not, with paths relative to this configuration.
        """


@dataclass(frozen=True)
class Settings:
    """How a model is run during evaluation."""

    batch_size: int
    """Rows of a batch."""
    context: int
    """Tokens of a row; a document starts a fresh context of at most this length."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass."""
    decoder: Decoder | None = None
    """Reads documents and prompts through a decoding policy. Default: documents are read in one pass."""

    def reader(self, model: LanguageModel) -> LanguageModel | DecodedModel:
        """What losses of documents are computed with: ``model``, or the model as the policy reads it."""
        if self.decoder is None:
            return model
        return DecodedModel(model, self.decoder, bf16=self.precision == "bf16")

    def rows(self, length: int) -> int:
        """Rows of ``length`` tokens that take as much memory as a batch."""
        return max(1, self.batch_size * self.context // max(1, length))


@dataclass(frozen=True)
class Conditions:
    """What a model is measured with."""

    settings: Settings
    vocabulary: int
    """Token ids of the model."""
    split: MeasuredSplit = "report"
    """Documents of the data sources to measure; suites that draw examples draw others for every split."""
    data: Source | None = None
    """Data of the model's run; None for an exported folder."""
    tokenizer: Tokenizer | None = None
    """Between text and the model's token ids; None of a model without text."""
    cache: Path | None = None
    """Folder of prepared data."""
    progress: Callable[[str], None] = field(default=lambda line: None, compare=False)
    """Called with a line about each step."""

    def text(self, suite: str) -> Tokenizer:
        """The tokenizer.

        Raises:
            ConfigError: when the model has none, naming ``suite``.
        """
        if self.tokenizer is None:
            raise ConfigError.at(
                "evaluation", got=f"{suite!r} for a model without tokenizer", expected="a model of text"
            )
        return self.tokenizer


class Journal(Protocol):
    """What was measured of the task in hand, document by document, on disk: a killed evaluation resumes after it."""

    def get(self, key: object) -> Any:
        """The value of a document, as :meth:`add` stored it; None if there is none."""

    def add(self, key: object, value: T) -> T:
        """Store the value of a document, fit for JSON and not None, and return it. A process that has to stop raises
        here."""


class NoJournal:
    """A journal in memory."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get(self, key: object) -> Any:
        return self._values.get(str(key))

    def add(self, key: object, value: T) -> T:
        self._values[str(key)] = value
        return value


class Suite(ABC):
    """One way to measure a model. Built as ``cls(config)``. Draws no random numbers from global generators."""

    Config: ClassVar[type[SuiteConfig]]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def tasks(self, conditions: Conditions) -> Sequence[str]:
        """Names of the tasks, in the order in which they are measured. Called before training as well, so that missing
        data are found then.

        Raises:
            ConfigError: naming what is missing or does not fit the model, with paths relative to the configuration.
        """

    @abstractmethod
    def measure(self, model: LanguageModel, task: str, conditions: Conditions, journal: Journal) -> Measured:
        """Measure ``model`` on one task.

        Args:
            model: in evaluation mode, neither compiled nor sharded, without gradients. Its weights may be those of a
                run in training: a suite that trains does so on a copy.
            task: one of :meth:`tasks`.
            conditions: data, tokenizer, precision.
            journal: what was measured already; worth using where a task takes minutes.
        """

    def metric_names(self, task: str) -> Sequence[str]:
        """Names of the metrics of a task, where they are known before it is measured. Called after :meth:`tasks`; a
        metric that an ablation declares is checked against them. Default: none is known."""
        return ()

    def label_values(self, task: str, conditions: Conditions) -> Mapping[str, Collection[Any]]:
        """Labels of the documents of a task -> their values, as far as they are known before it is measured. Called
        after :meth:`tasks`. Default: none is known."""
        return {}

    def material(self, conditions: Conditions) -> Mapping[str, Any]:
        """What the results depend on beside the configuration: hashes of files, versions of libraries. Results of other
        material are not mixed with them. Default: nothing."""
        return {}


@dataclass(frozen=True)
class Evaluation:
    """One row of a run's evaluations."""

    suite: str
    task: str
    metric: str
    """Unit of the metric: "bits per byte"."""
    value: float
    n: int
    """Documents or examples behind the value."""


@dataclass(frozen=True)
class Results:
    """What the suite of the primary metric measured."""

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


NO_LIMIT = 2**62
"""Tokens of a row that no example exceeds."""


def _source(data: object) -> Any:
    return None if data is None else sources.parse(data, default_kind="text")


class DocumentConfig(SuiteConfig):
    """Base of the configuration of a :class:`DocumentSuite`."""

    data: Annotated[SerializeAsAny[SourceConfig] | None, BeforeValidator(_source)] = None
    """Data to measure, such as {kind: mqar, …}. Default: the data of the run. Examples may be longer than the context
    of training, to measure extrapolation."""

    def check(self, vocabulary: int, context: int) -> None:
        if self.data is None:
            return
        require(
            self.data.readout is None,
            "data.kind",
            got=self.data.kind,
            expected="a task without a readout of its own, which the model would have to be trained with",
        )
        try:
            self.data.check(vocabulary, NO_LIMIT)  # it is not trained on
        except ConfigError as error:
            raise error.under("data") from None


class DocumentSuite(Suite):
    """A suite whose metrics are ratios of sums over the documents of a data source."""

    Config: ClassVar[type[DocumentConfig]]
    metrics: ClassVar[tuple[Metric, ...]]
    """The metrics of its rows."""

    @abstractmethod
    def columns(self, model: LanguageModel, documents: Split, settings: Settings) -> dict[str, np.ndarray]:
        """Columns over the documents, (D,) each, with the numerators and denominators of :attr:`metrics`; the others
        are labels."""

    def run(self, model: LanguageModel, data: Source, split: MeasuredSplit, settings: Settings) -> Results:
        """Measure ``model`` on the data of its run, as what it is judged by.

        Args:
            model: the model, compiled or sharded as in training; its mode is left as it was.
            data: prepared data.
            split: which documents; ``report`` is for confirmation runs only.
            settings: batches and precision.
        """
        data = data.judged
        suite, task = self.config.kind, data.card["kind"]
        columns = self.columns(model, getattr(data, split), settings)
        rows = list(self.rows(task, columns))
        for labels, cell in _cells(columns, data.Config.views.values()):
            rows += self.rows(f"{task}/{labels}", cell)
        return Results(tuple(rows), {(suite, task): columns})

    def rows(self, task: str, columns: Mapping[str, np.ndarray]) -> Iterator[Evaluation]:
        """One row per metric."""
        n = len(next(iter(columns.values())))
        for metric in self.metrics:
            yield Evaluation(self.config.kind, task, metric.unit, metric.of(columns), n)

    def tasks(self, conditions: Conditions) -> Sequence[str]:
        return [self._data(conditions).judged.card["kind"]]

    def measure(self, model: LanguageModel, task: str, conditions: Conditions, journal: Journal) -> Measured:
        documents: Split = getattr(self._data(conditions), conditions.split)
        columns = self.columns(model, documents, conditions.settings)
        sums = {name for metric in self.metrics for name in (metric.numerator, metric.denominator)}
        labels = pl.DataFrame({name: values for name, values in columns.items() if name not in sums})
        scores = []
        for metric in self.metrics:
            counts_D = columns[metric.denominator].astype(np.float64)
            values_D = np.zeros(len(counts_D))
            np.divide(metric.scale * columns[metric.numerator], counts_D, out=values_D, where=counts_D > 0)
            scores.append(Score(metric.unit, values_D, counts_D, metric.of(columns), upper=metric.upper))
        return Measured(scores, labels)

    def metric_names(self, task: str) -> Sequence[str]:
        return [metric.unit for metric in self.metrics]

    def label_values(self, task: str, conditions: Conditions) -> Mapping[str, Collection[Any]]:
        documents: Split = getattr(self._data(conditions), conditions.split)
        return {name: np.unique(values).tolist() for name, values in documents.columns.items()}

    def material(self, conditions: Conditions) -> Mapping[str, Any]:
        return {"data": self._data(conditions).fingerprint}

    def _data(self, conditions: Conditions) -> Source:
        if self.config.data is None:
            if conditions.data is None:
                raise ConfigError.at(
                    "data",
                    got=f"no data for {self.config.kind!r}, and a model without a run",
                    expected="data to measure",
                    do=f"For example evaluation: [{{kind: {self.config.kind}, data: {{kind: mqar}}}}].",
                )
            return conditions.data
        return self._prepared(conditions)

    def _prepared(self, conditions: Conditions) -> Source:
        if "_source" not in self.__dict__:
            if conditions.cache is None:
                raise ConfigError.at("data", got="no folder of prepared data", expected="a cache")
            source = prepare(self.config.data, conditions.vocabulary, conditions.cache, conditions.progress)
            other = source.tokenizer
            require(
                other is None or (conditions.tokenizer is not None and _same(other, conditions.tokenizer)),
                "data",
                got="text with another tokenizer than the model's",
                expected="the model's tokenizer",
                do="Name its file in data.tokenizer_file (of a task on text: data.text.tokenizer_file).",
            )
            self.__dict__["_source"] = source
        return self.__dict__["_source"]


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    return a.get_vocab() == b.get_vocab()


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
