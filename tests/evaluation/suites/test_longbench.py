"""LongBench: published metrics on fixed strings, truncation in the middle, files in the published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import small_model, small_tokenizer

from workbench.config import ConfigError
from workbench.evaluation import Conditions, Settings, measure_suite, suites
from workbench.evaluation.measure import check_suites
from workbench.evaluation.suites.longbench import (
    DEFINITIONS,
    TASKS,
    classification,
    code_similarity,
    cut_middle,
    f1,
    score,
)
from workbench.evaluation.text_model import TextModel
from workbench.results.scores import read_scores

CONDITIONS = Conditions(Settings(2, 160), 300, tokenizer=small_tokenizer())


def write(folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    fields = {"input": "Who?", "context": "The otter swims. ", "answers": ["otter"], "length": 3, "all_classes": None}
    return {**fields, "_id": f"id{number}", **changes}


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("The Otter!", "an otter", 1.0),  # case, punctuation, articles
        ("otter swims fast", "otter", 0.5),  # precision 1/3, recall 1
        ("otter otter", "otter swims", 0.5),  # a repeated word counts once
        ("", "otter", 0.0),
        ("the", "otter", 0.0),
    ],
)
def test_f1(prediction: str, answer: str, value: float) -> None:
    assert f1(prediction, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("Other location", "Other location", 1.0),  # "Other" alone is part of the answer
        ("Other location or City", "City", 1 / 3),
        ("none of them", "City", 0.0),
    ],
)
def test_classification(prediction: str, answer: str, value: float) -> None:
    assert classification(prediction, answer, ["City", "Other", "Other location"]) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "value"),
    [("\n# note\nreturn x\nreturn y", 1.0), ("```\n// c", 0.0), ("return y", 0.88), ("", 0.0)],  # 2·7/16 = 0.875
)
def test_code_similarity(prediction: str, value: float) -> None:
    assert code_similarity(prediction, "return x") == pytest.approx(value)


def test_rouge_l_is_that_of_the_library() -> None:
    pytest.importorskip("rouge")
    # longest common subsequence "the otter fast": precision 3/4, recall 3/5
    assert score("samsum", "the otter swims fast\nmore", ["the old otter runs fast"]) == pytest.approx(2 / 3, abs=1e-6)
    assert score("gov_report", "", ["x"]) == 0.0


def test_the_best_of_several_answers_counts() -> None:
    assert score("qasper", "a red fox", ["otter", "red fox"]) == 1.0


def test_few_shot_tasks_count_their_first_line() -> None:
    assert score("triviaqa", "\notter\nbadger", ["otter"]) == 1.0
    assert score("hotpotqa", "otter\nbadger", ["otter"]) == pytest.approx(2 / 3)


def test_the_middle_is_cut() -> None:
    assert cut_middle(range(10), 4) == [0, 1, 8, 9]
    assert cut_middle(range(10), 5) == [0, 1, 2, 8, 9]
    assert cut_middle(range(3), 3) == [0, 1, 2]


def test_the_fourteen_english_tasks_are_known() -> None:
    assert len(TASKS) == 14 and set(DEFINITIONS) == set(TASKS)


def config(folder: Path, **fields: Any) -> Any:
    return suites.parse({"kind": "longbench", "path": str(folder), "tasks": ["hotpotqa"], **fields})


def answering(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[list[int]]:
    seen: list[list[int]] = []

    def generate(self: Any, prompts: Any, max_tokens: int, until: Any = (), sampling: Any = None) -> Any:
        seen.extend(map(list, prompts))
        yield from enumerate(answers[: len(prompts)])

    monkeypatch.setattr(TextModel, "generate", generate)
    return seen


def test_every_document_has_its_score_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, ["otter", "badger"])
    folder = write(tmp_path / "data", "hotpotqa", [row(0), row(1, context="long words " * 200)])
    measure_suite(small_model(), config(folder), CONDITIONS, tmp_path, 1)
    frame = read_scores(tmp_path).select("document", "metric", "value", "words", "is_cut", "answer")
    assert frame.rows() == [
        (None, "F1", 0.5, None, None, None),
        (0, "F1", 1.0, 3, False, "otter"),
        (1, "F1", 0.0, 3, True, "badger"),
    ]


def test_a_long_prompt_keeps_its_beginning_and_its_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (seen,) = [answering(monkeypatch, ["x"])]
    folder = write(tmp_path / "data", "hotpotqa", [row(context="first " + "middle " * 300)])
    measure_suite(small_model(), config(folder), CONDITIONS, tmp_path, 1)
    text = small_tokenizer().decode(seen[0])
    assert len(seen[0]) == 160 - 32 and text.startswith("first") and text.endswith("Question: Who?\nAnswer:")


def test_published_prompts_and_sizes_are_used_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answering(monkeypatch, ["x"])
    folder = write(tmp_path / "data", "hotpotqa", [row()])
    (folder / "dataset2prompt.json").write_text('{"hotpotqa": "T {context} Q {input}"}')
    measure_suite(small_model(), config(folder), CONDITIONS, tmp_path, 1)
    assert small_tokenizer().decode(seen[0]) == "T The otter swims.  Q Who?"


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "hotpotqa", [row()])
    with pytest.raises(ConfigError, match=r"evaluation\[0\]\.tasks: .*qasper\.jsonl, trec\.jsonl"):
        check_suites([config(folder, tasks=["hotpotqa", "qasper", "trec"])], CONDITIONS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "without documents"), ([row(answers=[])], "line 1: ValueError"), ([{"input": "x"}], "line 1: KeyError")],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_suites([config(write(tmp_path / "data", "hotpotqa", rows))], CONDITIONS)


def test_an_answer_must_leave_room(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "hotpotqa", [row()])
    with pytest.raises(
        ConfigError, match=r"evaluation\[0\]\.max_length: got 33; .* 32 tokens of an answer to hotpotqa"
    ):
        check_suites([config(folder, max_length=33)], CONDITIONS)


def test_changed_files_are_other_material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, ["x", "x"])
    folder = write(tmp_path / "data", "hotpotqa", [row()])
    measure_suite(small_model(), config(folder), CONDITIONS, tmp_path, 1)
    write(folder, "hotpotqa", [row(), row(1)])
    with pytest.raises(ConfigError, match=r"material\.files"):
        measure_suite(small_model(), config(folder), CONDITIONS, tmp_path, 1)
