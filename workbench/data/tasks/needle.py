"""Needle in a haystack: facts hidden in long text, one of them asked for (in the manner of RULER, arXiv 2404.06654, §3).

    <document> … haystack … The magic number of quiet-otter is 4071925. … haystack …  The magic number of quiet-otter is → 4071925

The settings below correspond to RULER's tasks; wording, words and noise are ours.

    S-NIAH-1   haystack: noise                      MK-NIAH-1  haystack: text, needles: 4
    S-NIAH-2   haystack: text                       MK-NIAH-2  haystack: needles
    S-NIAH-3   haystack: text, value: uuid          MK-NIAH-3  haystack: needles, key: uuid, value: uuid

Numbers and UUIDs are spelt character by character, so that an answer takes as many tokens with any tokenizer. The
question repeats the needle's own words. Depth is where in the haystack the needle asked for lies, 0 % at its beginning,
moved to the nearest end of a sentence (or needle) where the haystack has such; training draws it evenly, the measured
splits go through ``depths`` × ``lengths``.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field

from workbench.config import ConfigError
from workbench.data.config import DataConfig
from workbench.data.preparation import DOCUMENT_SYMBOL, Documents, PreparedData
from workbench.data.sources import Source, prepare
from workbench.data.streams import IGNORE_INDEX
from workbench.data.tasks import Example, SplitName, Task, TaskConfig, check_lengths, sources

ADJECTIVES = [
    "able",
    "amber",
    "ancient",
    "bitter",
    "bold",
    "brave",
    "brief",
    "bright",
    "broad",
    "calm",
    "careful",
    "clever",
    "cold",
    "cosy",
    "curious",
    "daring",
    "deep",
    "distant",
    "dry",
    "eager",
    "early",
    "faint",
    "fair",
    "famous",
    "fierce",
    "firm",
    "fond",
    "frank",
    "fresh",
    "gentle",
    "giant",
    "glad",
    "golden",
    "grand",
    "green",
    "happy",
    "heavy",
    "hidden",
    "honest",
    "humble",
    "idle",
    "jolly",
    "keen",
    "kind",
    "late",
    "lively",
    "lonely",
    "loud",
    "lucky",
    "mild",
    "modest",
    "narrow",
    "noble",
    "odd",
    "pale",
    "patient",
    "plain",
    "polite",
    "proud",
    "quick",
    "quiet",
    "rapid",
    "rare",
    "ripe",
    "rough",
]
NOUNS = [
    "acorn",
    "anchor",
    "apple",
    "arrow",
    "badger",
    "barrel",
    "basket",
    "beacon",
    "beetle",
    "bottle",
    "bridge",
    "bucket",
    "button",
    "candle",
    "canyon",
    "carpet",
    "castle",
    "cedar",
    "chapel",
    "comet",
    "copper",
    "coral",
    "cradle",
    "desert",
    "dragon",
    "falcon",
    "feather",
    "fiddle",
    "forest",
    "garden",
    "glacier",
    "hammer",
    "harbour",
    "hazel",
    "helmet",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "lantern",
    "lemon",
    "magnet",
    "maple",
    "marble",
    "meadow",
    "mirror",
    "mountain",
    "needle",
    "orchard",
    "otter",
    "pebble",
    "pepper",
    "pillow",
    "planet",
    "pocket",
    "rabbit",
    "ribbon",
    "river",
    "saddle",
    "salmon",
    "shadow",
    "shovel",
    "silver",
    "spider",
]
NOISE = ("The wind is calm.", " The road is long.", " The lamp is lit.", " We walk on, and come back again.\n")
WORD_TOKENS = 4
"""About how many tokens a word takes, for estimates."""
ATTEMPTS = 100
"""Haystacks of text drawn before giving up on one that says nothing of what needles say (text hardly ever does)."""

Sort = Literal["word", "number", "uuid"]


class Case(NamedTuple):
    """An example's length in tokens, and the depth of its needle (None draws one)."""

    length: int
    depth: float | None


