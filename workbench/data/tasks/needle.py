"""Needle in a haystack: facts hidden in long text, one of which is queried (after RULER, arXiv 2404.06654, §3).

    <document> … haystack … The magic number of quiet-otter is 4071925. … haystack …
    The magic number of quiet-otter is → 4071925

These settings correspond to RULER's tasks; sentences, keys and noise are ours.

    S-NIAH-1   haystack: noise                      MK-NIAH-1  haystack: text, needles: 4
    S-NIAH-2   haystack: text                       MK-NIAH-2  haystack: needles
    S-NIAH-3   haystack: text, value: uuid          MK-NIAH-3  haystack: needles, key: uuid, value: uuid

Numbers and UUIDs are spelt character by character, so that an answer has the same number of tokens with every
tokenizer. The question repeats the words of the needle. Depth is the position of the queried needle in the haystack,
0 % at its beginning, moved to the nearest end of a sentence (or needle) if the haystack has any; training draws it
uniformly, the evaluation splits cycle through ``lengths`` × ``depths``.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field

from workbench.config import ConfigError, require
from workbench.data.config import DataConfig
from workbench.data.sources import Source, prepare
from workbench.data.streams import IGNORE_INDEX
from workbench.data.tasks import Example, Published, SplitName, Task, TaskConfig, check_lengths, sources
from workbench.data.text import Documents, PreparedData
from workbench.data.tokenizer import DOCUMENT_SYMBOL


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words("""
    able amber ancient bitter bold brave brief bright broad calm careful clever cold cosy curious daring deep
    distant dry eager early faint fair famous fierce firm fond frank fresh gentle giant glad golden grand green
    happy heavy hidden honest humble idle jolly keen kind late lively lonely loud lucky mild modest narrow noble odd
    pale patient plain polite proud quick quiet rapid rare ripe rough
""")
NOUNS = _words("""
    acorn anchor apple arrow badger barrel basket beacon beetle bottle bridge bucket button candle canyon carpet
    castle cedar chapel comet copper coral cradle desert dragon falcon feather fiddle forest garden glacier hammer
    harbour hazel helmet island jacket kettle ladder lantern lemon magnet maple marble meadow mirror mountain needle
    orchard otter pebble pepper pillow planet pocket rabbit ribbon river saddle salmon shadow shovel silver spider
