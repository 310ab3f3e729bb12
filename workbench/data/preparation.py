"""From a corpus to token arrays on disk, once: deduplicate, split by document, train a tokenizer, encode.

What is prepared is named by a fingerprint of the text and the settings. Processes that prepare the same thing at the
same time wait for each other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.config import ConfigError
from workbench.data.config import DataConfig
from workbench.data.corpora import corpora
from workbench.data.packing import TrainingStream
from workbench.data.sources import Source, digest, is_whole, sources, write_card
from workbench.data.spool import Spool
from workbench.files import locked, read_json, write_json

SPLITS = ("train", "selection", "report")
DOCUMENT_SYMBOL = "<|document|>"
"""Stands before and after every document; token id 0."""
SHARD_TOKENS = 2**27
"""Largest number of tokens in one file; a longer document has a file of its own."""
FORMAT = 3
"""Part of the fingerprint; raised when the files or the rules change."""
LINE_LENGTH = 20
"""Shorter lines say nothing about where a text comes from."""
ENCODED_TOGETHER = 256
"""Documents given to the tokenizer's threads at once."""
COMMON = 50
"""Lines in more documents than this are boilerplate and connect nothing; bounds the work."""


class Tokens:
    """Token ids of a split in memory-mapped shards, sliced as if they were one array. A document lies in one shard.

    Args:
        shards: files, in order.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = [np.load(path, mmap_mode="r") for path in shards]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids ``span.start`` to ``span.stop`` of one document."""
        shard = int(np.searchsorted(self.starts, span.start, side="right")) - 1
        base = int(self.starts[shard])
        return self.shards[shard][span.start - base : span.stop - base]


@dataclass(frozen=True)
class Documents:
    """Tokenized documents of one split."""

    tokens: Tokens
    """Token ids; document d is ``tokens[offsets[d]:offsets[d+1]]``, the document symbol first."""
    offsets: np.ndarray
    """(documents + 1,) int64."""
    byte_counts: np.ndarray
    """(documents,) int64: bytes of UTF-8 text behind each document's targets."""
    whole: bool = False
    answered: bool = False

    def __len__(self) -> int:
        return len(self.byte_counts)

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) targets of each: every token after the first."""
        return np.diff(self.offsets) - 1

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        return {"bytes": np.asarray(self.byte_counts, dtype=np.int64)}

    def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` tokens of a document from position ``first`` on, and the tokens after them."""
        at = int(self.offsets[document]) + first
        tokens = self.tokens[at : at + count + 1]
        return tokens[:-1], tokens[1:]


@sources.register
class PreparedData(Source):
    """Text, bits per byte. Its splits are memory-mapped."""

    Config = DataConfig

    @classmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, say: Callable[[str], None]) -> PreparedData:
        return _prepared(config, vocabulary, cache, say)

    def stream(self, *, context: int, seed: int) -> TrainingStream:
        return TrainingStream(self.train, context=context, seed=seed)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def train(self) -> Documents:
        return self._split("train")

    @cached_property
    def selection(self) -> Documents:  # type: ignore[override]
        return self._split("selection")

    @cached_property
    def report(self) -> Documents:  # type: ignore[override]
        return self._split("report")

    def _split(self, name: str) -> Documents:
        shards = [self.folder / file for file in self.card["splits"][name]["shards"]]
        offsets, byte_counts = (np.load(self.folder / f"{name}.{part}.npy") for part in ("offsets", "bytes"))
        return Documents(Tokens(shards), offsets, byte_counts)


def _prepared(config: DataConfig, vocabulary: int, cache: Path, say: Callable[[str], None]) -> PreparedData:
    corpus = corpora[config.corpus.kind](config.corpus)
    settings = {k: v for k, v in config.plain().items() if k != "corpus"}
    if config.tokenizer_file:
        settings["tokenizer_file"] = _tokenizer_hash(config.tokenizer_file)
    # what has been prepared from this very source is found without reading it again
    stamp = corpus.stamp()
    known = cache / "known" / f"{digest(FORMAT, stamp, config.corpus.plain(), vocabulary, settings)}.json"
    if stamp is not None:
        folder = cache / read_json(known).get("fingerprint", "none")
        if is_whole(folder):
            return PreparedData(folder)
    with locked(cache / f"{known.stem}.lock"):
        temporary = cache / f".{known.stem}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        spool = Spool(temporary / "spool")
        try:
            say("reading the corpus")
            for text in corpus.documents():
                if text.strip():
                    spool.add(text)
            fingerprint = digest(FORMAT, spool.digest, vocabulary, settings)
            folder = cache / fingerprint
            with locked(cache / f"{fingerprint}.lock"):
                if not is_whole(folder):
                    card = _prepare(config, vocabulary, spool, temporary, say)
                    spool.close()
                    (temporary / "spool").unlink()
                    write_card(temporary, card)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(temporary, folder)
        finally:
            spool.close()
            shutil.rmtree(temporary, ignore_errors=True)
        if stamp is not None:
            known.parent.mkdir(exist_ok=True)
            write_json(known, {"fingerprint": fingerprint})
    return PreparedData(folder)


