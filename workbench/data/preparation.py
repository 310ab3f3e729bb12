"""From a corpus to token arrays on disk, once: deduplicate, split by document, train a tokenizer, encode.

What is prepared is named by a fingerprint of the text and the settings. Processes that prepare the same thing at the
same time wait for each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.config import ConfigError
from workbench.data.config import DataConfig
from workbench.data.corpora import corpora
from workbench.files import locked

SPLITS = ("train", "selection", "report")
DOCUMENT_SYMBOL = "<|document|>"
"""Stands before and after every document; token id 0."""
FORMAT = 1
"""Part of the fingerprint; raised when the files or the rules change."""
LINE_LENGTH = 20
"""Shorter lines say nothing about where a text comes from."""
COMMON = 50
"""Lines in more documents than this are boilerplate and connect nothing; bounds the work."""


@dataclass(frozen=True)
class Documents:
    """Tokenized documents of one split."""

    tokens: np.ndarray
    """Flat token ids; document d is ``tokens[offsets[d]:offsets[d+1]]``, the document symbol first."""
    offsets: np.ndarray
    """(documents + 1,) int64."""
    byte_counts: np.ndarray
    """(documents,) int64: bytes of UTF-8 text behind each document's targets."""

    def __len__(self) -> int:
        return len(self.byte_counts)


