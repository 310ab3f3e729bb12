"""From a corpus to token arrays on disk, once: deduplicate, split by document, train a tokenizer, encode.

Prepared data is named by a fingerprint of the text and the settings. Processes that prepare the same data at the same
time wait for each other.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from workbench.config import require
from workbench.data import tokenizer as tokenizers
from workbench.data.config import DataConfig
from workbench.data.corpora import Corpus, corpora
from workbench.data.dedup import near_duplicates
from workbench.data.disk_strings import DiskStrings
from workbench.data.overlap import overlap
from workbench.data.shards import ShardWriter
from workbench.data.sources import content_digest, digest, is_complete, is_intact, write_card
from workbench.data.splits import MEASURED, SPLITS, Assignment, MeasuredSplit, SplitName, split_by_cluster
from workbench.files import locked, read_json, replacing_folder, write_json

FORMAT = 8
"""Part of the fingerprint; raised when the files or the rules change."""
REASONS = ("allow_overlap", "allow_lossy")
"""Fields that change how the data may be used, not the data."""
ENCODED_TOGETHER = 2**20
"""Bytes of text encoded in one call, by the tokenizer's threads; its result takes about fifty times as much memory."""
PROGRESS_EVERY = 2**14
"""Documents encoded from one line of progress to the next."""


