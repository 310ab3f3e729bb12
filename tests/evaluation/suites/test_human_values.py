"""The suite of human values: its tasks, what it trains and tunes on, its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WORDS, small_model
from tokenizers import Tokenizer

from workbench.config import ConfigError
from workbench.data.tokenizer import train as train_tokenizer
from workbench.evaluation.human_values import arguments
from workbench.evaluation.human_values.scores import scores
from workbench.evaluation.suites import Conditions, NoJournal, Settings, suites
from workbench.evaluation.suites.human_values import HumanValues
from workbench.model import LanguageModel


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [text for part in arguments.synthetic().values() for text in part.texts]
    return train_tokenizer([*texts, " ".join(WORDS)], 300, 100_000)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return small_model().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"training": 120, "validation": 60, "test": 40, "test-nyt": 30}
    return arguments.write(arguments.synthetic(sizes), tmp_path_factory.mktemp("values"))


def suite(**fields: Any) -> HumanValues:
    return HumanValues(suites.parse({"kind": "human_values", "seeds": 1, "penalties": [0.1], **fields}))


def conditions(tokenizer: Tokenizer | None, **fields: Any) -> Conditions:
    return Conditions(Settings(8, 64), 300, tokenizer=tokenizer, **fields)


def test_tasks_are_the_test_sets(tokenizer: Tokenizer, folder: Path) -> None:
    assert list(suite(path=str(folder)).tasks(conditions(tokenizer))) == ["test", "test-nyt"]


def test_before_the_end_only_the_validation_set_is_measured(tokenizer: Tokenizer, folder: Path) -> None:
    assert suite(path=str(folder)).tasks(conditions(tokenizer, split="selection")) == ["validation"]


def test_half_of_the_validation_set_tunes_and_the_other_half_is_measured(folder: Path) -> None:
    values = suite(path=str(folder))
    training, tuning = values._division(0, "selection")
    measured = values._measured_set("validation")
    assert len(tuning) == len(measured) == 30 and len(training) == 120
    assert not set(tuning.ids) & set(measured.ids)


def test_seeds_divide_training_and_validation_again(folder: Path) -> None:
    values = suite(path=str(folder))
    (training, tuning), (other, other_tuning) = (values._division(seed, "report") for seed in (0, 1))
    assert {*training.ids, *tuning.ids} == {*other.ids, *other_tuning.ids}
    assert len(other) == len(training) and set(other.ids) != set(training.ids)


def test_the_table_has_the_scores_of_its_predictions(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    measured = suite(path=str(folder), limit=40).measure(model, "test", conditions(tokenizer), NoJournal())
    total = {score.metric: score.total for score in measured.scores}
    truth, predicted = (
        np.array([list(row) for row in measured.documents[name]]) == "1" for name in ("truth", "predicted")
    )
    result = scores(truth, predicted)
    assert (total["official score"], total["mean F1"]) == pytest.approx((result.official, result.mean_f1))
    assert total["official score, 2.5 %"] <= total["official score"] <= total["official score, 97.5 %"]  # type: ignore[operator]
    assert total["official score"] - total["all ones"] == pytest.approx(total["lift over all ones"])  # type: ignore[operator]
    errors = next(score for score in measured.scores if score.metric == "label errors")
    assert np.asarray(errors.values) == pytest.approx((truth != predicted).mean(1))


def test_metrics_are_known_before(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    subject = suite(path=str(folder), limit=40)
    measured = {score.metric for score in subject.measure(model, "test", conditions(tokenizer), NoJournal()).scores}
    names = [name for name in subject.metric_names("test") if not name.startswith("F1 ")]  # of values that occur
    assert len(names) == 4 and set(names) <= measured


def test_a_killed_measurement_goes_on(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Predictions in the journal are not computed again."""
    journal = NoJournal()
    first = suite(path=str(folder), limit=40).measure(model, "test", conditions(tokenizer), journal)
    again = suite(path=str(folder), limit=40).measure(None, "test", conditions(tokenizer), journal)  # type: ignore[arg-type]
    assert again.frame().equals(first.frame())


@pytest.mark.parametrize("method", ["fine_tuning", "prompting"])
def test_other_methods(model: LanguageModel, tokenizer: Tokenizer, folder: Path, method: str) -> None:
    values = suite(path=str(folder), limit=20, method=method, epochs=1, learning_rates=[1e-3])
    frame = values.measure(model, "test", conditions(tokenizer), NoJournal()).frame()
    assert {"official score", "label errors"} <= set(frame["metric"])


def test_a_model_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="human_values"):
        suite().tasks(conditions(None))


def test_a_missing_folder_is_found_before_training(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"path: got .nowhere"):
        suite(path="nowhere").tasks(conditions(tokenizer))


def test_the_material_names_the_files_and_the_licence(tokenizer: Tokenizer, folder: Path) -> None:
    assert suite(path=str(folder)).material(conditions(tokenizer))["licence"] == "not stated in the folder"
    assert suite().material(conditions(tokenizer)) == {"data": "synthetic"}
