"""Prompts of RULER's 13 tasks (arXiv 2404.06654, section 3 and appendix B), of any length, for any tokenizer.

    niah_single_1    one needle in repeated noise; key: words, value: number
    niah_single_2    … in text
    niah_single_3    … in text; value: UUID
    niah_multikey_1  … in text, beside three needles of other keys
    niah_multikey_2  … among needles of other keys only
    niah_multikey_3  … among needles of other keys only; key and value: UUIDs
    niah_multivalue  four needles of one key in text
    niah_multiquery  four needles in text, all asked for
    vt               variable tracking: a chain of five assignments in noise; all variables with the first value
    cwe              common words: the ten most common words of a numbered list, each 30 times, others 3 times
                     (6 times and once in prompts below 4096 tokens)
    fwe              frequent words: the three most frequent of coded words with zeta frequencies (exponent 2); the most
                     frequent of all is dots
    qa_1, qa_2       questions about one document, and about two, among other documents

A prompt takes as many words of its haystack as fit: with the tokens reserved for the answer it is as long as asked, at
most 1 % shorter and never longer. What is drawn at random depends on seed, task, length, split and number alone.

As published: tasks, haystacks, frequencies, one worked example before ``vt`` and ``cwe``, tokens reserved for answers,
scores. Ours: the sentences, keys, words and noise; needles are inserted between two words exactly at their depth, not
at the end of a sentence; the depth of a needle that is asked for alone runs evenly over the documents; text begins at a
random word; the example of ``vt`` has 24 words of noise, not 500 tokens. docs/evaluation.md has a comparison with the
public generator (github.com/NVIDIA/RULER). Questions come from files in the form of SQuAD and HotpotQA where they are
given. Otherwise they are made of local text: the word that is left out of a quotation (one document), and the first
word of the document after the one that contains a quotation (two documents).
"""

from __future__ import annotations

import itertools
import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from scipy.special import zeta

from workbench.config import ConfigError, require
from workbench.data.tasks.needle import ADJECTIVES, KEYS, NOISE, NOUNS
from workbench.seeding import counter_generator, derived_seed

__all__ = ["ANSWER_TOKENS", "TASKS", "Generator", "Prompt", "TaskName", "score"]

TaskName: TypeAlias = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""Tokens of an answer, by the beginning of the task's name; as published."""
SHORT = 4096
"""Prompts below this length have fewer repetitions of common words; as published."""
PROBE = 64
"""Words from whose tokens the first number of words is extrapolated."""
INTERPOLATIONS = 8
"""Interpolated numbers of words before the interval is halved."""
ATTEMPTS = 50
"""Draws of a prompt whose answers happen to occur in its haystack as well."""
PASSAGE = 80
"""Words of a document that is cut from local text."""
SYMBOLS = "VAR ABCXYZ = 0123456789. quiet-otter: 'jkvw' 3f2a?"
"""What a tokenizer must be able to write."""


@dataclass(frozen=True)
class Needles:
    """How a needle task is made."""

    haystack: Literal["noise", "text", "needles"]
    key: Literal["words", "uuid"] = "words"
    value: Literal["number", "uuid"] = "number"
    others: int = 0
    """Needles of other keys beside the queried ones."""
    values: int = 1
    """Needles of one key."""
    queries: int = 1
    """Keys that are asked for."""


NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuid"),
    "niah_multikey_1": Needles("text", others=3),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", queries=4),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its answer must contain."""

    text: str
    """Ends where the answer begins."""
    answers: tuple[str, ...]
    any_of: bool = False
    """Whether one of the answers suffices (questions); otherwise all are asked for."""
    depth: float | None = None
    """Percent of the haystack's words before the needle, where one is asked for."""
    completion: str = ""
    """The right answer in words, as it follows the text."""
    further: tuple[str, ...] = ()
    """Questions with their answers about the other needles of the haystack."""


@dataclass(frozen=True)
class Question:
    """A question about documents."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    """What has to be read, in this order."""
    once: str = ""
    """Words that must occur once in the prompt's documents."""
    related: tuple[str, ...] = ()
    """Other documents of the same article, which are taken before those of others."""


