"""RULER: retrieval, tracing, aggregation and questions in prompts of any length (:mod:`workbench.data.ruler`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from workbench.config import require
from workbench.data import PreparedData
from workbench.data.ruler import ANSWER_TOKENS, SYMBOLS, TASKS, Generator, TaskName, score
from workbench.data.tasks import STREAMS
from workbench.decoding import encode_prompt
from workbench.evaluation.prompting import PromptConfig, answers, digests, local_texts, text_model
from workbench.evaluation.suites import Conditions, Journal, Measured, Score, Suite, suites
from workbench.model import LanguageModel
from workbench.seeding import Seed


@suites.register
class Ruler(Suite):
    """Accuracy of the 13 tasks of RULER (arXiv 2404.06654), by length and depth.

    Every length is a label of the documents. Haystacks and questions are made of ``text``, or else of the text of the
    run in the split that is measured.
    """

    class Config(PromptConfig):
        """The 13 tasks of RULER."""

        kind: Literal["ruler"] = "ruler"
        tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = TASKS
        """Which of them."""
        lengths: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1)] = (1024,)
        """Tokens of the prompts, each with the tokens reserved for its answer."""
        documents: Annotated[int, Field(ge=1)] = 100
        """Prompts of every task and length (published: 500)."""
        answer_tokens: Annotated[int | None, Field(ge=1)] = None
        """Tokens of an answer. Default, as published: 128 for needles, 30 for vt, 120 for cwe, 50 for fwe, 32 for
        questions."""
        text: tuple[str, ...] = ()
        """Text files, or folders of them. Default: the text of the run."""
        squad: str | None = None
        """A file in the form of SQuAD, for qa_1. Default: questions about the text."""
        hotpotqa: str | None = None
        """A file in the form of HotpotQA, for qa_2. Default: questions about the text."""
        seed: Seed = 0
        """Seed of the prompts."""
        length_field: ClassVar[str] = "lengths"

        @property
        def longest(self) -> int:
            return max(self.lengths)

    def tasks(self, conditions: Conditions) -> Sequence[str]:
        generator = self._generator(conditions)
        for name in ("squad", "hotpotqa"):
            path = getattr(self.config, name)
            require(path is None or Path(path).is_file(), name, got=path, expected="a file of questions")
        for task in self.config.tasks:
            for length in self.config.lengths:  # too short a length, or a lack of text, is found before training
                generator.prompt(task, length, 0, self.config.documents, self._answer_tokens(task))
        return list(self.config.tasks)

    def measure(self, model: LanguageModel, task: str, conditions: Conditions, journal: Journal) -> Measured:
        config, generator = self.config, self._generator(conditions)
        subject, answer_tokens = text_model(model, conditions, config), self._answer_tokens(task)
        rows = []
        for length in config.lengths:
            prompts = {
                f"{length}/{number}": generator.prompt(task, length, number, config.documents, answer_tokens)
                for number in range(config.documents)
            }
            texts = {name: prompt.text for name, prompt in prompts.items()}
            found = answers(texts, subject, journal, answer_tokens)
            rows += [
                {
                    "length": length,
                    "depth": prompt.depth,
                    "tokens": generator.count(prompt.text),
                    "answer": found[name],
                    "accuracy": score(prompt, found[name]),
                }
                for name, prompt in prompts.items()
            ]
        table = pl.DataFrame(rows, schema_overrides={"depth": pl.Float64})
        return Measured(
            [Score("accuracy", table["accuracy"].to_numpy(), higher_is_better=True, upper=1)], table.drop("accuracy")
        )

    def metric_names(self, task: str) -> Sequence[str]:
        return ["accuracy"]

    def label_values(self, task: str, conditions: Conditions) -> Mapping[str, Collection[Any]]:
        return {"length": self.config.lengths}

    def material(self, conditions: Conditions) -> Mapping[str, Any]:
        config = self.config
        text = digests(config.text) if config.text else getattr(conditions.data, "fingerprint", None)
        return {"text": text, "questions": digests([config.squad, config.hotpotqa])}

    def _answer_tokens(self, task: str) -> int:
        published = next(tokens for name, tokens in ANSWER_TOKENS.items() if task.startswith(name))
        return self.config.answer_tokens or published

    def _generator(self, conditions: Conditions) -> Generator:
        tokenizer = conditions.text("ruler")
        ids = tokenizer.encode(SYMBOLS, add_special_tokens=False).ids
        written = tokenizer.decode(ids)
        require(
            written.strip() == SYMBOLS,
            "tokenizer",
            got=f"{written!r} for {SYMBOLS!r}",
            expected="a tokenizer that writes letters, digits and punctuation as they are",
        )
        config = self.config
        return Generator(
            count=lambda text: len(encode_prompt(tokenizer, text)),
            texts=list(local_texts(config.text, "text")) if config.text else _texts_of(conditions),
            seed=config.seed,
            stream=STREAMS[conditions.split],
            squad=Path(config.squad) if config.squad else None,
            hotpotqa=Path(config.hotpotqa) if config.hotpotqa else None,
        )


def _texts_of(conditions: Conditions) -> list[str]:
    """The texts of the run's data in the split that is measured; none where the data are no text."""
    if conditions.data is None:
        return []
    source: Any = getattr(conditions.data, "text", conditions.data)  # of a task on text
    return list(source.texts(conditions.split)) if isinstance(source, PreparedData) else []
