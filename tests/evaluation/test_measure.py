"""Answers are counted as greedy decoding would give them; sizes and labels stay beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.data import prepare, tasks
from workbench.data.tasks import answer_starts
from workbench.evaluation import evaluate
from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS, BITS_PER_BYTE, Metric
from workbench.model import LanguageModel, ModelConfig
from workbench.training import RunConfig

MODEL = {"width": 32, "depth": 1, "vocabulary": 12}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "COMPARED", 10)
        mixes = [{"length": 16, "pairs": 3}, {"length": 12, "pairs": 1}]
        run = RunConfig.parse({"model": MODEL, "data": {"kind": "mqar", "mixes": mixes, "examples": 30}})
        return prepare(run.data, 12, tmp_path_factory.mktemp("cache")).report


@pytest.mark.parametrize(("batch_size", "context"), [(1, 16), (4, 60), (64, 16)])
def test_losses_and_errors_are_those_of_every_example_alone(split: Any, batch_size: int, context: int) -> None:
    model = LanguageModel(ModelConfig.parse(MODEL), seed=1)
    measured = evaluate(model, split, batch_size=batch_size, context=context)
    assert set(measured) == {"nll_nats", "errors", "answers", "length", "pairs"}
    for d in range(len(split)):
        tokens, targets = (torch.from_numpy(np.array(x)).long() for x in split.piece(d, 0, int(split.lengths[d])))
        with torch.no_grad():
            logits = model.logits(model(tokens[None]))[0]
        there = targets >= 0
        nll = torch.nn.functional.cross_entropy(logits[there], targets[there], reduction="sum")
        assert measured["nll_nats"][d] == pytest.approx(float(nll), rel=1e-4)
        assert measured["errors"][d] == int((logits[there].argmax(-1) != targets[there]).sum())
        assert measured["answers"][d] == int(there.sum())


def test_one_wrong_token_makes_an_answer_wrong_once() -> None:
    class Two:
        whole = answered = True
        lengths = np.array([6, 6])
        columns = {"answers": np.array([2, 1])}

        def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            targets = [[5, 5, 5, -100, -100, 7], [7, 7, -100, -100, -100, -100]][document]
            return np.arange(count), np.array(targets)

        def __len__(self) -> int:
            return 2

    class Fixed(torch.nn.Module):
        """Says 5, 6, 6, … in the first example's answers, 7 everywhere else."""

        embedding = torch.nn.Embedding(9, 2)

        def answer_losses(self, tokens_BT: Any, targets_BT: Any, segments: Any) -> tuple[Any, Any]:
            said = torch.full_like(targets_BT, 7)
            said[:, :3] = torch.tensor([5, 6, 6])
            there = targets_BT >= 0
            return there.float(), there & (said != targets_BT)

    for context in (6, 12):  # alone in a row, and with the next answer right behind in the same row
        measured = evaluate(Fixed(), Two(), batch_size=1, context=context)  # type: ignore[arg-type]
        assert measured["errors"].tolist() == ([1, 1] if context == 6 else [1, 0])
        assert measured["nll_nats"].tolist() == [4.0, 2.0]


def test_answers_begin_where_targets_or_documents_do() -> None:
    targets, documents = np.array([[3, 4, -100, 5, 6, 7]]), np.array([[0, 0, 0, 0, 1, 1]])
    assert answer_starts(targets).tolist() == [[True, False, False, True, False, False]]
    assert answer_starts(targets, documents).tolist() == [[True, False, False, True, True, False]]


def test_metrics_are_ratios_of_sums() -> None:
    columns = {
        "nll_nats": np.array([1.0, 3.0]),
        "bytes": np.array([2, 6]),
        "errors": np.array([1, 0]),
        "answers": np.array([1, 3]),
    }
    assert BITS_PER_BYTE.of(columns) == pytest.approx(0.5 / math.log(2))
    assert ANSWER_LOSS.of(columns) == pytest.approx(1 / math.log(2)) and ANSWER_ERRORS.of(columns) == 0.25
    assert Metric(**ANSWER_ERRORS.plain()) == ANSWER_ERRORS and ANSWER_ERRORS.short == "errors/answer"


def test_training_reaches_the_answers_only(tmp_path: Path) -> None:
    """The gradient of a row is that of its answers: other tokens as targets would change it."""
    model = LanguageModel(ModelConfig.parse(MODEL), seed=0)
    tokens = torch.randint(12, (2, 8))
    targets = torch.full((2, 8), -100)
    targets[0, 3], targets[1, 5] = 4, 2
    model.loss(tokens, targets).backward()
    got = model.embedding.weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    hidden = model(tokens)
    scores = model.logits(torch.stack((hidden[0, 3], hidden[1, 5])))
    torch.nn.functional.cross_entropy(scores, torch.tensor([4, 2])).backward()
    assert torch.allclose(got, model.embedding.weight.grad, atol=1e-6)  # type: ignore[arg-type]