def score(prompt: Prompt, prediction: str) -> float:
    """Share of the answers in a prediction, without regard to case; of a question, 1 if any is there. As published."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()
    found = [answer.lower() in text for answer in prompt.answers]
    return float(any(found)) if prompt.any_of else sum(found) / len(found)


class _TooLong(ConfigError):
    """What a prompt holds at least does not fit."""


@dataclass
class Generator:
    """Makes prompts.

    Args:
        count: tokens of a text as a prompt.
        texts: local texts for haystacks and documents; at least one with words for tasks that need text.
        seed: of all draws.
        stream: number of the split; every split has other prompts.
        tolerance: a prompt is long enough when this share of its length is missing, or when one word more does not fit.
        squad: file of questions in the form of SQuAD, for ``qa_1``. Default: made of ``texts``.
        hotpotqa: file of questions in the form of HotpotQA, for ``qa_2``. Default: made of ``texts``.
    """

    count: Callable[[str], int]
    texts: Sequence[str] = ()
    seed: int = 0
    stream: int = 0
    tolerance: float = 0.002
    squad: Path | None = None
    hotpotqa: Path | None = None
    _questions: dict[str, list[Question]] = field(default_factory=dict, init=False)

    def prompt(self, task: str, length: int, number: int, documents: int = 1, answer_tokens: int = 0) -> Prompt:
        """Prompt ``number`` of ``documents`` of a task.

        Args:
            task: its name, one of :data:`TASKS`.
            length: tokens of the prompt and its answer.
            number: from 0; decides what is drawn.
            documents: number of prompts, over which depths are spread evenly.
            answer_tokens: tokens reserved for the answer.

        Raises:
            ConfigError: when the length is too short for the task, or there is no text.
        """
        limit = length - answer_tokens
        generator = counter_generator(derived_seed(self.seed, "ruler", task, str(length)), self.stream, number)
        depth = number / (documents - 1) if documents > 1 else 0.5
        return self._drawn(task, length, limit, depth, generator)

    def document(self, task: str, length: int, number: int, further: int = 0) -> str:
        """Document ``number`` to train on: a prompt with its answer, the needle at a random depth. Ours.

        Args:
            task: its name, one of :data:`TASKS`.
            length: tokens of the prompt.
            number: from 0; decides what is drawn.
            further: questions about other needles of the same haystack that follow, at most.

        Raises:
            ConfigError: when the length is too short for the task, or there is no text.
        """
        generator = counter_generator(derived_seed(self.seed, "ruler document", task, str(length)), self.stream, number)
        prompt = self._drawn(task, length, length, float(generator.random()), generator)
        order = generator.permutation(len(prompt.further))[:further]
        return "\n\n".join([f"{prompt.text} {prompt.completion}", *(prompt.further[i] for i in order)])

    def _drawn(self, task: str, length: int, limit: int, depth: float, generator: np.random.Generator) -> Prompt:
        make = next(made for name, made in self._makers().items() if task.startswith(name))
        shortest: _TooLong | None = None
        for _ in range(ATTEMPTS):
            try:
                prompt = make(task, length, limit, depth, generator)
            except _TooLong as error:  # the documents of another question may be shorter
                shortest = error
            else:
                if prompt is not None:
                    return prompt
        raise shortest or ConfigError.at(
            "text",
            got=f"text in which the answers of {task} occur",
            expected="text in which they occur once",
            do="Give other text.",
        )

    @cached_property
    def _words(self) -> list[str]:
        """The words of the texts, for haystacks."""
        words = [word for text in self.texts for word in text.split()]
        require(
            words,
            "text",
            got="no text",
            expected="text for haystacks",
            do="Name files in text, or leave out the tasks that need text.",
        )
        return words

    @cached_property
    def _passages(self) -> list[str]:
        """Different documents that are cut from the texts, for questions."""
        cuts = (words[i : i + PASSAGE] for words in map(str.split, self.texts) for i in range(0, len(words), PASSAGE))
        passages = list(dict.fromkeys(" ".join(cut) for cut in cuts if len(cut) == PASSAGE))
        require(
            len(passages) >= 3,
            "text",
            got=f"{len(passages)} passages of {PASSAGE} words",
            expected="at least 3, to ask questions about",
            do="Name more text in text, or leave out qa_1 and qa_2.",
        )
        return passages

    def _makers(self) -> dict[str, Callable[..., Prompt | None]]:
        return {"niah": self._niah, "vt": self._vt, "cwe": self._cwe, "fwe": self._fwe, "qa": self._qa}

    # -- length ------------------------------------------------------------------------------------------------------

    def _fit(self, task: str, length: int, limit: int, build: Callable[[int], str]) -> tuple[str, int]:
        """The text with as many words as fit into ``limit`` tokens, and their number; ``build`` makes it of a number of
        words. Tokens grow about linearly with words, so the number is found by interpolation."""
        text, fits = build(0), 0
        tokens = empty = self.count(text)
        if tokens > limit:
            raise _TooLong.at(
                "lengths",
                got=length,
                expected=f"at least {length + tokens - limit} tokens for {task} with this tokenizer",
                do="Give longer prompts, or leave the task out.",
            )
        beyond, beyond_tokens, guess = 0, 0, PROBE
        for trial in itertools.count():
            if limit - tokens <= self.tolerance * length or beyond == fits + 1:
                return text, fits
            attempt = build(guess)
            now = self.count(attempt)
            if now <= limit:
                text, tokens, fits = attempt, now, guess
            else:
                beyond, beyond_tokens = guess, now
            if not beyond:
                rate = (tokens - empty) / fits
                guess = fits + max(1, math.ceil((limit - tokens) / rate)) if rate else 2 * guess
            else:
                share = (limit - tokens) / (beyond_tokens - tokens) if trial < INTERPOLATIONS else 0.5
                guess = min(max(fits + int(share * (beyond - fits)), fits + 1), beyond - 1)
        raise AssertionError("unreachable")

    # -- needles -----------------------------------------------------------------------------------------------------

    def _niah(self, task: str, length: int, limit: int, depth: float, generator: np.random.Generator) -> Prompt | None:
        kind = NEEDLES[task]
        keys = self._names(kind.key, generator)
        values = self._names(kind.value, generator)
        queried = [next(keys) for _ in range(kind.queries)]
        needles = [(key, next(values)) for key in queried for _ in range(kind.values)]
        answers = tuple(value for _, value in needles)
        others = [(next(keys), next(values)) for _ in range(kind.others)]
        facts = [_fact(kind, key, value) for key, value in (*needles, *others)]
        is_single = kind.queries * kind.values == 1
        depths = [depth] if len(facts) == 1 else _grid(len(facts), generator)
        if is_single:
            depths[0] = depth
        question = _question(kind, _listed(queried), is_single)

        def whole(words: Sequence[str], after: Sequence[str] = ()) -> str:
            positions = [(round(at * len(words)), fact) for at, fact in zip(depths, facts)]
            inserted = _insert([*words, *after], positions)
            return f"Facts are hidden in the following text. Remember them.\n\n{inserted}\n\n{question}"

        if kind.haystack == "needles":
            new = zip(keys, values)

            def among(facts_used: int, noise: int = 0) -> str:
                while len(others) < facts_used:
                    others.append(next(new))
                return whole([_fact(kind, key, value) for key, value in others[:facts_used]], _noise(noise))

            _, used = self._fit(task, length, limit, among)
            text, _ = self._fit(task, length, limit, lambda noise: among(used, noise))
            others = others[:used]
        elif kind.haystack == "noise":
            text, _ = self._fit(task, length, limit, lambda n: whole(_noise(n)))
        else:
            hay = self._hay(generator)
            text, _ = self._fit(task, length, limit, lambda n: whole(hay(n)))
        if any(text.count(answer) != 1 for answer in answers):
            return None
        further = tuple(f"{_question(kind, key, True)} {value}." for key, value in others)
        return Prompt(text, answers, False, 100 * depth if is_single else None, f"{_listed(answers)}.", further)

    def _hay(self, generator: np.random.Generator) -> Callable[[int], list[str]]:
        """A function that gives any number of words of the texts, from a random one on; their beginning follows their
        end."""
        first = int(generator.integers(len(self._words)))

        def words(count: int) -> list[str]:
            taken = self._words[first : first + count]
            while len(taken) < count:
                taken += self._words[: count - len(taken)]
            return taken

        return words

    @staticmethod
    def _names(kind: str, generator: np.random.Generator) -> Iterator[str]:
        """Endless different keys or values."""
        used: set[str] = set()
        while True:
            if kind == "words":
                name = _two_words(int(generator.integers(KEYS)))
                if len(used) > KEYS // 2:  # longer names before two-word ones run out
                    name = f"{ADJECTIVES[int(generator.integers(len(ADJECTIVES)))]}-{name}"
            elif kind == "number":
                name = str(generator.integers(1_000_000, 10_000_000))
            else:
                name = str(uuid.UUID(bytes=generator.bytes(16), version=4))
            if name not in used:
                used.add(name)
                yield name

    # -- variable tracking -------------------------------------------------------------------------------------------

    def _vt(self, task: str, length: int, limit: int, depth: float, generator: np.random.Generator) -> Prompt | None:
        def chain(letters: int) -> tuple[list[str], str]:
            """Five names and the value of the first."""
            alphabet = [chr(ord("A") + i) for i in range(26)]
            return ["".join(generator.choice(alphabet, letters)) for _ in range(5)], str(
                generator.integers(10_000, 99_999)
            )

        (shown, shown_value), (names, value) = chain(3), chain(5)
        places, shown_places = np.sort(generator.random(5)), np.sort(generator.random(5))

        def part(names: list[str], value: str, words: list[str], at: np.ndarray) -> str:
            facts = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))]
            text = _insert(words, [(int(p * (len(words) + 1)), f"{fact}.") for p, fact in zip(at, facts)])
            return (
                f"Follow the chain of assignments in the following text.\n\n{text}\n\n"
                f"Which variables have the value {value}?\nThe {len(names)} variables with the value {value} are"
            )

        example = f"{part(shown, shown_value, _noise(24), shown_places)} {', '.join(shown)}.\n\n"
        text, _ = self._fit(task, length, limit, lambda n: example + part(names, value, _noise(n), places))
        if len({*names, *shown}) < 10 or value == shown_value:
            return None
        return Prompt(text, tuple(names), completion=f"{', '.join(names)}.")

    # -- aggregation -------------------------------------------------------------------------------------------------

    def _cwe(self, task: str, length: int, limit: int, depth: float, generator: np.random.Generator) -> Prompt:
        common, rare, example_words, example_common, example_rare = (
            (6, 1, 20, 3, 1) if length < SHORT else (30, 3, 40, 10, 3)
        )
        single = list(dict.fromkeys([*ADJECTIVES, *NOUNS]))
        order = [single[i] for i in generator.permutation(len(single))]
        pairs = generator.permutation(KEYS)
        seeds = generator.integers(2**32, size=2)

        def word(number: int) -> str:
            """Different words: single ones, then names of two words, then of three."""
            if number < len(order):
                return order[number]
            times, index = divmod(number - len(order), KEYS)
            name = _two_words(int(pairs[index]))
            return f"{ADJECTIVES[times - 1]}-{name}" if times else name

        def words(start: int, count: int) -> list[str]:
            return [word(number) for number in range(start, start + count)]

        def part(common_words: list[str], other: list[str], times: int, other_times: int, extra: int, seed: int) -> str:
            entries = [*common_words * times, *other * other_times]
            if extra:  # the last word is not repeated as often where its other repetitions do not fit
                entries = entries[: len(entries) - other_times + extra] if other else entries
            listed = [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))]
            numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
            return (
                f"Some words of the following numbered list occur more often than others.\n\n{numbered}\n\n"
                "Which ten words are the most common in the list above?\nThe ten most common words are"
            )

        def numbered(answers: list[str]) -> str:
            return " ".join(f"{i}. {word}" for i, word in enumerate(answers, 1))

        shown, top = words(0, 10), list(range(example_words, example_words + 10))
        example = part(shown, words(10, example_words - 10), example_common, example_rare, 0, int(seeds[0]))
        example += f" {numbered(shown)}\n\n"

        def build(entries: int) -> str:
            """A prompt with so many entries of rare words."""
            whole, extra = divmod(entries, rare)
            numbers = itertools.filterfalse(set(top).__contains__, itertools.count(example_words))
            other = [word(number) for number in itertools.islice(numbers, whole + bool(extra))]
            return example + part([word(number) for number in top], other, common, rare, extra, int(seeds[1]))

        text, entries = self._fit(task, length, limit, build)
        used = 10 + math.ceil(entries / rare)
        if example_words + used > len(order):  # names of two words among them: the common words are such as often
            top = [example_words + int(number) for number in generator.choice(used, 10, replace=False)]
            text, _ = self._fit(task, length, limit, build)
        answers = [word(number) for number in top]
        return Prompt(text, tuple(answers), completion=numbered(answers))

    def _fwe(self, task: str, length: int, limit: int, depth: float, generator: np.random.Generator) -> Prompt | None:
        size = max(8, length // 50)
        letters = generator.integers(ord("a"), ord("z") + 1, (size, 6))
        vocabulary = ["".join(map(chr, row)) for row in letters]
        if len(set(vocabulary)) < size:
            return None
        answers = tuple(vocabulary[1:4])
        vocabulary[0] = "..."
        shares = np.arange(1, size + 1) ** -2.0 / zeta(2.0)
        seed = int(generator.integers(2**32))
        least = int(np.ceil(2 / (shares[3] - shares[4])))  # the fourth word is more frequent than the fifth

        def build(words: int) -> str:
            counts = ((least + words) * shares).astype(int)
            listed = [word for word, times in zip(vocabulary, counts) for _ in range(times)]
            coded = " ".join(listed[i] for i in np.random.default_rng(seed).permutation(len(listed)))
            return (
                f"Count how often each coded word occurs in the following text; leave out the dots.\n\n{coded}\n\n"
                "Which three coded words are the most frequent in the text above?\nThe three most frequent words are"
            )

        return Prompt(self._fit(task, length, limit, build)[0], answers, completion=f"{_listed(answers)}.")

    # -- questions ---------------------------------------------------------------------------------------------------

    def _qa(self, task: str, length: int, limit: int, depth: float, generator: np.random.Generator) -> Prompt | None:
        file = self.squad if task == "qa_1" else self.hotpotqa
        question: Question | None
        if file is None:
            question, others = self._local_question(task, limit // PASSAGE + 1, generator)
        else:
            questions = self._read_questions(task, file)
            question = questions[int(generator.integers(len(questions)))]
            other = [q for q in questions if not set(q.documents) & set(question.documents)]
            order = generator.permutation(len(other))
            related = (question.related[i] for i in generator.permutation(len(question.related)))
            others = list(dict.fromkeys([*related, *(text for i in order for text in other[i].documents)]))
            require(others, self._file_field(task), got=f"{file}: one document", expected="questions about several")
        if question is None:
            return None
        place = float(generator.random())
        others *= 1 + limit // sum(len(text.split()) for text in others)  # a word has a token at least
        sizes = np.cumsum([len(text.split()) for text in others])
        # documents of a file are in a random order; those of a local question follow each other
        ranks = None if file is None else generator.random(len(question.documents) + len(others))

        def build(words: int) -> str:
            whole = int(np.searchsorted(sizes, words, side="right"))
            texts = others[:whole]
            rest = words - (int(sizes[whole - 1]) if whole else 0)
            if rest and whole < len(others):
                texts = [*texts, " ".join(others[whole].split()[:rest])]
            at = round(place * whole) if ranks is None else 0
            texts = [*texts[:at], *question.documents, *texts[at:]]
            if ranks is not None:
                texts = [texts[i] for i in np.argsort(ranks[: len(texts)])]
            listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
            return (
                f"Answer the question with the documents below. Give the answer alone.\n\n{listed}\n\n"
                f"Question: {question.text}\nAnswer:"
            )

        text, _ = self._fit(task, length, limit, build)
        documents = text[: text.rindex("\n\nQuestion: ")]
        if question.once and " ".join(documents.split()).count(question.once) != 1:
            return None
        return Prompt(text, question.answers, any_of=True, completion=f"{question.answers[0]}.")

    def _local_question(
        self, task: str, most: int, generator: np.random.Generator
    ) -> tuple[Question | None, list[str]]:
        """A question about local text, and at most ``most`` other documents in a random order; None where a draw gives
        none."""
        order = generator.permutation(len(self._passages))
        first = self._passages[order[0]]
        words = first.split()
        start = int(generator.integers(len(words) - 12))
        quoted = words[start : start + 12]
        if task == "qa_1":
            candidates = [i for i, word in enumerate(quoted) if re.fullmatch(r"[A-Za-z]{4,}[.,;:]?", word)]
            if candidates:
                hidden = candidates[int(generator.integers(len(candidates)))]
                answer = quoted[hidden].rstrip(".,;:")
                gap = " ".join([*quoted[:hidden], "____", *quoted[hidden + 1 :]])
                asked = f'Which word is left out here: "{gap}"?'
                others = [self._passages[i] for i in order[1 : 1 + most]]
                return Question(asked, (answer,), (first,), " ".join(quoted)), others
        else:
            found = ((i, re.match(r"[A-Za-z]{4,}\b", self._passages[i])) for i in order[1:])
            following, answer = next((pair for pair in found if pair[1]), (0, None))
            if answer:
                after = self._passages[following]
                asked = f'What is the first word of the document after the one that contains "{" ".join(quoted)}"?'
                others = [self._passages[i] for i in order[1 : 2 + most] if i != following][:most]
                return Question(asked, (answer.group(),), (first, after), " ".join(quoted)), others
        return None, []

    @staticmethod
    def _file_field(task: str) -> str:
        return "squad" if task == "qa_1" else "hotpotqa"

    def _read_questions(self, task: str, file: Path) -> list[Question]:
        if task not in self._questions:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                read = _squad(content) if task == "qa_1" else _hotpotqa(content)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError.at(
                    self._file_field(task),
                    got=f"{file}: {type(error).__name__}: {error}",
                    expected=f"a file in the form of {'SQuAD' if task == 'qa_1' else 'HotpotQA'}",
                ) from None
            require(read, self._file_field(task), got=str(file), expected="a file with questions")
            self._questions[task] = read
        return self._questions[task]


def _two_words(number: int) -> str:
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def _fact(kind: Needles, key: str, value: str) -> str:
    return f"The magic {kind.value} of {key} is {value}."


def _question(kind: Needles, names: str, is_single: bool) -> str:
    """A question about needles, and the beginning of its answer."""
    verb, plural = ("is", "") if is_single else ("are", "s")
    asked = f"the magic {kind.value}{plural} of {names}"
    return f"What {verb} {asked} in the text above?\nT{asked[1:]} {verb}"


def _listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _grid(count: int, generator: np.random.Generator) -> list[float]:
    """Different ones of 40 depths, evenly spaced; as published."""
    return [int(number) / 39 for number in generator.choice(40, count, replace=False)]


def _noise(words: int) -> list[str]:
    sentence = " ".join(NOISE).split()
    return (sentence * (words // len(sentence) + 1))[:words]


def _insert(words: Sequence[str], facts: Sequence[tuple[int, str]]) -> str:
    """Words with facts before the words of their positions."""
    parts: list[str] = []
    used = 0
    for position, fact in sorted(facts, key=lambda item: item[0]):
        parts += [*words[used:position], fact]
        used = position
    return " ".join([*parts, *words[used:]])


def _squad(content: Any) -> list[Question]:
    """Questions with an answer; others of the same paragraph share its document."""
    return [
        Question(
            asked["question"],
            tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])),
            (paragraph["context"],),
            related=tuple(dict.fromkeys(c for c in contexts if c != paragraph["context"])),
        )
        for article in content["data"]
        for contexts in [[paragraph["context"] for paragraph in article["paragraphs"]]]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
        if not asked.get("is_impossible") and asked["answers"]
    ]


def _hotpotqa(content: Any) -> list[Question]:
    return [
        Question(
            asked["question"],
            (asked["answer"],),
            tuple(f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]),
        )
        for asked in content
    ]
