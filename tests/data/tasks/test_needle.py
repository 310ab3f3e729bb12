"""Needles in haystacks: found once, at their depth, answered from the context, with text of the right split."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data import Source, prepare, tasks
from workbench.data.splits import MEASURED
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


@pytest.fixture(autouse=True, scope="module")
def _fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 20)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 30)


def made(corpus: Path, **changes: Any) -> Needle:
    text = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3, "evaluation_bytes": 400}
    fields = {"lengths": [200, 300], "examples": 20, "text": text, **changes}
    return prepare(Needle.Config.parse(fields), 300, corpus.parent / "cache")


class Read(NamedTuple):
    """An example as text."""

    tokens: np.ndarray
    targets: np.ndarray
    labels: Any
    facts: list[tuple[str, str]]
    """Key and value of every fact in the haystack."""
    queried: str
    """Key in the question."""
    answer: str

    @property
    def positions(self) -> np.ndarray:
        """Positions with a target."""
        return np.nonzero(self.targets >= 0)[0]


def read(task: Needle, number: int) -> Read:
    tokens, targets, labels = task.draw("report", number)
    positions = np.nonzero(targets >= 0)[0]
    text = task.tokenizer.decode(tokens[: positions[0] + 1].tolist(), skip_special_tokens=False)
    question = re.search(r"of (\S+) is ?$", text)
    assert question is not None
    answer = task.tokenizer.decode(targets[positions].tolist()).strip()
    return Read(tokens, targets, labels, re.findall(FACT, text), question[1], answer)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def examples(case: dict[str, Any], corpus: Path) -> list[Read]:
    task = made(corpus, **case)
    return [read(task, number) for number in range(20)]


def test_an_example_has_the_length_of_its_label(examples: list[Read]) -> None:
    assert all(len(e.tokens) == len(e.targets) == e.labels["length"] for e in examples)


def test_the_answer_is_at_the_end(examples: list[Read]) -> None:
    assert all(np.array_equal(e.positions, range(e.positions[0], len(e.tokens))) for e in examples)


def test_the_tokens_of_the_answer_follow_one_another(examples: list[Read]) -> None:
    assert all(np.array_equal(e.targets[e.positions[:-1]], e.tokens[e.positions[1:]]) for e in examples)


def test_the_queried_fact_occurs_once_with_the_answer(examples: list[Read]) -> None:
    assert all([value for key, value in e.facts if key == e.queried] == [e.answer] for e in examples)


def test_keys_are_different(examples: list[Read]) -> None:
    assert all(len(dict(e.facts)) == len(e.facts) for e in examples)


def test_the_haystack_has_as_many_facts_as_asked(case: dict[str, Any], examples: list[Read]) -> None:
    if case.get("haystack") == "needles":
        assert all(len(e.facts) > 1 for e in examples)
    else:
        assert {len(e.facts) for e in examples} == {case.get("needles", 1)}


@pytest.mark.parametrize(("number", "depth"), enumerate((0.0, 0.3, 1.0)))
def test_depth_is_the_position_of_the_needle(corpus: Path, number: int, depth: float) -> None:
    task = made(corpus, haystack="text", lengths=[300], depths=[0.0, 0.3, 1.0])
    tokens, _, labels = task.draw("selection", number)
    before, after = re.split(FACT, task.tokenizer.decode(tokens.tolist()))[::3]
    sizes = [len(task.tokenizer.encode(text).ids) for text in (before, after.split("\nThe magic")[0])]
    assert sizes[0] / sum(sizes) == pytest.approx(depth, abs=0.02)
    assert labels["depth"] == 100 * depth


def test_training_draws_the_depth(corpus: Path) -> None:
    task = made(corpus, haystack="text", lengths=[300])
    case = task.cases("train")[0]
    depths = {task.example(case, "train", np.random.default_rng(i)).labels["depth"] for i in range(9)}
    assert len(depths) == 9


def test_evaluation_splits_cycle_through_lengths_and_depths(corpus: Path) -> None:
    task = made(corpus, measured_lengths=[150, 350], depths=[0.0, 0.5], examples=8)
    columns = task.report.columns
    cells = list(zip(columns["length"].tolist(), columns["depth"].tolist()))
    assert sorted(cells) == sorted([(150, 0.0), (150, 50.0), (350, 0.0), (350, 50.0)] * 2)


def test_an_example_has_one_answer(corpus: Path) -> None:
    assert made(corpus, examples=8).report.columns["answers"].tolist() == [1] * 8


@pytest.mark.parametrize("name", MEASURED)
def test_haystacks_of_text_come_from_their_split(corpus: Path, name: str) -> None:
    task = made(corpus, haystack="text", lengths=[250])
    texts = {
        split: ["".join(map(chr, documents.piece(d, 0, int(n))[1] + 1)) for d, n in enumerate(documents.lengths)]
        for split, documents in (("train", task.text.train), (name, getattr(task.text, name)))
    }
    hay = task._pieces(getattr(task.text, name), 40, np.random.default_rng(1))
    start = "".join(map(chr, hay[:25] + 1))
    assert any(start in text for text in texts[name])
    assert not any(start in text for text in texts["train"])


def test_sentences_like_needles_are_left_out_of_the_haystack(corpus: Path) -> None:
    files = {"kind": "files", "path": str(corpus)}
    text = {"corpus": {"kind": "drawn_lengths", "scale": 1 / 64, "text": files}, "evaluation_documents": 3}
    task = made(corpus, haystack="text", value="word", lengths=[200], text=text)
    for number in range(8):
        tokens = task.draw("train", number)[0].tolist()
        assert task.tokenizer.decode(tokens).count("The magic word of") == 2, "the needle and its question"


def test_a_text_of_needles_alone_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(corpus, haystack="text")
    needle = np.array([*task._lead, *task._ids("x"), *task._end], np.int64)
    monkeypatch.setattr(task, "_pieces", lambda documents, room, generator: np.resize(needle, room)[:room])
    with pytest.raises(ConfigError, match=r"data\.text: got 'text of little but sentences that look like"):
        task._text(task.text.train, 100 * len(needle), np.random.default_rng(0))


def test_rows_are_a_function_of_their_number(corpus: Path) -> None:
    task = made(corpus, haystack="text", needles=2)
    one, other = (task.stream(context=600, seed=3) for _ in range(2))
    in_order = [one.row(r) for r in range(4)]
    for r in (2, 0, 3, 1):
        assert all(np.array_equal(a, b) for a, b in zip(other.row(r), in_order[r]))


def test_each_row_draws_its_length(corpus: Path) -> None:
    batch = made(corpus, haystack="text", needles=2).stream(context=600, seed=3).batch(range(16))
    assert {int((row == 0).sum()) for row in batch.segments_BT} == {200, 300}


@pytest.mark.parametrize("words", [ADJECTIVES, NOUNS])
def test_words_are_different(words: list[str]) -> None:
    assert len(set(words)) == len(words)


def test_the_text_is_part_of_the_fingerprint(corpus: Path) -> None:
    fingerprints = {
        made(
            corpus, text={"corpus": {"kind": "files", "path": str(corpus / pattern)}, "evaluation_documents": 3}
        ).fingerprint
        for pattern in ("*.txt", "00*.txt")
    }
    assert len(fingerprints) == 2


def test_a_task_without_its_text_is_incomplete(corpus: Path, tmp_path: Path) -> None:
    task = made(Path(shutil.copytree(corpus, tmp_path / "corpus")), lengths=[250])
    cache = task.folder.parent
    shutil.rmtree(cache / task.card["material"]["text"])
    with pytest.raises(ConfigError, match="no prepared data"):  # so that it is prepared again
        Source.open(cache, task.fingerprint)


def test_an_example_too_short_for_its_needle(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.lengths: got 30; expected at least \d+ tokens"):
        made(corpus, lengths=[30])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lengths": [512]}, r"data.lengths: got 'an example of 512 tokens'; expected at most training.context=256"),
        ({"haystack": "needles", "needles": 3}, r"data.needles: got 3; expected 1"),
        ({"needles": 2_500}, r"data.needles: got 2500; expected at most half of the 4160 two-word keys"),
        ({"depths": [1.5]}, "data.depths"),
        ({"key": "name"}, "data.key"),
        ({"text": {"corpus": "stdlb"}}, r"data.text.corpus.kind.*'stdlib'"),
    ],
)
def test_mistakes(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse({"data": {"kind": "needle", **data}, "training": {"context": 256}})
