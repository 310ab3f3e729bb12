"""Documents in the form of RULER's tasks: their number, lengths, answers, and what their splits are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data import prepare, tasks
from workbench.data.splits import SPLITS
from workbench.data.tasks.ruler import RulerDocuments


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 30)


def made(corpus: Path, **changes: Any) -> RulerDocuments:
    text = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3, "evaluation_bytes": 4000}
    fields = {
        "tasks": ["niah_single_2", "niah_multikey_2", "niah_multikey_1"],
        "lengths": [512, 700],
        "tokens": 12_000,
        "examples": 6,
        "further": 3,
        "text": text,
        **changes,
    }
    return prepare(RulerDocuments.Config.parse(fields), 300, corpus.parent / "cache")


def texts(documents: RulerDocuments, split: str) -> list[str]:
    part = getattr(documents, split)
    pieces = (part.piece(index, 0, int(length)) for index, length in enumerate(part.lengths))
    return [documents.tokenizer.decode(tokens.tolist()) for _, tokens in pieces]


def test_every_task_and_length_gets_the_same_number_of_tokens(corpus: Path) -> None:
    cells = made(corpus).card["splits"]["train"]["cells"]
    assert cells == {
        f"{task}/{length}": count
        for task in ("niah_single_2", "niah_multikey_2", "niah_multikey_1")
        for length, count in ((512, 4), (700, 3))  # ceil(12,000 / length / 6 cells)
    }


def test_a_document_ends_with_its_answers(corpus: Path) -> None:
    for written in texts(made(corpus), "train"):
        assert written.endswith(".")
        if "magic" in written:
            key, value = written.rsplit("The magic number of ", 1)[1].rstrip(".").split(" is ")
            assert f"The magic number of {key} is {value}." in written.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]


def test_further_questions_ask_for_other_needles(corpus: Path) -> None:
    documents = [text for text in texts(made(corpus), "train") if text.count("in the text above?") > 1]
    assert documents
    for written in documents:
        keys = [part.split(" is ")[0] for part in written.split("?\nThe magic number of ")[1:]]
        assert len(set(keys)) == len(keys) == 4


def test_documents_are_about_as_long_as_asked(corpus: Path) -> None:
    for length in made(corpus, further=0, tasks=["niah_single_2"], lengths=[600]).train.lengths:
        assert 570 <= length <= 640  # at most 5 % shorter; the answer is after the prompt


def test_splits_are_of_different_text(corpus: Path) -> None:
    documents = made(corpus)
    drawn = {split: set(texts(documents, split)) for split in SPLITS}
    assert all(drawn.values()) and sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


def test_a_document_that_fits_no_length_is_left_out(corpus: Path) -> None:
    cells = made(corpus, tasks=["niah_single_1", "cwe"], lengths=[512]).card["splits"]["train"]["cells"]
    assert set(cells) == {"niah_single_1/512"}


def test_lengths_that_fit_nothing_are_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.lengths: got \[64\]"):
        made(corpus, tasks=["cwe"], lengths=[64])


def test_documents_train_as_text_does(corpus: Path) -> None:
    rows = made(corpus).stream(context=128, seed=0)
    tokens, targets, _, _ = rows.row(0)
    assert len(tokens) == 128 and (targets >= 0).all()
    assert tasks.sources["ruler"] is RulerDocuments
