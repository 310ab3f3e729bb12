"""Byte-level BPE: trained on the training split, or loaded from a file."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.config import ConfigError, require

DOCUMENT_SYMBOL = "<|document|>"
"""Before and after every document; token id 0 of a trained tokenizer."""
MAX_WORD = 256
"""Characters of the longest word, or run of white space, that BPE is trained on, whose time is quadratic in their
length; longer ones, as in genomes, encoded data or tables, are cut."""
LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}|\s{{{MAX_WORD + 1},}}")


class Encoded(NamedTuple):
    """A text as token ids."""

    ids: np.ndarray
    """int64, the document symbol first; last too, unless the text was cut."""
    size: int
    """Bytes of UTF-8 text."""


def file_hash(path: str) -> str:
    """SHA-256 of a tokenizer's file.

    Raises:
        ConfigError: when it cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError.at(
            "data.tokenizer_file", got=f"{path} ({error.strerror})", expected="a tokenizer's JSON file"
        ) from None


def load(path: str, vocabulary: int) -> Tokenizer:
    """A tokenizer from JSON of the `tokenizers` library; the document symbol is added if it has none.

    Raises:
        ConfigError: for another file, or more ids than ``vocabulary``.
    """
    tokenizer = read(path, field="data.tokenizer_file")
    ids_before = set(tokenizer.get_vocab().values())
    is_new = tokenizer.token_to_id(DOCUMENT_SYMBOL) is None
    tokenizer.add_special_tokens([DOCUMENT_SYMBOL])
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    require(
        not (is_new and symbol in ids_before),
        "data.tokenizer_file",
        got=f"ids with gaps: the document symbol would share id {symbol} with a token",
        expected="ids without gaps, or a file that contains the document symbol",
        do=f"Add the special token {DOCUMENT_SYMBOL} with an unused id to the file.",
    )
    size = max(tokenizer.get_vocab().values()) + 1
    require(
        size <= vocabulary,
        "model.vocabulary",
        got=vocabulary,
        expected=f"at least {size}, as the tokenizer has id {size - 1}",
        do=f"Set model.vocabulary={size} or more.",
    )
    return tokenizer


def read(path: str, field: str) -> Tokenizer:
    """The tokenizer in a file, without what changes a text's ids: truncation, padding, dropout of merges.

    Args:
        path: JSON of the `tokenizers` library.
        field: named in the error.

    Raises:
        ConfigError: when the library cannot read the file.
    """
    with _refusing(field, path, "JSON that the `tokenizers` library wrote"):
        tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


@contextlib.contextmanager
def _refusing(field: str, got: str, expected: str) -> Iterator[None]:
    """Turn errors of the library into a ConfigError. It raises nothing more precise than Exception, and BaseException
    where its Rust code panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ConfigError.at(field, got=f"{got}: {error}", expected=expected) from None


class RoundTrip(Enum):
    """What decoding makes of an encoded text."""

    EXACT = "exact"
    """The text."""
    SPACE = "space"
    """The text with one space more or less in front, as tokenizers that put a space before every text do: all that is
    lost is whether the text begins with one, at most one bit."""
    LOSSY = "lossy"
    """Another text."""


def round_trip(tokenizer: Tokenizer, document: Encoded, text: str) -> RoundTrip:
    """Decode a document and compare it with its text.

    Args:
        document: of :func:`encode`.
        text: what was encoded; it may be longer, where ``document`` is its beginning.
    """
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    ids = document.ids[1:].tolist()
    if ids and ids[-1] == symbol:
        ids.pop()
    decoded, text = tokenizer.decode(ids, skip_special_tokens=False), cut(text, document.size)
    if decoded == text:
        return RoundTrip.EXACT
    return RoundTrip.SPACE if f" {text}" == decoded or f" {decoded}" == text else RoundTrip.LOSSY


def check_vocabulary(vocabulary: int) -> None:
    """Raise ConfigError where a byte-level tokenizer has too few ids."""
    require(
        vocabulary >= 257,
        "model.vocabulary",
        got=vocabulary,
        expected="at least 257: every byte and one document symbol",
    )


def train(texts: Iterable[str], vocabulary: int, sample_characters: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most ``vocabulary`` ids; a small corpus yields fewer, the rest stays unused.

    Args:
        texts: the training split.
        vocabulary: number of ids, at least 257.
        sample_characters: length of the beginning of the split that is used.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[DOCUMENT_SYMBOL],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sample, left = [], sample_characters
    for text in texts:
        if left <= 0:
            break
        sample += _cut_words(text[:left])
        left -= len(text)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_bytes: int | None = None) -> list[Encoded]:
    """Texts as documents: token ids between document symbols.

    Args:
        tokenizer: with a document symbol; the symbol written out in a text is encoded as text.
        texts: the texts.
        max_bytes: a longer text is cut to at most this many bytes and has no symbol at its end.

    Raises:
        ConfigError: the tokenizer fails, as one without an unknown token does at a character that it does not have.
    """
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    tokenizer.encode_special_tokens = True
    pieces = [text if max_bytes is None else cut(text, max_bytes) for text in texts]
    with _refusing("data.tokenizer_file", "a tokenizer that fails", "one that encodes every text"):
        encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    documents = []
    for text, piece, encoding in zip(texts, pieces, encodings):
        end = [symbol] if len(piece) == len(text) else []
        documents.append(Encoded(np.array([symbol, *encoding.ids, *end], dtype=np.int64), len(piece.encode())))
    return documents


def _cut_words(text: str) -> list[str]:
    """``text`` in pieces without a word or white space of more than ``MAX_WORD`` characters; whole if it has none."""
    if not LONG_WORD.search(text):
        return [text]
    pieces = LONG_WORD.split(text)
    words = [word[i : i + MAX_WORD] for word in LONG_WORD.findall(text) for i in range(0, len(word), MAX_WORD)]
    return [*filter(None, pieces), *words]


def cut(text: str, limit: int) -> str:
    """The longest beginning of ``text`` of at most ``limit`` bytes of UTF-8."""
    data = text.encode()
    return text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
