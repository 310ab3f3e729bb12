"""RULER as a suite: labels, lengths, resumption, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import small_model, small_tokenizer, write_corpus
from tokenizers import Tokenizer, models

from workbench.config import ConfigError
from workbench.evaluation import Conditions, Settings, measure_suite, suites
from workbench.evaluation.measure import check_suites
from workbench.evaluation.suites.ruler import Ruler
from workbench.evaluation.text_model import TextModel
from workbench.results.scores import read_scores


def conditions(context: int = 512, **changes: Any) -> Conditions:
    fields: dict[str, Any] = {"settings": Settings(4, context), "vocabulary": 300, "tokenizer": small_tokenizer()}
    return Conditions(**{**fields, **changes})


def config(tmp_path: Path, **fields: Any) -> Any:
    text = write_corpus(tmp_path / "text", 6)
    return suites.parse(
        {
            "kind": "ruler",
            "tasks": ["niah_single_1", "niah_single_2"],
            "lengths": [400, 512],
            "documents": 3,
            "answer_tokens": 12,
            "text": [str(text)],
            **fields,
        }
    )


def answering(monkeypatch: pytest.MonkeyPatch, asked: list[int] | None = None) -> None:
    """Answer every prompt with its number of tokens."""

    def generate(self: TextModel, prompts: Any, max_tokens: int, until: Any = (), sampling: Any = None) -> Any:
        for number, ids in enumerate(prompts):
            if asked is not None:
                asked.append(len(ids))
            yield number, str(len(ids))

    monkeypatch.setattr(TextModel, "generate", generate)


def test_every_task_length_and_depth_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch)
    measure_suite(small_model(), config(tmp_path), conditions(), tmp_path / "out", 1)
    rows = read_scores(tmp_path / "out").filter(pl.col("document").is_not_null())
    keys = rows.select("task", "length", "depth").rows()
    assert keys == [
        (task, length, depth)
        for task in ("niah_single_1", "niah_single_2")
        for length in (400, 512)
        for depth in (0.0, 50.0, 100.0)
    ]
    assert all(0.98 * length <= tokens + 12 <= length for length, tokens in rows.select("length", "tokens").rows())


def test_an_interrupted_task_asks_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answering(monkeypatch, asked)
    left = iter([None, None])

    def stop() -> None:
        if next(left, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_suite(small_model(), config(tmp_path), conditions(), tmp_path / "out", 1, stop)
    measure_suite(small_model(), config(tmp_path), conditions(), tmp_path / "out", 1)
    assert len(asked) == 2 * 2 * 3
    measure_suite(small_model(), config(tmp_path), conditions(), tmp_path / "whole", 1)
    assert read_scores(tmp_path / "out").equals(read_scores(tmp_path / "whole"))


def test_a_model_answers_with_its_own_text(tmp_path: Path) -> None:
    measure_suite(
        small_model(), config(tmp_path, tasks=["niah_single_1"], lengths=[400]), conditions(), tmp_path / "out", 1
    )
    frame = read_scores(tmp_path / "out")
    assert frame["higher_is_better"].all() and frame["metric"].unique().to_list() == ["accuracy"]
    assert frame["upper"].unique().to_list() == [1.0]
    assert frame.filter(pl.col("document").is_not_null())["answer"].str.len_chars().max() > 0


def test_splits_have_other_prompts(tmp_path: Path) -> None:
    suite: Any = Ruler(config(tmp_path))
    made = [
        suite._generator(conditions(split=split)).prompt("niah_single_1", 400, 0) for split in ("selection", "report")
    ]
    assert made[0].answers != made[1].answers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [1024]}, r"lengths: got 1024; expected at most 512 tokens.*extrapolate"),
        ({"lengths": [64]}, r"lengths: got 64; expected at least \d+ tokens for niah_single_1"),
        ({"text": ["nowhere"]}, r"text\[0\]: got 'nowhere'"),
        ({"squad": "nowhere.json"}, r"squad: got 'nowhere.json'"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\[0\]\.{message}"):
        check_suites([config(tmp_path, **fields)], conditions())


def test_longer_prompts_than_trained_are_extrapolation(tmp_path: Path) -> None:
    tasks = check_suites([config(tmp_path, lengths=[1024], extrapolate=True)], conditions())
    assert tasks == {"ruler": ["niah_single_1", "niah_single_2"]}


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tasks\[0\]: got 'niah_single_4'"):
        suites.parse({"kind": "ruler", "tasks": ["niah_single_4"]})


def test_a_model_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model without tokenizer"):
        check_suites([config(tmp_path)], conditions(tokenizer=None))


def test_a_tokenizer_without_digits_is_refused(tmp_path: Path) -> None:
    letters = Tokenizer(models.WordLevel({"VAR": 0, "?": 1, "[UNK]": 2}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match=r"tokenizer: .*letters, digits and punctuation"):
        check_suites([config(tmp_path)], conditions(tokenizer=letters))
