"""Documents of drawn lengths: lengths, text used once, facts asked for at the end."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data.corpora import corpora
from workbench.data.lengths import draw_lengths
from workbench.seeding import counter_generator

FACT = re.compile(r"\nThe magic word of (\S+) is (\S+)\.\n")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"kind": "files", "path": str(write_corpus(tmp_path_factory.mktemp("corpus"), 12))}


def documents(text: dict[str, str], **fields: Any) -> list[str]:
    config = corpora.parse({"kind": "drawn_lengths", "text": text, "scale": 1 / 64, **fields})
    return list(corpora["drawn_lengths"](config).documents())


def test_documents_have_the_drawn_lengths(text: dict[str, str]) -> None:
    made = documents(text, distribution="bimodal", characters_per_token=4)
    lengths = draw_lengths("bimodal", 100_000, counter_generator(0, 0), 1 / 64)[: len(made)]
    long = lengths > 100  # shorter ones consist of facts
    assert long.any()
    for document, length in zip(made, lengths):
        if length > 100:
            assert len(document) == pytest.approx(4 * length, abs=2)


def test_every_piece_of_the_text_is_used_once(text: dict[str, str]) -> None:
    made = documents(text, distribution="uniform", facts=0)
    (config,) = [corpora.parse(text)]
    whole = "".join(corpora["files"](config).documents())
    joined = "".join(made)
    assert whole.startswith(joined) and len(joined) > 0.8 * len(whole)


def test_the_end_asks_for_every_fact(text: dict[str, str]) -> None:
    for document in documents(text, distribution="long_tail", facts=3):
        facts = FACT.findall(document)
        assert len(facts) == 6 and sorted(facts[:3]) == sorted(facts[3:])
        assert document.endswith(f"{facts[-1][1]}.\n")


def test_documents_depend_on_the_seed_alone(text: dict[str, str]) -> None:
    assert documents(text, seed=1) == documents(text, seed=1) != documents(text, seed=2)


def test_too_little_text_is_an_error(text: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data.corpus.text: got 'less text than the \d+ tokens of the first"):
        documents(text, distribution="long_tail", scale=1.0, characters_per_token=100)
