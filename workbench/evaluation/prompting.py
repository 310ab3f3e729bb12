"""What suites that ask a model of text in prompts share: their lengths, local files, and answers in the journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from workbench.config import require
from workbench.evaluation.suites import Conditions, Journal, SuiteConfig
from workbench.evaluation.text_model import TextModel
from workbench.model import LanguageModel

__all__ = ["CutPromptConfig", "PromptConfig", "answers", "check_room", "digests", "local_texts", "text_model"]


class PromptConfig(SuiteConfig):
    """Base of the configuration of a suite that asks in prompts."""

    extrapolate: bool = False
    """Whether prompts may be longer than the context of training."""
    length_field: ClassVar[str] = "max_length"
    """Field that decides how long prompts are."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest prompt with its answer; None: the context of training."""
        return None

    def check(self, vocabulary: int, context: int) -> None:
        require(
            self.extrapolate or (self.longest or 0) <= context,
            self.length_field,
            got=self.longest,
            expected=f"at most {context} tokens, the context that the model is trained with",
            do="Set extrapolate: true to measure beyond it.",
        )


class CutPromptConfig(PromptConfig):
    """Base of the configuration of a suite that cuts prompts which are too long."""

    max_length: Annotated[int | None, Field(ge=2)] = None
    """Tokens of a prompt and its answer, at most. Default: the context of training."""

    @property
    def longest(self) -> int | None:
        return self.max_length


def text_model(model: LanguageModel, conditions: Conditions, config: PromptConfig) -> TextModel:
    """The model of a suite, with its tokenizer."""
    tokenizer = conditions.text(config.label)
    return TextModel(model, tokenizer, conditions.settings, config.longest)


def check_room(config: CutPromptConfig, conditions: Conditions, task: str, max_tokens: int) -> None:
    """Check that a prompt of two tokens or more fits beside an answer.

    Args:
        config: of the suite.
        conditions: the context of training, which is the default length.
        task: its name, for the message.
        max_tokens: tokens of an answer, at most.

    Raises:
        ConfigError: naming ``max_length``.
    """
    length = config.max_length or conditions.settings.context
    require(
        length - max_tokens > 1,
        "max_length",
        got=length,
        expected=f"more than the {max_tokens} tokens of an answer to {task}, and room for a prompt",
        do="Leave the task out, or set max_length, with extrapolate: true beyond the context of training.",
    )


def answers(
    prompts: Mapping[str, str],
    model: TextModel,
    journal: Journal,
    max_tokens: int,
    until: Sequence[str] = (),
    encode: Callable[[str], Sequence[int]] | None = None,
) -> dict[str, str]:
    """What the model answers to every prompt; those that the journal has are not asked again.

    Args:
        prompts: name -> text.
        model: the model.
        journal: of the task.
        max_tokens: tokens of an answer, at most.
        until: strings that end an answer.
        encode: token ids of a prompt. Default: those of the model.
    """
    found = {name: journal.get(name) for name in prompts}
    missing = [name for name, answer in found.items() if answer is None]
    ids = [(encode or model.encode)(prompts[name]) for name in missing]
    for number, answer in model.generate(ids, max_tokens, until):
        found[missing[number]] = journal.add(missing[number], answer)
    return found


def local_texts(paths: Sequence[str], field: str) -> Iterator[str]:
    """The texts of files, and of the files in folders, in the order of their names.

    Raises:
        ConfigError: for a path that does not exist, or a file that is not UTF-8.
    """
    for index, name in enumerate(paths):
        path = Path(name)
        require(path.exists(), f"{field}[{index}]", got=name, expected="a text file, or a folder of text files")
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                require(False, f"{field}[{index}]", got=str(file), expected="UTF-8 text")


def digests(paths: Sequence[str | Path | None]) -> dict[str, Any]:
    """Name of each file, or file in a folder, -> the beginning of the SHA-256 of its content."""
    found = {}
    for path in (Path(name) for name in paths if name is not None):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if file.is_file():
                found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found
