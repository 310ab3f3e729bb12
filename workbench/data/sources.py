"""Data sources: what a run is trained and evaluated on. Text is one; each synthetic task is one.

A source is prepared once, into a folder of the cache. It then yields endless training rows and three splits to evaluate
on: selection, which tuning looks at; report, which only confirmation runs open; and pilot, drawn by the same rule as
report, on which pilots measure the noise.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from workbench.config import Config, require
from workbench.data.streams import RowStream, Split
from workbench.files import checksum, read_json, write_json
from workbench.metric import Metric
from workbench.registry import Registry

__all__ = ["Source", "SourceConfig", "prepare", "sources"]


class SourceConfig(Config):
    """Base of a data source's configuration. ``kind`` is the registered name."""

    kind: str
    allow_overlap: str | None = None
    """Reason to measure on data most of which is also in the training data. Such a verdict is exploratory; without a
    reason the ablation is refused."""
    allow_lossy: str | None = None
    """Reason to measure bits per byte with a tokenizer whose ids do not decode to the measured text. Such a verdict is
    exploratory; without a reason the ablation is refused."""
    readout: ClassVar[str | None] = None
    """The readout (``model.readout``) of models that are trained on this source."""
    views: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Dashboard panels that show the evaluated documents by their labels: panel -> label columns. Evaluation adds a row
    for every combination of these labels."""

    @property
    def metric(self) -> Metric:
        """The primary metric of models on this source."""
        raise NotImplementedError(f"{type(self).__name__} defines no metric")

    @property
    def judged(self) -> SourceConfig:
        """What runs are judged on: this source, or a part of it."""
        return self

    measured_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide what is measured and leave the training rows as they are."""

    def check(self, vocabulary: int, context: int) -> None:
        """Check that the source fits a model of ``vocabulary`` token ids and rows of ``context`` tokens.

        Raises:
            ConfigError: if it does not, with paths relative to this configuration.
        """

    def target_share(self, context: int) -> float:
        """Fraction of the positions of a training row that have a target (to estimate time)."""
        return 1.0


class Source(ABC):
    """A prepared data source, built as ``cls(folder)``."""

    Config: ClassVar[type[SourceConfig]]
    tokenizer: Any = None
    """Between text and token ids; None without text."""
    selection: Split
    report: Split
    pilot: Split

    def __init__(self, folder: Path):
        self.folder = folder
        self.fingerprint = folder.name
        self.card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> Source:
        """Prepare the data, unless it has been prepared before.

        Args:
            config: an instance of ``cls.Config``.
            vocabulary: token ids of the model.
            cache: existing folder of prepared data.
            progress: called with a line per phase.
        """

    @classmethod
    def find(cls, config: Any, vocabulary: int, cache: Path) -> Source | None:
        """The data, if they have been prepared and can be recognised without reading their material. Default: None.

        Arguments as of :meth:`prepare`.
        """
        return None

    @staticmethod
    def open(cache: str | Path, fingerprint: str, *, thorough: bool = False) -> Any:
        """Prepared data of any kind, without preparing it again.

        Args:
            cache: folder of prepared data.
            fingerprint: of the data.
            thorough: whether the content of the training tokens is verified too, at about a second per gigabyte;
                that of all other files always is.

        Raises:
            ConfigError: if it, or other data that it is made of, is missing, incomplete or damaged.
        """
        folder = Path(cache) / fingerprint
        require(
            is_complete(folder),
            "data",
            got=f"no prepared data {fingerprint} in {cache}",
            expected="data prepared before",
            do="Start the ablation again; it prepares the data.",
        )
        damaged = damaged_files(folder, thorough=thorough)
        require(
            not damaged,
            "data",
            got=f"damaged prepared data: {', '.join(damaged)} in {folder}",
            expected="files as they were written",
            do="Start the ablation again; it prepares the data.",
        )
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        for material in card.get("material", {}).values():
            Source.open(cache, material, thorough=thorough)
        return sources[card["kind"]](folder)

    @property
    def vocabulary(self) -> int:
        return self.card["vocabulary"]

    @property
    def judged(self) -> Source:
        """What runs are judged on: this source, or a part of it."""
        return self

    def digests(self, split: str) -> list[str]:
        """Content hashes of the documents of a measured split, in order: equal documents have equal ones, however the
        data were prepared. Here the hash of a document's tokens and targets."""
        documents: Split = getattr(self, split)
        pieces = (documents.piece(index, 0, int(length)) for index, length in enumerate(documents.lengths))
        return [content_digest(*(np.asarray(part, np.int64).tobytes() for part in piece)) for piece in pieces]

    @abstractmethod
    def stream(self, *, context: int, seed: int, buckets: Sequence[int] = ()) -> RowStream:
        """Endless training rows.

        Args:
            context: tokens of a row.
            seed: seed of the order, or of the examples.
            buckets: with these lengths, rising to ``context``, every row has one document (or example), padded to the
                smallest that it fits in.
        """


sources: Registry[type[Source]] = Registry("data source", "workbench.data.tasks")


def prepare(
    config: SourceConfig, vocabulary: int, cache: str | Path, progress: Callable[[str], None] | None = None
) -> Any:
    """Prepare a data source, unless it has been prepared before.

    Args:
        config: the source.
        vocabulary: token ids of the model.
        cache: folder of prepared data; created if missing.
        progress: called with a line per phase.

    Returns:
        The :class:`Source`.

    Raises:
        ConfigError: nothing to read, nothing left for a split, or a vocabulary that does not fit.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    return sources[config.kind].prepare(config, vocabulary, cache, progress or (lambda line: None))


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that identify plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def content_digest(*parts: bytes) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds prepared data, every file at its full size."""
    files = read_json(folder / "card.json").get("files")
    try:
        return isinstance(files, dict) and all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def damaged_files(folder: Path, *, thorough: bool) -> list[str]:
    """Files of prepared data whose content is not what was written.

    Args:
        folder: with a card; that of an earlier version has no checksums.
        thorough: whether the training tokens are read too.
    """
    checksums = read_json(folder / "card.json").get("checksums", {})
    names = [name for name in checksums if thorough or not name.startswith("train.tokens.")]
    return [name for name in names if checksum(folder / name) != checksums[name]]


def is_intact(folder: Path) -> bool:
    """Whether ``folder`` holds prepared data, every file with the content that was written."""
    return is_complete(folder) and not damaged_files(folder, thorough=True)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` with sizes and checksums of all other files. Called last: :func:`is_complete` relies on
    it."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "card.json"]
    sizes = {path.name: path.stat().st_size for path in paths}
    write_json(
        folder / "card.json", {**card, "files": sizes, "checksums": {path.name: checksum(path) for path in paths}}
    )
