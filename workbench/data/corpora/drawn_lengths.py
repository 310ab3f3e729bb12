"""Documents of drawn lengths, cut from the text of another corpus, with facts that are asked for at the end.

The text of the other corpus is read as one, in its order, and cut into documents whose lengths follow a distribution.
Facts are sentences of :mod:`workbench.data.tasks.needle` with words as values, at random places; the end of a document
repeats every one of them, so that a model that has found a fact predicts the last word. A model that is trained on such
documents is measured by length with ``evaluation: [{kind: answers, data: {kind: needle, value: word, …}}]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.config import require
from workbench.data.corpora import Corpus, CorpusConfig, corpora
from workbench.data.lengths import LengthDistribution, draw_lengths
from workbench.data.tasks.needle import ADJECTIVES, NOUNS
from workbench.seeding import Seed, counter_generator

SHORTEST = 64
"""Characters of text in a document beside its facts, at least."""


@corpora.register
class DrawnLengths(Corpus):
    """Documents of drawn lengths with facts to be found."""

    class Config(CorpusConfig):
        """Documents of drawn lengths with facts to be found."""

        kind: Literal["drawn_lengths"] = "drawn_lengths"
        text: Annotated[SerializeAsAny[CorpusConfig], BeforeValidator(corpora.parse)] = Field(
            default="stdlib", validate_default=True
        )
        """Corpus that documents are cut from."""
        distribution: LengthDistribution = "long_tail"
        """Lengths: uniform (1k to 32k tokens), bimodal (512 to 4k and 16k to 32k), or long_tail (8k to 72k)."""
        scale: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Factor of all lengths, for small machines: with 1/64 the longest of 72k tokens has 1,152."""
        characters_per_token: Annotated[float, Field(gt=0)] = 3.5
        """By which a length in tokens becomes one in characters; what the tokenizer needs is near it."""
        documents: Annotated[int, Field(ge=1)] = 100_000
        """Documents, as far as the text suffices; each piece of it is used once."""
        facts: Annotated[int, Field(ge=0)] = 2
        """Facts of a document."""
        seed: Seed = 0
        """Seed of lengths, facts and their places."""

    def stamp(self) -> str | None:
        return corpora[self.config.text.kind](self.config.text).stamp()

    def documents(self) -> Iterator[str]:
        config, texts = self.config, corpora[self.config.text.kind](self.config.text).documents()
        generator = counter_generator(config.seed, 0)
        tokens = draw_lengths(config.distribution, config.documents, generator, config.scale)
        pool, made = "", 0
        for number, length in enumerate(tokens.tolist()):
            drawn = counter_generator(config.seed, 1, number)
            facts = [_fact(drawn) for _ in range(config.facts)]
            questions = "".join(facts)
            room = max(SHORTEST, round(length * config.characters_per_token) - 2 * len(questions))
            while len(pool) < room and (text := next(texts, None)) is not None:
                pool += text
            if len(pool) < room:
                break
            haystack, pool = pool[:room], pool[room:]
            places = [0, *sorted(drawn.integers(0, room + 1, size=len(facts)).tolist()), room]
            pieces = [haystack[first:last] for first, last in itertools.pairwise(places)]
            yield "".join(piece + fact for piece, fact in zip(pieces, [*facts, questions]))
            made += 1
        require(
            made > 0,
            "data.corpus.text",
            got=f"less text than the {tokens[0]} tokens of the first document",
            expected="a corpus with more text",
            do="Choose another corpus, or a smaller scale.",
        )


def _fact(generator: np.random.Generator) -> str:
    """A fact: "The magic word of quiet-otter is bold-river."."""
    key, value = (
        f"{ADJECTIVES[generator.integers(len(ADJECTIVES))]}-{NOUNS[generator.integers(len(NOUNS))]}" for _ in range(2)
    )
    return f"\nThe magic word of {key} is {value}.\n"
