"""Answers are counted as greedy decoding would give them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from workbench.data import prepare, tasks
from workbench.data.tasks import answer_starts
from workbench.evaluation import Results, Settings, suites
from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS
from workbench.model import LanguageModel, ModelConfig
from workbench.training import RunConfig

MODEL = {"width": 32, "depth": 1, "vocabulary": 12}
ANSWERS: Any = suites["answers"](suites.parse("answers"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 10)
        mixes = [{"length": 16, "pairs": 3}, {"length": 12, "pairs": 1}]
        run = RunConfig.parse({"model": MODEL, "data": {"kind": "mqar", "mixes": mixes, "examples": 30}})
        return prepare(run.data, 12, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(ModelConfig.parse(MODEL), seed=1)


def alone(model: LanguageModel, split: Any, document: int) -> tuple[float, int, int]:
    """Loss, errors and answers of one example by itself; every answer has one token."""
    tokens, targets = (
        torch.from_numpy(np.array(part)).long() for part in split.piece(document, 0, int(split.lengths[document]))
    )
    with torch.no_grad():
        logits = model.logits(model(tokens[None]))[0]
    mask = targets >= 0
    loss = torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum")
    return float(loss), int((logits[mask].argmax(-1) != targets[mask]).sum()), int(mask.sum())


@pytest.mark.parametrize(("batch_size", "context"), [(1, 16), (4, 60), (64, 16)])
def test_losses_and_errors_are_those_of_every_example_alone(
    model: LanguageModel, data: Any, batch_size: int, context: int
) -> None:
    measured = ANSWERS.columns(model, data.report, Settings(batch_size, context))
    losses, errors, answers = zip(*(alone(model, data.report, d) for d in range(len(data.report))))
    assert measured["nll_nats"] == pytest.approx(np.array(losses), rel=1e-4)
    assert measured["errors"].tolist() == list(errors)
    assert measured["answers"].tolist() == list(answers)


@pytest.fixture(scope="module")
def results(model: LanguageModel, data: Any) -> Results:
    return ANSWERS.run(model, data, "report", Settings(8, 16))


def test_the_rows_over_all_examples_are_ratios_of_sums(results: Results) -> None:
    columns = results.documents["answers", "mqar"]
    assert results.rows[0].value == ANSWER_ERRORS.of(columns)
    assert results.rows[1].value == ANSWER_LOSS.of(columns)


def test_every_cell_of_a_view_has_its_rows(results: Results) -> None:
    assert {(row.task, row.n) for row in results.rows} == {
        ("mqar", 30),
        ("mqar/length=16,pairs=3", 15),
        ("mqar/length=12,pairs=1", 15),
    }


def test_labels_are_columns_of_the_documents(results: Results) -> None:
    assert set(results.documents["answers", "mqar"]) == {"nll_nats", "errors", "answers", "cluster", "length", "pairs"}


class TwoExamples:
    """Two answers of three and one tokens, then one answer of two."""

    indivisible = True
    lengths = np.array([6, 6])
    columns = {"answers": np.array([2, 1])}

    def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        targets = [[5, 5, 5, -100, -100, 7], [7, 7, -100, -100, -100, -100]][document]
        return np.arange(count), np.array(targets)

    def __len__(self) -> int:
        return 2


class FixedModel(torch.nn.Module):
    """Predicts 5, 6, 6 in the first three positions of a row, 7 everywhere else; every token costs one nat."""

    embedding = torch.nn.Embedding(9, 2)

    def answer_losses(self, tokens_BT: Any, targets_BT: Any, segments: Any) -> tuple[Any, Any]:
        predicted = torch.full_like(targets_BT, 7)
        predicted[:, :3] = torch.tensor([5, 6, 6])
        mask = targets_BT >= 0
        return mask.float(), mask & (predicted != targets_BT)


# alone in a row, and with the next answer right behind in the same row
@pytest.mark.parametrize(("context", "errors"), [(6, [1, 1]), (12, [1, 0])])
def test_one_wrong_token_makes_an_answer_wrong_once(context: int, errors: list[int]) -> None:
    measured = ANSWERS.columns(FixedModel(), TwoExamples(), Settings(1, context))
    assert measured["errors"].tolist() == errors


def test_the_loss_of_an_answer_sums_its_tokens() -> None:
    assert ANSWERS.columns(FixedModel(), TwoExamples(), Settings(1, 12))["nll_nats"].tolist() == [4.0, 2.0]


TARGETS = np.array([[3, 4, -100, 5, 6, 7]])


def test_answers_begin_where_targets_do() -> None:
    assert answer_starts(TARGETS).tolist() == [[True, False, False, True, False, False]]


def test_answers_begin_where_documents_do() -> None:
    documents = np.array([[0, 0, 0, 0, 1, 1]])
    assert answer_starts(TARGETS, documents).tolist() == [[True, False, False, True, True, False]]
