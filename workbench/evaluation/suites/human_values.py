"""Human-value detection in arguments (SemEval-2023 task 4, Touché23-ValueEval): which of twenty values does it rest on?

Three methods (:mod:`workbench.evaluation.human_values`): a frozen probe, full fine-tuning, prompting. A task is a test
set. Per-label thresholds are tuned on the validation set only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from workbench.config import require
from workbench.evaluation.human_values import arguments, scores
from workbench.evaluation.human_values.arguments import NAMES, Arguments
from workbench.evaluation.human_values.fine_tuning import Recipe, fine_tune
from workbench.evaluation.human_values.probe import probe
from workbench.evaluation.human_values.prompting import prompt_scores
from workbench.evaluation.human_values.states import encode, hidden_states
from workbench.evaluation.suites import Conditions, Journal, Measured, Score, Suite, SuiteConfig, suites
from workbench.model import LanguageModel
from workbench.seeding import Seed, counter_generator

DIVISION_STREAM = 100
"""Random stream of the divisions into training and validation, behind those of the synthetic sets."""

LIFT = "lift over all ones"
"""Official score above that of predicting every value everywhere; may be negative."""


@suites.register
class HumanValues(Suite):
    """The official score, the mean of per-label F1, and the lift over predicting every value everywhere.

    With several seeds the scores are means over seeds. The first seed uses the public division into training and
    validation; every further one divides their arguments again, at the same sizes. ``label errors`` is the share of the
    twenty labels that are wrong, by argument. Columns ``truth`` and ``predicted`` (of the first seed; one character per
    value) let :func:`workbench.evaluation.human_values.scores.intervals` resample the arguments of several runs
    together.

    After a step, and in tuning runs, the test sets stay closed: half of the validation set tunes the thresholds, the
    other half is measured.
    """

    class Config(SuiteConfig):
        """Human-value detection."""

        kind: Literal["human_values"] = "human_values"
        path: str | None = None
        """Folder of the public TSV files. Default: a synthetic set of the same form, whose scores mean nothing."""
        method: Literal["probe", "fine_tuning", "prompting"] = "probe"
        """Logistic regressions on frozen states, all weights with a head, or log-probabilities of yes and no."""
        seeds: Annotated[int, Field(ge=1, le=100)] = 5
        """Seeds of the division and, in fine-tuning, of head and order; prompting has one."""
        seed: Seed = 0
        """Of the synthetic set, the divisions and the resamples."""
        penalties: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-3, 1e-2, 1e-1, 1.0)
        """Weights of the squared norm that the probe chooses from."""
        head: Literal["linear", "per value"] = "linear"
        """Head of fine-tuning: one matrix, or a network of one hidden layer for every value."""
        learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-5, 3e-5, 1e-4)
        """Peak learning rates that fine-tuning chooses from."""
        epochs: Annotated[int, Field(ge=1)] = 4
        """Epochs of fine-tuning."""
        arguments_per_step: Annotated[int, Field(ge=1)] = 32
        """Arguments of an optimiser step of fine-tuning."""
        layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Learning rate of a block as a factor of that of the next one."""
        limit: Annotated[int | None, Field(ge=20)] = None
        """Arguments of each set at most, the first ones, for a quick look. Default: all."""

    @cached_property
    def sets(self) -> dict[str, Arguments]:
        """All sets, by name.

        Raises:
            ConfigError: as :func:`workbench.evaluation.human_values.arguments.read`.
        """
        config = self.config
        found = arguments.synthetic(seed=config.seed) if config.path is None else arguments.read(config.path)
        if config.limit is not None:
            found = {name: part.take(np.arange(min(len(part), config.limit))) for name, part in found.items()}
        return found

    def tasks(self, conditions: Conditions) -> Sequence[str]:
        conditions.text(self.config.kind)
        require(
            conditions.settings.decoder is None,
            "kind",
            got="'human_values', which reads arguments in one pass, with a decoding policy",
            expected="loss, answers, or a suite of generated answers",
            do="Measure it in the run that the weights are from.",
        )
        test_sets = [name for name in self.sets if name.startswith("test")]
        for name in ("training", "validation", *test_sets):
            require(
                bool(self.sets[name].labels.any()), "path", got=f"no label in {name}", expected="labelled arguments"
            )
        return test_sets if conditions.split == "report" else ["validation"]

    def metric_names(self, task: str) -> Sequence[str]:
        return ["official score", "mean F1", LIFT, *(f"F1 {name}" for name in NAMES), "label errors"]

    def material(self, conditions: Conditions) -> Mapping[str, Any]:
        if self.config.path is None:
            return {"data": "synthetic"}
        return arguments.material(self.config.path)

    def measure(self, model: LanguageModel, task: str, conditions: Conditions, journal: Journal) -> Measured:
        count = 1 if self.config.method == "prompting" else self.config.seeds
        predicted = []
        for seed in range(count):
            stored = journal.get(seed)
            if stored is None:
                conditions.progress(f"{self.config.method} of human values, seed {seed + 1} of {count}")
                stored = journal.add(seed, _written(self._predictions(model, conditions, seed)[task]))
            predicted.append(_read(stored))
        return _measured(self._measured_set(task), np.stack(predicted), self.config.seed)

    # -- predictions -------------------------------------------------------------------------------------------------

    def _predictions(self, model: LanguageModel, conditions: Conditions, seed: int) -> dict[str, np.ndarray]:
        """(N, 20) booleans of every task, thresholds tuned on the validation set of this seed."""
        key = (id(model), conditions.split, seed)
        if key in self._predicted:
            return self._predicted[key]
        training, tuning = self._division(seed, conditions.split)
        measured = {name: self._measured_set(name) for name in self.tasks(conditions)}
        values, *others = self._values(model, conditions, [training, tuning, *measured.values()], seed)
        limits = scores.thresholds(tuning.labels, values)
        self._predicted[key] = {name: part >= limits for name, part in zip(measured, others, strict=True)}
        return self._predicted[key]

    @cached_property
    def _predicted(self) -> dict[tuple[int, str, int], dict[str, np.ndarray]]:
        """Predictions by model, split and seed: a method serves all test sets at once."""
        return {}

    def _measured_set(self, task: str) -> Arguments:
        part = self.sets[task]
        return part.take(np.arange(1, len(part), 2)) if task == "validation" else part

    def _division(self, seed: int, split: str) -> tuple[Arguments, Arguments]:
        """Arguments to train on and to tune on."""
        training, validation = self.sets["training"], self.sets["validation"]
        if split != "report":  # the other half of the validation set is measured
            return training, validation.take(np.arange(0, len(validation), 2))
        if seed == 0:
            return training, validation
        both = training.joined(validation)
        order = counter_generator(self.config.seed, DIVISION_STREAM, seed).permutation(len(both))
        return both.take(order[: len(training)]), both.take(order[len(training) :])

    def _values(
        self, model: LanguageModel, conditions: Conditions, parts: Sequence[Arguments], seed: int
    ) -> Sequence[np.ndarray]:
        """(N, 20) real values of all sets but the first, larger where the argument is more likely to have the label."""
        config, settings = self.config, conditions.settings
        tokenizer = conditions.text(config.kind)
        if config.method == "prompting":
            return [prompt_scores(model, tokenizer, part.texts, settings) for part in parts[1:]]
        rows = [encode(tokenizer, part.texts, settings.context) for part in parts]
        labels = [part.labels for part in parts[:2]]
        if config.method == "probe":
            states = [hidden_states(model, part, settings) for part in rows]
            return probe(states, labels, config.penalties).values
        recipe = Recipe(
            head=config.head,
            learning_rates=config.learning_rates,
            epochs=config.epochs,
            batch_size=config.arguments_per_step,
            layer_decay=config.layer_decay,
        )
        return fine_tune(model, rows, labels, recipe, settings, seed=seed).values


