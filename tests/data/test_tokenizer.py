"""The tokenizer loses nothing; unusable ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from workbench.config import ConfigError
from workbench.data import DataConfig, prepare
from workbench.data.tokenizer import DOCUMENT_SYMBOL, encode, load, train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([f"the quick brown fox jumps over {i} lazy dogs" for i in range(50)], 300, 10_000)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, position=st.integers(0, 5))
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str, position: int) -> None:
    text = text[:position] + DOCUMENT_SYMBOL + text[position:]
    ((ids, _),) = encode(tokenizer, [text])
    assert tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_document_symbol_is_at_both_ends_only(tokenizer: Tokenizer, text: str) -> None:
    ((ids, _),) = encode(tokenizer, [text + DOCUMENT_SYMBOL])
    assert (ids == 0).nonzero()[0].tolist() == [0, len(ids) - 1]


def test_the_size_is_in_bytes(tokenizer: Tokenizer) -> None:
    assert [document.size for document in encode(tokenizer, ["äöü", "fox"])] == [6, 3]


def test_a_cut_text_has_no_symbol_at_its_end(tokenizer: Tokenizer) -> None:
    ((ids, size),) = encode(tokenizer, ["the quick brown fox"], max_bytes=9)
    assert (size, int(ids[-1])) != (9, 0)
    assert tokenizer.decode(ids[1:].tolist()) == "the quick"


def test_no_character_is_cut_in_half(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, ["äöü"], max_bytes=5)[0].size == 4


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data.tokenizer_file"):
        load(str(tmp_path / "tokenizer.json"), 300)


def test_a_tokenizer_with_more_ids_than_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"model.vocabulary: got 299; expected at least the tokenizer's 300 ids"):
        load(str(tmp_path / "tokenizer.json"), 299)


@pytest.mark.parametrize(
    ("fields", "vocabulary", "message"),
    [
        ({}, 256, "model.vocabulary: got 256; expected at least 257"),
        ({"tokenizer_file": "none.json"}, 300, "data.tokenizer_file: got .*No such file"),
    ],
)
def test_a_run_without_a_usable_tokenizer(
    tmp_path: Path, fields: dict[str, object], vocabulary: int, message: str
) -> None:
    corpus = {"kind": "files", "path": str(write_corpus(tmp_path / "corpus", 4))}
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig.parse({"corpus": corpus, **fields}), vocabulary, tmp_path / "cache")