""")
KEYS = len(ADJECTIVES) * len(NOUNS)
"""Number of two-word keys."""
NOISE = ("The wind is calm.", " The road is long.", " The lamp is lit.", " We walk on, and come back again.\n")
WORD_TOKENS = 4
"""Approximate number of tokens of a two-word key, for estimates."""
ATTEMPTS = 100
"""Draws of text for a haystack from which sentences like needles are taken (text hardly ever contains any)."""

KeyKind: TypeAlias = Literal["word", "number", "uuid"]


class Case(NamedTuple):
    """Length of an example in tokens, and depth of its needle (None: drawn)."""

    length: int
    depth: float | None


@sources.register
class Needle(Task):
    """Needle in a haystack: one fact of a long text is queried."""

    class Config(TaskConfig):
        """Needle in a haystack."""

        kind: Literal["needle"] = "needle"
        haystack: Literal["noise", "text", "needles"] = "noise"
        """What hides the needle: a few repeated sentences, text of the corpus, or only other needles."""
        needles: Annotated[int, Field(ge=1)] = 1
        """Facts in the haystack, including the queried one; the others are distractors with different keys."""
        key: KeyKind = "word"
        """Key of a fact: two words, a number of seven digits, or a UUID."""
        value: KeyKind = "number"
        """Value of a fact."""
        lengths: Annotated[tuple[Annotated[int, Field(ge=8)], ...], Field(min_length=1)] = (256,)
        """Tokens of the training examples; each row draws one."""
        measured_lengths: tuple[Annotated[int, Field(ge=8)], ...] = ()
        """Tokens of the evaluation examples, also above the context of training. Default: those of training."""
        depths: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
            0,
            0.25,
            0.5,
            0.75,
            1,
        )
        """Depths of the needle in the evaluation examples: 0 is the beginning of the haystack, 1 its end."""
        text: Annotated[DataConfig, BeforeValidator(lambda data: DataConfig.parse(data))] = Field(
            default={}, validate_default=True
        )
        """Corpus and tokenizer. The haystacks of a split are made of the documents of that split."""

        views = {"recall_map": ("length", "depth")}
        published = Published(
            "RULER, arXiv 2404.06654, section 3",
            {"haystack": "text", "measured_lengths": (4096, 8192, 16_384, 32_768, 65_536, 131_072)},
            {"haystack": ("noise", "text", "needles"), "needles": (1, 4), "value": ("number", "uuid")},
            "none: pretrained models, 500 examples of a task and length",
        )

        def model_post_init(self, _context: Any) -> None:
            require(
                self.haystack != "needles" or self.needles == 1,
                "needles",
                got=self.needles,
                expected="1 with haystack 'needles'",
                do="Such a haystack is filled with as many distractors as fit.",
            )
            require(
                self.needles <= KEYS // 2,
                "needles",
                got=self.needles,
                expected=f"at most half of the {KEYS} two-word keys",
            )

        def check(self, vocabulary: int, context: int) -> None:
            check_lengths("lengths", self.lengths, context)

        def chance(self, vocabulary: int) -> float:
            return 1 - {"word": 1 / KEYS, "number": 1 / 9_000_000, "uuid": 2.0**-122}[self.value]

        def target_share(self, context: int) -> float:
            answer = {"word": WORD_TOKENS, "number": 7, "uuid": 36}[self.value]
            return sum(answer * (context // length) for length in self.lengths) / len(self.lengths) / context

    @classmethod
    def material(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> dict[str, str]:
        return {"text": prepare(config.text, vocabulary, cache, progress).fingerprint}

    @cached_property
    def text(self) -> PreparedData:
        """Text of the haystacks, and its tokenizer."""
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
        only_needles = self.config.haystack == "needles"
        count = min(case.length // 8, KEYS // 2) if only_needles else self.config.needles
        keys = self._names(self.config.key, max(1, count), generator)
        values = self._names(self.config.value, max(1, count), generator)
        question, answer = self._question(next(keys)), self._value(next(values))
        needle = question + answer + self._end
        distractors = (self._question(key) + self._value(value) + self._end for key, value in zip(keys, values))
        needles = [needle, *([] if only_needles else distractors)]
        room = case.length - len(question) - len(answer) - sum(map(len, needles))
        require(
            room >= 0,
            "data.lengths",
            got=case.length,
            expected=f"at least {case.length - room} tokens for the needles, the question and the answer",
            do="Give longer examples, or fewer needles.",
        )
        hay, cuts = self._haystack(room, distractors, split, generator)
        positions = [
            int(np.abs(cuts - depth * room).argmin()),
            *generator.integers(len(cuts), size=len(needles) - 1).tolist(),
        ]
        # one token more than the example: the last is only a target
        sequence, used = [self._symbol], 0
        for position, fact in sorted(zip(positions, needles), key=lambda pair: pair[0]):
            sequence += hay[used : cuts[position]] + fact
            used = int(cuts[position])
        sequence += hay[used:] + question + answer
        tokens, targets = np.array(sequence[:-1], np.int64), np.array(sequence[1:], np.int64)
        targets[: len(targets) - len(answer)] = IGNORE_INDEX
        labels = {"length": case.length, "depth": round(100 * depth, 6), "needles": self.config.needles}
        return Example(tokens, targets, labels)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _haystack(
        self, room: int, distractors: Iterator[list[int]], split: SplitName, generator: np.random.Generator
    ) -> tuple[list[int], np.ndarray]:
        """``room`` tokens, and the positions among them at which a needle may be inserted."""
        if self.config.haystack == "text":
            return self._text(getattr(self.text, split), room, generator).tolist(), np.arange(room + 1)
        sentences = [self._ids(sentence) for sentence in NOISE]
        repeated = sentences * (room // sum(map(len, sentences)) + 1)
        facts: list[int] = []
        if self.config.haystack == "needles":
            cuts = [0]
            for fact in distractors:
                if len(facts) + len(fact) > room:
                    break
                facts += fact
                cuts.append(len(facts))
        else:
            cuts = [end for end in np.cumsum([0, *map(len, repeated)]).tolist() if end < room] + [room]
        noise = [token for sentence in repeated for token in sentence]  # its last sentence may be cut
        return facts + noise[: room - len(facts)], np.array(cuts)

    def _text(self, documents: Documents, room: int, generator: np.random.Generator) -> np.ndarray:
        """``room`` tokens of text in which no needle begins; sentences like needles are left out of it."""
        hay = np.empty(0, np.int64)
        for _ in range(ATTEMPTS):
            hay = self._without_needles(np.concatenate([hay, self._pieces(documents, room - len(hay), generator)]))
            if len(hay) == room:
                return hay
        raise ConfigError.at(
            "data.text",
            got="text of little but sentences that look like needles",
            expected=f"{room} tokens of other text",
            do="Choose another corpus, or haystack: noise.",
        )

    def _without_needles(self, hay: np.ndarray) -> np.ndarray:
        """The text without its sentences that begin like a needle, each up to its end."""
        lead, end = (np.array(part, np.int64).tobytes() for part in (self._lead, self._end))
        text = hay.tobytes()
        while (first := _find(text, lead, 0)) >= 0:
            last = _find(text, end, first + len(lead))
            text = text[:first] + text[(last + len(end) if last >= 0 else first + len(lead)) :]
        return np.frombuffer(text, np.int64)

    @staticmethod
    def _pieces(documents: Documents, room: int, generator: np.random.Generator) -> np.ndarray:
        """Text of randomly drawn documents, one after another; the first from a random position on."""
        parts: list[np.ndarray] = [np.empty(0, np.int64)]
        left, first = room, True
        while left:
            document = int(generator.integers(len(documents)))
            count = int(documents.lengths[document])
            start = int(generator.integers(count)) if first and count else 0
            _, tokens = documents.piece(document, start, min(left, count - start))  # without the document symbol
            parts.append(tokens)
            left, first = left - len(tokens), False
        return np.concatenate(parts).astype(np.int64)

    @staticmethod
    def _names(kind: KeyKind, count: int, generator: np.random.Generator) -> Iterator[str]:
        """``count`` different keys or values; UUIDs are drawn one by one, as they are needed."""
        if kind == "word":
            for i in generator.choice(KEYS, count, replace=False).tolist():
                yield f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}"
        elif kind == "number":
            yield from map(str, (1_000_000 + generator.choice(9_000_000, count, replace=False)).tolist())
        else:
            for _ in range(count):
                yield str(uuid.UUID(bytes=generator.bytes(16), version=4))

    def _ids(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._encoded[text]

    @cached_property
    def _encoded(self) -> dict[str, list[int]]:
        """Token ids of the phrases, words and characters that examples are made of."""
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

    def _question(self, key: str) -> list[int]:
        """A fact up to its value: "The magic number of quiet-otter is"."""
        spelt = self._ids(f" {key}") if self.config.key == "word" else self._ids(" ") + self._spelt(key)
        return self._lead + spelt + self._ids(" is") + ([] if self.config.value == "word" else self._ids(" "))

    def _value(self, value: str) -> list[int]:
        return self._ids(f" {value}") if self.config.value == "word" else self._spelt(value)

    def _spelt(self, text: str) -> list[int]:
        return [token for character in text for token in self._ids(character)]


def _find(text: bytes, part: bytes, start: int) -> int:
    """Position in bytes of ``part`` in ``text``, both of int64 numbers, from ``start`` on; -1 if it is not there."""
    while (found := text.find(part, start)) >= 0 and found % 8:
        start = found + 1
    return found
