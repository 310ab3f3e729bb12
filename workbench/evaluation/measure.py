"""Measure a model with several suites, task by task, into the tables of a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from workbench.config import ConfigError, Problem, nearest, require
from workbench.evaluation.suites import Conditions, Suite, SuiteConfig, suites
from workbench.model import LanguageModel
from workbench.results.scores import ScoreTable

__all__ = ["check_score", "check_suites", "measure_suite"]


def check_suites(suite_configs: Sequence[SuiteConfig], conditions: Conditions) -> dict[str, list[str]]:
    """Name of every suite -> its tasks, before anything takes time.

    Raises:
        ConfigError: with the mistakes of all suites: data that are missing, tasks that are unknown, a model that a
            suite does not fit. Paths begin with ``evaluation[number]``.
    """
    problems: list[Problem] = []
    tasks: dict[str, list[str]] = {}
    for index, config in enumerate(suite_configs):
        try:
            config.check(conditions.vocabulary, conditions.settings.context)
            tasks[config.label] = list(suites[config.kind](config).tasks(conditions))
        except ConfigError as error:
            problems += error.under(f"evaluation[{index}]").problems
    if problems:
        raise ConfigError(problems)
    return tasks


def check_score(
    config: SuiteConfig, conditions: Conditions, task: str | None, metric: str, where: Mapping[str, object]
) -> None:
    """Check that a suite measures a score, as far as that is known before it measures.

    Args:
        config: the suite.
        conditions: data, tokenizer, split.
        task: one of its tasks; None stands for all of them.
        metric: name of the metric.
        where: label of documents -> value.

    Raises:
        ConfigError: naming ``task``, ``metric`` or ``where`` and the nearest valid name.
    """
    suite: Suite = suites[config.kind](config)
    tasks = suite.tasks(conditions)
    require(
        task is None or task in tasks,
        "task",
        got=task,
        expected=f"a task of {config.label!r}",
        do=nearest(task, tasks),
    )
    for name in tasks if task is None else (task,):
        metrics, labels = suite.metric_names(name), suite.label_values(name, conditions)
        require(
            not metrics or metric in metrics,
            "metric",
            got=metric,
            expected=f"a metric of {name!r}",
            do=nearest(metric, metrics),
        )
        for label, value in where.items():
            require(
                label not in labels or value in labels[label],
                f"where.{label}",
                got=value,
                expected=f"one of {', '.join(map(str, labels.get(label, ())))}, which {name!r} measures",
            )


def measure_suite(
    model: LanguageModel,
    config: SuiteConfig,
    conditions: Conditions,
    folder: Path,
    step: int,
    on_document: Callable[[], None] = lambda: None,
) -> int:
    """Measure ``model`` with one suite; tasks that the table of the suite has already are left as they are.

    Args:
        model: neither compiled nor sharded; its mode is left as it was.
        config: the suite.
        conditions: data, tokenizer, precision.
        folder: of the tables.
        step: optimiser step after which the model is measured.
        on_document: called after every document of a suite with a journal; may raise to stop.

    Returns:
        Number of tasks that were measured.

    Raises:
        ConfigError: when the table has the suite with other settings; when tasks cannot be measured, after all others
            were.
    """
    suite: Suite = suites[config.kind](config)
    tasks = suite.tasks(conditions)
    table = ScoreTable(folder, config.label, {**config.settings, "material": dict(suite.material(conditions))})
    missing = [task for task in tasks if not table.has(step, conditions.split, task)]
    problems: list[Problem] = []
    with _evaluation_mode(model):
        for number, task in enumerate(missing, 1):
            conditions.progress(f"measuring {config.label}: {task} ({number} of {len(missing)})")
            journal = table.journal(step, conditions.split, task, on_document)
            try:
                measured = suite.measure(model, task, conditions, journal)
            except ConfigError as error:  # no reason to leave out the tasks that follow
                problems += error.under(task).problems
                journal.remove()
                continue
            table.add(step, conditions.split, task, measured.frame())
            journal.remove()
            on_document()
    if problems:
        raise ConfigError(problems)
    return len(missing)


@contextlib.contextmanager
def _evaluation_mode(model: LanguageModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
