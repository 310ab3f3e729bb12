"""The loss of text, document by document."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_fields, write_corpus

from workbench.data import prepare
from workbench.evaluation import Results, Settings, suites
from workbench.metric import BITS_PER_BYTE, NATS_PER_TOKEN
from workbench.model import LanguageModel
from workbench.training import RunConfig

LOSS: Any = suites["loss"](suites.parse("loss"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return RunConfig.parse(run_fields(write_corpus(tmp_path_factory.mktemp("loss") / "corpus")))


@pytest.fixture(scope="module")
def data(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return prepare(run.data, 300, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(run: RunConfig) -> LanguageModel:
    return LanguageModel(run.model, seed=1)


def alone(model: LanguageModel, split: Any, document: int) -> float:
    """Loss of one document by itself."""
    piece = split.piece(document, 0, int(split.lengths[document]))
    tokens, targets = (torch.from_numpy(np.array(part, dtype=np.int64))[None] for part in piece)
    return float(model.token_losses(tokens, targets).double().sum())


@pytest.mark.parametrize("batch_size", [1, 5])
def test_losses_are_those_of_every_document_alone(model: LanguageModel, data: Any, batch_size: int) -> None:
    split = data.selection
    measured = LOSS.columns(model, split, Settings(batch_size, context=int(split.lengths.sum())))
    with torch.no_grad():
        expected = [alone(model, split, document) for document in range(len(split))]
    assert measured["nll_nats"] == pytest.approx(np.array(expected), rel=1e-4)


def test_every_target_is_counted(model: LanguageModel, data: Any) -> None:
    measured = LOSS.columns(model, data.selection, Settings(2, 32))
    assert measured["targets"].tolist() == data.selection.lengths.tolist()


@pytest.fixture(scope="module")
def results(model: LanguageModel, data: Any) -> Results:
    return LOSS.run(model, data, "selection", Settings(2, 32))


def test_one_row_per_metric(results: Results) -> None:
    assert [(row.suite, row.task, row.metric, row.n) for row in results.rows] == [
        ("loss", "text", "bits per byte", 2),
        ("loss", "text", "nats per token", 2),
    ]


def test_the_primary_metric_is_found_by_suite_task_and_unit(results: Results) -> None:
    columns = results.documents["loss", "text"]
    bits = columns["nll_nats"].sum() / columns["bytes"].sum() / math.log(2)
    assert results.value(BITS_PER_BYTE) == pytest.approx(bits, rel=1e-15)


def test_nats_per_token_divides_by_targets(results: Results) -> None:
    columns = results.documents["loss", "text"]
    assert results.value(NATS_PER_TOKEN) == columns["nll_nats"].sum() / columns["targets"].sum()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model: LanguageModel, data: Any, training: bool) -> None:
    model.train(training)
    LOSS.columns(model, data.selection, Settings(2, 32))
    assert model.training is training
