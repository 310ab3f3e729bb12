"""LongBench (arXiv 2308.14508): the fourteen English tasks of papers on long contexts, from local files.

A task is ``<path>/<task>.jsonl`` in the published form, a line per document: input, context, answers, length (words),
all_classes, _id. Where the folder has the published ``dataset2prompt.json`` and ``dataset2maxlen.json``, they are used;
the prompts here are ours, the numbers of tokens the published ones. A prompt that is too long loses its middle, as
published. Scores are published: the best over the answers of a document, of

    F1           of words without case, punctuation and articles: questions
    ROUGE-L      by the ``rouge`` library: summaries, samsum
    accuracy     1 / number of classes in the prediction, if the right one is among them: trec
    similarity   of the first line that is code: lcc, repobench-p

and of trec, triviaqa and samsum the first line of the prediction counts.
"""

from __future__ import annotations

import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

import polars as pl
from pydantic import Field

from workbench.config import ConfigError, nearest, require
from workbench.distribution import install_extra
from workbench.evaluation.prompting import CutPromptConfig, answers, check_room, digests, text_model
from workbench.evaluation.suites import Conditions, Journal, Measured, Score, Suite, suites
from workbench.model import LanguageModel

TaskName: TypeAlias = Literal[
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "lcc",
    "repobench-p",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
PROMPTS, MAX_TOKENS = "dataset2prompt.json", "dataset2maxlen.json"


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall of words, without case, punctuation and articles."""
    predicted, wanted = _words(prediction), _words(answer)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F-score of ROUGE-L (``rouge`` library); 0 where one of the texts has no word."""
    from rouge import Rouge

    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # one of them is empty
        return 0.0


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the prediction names, if the answer is among them.

    Names that are part of the answer's name do not count. (The published code skips some of them by mistake.)
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line of the prediction that has no comment or fence, in hundredths."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


class _Task(NamedTuple):
    metric: str
    score: Callable[..., float]
    max_tokens: int
    """Tokens of an answer; as published."""
    prompt: str
    """Ours."""
    first_line: bool = False


_QUESTION = (
    "{context}\n\nAnswer the question from the text above, in as few words as possible.\nQuestion: {input}\nAnswer:"
)
_SUMMARY = "{context}\n\n{input}\nSummarise the text above.\nSummary:"
_EXAMPLES = "{context}\n{input}"
_CODE = "{context}{input}"
DEFINITIONS: dict[str, _Task] = {
    **{
        name: _Task("F1", f1, max_tokens, _QUESTION)
        for name, max_tokens in {
            "narrativeqa": 128,
            "qasper": 128,
            "multifieldqa_en": 64,
            "hotpotqa": 32,
            "2wikimqa": 32,
            "musique": 32,
        }.items()
    },
    **{name: _Task("ROUGE-L", rouge_l, 512, _SUMMARY) for name in ("gov_report", "qmsum", "multi_news")},
    "trec": _Task("accuracy", classification, 64, _EXAMPLES, first_line=True),
    "triviaqa": _Task("F1", f1, 32, _EXAMPLES, first_line=True),
    "samsum": _Task("ROUGE-L", rouge_l, 128, _EXAMPLES, first_line=True),
    "lcc": _Task("similarity", code_similarity, 64, _CODE),
    "repobench-p": _Task("similarity", code_similarity, 64, _CODE),
}


def score(task: str, prediction: str, accepted: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best score of a prediction over the answers that are accepted."""
    definition = DEFINITIONS[task]
    if definition.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(definition.score(prediction, answer, classes) for answer in accepted)


def cut_middle(ids: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` token ids: the first and the last half of them."""
    if len(ids) <= limit:
        return list(ids)
    first = limit - limit // 2
    return [*ids[:first], *ids[len(ids) - limit // 2 :]]


class Document(NamedTuple):
    """A line of a task's file."""

    name: str
    prompt: str
    answers: Sequence[str]
    classes: Sequence[str]
    length: int
    """Words of the context, as the file counts them."""


@suites.register
class LongBench(Suite):
    """The fourteen English tasks of LongBench, with their metrics, from local files."""

    class Config(CutPromptConfig):
        """English tasks of LongBench."""

        kind: Literal["longbench"] = "longbench"
        path: str
        """Folder of the files."""
        tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = TASKS
        """Which of them."""
        limit: Annotated[int | None, Field(ge=1)] = None
        """Documents of every task, from the first. Default: all."""

    def tasks(self, conditions: Conditions) -> Sequence[str]:
        conditions.text("longbench")
        folder = Path(self.config.path)
        require(folder.is_dir(), "path", got=self.config.path, expected="a folder of JSONL files")
        missing = [task for task in self.config.tasks if not (folder / f"{task}.jsonl").is_file()]
        present = [path.stem for path in folder.glob("*.jsonl")]
        require(
            not missing,
            "tasks",
            got=f"no file {', '.join(f'{task}.jsonl' for task in missing)} in {folder}",
            expected="a file for every task",
            do=f"Copy them there, or name the tasks that are there. {nearest(missing[0], present) if missing else ''}",
        )
        scored = [task for task in self.config.tasks if DEFINITIONS[task].score is rouge_l]
        require(
            not scored or find_spec("rouge"),
            "tasks",
            got=f"{', '.join(scored)} without the library rouge",
            expected="the extra `eval`",
            do=install_extra("eval"),
        )
        for task in self.config.tasks:
            self._documents(task, first=1)
            check_room(self.config, conditions, task, self._number(task))
        return list(self.config.tasks)

    def measure(self, model: LanguageModel, task: str, conditions: Conditions, journal: Journal) -> Measured:
        documents, subject = self._documents(task), text_model(model, conditions, self.config)
        max_tokens = self._number(task)
        room = subject.max_length - max_tokens
        sizes: dict[str, int] = {}

        def encode(prompt: str) -> list[int]:
            return cut_middle(subject.encode(prompt), room)

        for document in documents:
            sizes[document.name] = len(subject.encode(document.prompt))
        texts = {document.name: document.prompt for document in documents}
        until = ("\n",) if DEFINITIONS[task].first_line and task == "samsum" else ()
        found = answers(texts, subject, journal, max_tokens, until, encode)
        values = [score(task, found[d.name], d.answers, d.classes) for d in documents]
        labels = pl.DataFrame(
            {
                "words": [document.length for document in documents],
                "tokens": [min(sizes[document.name], room) for document in documents],
                "is_cut": [sizes[document.name] > room for document in documents],
                "answer": [found[document.name] for document in documents],
            }
        )
        return Measured([Score(DEFINITIONS[task].metric, values, higher_is_better=True, upper=1)], labels)

    def metric_names(self, task: str) -> Sequence[str]:
        return [DEFINITIONS[task].metric]

    def material(self, conditions: Conditions) -> Mapping[str, Any]:
        folder = Path(self.config.path)
        files = [*(f"{task}.jsonl" for task in self.config.tasks), PROMPTS, MAX_TOKENS]
        return {"files": digests([folder / name for name in files])}

    def _documents(self, task: str, first: int | None = None) -> list[Document]:
        """The documents of a task, at most ``first``.

        Raises:
            ConfigError: naming the line that is not of the published form, or a file without documents.
        """
        path, limit = Path(self.config.path) / f"{task}.jsonl", first or self.config.limit
        template = _published(path.parent / PROMPTS).get(task, DEFINITIONS[task].prompt)
        documents: list[Document] = []
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(filter(str.strip, file), 1):
                if len(documents) == limit:
                    break
                try:
                    row = json.loads(line)
                    prompt = template.format(context=row["context"], input=row["input"])
                    accepted, classes = row["answers"], row.get("all_classes") or ()
                    if not accepted or not all(isinstance(answer, str) for answer in accepted):
                        raise ValueError(f"answers {accepted!r}")
                    name = str(row.get("_id", number))
                    documents.append(Document(f"{number}/{name}", prompt, accepted, classes, int(row.get("length", 0))))
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise ConfigError.at(
                        "path",
                        got=f"{path}, line {number}: {type(error).__name__}: {error}",
                        expected="an object with input, context, answers and length",
                    ) from None
        require(documents, "path", got=f"{path} without documents", expected="a document a line")
        return documents

    def _number(self, task: str) -> int:
        return int(_published(Path(self.config.path) / MAX_TOKENS).get(task, DEFINITIONS[task].max_tokens))


def _published(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content
    except (ValueError, AssertionError) as error:
        raise ConfigError.at("path", got=f"{path}: {error}", expected="a JSON object") from None