class PreparedData:
    """Prepared splits, memory-mapped. Made by :func:`prepare` or, without reading the corpus again, :meth:`open`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fingerprint = folder.name
        self.card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))

    @classmethod
    def open(cls, cache: str | Path, fingerprint: str) -> PreparedData:
        """Raises ConfigError when it is not there."""
        folder = Path(cache) / fingerprint
        if not _is_whole(folder):
            raise ConfigError.at("data", got=f"no prepared data {fingerprint} in {cache}", expected="data prepared before",
                                 do="Start the ablation again; it prepares the data.")  # fmt: skip
        return cls(folder)

    @property
    def vocabulary(self) -> int:
        return self.card["vocabulary"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def train(self) -> Documents:
        return self._split("train")

    @cached_property
    def selection(self) -> Documents:
        return self._split("selection")

    @cached_property
    def report(self) -> Documents:
        return self._split("report")

    def _split(self, name: str) -> Documents:
        tokens, offsets, byte_counts = (
            np.load(self.folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "offsets", "bytes")
        )
        return Documents(tokens, np.asarray(offsets), np.asarray(byte_counts))


def prepare(
    config: DataConfig, vocabulary: int, cache: str | Path, progress: Callable[[str], None] | None = None
) -> PreparedData:
    """Prepare, or find as prepared before, the data of ``config`` for a model with ``vocabulary`` token ids.

    Raises:
        ConfigError: an empty corpus, fewer than three different documents, or a vocabulary that does not fit.
    """
    say = progress or (lambda line: None)
    say("reading the corpus")
    raw = [_encodable(text) for text in corpora[config.corpus.kind](config.corpus).documents() if text.strip()]
    digest = hashlib.sha256()
    for text in raw:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    settings = {k: v for k, v in config.plain().items() if k != "corpus"}
    if config.tokenizer_file:
        settings["tokenizer_file"] = _tokenizer_hash(config.tokenizer_file)
    key = json.dumps([FORMAT, digest.hexdigest(), vocabulary, settings], sort_keys=True)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = Path(cache) / fingerprint
    with locked(Path(cache) / f"{fingerprint}.lock"):
        if not _is_whole(folder):
            temporary = folder.with_name(f".{fingerprint}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                _prepare(config, vocabulary, raw, digest.hexdigest(), temporary, say)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return PreparedData(folder)


def _prepare(
    config: DataConfig, vocabulary: int, raw: list[str], corpus_hash: str, folder: Path, say: Callable[[str], None]
) -> None:
    if not raw:
        raise ConfigError.at("data.corpus", got="no text at all", expected="documents with text in them",
                             do="Check the path and the field.")  # fmt: skip
    say("removing duplicates")
    texts = list(
        {
            hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest(): text for text in raw
        }.values()
    )
    clusters = near_duplicates(texts)
    splits = split_by_cluster(texts, clusters, config)
    tokenizer = _tokenizer(config, vocabulary, splits["train"], say)
    tokenizer.save(str(folder / "tokenizer.json"))
    card: dict[str, Any] = {
        "corpus": config.corpus.plain(), "corpus_hash": corpus_hash, "vocabulary": vocabulary,
        "documents_read": len(raw), "duplicates_dropped": len(raw) - len(texts), "clusters": len(set(clusters)), "splits": {},
    }  # fmt: skip
    sizes = {}
    for name in SPLITS:
        say(f"encoding the {name} split")
        measured = name != "train"
        documents = splits[name][: config.evaluation_documents] if measured else splits[name]
        pieces = [_cut(text, config.evaluation_bytes) if measured else text for text in documents]
        ids, counts = _encode(tokenizer, pieces, ended=[len(p) == len(t) for p, t in zip(pieces, documents)])
        lengths = np.array([len(i) for i in ids], dtype=np.int64)
        arrays = {
            "tokens": np.concatenate(ids).astype(np.uint16 if vocabulary <= 2**16 else np.uint32),
            "offsets": np.concatenate(([0], lengths.cumsum())),
            "bytes": np.array(counts, dtype=np.int64),
        }
        for part, array in arrays.items():
            np.save(folder / f"{name}.{part}.npy", array)
            sizes[f"{name}.{part}.npy"] = (folder / f"{name}.{part}.npy").stat().st_size
        total = int(arrays["bytes"].sum())
        card["splits"][name] = {"documents": len(ids), "documents_in_split": len(splits[name]), "bytes": total,
                                "tokens": int(lengths.sum()), "bytes_per_token": total / max(1, int(lengths.sum() - len(ids)))}  # fmt: skip
    sizes["tokenizer.json"] = (folder / "tokenizer.json").stat().st_size
    card["files"] = sizes
    (folder / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether a prepared folder is there with every file at its full size."""
    try:
        files = json.loads((folder / "card.json").read_text(encoding="utf-8"))["files"]
        return "tokenizer.json" in files and all((folder / n).stat().st_size == size for n, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


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


def split_by_cluster(texts: Sequence[str], clusters: Sequence[int], config: DataConfig) -> dict[str, list[str]]:
    """Texts by split; a cluster is never torn. The order within a split is that of the clusters' content hashes.

    Raises:
        ConfigError: fewer than three clusters.
    """
    members: dict[int, list[str]] = {}
    for text, cluster in zip(texts, clusters):
        members.setdefault(cluster, []).append(text)
    if len(members) < 3:
        raise ConfigError.at("data.corpus", got=f"{len(texts)} document(s) in {len(members)} group(s) of near-duplicates",
                             expected="at least 3 different documents, one for each of train, selection and report",
                             do="Give more files, or cut the file into documents (JSONL, one a line).")  # fmt: skip

    def key(group: list[str]) -> bytes:
        return min(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in group)

    groups = sorted(members.values(), key=key)
    total = sum(len(text) for text in texts)
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    queue = list(groups)
    for name, fraction in (("report", config.report_fraction), ("selection", config.selection_fraction)):
        size = 0
        # a group that would fill the split several times over goes to training, unless nothing else is left
        while len(queue) > (2 if name == "report" else 1) and size < fraction * total:
            fitting = [g for g in queue if size + sum(map(len, g)) <= 2 * fraction * total]
            if not fitting and splits[name]:
                break
            group = fitting[0] if fitting else min(queue, key=lambda g: sum(map(len, g)))
            queue.remove(group)
            splits[name] += group
            size += sum(map(len, group))
    splits["train"] = [text for group in queue for text in group]
    return splits


def _tokenizer_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError.at("data.tokenizer_file", got=f"{path} ({error.strerror})", expected="a tokenizer's JSON file") from None  # fmt: skip


def _tokenizer(config: DataConfig, vocabulary: int, texts: Iterable[str], say: Callable[[str], None]) -> Tokenizer:
    if config.tokenizer_file:
        try:
            tokenizer = Tokenizer.from_file(config.tokenizer_file)
        except Exception as error:  # the library raises nothing more precise
            raise ConfigError.at("data.tokenizer_file", got=f"{config.tokenizer_file}: {error}",
                                 expected="JSON that the `tokenizers` library wrote") from None  # fmt: skip
        tokenizer.add_special_tokens([DOCUMENT_SYMBOL])
        size = tokenizer.get_vocab_size()
        if size > vocabulary:
            raise ConfigError.at("model.vocabulary", got=vocabulary, expected=f"at least the tokenizer's {size} ids",
                                 do=f"Set model.vocabulary={size} or more.")  # fmt: skip
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
        vocab_size=vocabulary, special_tokens=[DOCUMENT_SYMBOL], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
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
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        for offset, encoding in enumerate(tokenizer.encode_batch_fast(list(part), add_special_tokens=False)):
            tail = [symbol] if ended[start + offset] else []
            ids.append(np.array([symbol, *encoding.ids, *tail], dtype=np.int64))
            counts.append(len(part[offset].encode("utf-8", "surrogatepass")))
    return ids, counts


def _encodable(text: str) -> str:
    """``text`` with half surrogates, which JSON can write and UTF-8 cannot, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _cut(text: str, limit: int) -> str:
    """The longest beginning of ``text`` of at most ``limit`` bytes of UTF-8."""
    data = text.encode("utf-8", "surrogatepass")
    return text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
