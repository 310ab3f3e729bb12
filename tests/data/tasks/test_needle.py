"""Needles in haystacks: found once, at their depth, answered from the context, with text of the right split."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data import Source, prepare, tasks
from workbench.data.tasks.needle import ADJECTIVES, NOUNS, Needle
from workbench.training import RunConfig

FACT = r"\nThe magic (?:number|word|uuid) of (\S+) is (\S+?)\.\n"
CASES: list[dict[str, Any]] = [
    {},
    {"haystack": "text", "needles": 4, "lengths": [300, 400]},
    {"haystack": "text", "value": "uuid", "key": "number"},
    {"haystack": "needles", "key": "uuid", "value": "uuid", "lengths": [400, 500]},
    {"haystack": "needles", "value": "word"},
]


@pytest.fixture(autouse=True)
def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "OVERLAP_ROWS", 20)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 30)


def made(corpus: Path, **changes: Any) -> Needle:
    text = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3, "evaluation_bytes": 400}
    fields = {"lengths": [200, 300], "examples": 20, "text": text, **changes}
    return prepare(Needle.Config.parse(fields), 300, corpus.parent / "cache")


@pytest.mark.parametrize("case", CASES)
def test_the_question_is_answered_once_in_the_context(case: dict[str, Any], corpus: Path) -> None:
    task = made(corpus, **case)
    for number in range(20):
        tokens, targets, labels = task.draw("report", number)
        assert len(tokens) == len(targets) == labels["length"]
        (asked,) = np.nonzero(targets >= 0)
        assert (np.diff(asked) == 1).all() and asked[-1] == len(tokens) - 1, "one answer, at the end"
        assert np.array_equal(targets[asked[:-1]], tokens[asked[1:]]), "its tokens follow one another"
        text = task.tokenizer.decode(tokens[: asked[0] + 1].tolist(), skip_special_tokens=False)
        answer = task.tokenizer.decode(targets[asked].tolist()).strip()
        found = re.findall(FACT, text)
        match = re.search(r"of (\S+) is ?$", text)
        assert match and [value for key, value in found if key == match[1]] == [answer]
        assert len({key for key, _ in found}) == len(found)
        if case.get("haystack") != "needles":
            assert len(found) == case.get("needles", 1)
        else:
            assert len(found) > 1


def test_depth_is_where_the_needle_lies(corpus: Path) -> None:
    task = made(corpus, haystack="text", lengths=[300], depths=[0.0, 0.3, 1.0])
    for number, depth in enumerate((0.0, 0.3, 1.0)):
        tokens, _, labels = task.draw("selection", number)
        text = task.tokenizer.decode(tokens.tolist())
        before, after = re.split(FACT, text)[::3]
        hay = len(task.tokenizer.encode(before).ids) + len(task.tokenizer.encode(after.split("\nThe magic")[0]).ids)
        assert labels["depth"] == 100 * depth
        assert len(task.tokenizer.encode(before).ids) / hay == pytest.approx(depth, abs=0.02)
    trained = {
        task.example(task.cases("train")[0], "train", np.random.default_rng(i)).labels["depth"] for i in range(9)
    }
    assert len(trained) == 9, "training draws the depth"


def test_measured_splits_go_through_depths_and_lengths_evenly(corpus: Path) -> None:
    task = made(corpus, measured_lengths=[150, 350], depths=[0.0, 0.5], examples=8)
    columns = task.report.columns
    cells = list(zip(columns["length"].tolist(), columns["depth"].tolist()))
    assert sorted(cells) == sorted([(150, 0.0), (150, 50.0), (350, 0.0), (350, 50.0)] * 2)
    assert columns["answers"].tolist() == [1] * 8


def test_haystacks_of_text_come_from_their_own_split(corpus: Path) -> None:
    task = made(corpus, haystack="text", lengths=[250])
    texts = {name: getattr(task.text, name) for name in ("train", "selection", "report")}
    held = {
        name: {"".join(map(chr, split.piece(d, 0, int(split.lengths[d]))[1] + 1)) for d in range(len(split))}
        for name, split in texts.items()
    }
    for name in ("selection", "report"):
        hay = "".join(map(chr, task._pieces(texts[name], 40, np.random.default_rng(1)) + 1))
        assert any(hay in text or hay[: len(hay) // 4] in text for text in held[name])
        assert not any(hay[: len(hay) // 4] in text for text in held["train"])


def test_rows_are_a_function_of_their_number(corpus: Path) -> None:
    task = made(corpus, haystack="text", needles=2)
    one, other = (task.stream(context=600, seed=3) for _ in range(2))
    in_order = [one.row(r) for r in range(4)]
    for r in (2, 0, 3, 1):
        assert all(np.array_equal(a, b) for a, b in zip(other.row(r), in_order[r]))


def test_each_row_draws_its_length(corpus: Path) -> None:
    batch = made(corpus, haystack="text", needles=2).stream(context=600, seed=3).batch(range(16))
    assert {int((row == 0).sum()) for row in batch.segments_BT} == {200, 300}


def test_text_is_part_of_what_the_task_is(corpus: Path) -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)
    whole, less = (
        made(corpus, text={"corpus": {"kind": "files", "path": str(corpus / pattern)}, "evaluation_documents": 3})
        for pattern in ("*.txt", "00*.txt")
    )
    assert whole.card["material"] != less.card["material"] and whole.fingerprint != less.fingerprint


def test_a_task_whose_text_was_removed_is_not_there(corpus: Path, tmp_path: Path) -> None:
    task = made(Path(shutil.copytree(corpus, tmp_path / "corpus")), lengths=[250])
    cache = task.folder.parent
    assert Source.open(cache, task.fingerprint).fingerprint == task.fingerprint
    shutil.rmtree(cache / task.card["material"]["text"])
    with pytest.raises(ConfigError, match="no prepared data"):  # so that whoever starts the run makes it again
        Source.open(cache, task.fingerprint)


def test_mistakes(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.lengths: got 30; expected at least \d+ tokens"):
        made(corpus, lengths=[30])
    for data, message in (
        ({"lengths": [512]}, r"data.lengths: got 'an example of 512 tokens'; expected at most training.context=256"),
        ({"measured_lengths": [300]}, r"data.measured_lengths.*300"),
        ({"haystack": "needles", "needles": 3}, r"data.needles: got 3; expected 1"),
        ({"depths": [1.5]}, "data.depths"),
        ({"key": "name"}, "data.key"),
        ({"text": {"corpus": "stdlb"}}, r"data.text.corpus.kind.*'stdlib'"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig.parse({"data": {"kind": "needle", **data}, "training": {"context": 256}})
