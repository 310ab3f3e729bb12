"""The tokenizer loses nothing; unusable ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from workbench.config import ConfigError
from workbench.data import DataConfig, prepare
from workbench.data.tokenizer import DOCUMENT_SYMBOL, MAX_WORD, RoundTrip, _cut_words, encode, load, round_trip, train


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


def test_settings_inside_a_file_are_reset(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over 7 lazy dogs " * 9
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=500)
    copy.model.dropout = 0.5
    copy.save(str(tmp_path / "tokenizer.json"))
    loaded = load(str(tmp_path / "tokenizer.json"), 300)
    assert encode(loaded, [text])[0].ids.tolist() == encode(tokenizer, [text])[0].ids.tolist()


def renumbered(tokenizer: Tokenizer, path: Path, shift: int) -> str:
    """A copy whose last ten ids are larger by ``shift``."""
    fields = json.loads(tokenizer.to_str())
    vocabulary = fields["model"]["vocab"]
    for token in sorted(vocabulary, key=vocabulary.__getitem__)[-10:]:
        vocabulary[token] += shift
    path.write_text(json.dumps(fields))
    return str(path)


def test_the_largest_id_must_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    largest = max(tokenizer.get_vocab().values()) + 500
    with pytest.raises(ConfigError, match=f"has id {largest}"):
        load(renumbered(tokenizer, tmp_path / "t.json", 500), largest)
    assert load(renumbered(tokenizer, tmp_path / "t.json", 500), largest + 1)


def test_the_document_symbol_shares_no_id(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 3}, unk_token="a"))
    plain.save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=r"share id 3"):
        load(str(tmp_path / "t.json"), 300)


@pytest.mark.parametrize("text", ["the quick", "naïve über", "a\r\nb", f"x{DOCUMENT_SYMBOL}y"])
def test_a_byte_level_tokenizer_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    (document,) = encode(tokenizer, [text])
    assert round_trip(tokenizer, document, text) is RoundTrip.EXACT


def test_a_cut_text_is_compared_with_its_beginning(tokenizer: Tokenizer) -> None:
    (document,) = encode(tokenizer, ["the quick brown fox"], max_bytes=9)
    assert round_trip(tokenizer, document, "the quick brown fox") is RoundTrip.EXACT


def test_unknown_words_are_a_loss() -> None:
    words = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([DOCUMENT_SYMBOL])
    (document,) = encode(words, ["the fox"])
    assert round_trip(words, document, "the fox") is RoundTrip.LOSSY


@pytest.mark.parametrize(
    ("text", "expected"),
    [("the fox", RoundTrip.SPACE), (" the fox", RoundTrip.EXACT), ("  the fox", RoundTrip.EXACT)],
)
def test_a_space_put_before_every_text_is_no_loss(text: str, expected: RoundTrip) -> None:
    tokenizer = train([text], 300, 10_000)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (document,) = encode(tokenizer, [text])
    assert round_trip(tokenizer, document, text) is expected


@pytest.mark.parametrize("word", ["ACGT" * 300, "\n" * 1200])
def test_long_words_and_white_space_are_cut_for_training(word: str) -> None:
    assert max(map(len, _cut_words(f"one-{word}-two"))) == MAX_WORD
    assert sorted("".join(_cut_words(f"one-{word}-two"))) == sorted(f"one-{word}-two")


def test_text_without_long_words_is_whole() -> None:
    assert _cut_words("one two\nthree") == ["one two\nthree"]


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data.tokenizer_file"):
        load(str(tmp_path / "tokenizer.json"), 300)


def test_a_tokenizer_with_more_ids_than_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"model.vocabulary: got 299; expected at least 300"):
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


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0}), models.Unigram([("a", -1.0)], None, False)])
def test_a_tokenizer_without_an_unknown_token_fails_with_a_clear_error(model: Any) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([DOCUMENT_SYMBOL])
    with pytest.raises(ConfigError, match=r"data.tokenizer_file: got .a tokenizer that fails: "):
        encode(tokenizer, ["the fox"])


def test_a_panic_of_the_library_is_a_clear_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An expression that backtracks without end."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "t.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), "pre_tokenizer": split}))
    loaded = load(str(tmp_path / "t.json"), 300)
    with pytest.raises(ConfigError, match=r"a tokenizer that fails: .*retry-limit"):
        encode(loaded, ["x" * 40])


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"decoder": None},
    ],
)
def test_normalised_text_is_a_loss(tokenizer: Tokenizer, tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **fields}))
    text = " The fox e\u0301 "
    loaded = load(str(tmp_path / "t.json"), 300)
    (document,) = encode(loaded, [text])
    assert round_trip(loaded, document, text) is RoundTrip.LOSSY


@pytest.mark.parametrize("unit", [" ", "\n", "=", "ACGT", "的一是不"])
def test_training_time_does_not_grow_with_the_length_of_a_run(unit: str) -> None:
    """Quadratic training takes minutes for this text."""
    train(["a word" + unit * (400_000 // len(unit))], 300, 10**6)