def _measured(measured: Arguments, predicted: np.ndarray, seed: int) -> Measured:
    """Scores of (S, N, 20) predictions: means over seeds, and percentile intervals over arguments."""
    truth = measured.labels
    by_seed = [scores.scores(truth, prediction) for prediction in predicted]
    baseline = scores.all_ones(truth)
    official = float(np.mean([one.official for one in by_seed]))
    totals = {
        "official score": official,
        "mean F1": float(np.mean([one.mean_f1 for one in by_seed])),
        LIFT: official - baseline.official,
        "all ones": baseline.official,
    }
    bounds = scores.intervals(truth, predicted, seed=seed)
    for name, metric in (("official", "official score"), ("mean F1", "mean F1"), ("lift", LIFT)):
        totals |= {f"{metric}, 2.5 %": bounds[name].low, f"{metric}, 97.5 %": bounds[name].high}
    if len(by_seed) > 1:
        totals["official score, seeds' deviation"] = float(np.std([one.official for one in by_seed], ddof=1))
    for index, name in enumerate(NAMES):
        if truth[:, index].any():
            totals[f"F1 {name}"] = float(np.mean([one.f1[index] for one in by_seed]))
    errors = (predicted != truth).mean(axis=(0, 2))
    documents = pl.DataFrame(
        {
            "argument": measured.ids,
            "source": measured.sources,
            "truth": _written(truth),
            "predicted": _written(predicted[0]),
        }
    )
    whole = [
        Score(metric, total=value, higher_is_better=True, upper=None if metric.startswith(LIFT) else 1)
        for metric, value in totals.items()
    ]
    return Measured([*whole, Score("label errors", errors, upper=1)], documents)


def _written(labels: np.ndarray) -> list[str]:
    """(N, 20) booleans as a string of 0 and 1 per argument."""
    return ["".join(row) for row in np.where(labels, "1", "0").tolist()]


def _read(rows: Sequence[str]) -> np.ndarray:
    return np.array([list(row) for row in rows]) == "1"