@sources.register
class Needle(Task):
    """Needle in a haystack: one fact of a long text is asked for."""

    class Config(TaskConfig):
        """Needle in a haystack."""

        kind: Literal["needle"] = "needle"
        haystack: Literal["noise", "text", "needles"] = "noise"
        """What hides the needle: a few sentences repeated, text of the corpus, or other needles and nothing else."""
        needles: Annotated[int, Field(ge=1)] = 1
        """Facts in the haystack, the one asked for included; the others are distractors with keys of their own."""
        key: Sort = "word"
        """What a fact is about: two words, a number of seven digits, a UUID."""
        value: Sort = "number"
        """What it says."""
        lengths: Annotated[tuple[Annotated[int, Field(ge=8)], ...], Field(min_length=1)] = (256,)
        """Tokens of the training examples; each row of a batch draws one."""
        measured_lengths: tuple[Annotated[int, Field(ge=8)], ...] = ()
        """Tokens of the measured examples. Default: those of training."""
        depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
            0.0,
            0.25,
            0.5,
            0.75,
            1.0,
        )
        """Depths of the needle in the measured examples: 0 is the beginning of the haystack, 1 its end."""
        text: Annotated[DataConfig, BeforeValidator(lambda data: DataConfig.parse(data))] = Field(
            default={}, validate_default=True
        )
        """Corpus and tokenizer. A split's haystacks are made of the documents of that split alone."""

        views = {"recall_map": ("length", "depth")}

        def model_post_init(self, _context: Any) -> None:
            if self.haystack == "needles" and self.needles > 1:
                raise ConfigError.at(
                    "needles",
                    got=self.needles,
                    expected="1 with haystack 'needles'",
                    do="Such a haystack holds as many distractors as fit.",
                )
            if self.needles > len(ADJECTIVES) * len(NOUNS) // 2:
                raise ConfigError.at(
                    "needles",
                    got=self.needles,
                    expected=f"at most half of the {len(ADJECTIVES) * len(NOUNS)} two-word keys",
                )

        def check(self, vocabulary: int, context: int) -> None:
            check_lengths("lengths", self.lengths, context)
            check_lengths("measured_lengths", self.measured_lengths or (1,), context)

        def target_share(self, context: int) -> float:
            answer = {"word": WORD_TOKENS, "number": 7, "uuid": 36}[self.value]
            return sum(answer * (context // length) for length in self.lengths) / len(self.lengths) / context

    @classmethod
    def material(cls, config: Any, vocabulary: int, cache: Path, say: Callable[[str], None]) -> dict[str, str]:
        return {"text": prepare(config.text, vocabulary, cache, say).fingerprint}

    @cached_property
    def text(self) -> PreparedData:
        """The haystacks' text and its tokenizer."""
        return Source.open(self.folder.parent, self.card["material"]["text"])

    @cached_property
    def tokenizer(self) -> Any:
        return self.text.tokenizer

    def cases(self, split: SplitName) -> Sequence[Case]:
        if split == "train":
            return [Case(length, None) for length in self.config.lengths]
        return [
            Case(*c) for c in itertools.product(self.config.measured_lengths or self.config.lengths, self.config.depths)
        ]

    def example(self, case: Case, split: SplitName, generator: np.random.Generator) -> Example:
        depth = float(generator.random()) if case.depth is None else case.depth
        full = self.config.haystack == "needles"
        count = min(case.length // 8, len(ADJECTIVES) * len(NOUNS) // 2) if full else self.config.needles
        keys = self._names(self.config.key, max(1, count), generator)
        values = self._names(self.config.value, max(1, count), generator)
        question, answer = self._head(next(keys)), self._value(next(values))
        asked = question + answer + self._end
        facts = (self._head(key) + self._value(value) + self._end for key, value in zip(keys, values))
        hidden = [asked, *([] if full else facts)]
        room = case.length - len(question) - len(answer) - sum(map(len, hidden))
        if room < 0:
            raise ConfigError.at(
                "data.lengths",
                got=case.length,
                expected=f"at least {case.length - room} tokens for the needles, the question and the answer",
                do="Give longer examples, or fewer needles.",
            )
        hay, cuts = self._haystack(room, facts, split, generator)
        places = [
            int(np.abs(cuts - depth * room).argmin()),
            *generator.integers(len(cuts), size=len(hidden) - 1).tolist(),
        ]
        # one token more than the example: the last is only a target
        sequence, done = [self._symbol], 0
        for place, fact in sorted(zip(places, hidden), key=lambda pair: pair[0]):
            sequence += hay[done : cuts[place]] + fact
            done = int(cuts[place])
        sequence += hay[done:] + question + answer
        tokens, targets = np.array(sequence[:-1], np.int64), np.array(sequence[1:], np.int64)
        targets[: len(targets) - len(answer)] = IGNORE_INDEX
        return Example(
            tokens, targets, {"length": case.length, "depth": round(100 * depth, 6), "needles": self.config.needles}
        )

    # -- parts -------------------------------------------------------------------------------------------------------

    def _haystack(
        self, room: int, facts: Iterator[list[int]], split: SplitName, generator: np.random.Generator
    ) -> tuple[list[int], np.ndarray]:
        """``room`` tokens, and the places in them where a needle may be put; as many ``facts`` as fit, where it is made of
        needles."""
        if self.config.haystack == "text":
            lead = np.array(self._lead, np.int64).tobytes()
            for _ in range(ATTEMPTS):
                hay = self._pieces(getattr(self.text, split), room, generator)
                if lead not in hay.tobytes():
                    return hay.tolist(), np.arange(room + 1)
            raise ConfigError.at(
                "data.text", got="text that says over and over what a needle says", expected="other text"
            )
        made: list[int] = []
        ends = [0]
        sentences = [self._ids(sentence) for sentence in NOISE]
        repeats = room // sum(map(len, sentences)) + 1
        if self.config.haystack == "needles":
            for fact in facts:
                if len(made) + len(fact) > room:
                    break
                made += fact
                ends.append(len(made))
        else:
            ends = [end for end in np.cumsum([0, *map(len, sentences * repeats)]).tolist() if end < room] + [room]
        noise = [token for sentence in sentences * repeats for token in sentence]  # its last sentence may be cut
        return made + noise[: room - len(made)], np.array(ends)

    @staticmethod
    def _pieces(documents: Documents, room: int, generator: np.random.Generator) -> np.ndarray:
        """Text of documents drawn at random, one after another; the first from a random place in it."""
        parts: list[np.ndarray] = [np.empty(0, np.int64)]
        left, first = room, True
        while left:
            document = int(generator.integers(len(documents)))
            count = int(documents.lengths[document])
            start = int(generator.integers(count)) if first and count else 0
            tokens = documents.piece(document, start, min(left, count - start))[
                1
            ]  # without the document symbol before it
            parts.append(tokens)
            left, first = left - len(tokens), False
        return np.concatenate(parts).astype(np.int64)

    @staticmethod
    def _names(sort: Sort, count: int, generator: np.random.Generator) -> Iterator[str]:
        """So many different names, each drawn when it is asked for."""
        if sort == "word":
            for i in generator.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False).tolist():
                yield f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}"
        elif sort == "number":
            yield from map(str, (1_000_000 + generator.choice(9_000_000, count, replace=False)).tolist())
        else:
            for _ in range(count):
                yield str(uuid.UUID(bytes=generator.bytes(16), version=4))

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """Token ids of the pieces that examples are put together from: phrases, words, characters."""
        return {}

    @cached_property
    def _symbol(self) -> int:
        return self.tokenizer.token_to_id(DOCUMENT_SYMBOL)

    @property
    def _lead(self) -> list[int]:
        return self._ids(f"\nThe magic {self.config.value} of")

    @property
    def _end(self) -> list[int]:
        return self._ids(".\n")

    def _head(self, key: str) -> list[int]:
        """A fact up to its value: "The magic number of quiet-otter is"."""
        spelt = self._ids(f" {key}") if self.config.key == "word" else self._ids(" ") + self._spelt(key)
        return self._lead + spelt + self._ids(" is") + ([] if self.config.value == "word" else self._ids(" "))

    def _value(self, value: str) -> list[int]:
        return self._ids(f" {value}") if self.config.value == "word" else self._spelt(value)

    def _spelt(self, text: str) -> list[int]:
        return [token for character in text for token in self._ids(character)]