def _prepare(
    config: DataConfig, vocabulary: int, spool: Spool, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write tokenizer and splits. Returns the card."""
    if not spool:
        raise ConfigError.at(
            "data.corpus",
            got="no text at all",
            expected="documents with text in them",
            do="Check the path and the field.",
        )
    clusters: Sequence[int] = range(len(spool))
    if config.near_duplicates:
        say("looking for near-duplicates")
        clusters = near_duplicates(spool)
    splits = split_by_cluster([spool.size(i) for i in range(len(spool))], spool.keys, clusters, config)
    tokenizer = _tokenizer(config, vocabulary, (spool[i] for i in splits["train"]), say)
    tokenizer.save(str(folder / "tokenizer.json"))
    card: dict[str, Any] = {
        "kind": config.kind,
        "corpus": config.corpus.plain(),
        "corpus_hash": spool.digest,
        "vocabulary": vocabulary,
        "documents_read": spool.read,
        "duplicates_dropped": spool.read - len(spool),
        "clusters": len(set(clusters)),
        "splits": {},
    }
    for name in SPLITS:
        say(f"encoding the {name} split")
        members = splits[name] if name == "train" else splits[name][: config.evaluation_documents]
        limit = None if name == "train" else config.evaluation_bytes
        card["splits"][name] = _write_split(name, spool, members, limit, tokenizer, vocabulary, folder, say)
        card["splits"][name]["documents_in_split"] = len(splits[name])
    return card


def _write_split(
    name: str,
    spool: Spool,
    members: Sequence[int],
    limit: int | None,
    tokenizer: Tokenizer,
    vocabulary: int,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Encode documents batch by batch and write them shard by shard. Returns their part of the card."""
    lengths, counts = array("q"), array("q")
    shards: list[str] = []
    waiting: list[np.ndarray] = []
    held = 0
    dtype = np.uint16 if vocabulary <= 2**16 else np.uint32

    def write() -> None:
        if waiting:
            shards.append(f"{name}.tokens.{len(shards):05d}.npy")
            np.save(folder / shards[-1], np.concatenate(waiting))
            waiting.clear()

    for start in range(0, len(members), ENCODED_TOGETHER):
        texts = [spool[i] for i in members[start : start + ENCODED_TOGETHER]]
        pieces = texts if limit is None else [_cut(text, limit) for text in texts]
        ids, sizes = _encode(tokenizer, pieces, ended=[len(p) == len(t) for p, t in zip(pieces, texts)])
        for own in ids:
            if held + len(own) > SHARD_TOKENS:
                write()
                held = 0
            waiting.append(own.astype(dtype))
            held += len(own)
        lengths.extend(len(own) for own in ids)
        counts.extend(sizes)
        if start and start % (64 * ENCODED_TOGETHER) == 0:
            say(f"encoding the {name} split: {start:,} of {len(members):,} documents")
    write()
    np.save(folder / f"{name}.offsets.npy", np.concatenate(([0], np.asarray(lengths, np.int64).cumsum())))
    np.save(folder / f"{name}.bytes.npy", np.asarray(counts, np.int64))
    tokens, total = sum(lengths), sum(counts)
    return {
        "documents": len(lengths),
        "bytes": total,
        "tokens": tokens,
        "shards": shards,
        "bytes_per_token": total / max(1, tokens - len(lengths)),
    }


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """A cluster number for every text: texts that share at least half of the smaller one's long lines are together.

    Our own rule: lines of ``LINE_LENGTH`` characters or more, without their indentation; lines found in more than
    ``COMMON`` texts count for neither side, so the work stays linear.
    """
    lines = [{hash(s) for line in text.splitlines() if len(s := line.strip()) >= LINE_LENGTH} for text in texts]
    seen = Counter(line for own in lines for line in own)
    holders: dict[int, list[int]] = {}
    telling = []
    for index, own in enumerate(lines):
        own = {line for line in own if seen[line] <= COMMON}
        telling.append(len(own))
        for line in own:
            if seen[line] > 1:
                holders.setdefault(line, []).append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in holders.values():
        shared.update((a, b) for i, a in enumerate(indices) for b in indices[i + 1 :])
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for (a, b), count in shared.items():
        if 2 * count >= max(2, min(telling[a], telling[b])):
            parent[root(b)] = root(a)
    return [root(i) for i in range(len(texts))]


def split_by_cluster(
    sizes: Sequence[int], keys: Sequence[bytes], clusters: Sequence[int], config: DataConfig
) -> dict[str, list[int]]:
    """Numbers of documents by split; a cluster is never torn. The order within a split is that of the clusters' least keys.

    Args:
        sizes: bytes of every document. keys: content hashes. clusters: see :func:`near_duplicates`.

    Raises:
        ConfigError: fewer than three clusters.
    """
    members: dict[int, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    if len(members) < 3:
        raise ConfigError.at(
            "data.corpus",
            got=f"{len(sizes)} document(s) in {len(members)} group(s) of near-duplicates",
            expected="at least 3 different documents, one for each of train, selection and report",
            do="Give more files, or cut the file into documents (JSONL, one a line).",
        )
    groups = sorted(members.values(), key=lambda group: min(keys[i] for i in group))
    weights = [sum(sizes[i] for i in group) for group in groups]
    total = sum(weights)
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    left = list(range(len(groups)))
    for name, fraction in (("report", config.report_fraction), ("selection", config.selection_fraction)):
        size = 0
        taken: set[int] = set()
        keep = 2 if name == "report" else 1  # groups that must be left for the other splits
        for group in left:
            if size >= fraction * total or len(left) - len(taken) <= keep:
                break
            # a group that would fill the split several times over goes to training, unless nothing else is left
            if size + weights[group] <= 2 * fraction * total:
                taken.add(group)
                size += weights[group]
        taken = taken or {min(left, key=lambda group: weights[group])}
        splits[name] = [index for group in left if group in taken for index in groups[group]]
        left = [group for group in left if group not in taken]
    splits["train"] = [index for group in left for index in groups[group]]
    return splits


def _tokenizer_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError.at(
            "data.tokenizer_file", got=f"{path} ({error.strerror})", expected="a tokenizer's JSON file"
        ) from None


def _tokenizer(config: DataConfig, vocabulary: int, texts: Iterable[str], say: Callable[[str], None]) -> Tokenizer:
    if config.tokenizer_file:
        try:
            tokenizer = Tokenizer.from_file(config.tokenizer_file)
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError.at(
                "data.tokenizer_file",
                got=f"{config.tokenizer_file}: {error}",
                expected="JSON that the `tokenizers` library wrote",
            ) from None
        tokenizer.add_special_tokens([DOCUMENT_SYMBOL])
        size = tokenizer.get_vocab_size()
        if size > vocabulary:
            raise ConfigError.at(
                "model.vocabulary",
                got=vocabulary,
                expected=f"at least the tokenizer's {size} ids",
                do=f"Set model.vocabulary={size} or more.",
            )
        return tokenizer
    if vocabulary < 257:
        raise ConfigError.at(
            "model.vocabulary", got=vocabulary, expected="at least 257: every byte and one document symbol"
        )
    say(f"training a byte-level BPE tokenizer of {vocabulary} ids")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[DOCUMENT_SYMBOL],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sample, left = [], config.tokenizer_bytes
    for text in texts:
        if left <= 0:
            break
        sample.append(text[:left])
        left -= len(text)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer  # a small corpus fills fewer ids; the rest of the vocabulary stays unused


def _encode(tokenizer: Tokenizer, texts: Sequence[str], ended: Sequence[bool]) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of every text between document symbols (the last only where the text ended), and its bytes."""
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    tokenizer.encode_special_tokens = True  # the symbol written out in a text is text
    ids, counts = [], []
    for text, whole, encoding in zip(texts, ended, tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)):
        ids.append(np.array([symbol, *encoding.ids, *([symbol] if whole else [])], dtype=np.int64))
        counts.append(len(text.encode()))
    return ids, counts


def _cut(text: str, limit: int) -> str:
    """The longest beginning of ``text`` of at most ``limit`` bytes of UTF-8."""
    data = text.encode()
    return text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