def prepare_text(config: DataConfig, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> Path:
    """Prepare a corpus, unless it has been prepared before.

    Args:
        config: corpus, splits and tokenizer.
        vocabulary: token ids of the model.
        cache: existing folder of prepared data.
        progress: called with a line per phase.

    Returns:
        The folder, named by the fingerprint.

    Raises:
        ConfigError: nothing to read, too few documents for the splits, or a vocabulary that does not fit.
    """
    corpus = corpora[config.corpus.kind](config.corpus)
    stamp, settings = corpus.stamp(), _settings(config)
    known = _known(config, vocabulary, cache, stamp, settings)
    if is_intact(found := _known_folder(known, cache)):
        return found
    with locked(cache / f"{known.stem}.lock"), DiskStrings(cache / f".{known.stem}.texts") as texts:
        progress("reading the corpus")
        empty = _read(corpus, texts)
        fingerprint = digest(FORMAT, texts.digest, vocabulary, settings)
        folder = cache / fingerprint
        with locked(cache / f"{fingerprint}.lock"):
            if not is_intact(folder):
                with replacing_folder(folder) as scratch:
                    write_card(scratch, _write(config, vocabulary, texts, empty, scratch, progress))
        if stamp is not None:
            known.parent.mkdir(exist_ok=True)
            write_json(known, {"fingerprint": fingerprint})
    return folder


def find_text(config: DataConfig, vocabulary: int, cache: Path) -> Path | None:
    """The folder of :func:`prepare_text` if the corpus has been prepared and is unchanged, without reading it."""
    stamp = corpora[config.corpus.kind](config.corpus).stamp()
    folder = _known_folder(_known(config, vocabulary, cache, stamp, _settings(config)), cache)
    return folder if is_complete(folder) else None


def _settings(config: DataConfig) -> dict[str, Any]:
    """What the prepared data depend on beside the text and the vocabulary."""
    settings = {name: value for name, value in config.plain().items() if name not in ("corpus", *REASONS)}
    if config.tokenizer_file:
        settings["tokenizer_file"] = tokenizers.file_hash(config.tokenizer_file)
    return settings


def _known(config: DataConfig, vocabulary: int, cache: Path, stamp: str | None, settings: Mapping[str, Any]) -> Path:
    """File with the fingerprint of an unchanged source, which its stamp identifies without reading it again."""
    return cache / "known" / f"{digest(FORMAT, stamp, config.corpus.plain(), vocabulary, settings)}.json"


def _known_folder(known: Path, cache: Path) -> Path:
    """The folder that the file ``known`` names; without such a file, one that does not exist."""
    return cache / str(read_json(known).get("fingerprint", "none"))


def _read(corpus: Corpus, texts: DiskStrings) -> int:
    """Store the documents of a corpus. Returns the number of those without text, which are left out."""
    empty = 0
    for text in corpus.documents():
        if text.strip():
            texts.add(text)
        else:
            empty += 1
    require(
        len(texts),
        "data.corpus",
        got="no text at all",
        expected="documents with text in them",
        do="Check the path and the field.",
    )
    return empty


def _write(
    config: DataConfig,
    vocabulary: int,
    texts: DiskStrings,
    empty: int,
    folder: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Write tokenizer and splits. Returns the card. ``empty`` documents were left out."""
    progress("looking for near-duplicates")
    clusters = near_duplicates(texts)
    fractions: dict[MeasuredSplit, float] = {
        "selection": config.selection_fraction,
        "report": config.report_fraction,
        "pilot": config.report_fraction,
    }
    most: dict[MeasuredSplit, int] = {
        "selection": min(config.selection_documents, config.evaluation_documents),
        "report": config.evaluation_documents,
        "pilot": config.evaluation_documents,
    }
    splits = split_by_cluster(texts.sizes, texts.keys, clusters, fractions, most)
    progress("comparing the measured text with the training text")
    shares, containing = _overlap(config, texts, splits)
    members = {**splits.documents, "train": [i for i in splits.documents["train"] if i not in containing]}
    tokenizer = _tokenizer(config, vocabulary, texts, members["train"], progress)
    tokenizer.save(str(folder / "tokenizer.json"))
    card: dict[str, Any] = {
        "kind": config.kind,
        "corpus": config.corpus.plain(),
        "corpus_hash": texts.digest,
        "vocabulary": vocabulary,
        "documents_read": texts.added,
        "empty_dropped": empty,
        "duplicates_dropped": texts.added - len(texts),
        "clusters": len(np.unique(clusters)),
        "near_duplicates_dropped": len(splits.unused),
        "containing_dropped": len(containing),
        "splits": {},
    }
    for name in SPLITS:
        progress(f"encoding the {name} split")
        max_bytes = None if name == "train" else config.evaluation_bytes
        if name != "train":
            digests = [content_digest(b" ".join(texts[i].encode().split())) for i in members[name]]
            np.save(folder / f"{name}.digests.npy", np.array(digests))
        writer = ShardWriter(folder, name, vocabulary)
        part = _write_split(texts, members[name], max_bytes, tokenizer, writer, progress)
        clusters_D = splits.clusters[members[name]]
        np.save(folder / f"{name}.clusters.npy", clusters_D)
        card["splits"][name] = {**part, "clusters": len(np.unique(clusters_D)), **shares.get(name, {})}
    return card


def _overlap(
    config: DataConfig, texts: DiskStrings, splits: Assignment
) -> tuple[dict[SplitName, dict[str, Any]], set[int]]:
    """Entries of the card per measured split, and the training documents that contain a measured one."""
    train = splits.documents["train"]
    measured = [tokenizers.cut(texts[i], config.evaluation_bytes) for name in MEASURED for i in splits.documents[name]]
    found = overlap(measured, _Members(texts, train))
    entries: dict[SplitName, dict[str, Any]] = {}
    first = 0
    for name in MEASURED:
        span = slice(first, first + len(splits.documents[name]))
        seen_D, shingles_D = found.seen_M[span], found.shingles_M[span]
        entries[name] = {
            "overlap": round(float(seen_D.sum() / max(1, shingles_D.sum())), 6),
            "documents_mostly_seen": int((2 * seen_D > shingles_D).sum()),
        }
        first = span.stop
    return entries, {train[i] for i in found.containing}


class _Members(Sequence[str]):
    """Some of the texts."""

    def __init__(self, texts: DiskStrings, members: Sequence[int]):
        self._texts, self._members = texts, members

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[self._members[index]]


def _tokenizer(
    config: DataConfig,
    vocabulary: int,
    texts: DiskStrings,
    members: Sequence[int],
    progress: Callable[[str], None],
) -> Tokenizer:
    if config.tokenizer_file:
        return tokenizers.load(config.tokenizer_file, vocabulary)
    tokenizers.check_vocabulary(vocabulary)
    progress(f"training a byte-level BPE tokenizer of {vocabulary} ids")
    return tokenizers.train((texts[i] for i in members), vocabulary, config.tokenizer_bytes)


def _batches(texts: DiskStrings, members: Sequence[int]) -> Iterator[list[str]]:
    """The texts of ``members``, in order, in batches of about :data:`ENCODED_TOGETHER`."""
    batch: list[str] = []
    total = 0
    for member in members:
        batch.append(texts[member])
        total += len(batch[-1])
        if total >= ENCODED_TOGETHER:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _write_split(
    texts: DiskStrings,
    members: Sequence[int],
    max_bytes: int | None,
    tokenizer: Tokenizer,
    writer: ShardWriter,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Encode documents and write them shard by shard. Returns their part of the card."""
    lengths, sizes = array("q"), array("q")
    outcomes: Counter[tokenizers.RoundTrip] = Counter()
    for together in _batches(texts, members):
        for document, text in zip(tokenizers.encode(tokenizer, together, max_bytes), together):
            writer.add(document.ids)
            lengths.append(len(document.ids))
            sizes.append(document.size)
            if max_bytes is not None:  # measured: bits per byte assume that the ids hold the whole text
                outcomes[tokenizers.round_trip(tokenizer, document, text)] += 1
        if len(lengths) // PROGRESS_EVERY > (len(lengths) - len(together)) // PROGRESS_EVERY:
            progress(f"encoding the {writer.name} split: {len(lengths):,} of {len(members):,} documents")
    writer.flush()
    offsets = np.concatenate(([0], np.asarray(lengths, np.int64).cumsum()))
    np.save(writer.folder / f"{writer.name}.offsets.npy", offsets)
    np.save(writer.folder / f"{writer.name}.bytes.npy", np.asarray(sizes, np.int64))
    tokens, total = sum(lengths), sum(sizes)
    return {
        "documents": len(lengths),
        "bytes": total,
        "tokens": tokens,
        "shards": writer.files,
        "bytes_per_token": total / max(1, tokens - len(lengths)),
        **({} if max_bytes is None else _losses(outcomes)),
    }


def _losses(outcomes: Counter[tokenizers.RoundTrip]) -> dict[str, int]:
    """Measured documents that do not decode to their text, as entries of the card."""
    spaces = outcomes[tokenizers.RoundTrip.SPACE]
    return {"lossy_documents": outcomes[tokenizers.RoundTrip.LOSSY], **({"space_documents": spaces} if spaces else {})}
