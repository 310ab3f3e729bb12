"""Data sources: what a run is trained and measured on. Text is one; each synthetic task is one.

A source is prepared once into a folder of the cache. Prepared, it gives endless training rows and two splits to measure
on: selection, which tuning looks at, and report, which only confirmation runs open.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from workbench.config import Config, ConfigError
from workbench.data.streams import RowStream, Split
from workbench.metric import Metric
from workbench.registry import Registry

__all__ = ["Source", "SourceConfig", "prepare", "sources"]


class SourceConfig(Config):
    """Base of a data source's configuration. ``kind`` is the registered name."""

    kind: str
    views: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Figures of :mod:`workbench.dashboards` that show the measured documents by their labels: name -> label columns."""

    @property
    def metric(self) -> Metric:
        """What models are judged by on this source."""
        raise NotImplementedError(f"{type(self).__name__} tells no metric")

    def check(self, vocabulary: int, context: int) -> None:
        """Raise ConfigError, paths relative to this configuration, where it fits no model of so many token ids or no
        row of ``context`` tokens."""

    def target_share(self, context: int) -> float:
        """Share of the positions of a training row that have a target (for estimates of time)."""
        return 1.0


class Source(ABC):
    """A prepared data source, built as ``cls(folder)``."""

    Config: ClassVar[type[SourceConfig]]
    tokenizer: Any = None
    """Between text and token ids; None where there is no text."""
    selection: Split
    report: Split

    def __init__(self, folder: Path):
        self.folder = folder
        self.fingerprint = folder.name
        self.card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, say: Callable[[str], None]) -> Source:
        """Prepare, or find as prepared before, the data of ``config`` for a model with ``vocabulary`` token ids, in the
        folder ``cache``, which is there."""

    @staticmethod
    def open(cache: str | Path, fingerprint: str) -> Any:
        """Prepared data, of whatever kind, without preparing it again. Raises ConfigError when it, or what it is made of, is
        not there."""
        folder = Path(cache) / fingerprint
        if not is_whole(folder):
            raise ConfigError.at(
                "data",
                got=f"no prepared data {fingerprint} in {cache}",
                expected="data prepared before",
                do="Start the ablation again; it prepares the data.",
            )
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        for material in card.get("material", {}).values():
            Source.open(cache, material)
        return sources[card["kind"]](folder)

    @property
    def vocabulary(self) -> int:
        return self.card["vocabulary"]

    @abstractmethod
    def stream(self, *, context: int, seed: int) -> RowStream:
        """Endless training rows."""


sources: Registry[type[Source]] = Registry("data source", "workbench.data.tasks")


def prepare(
    config: SourceConfig, vocabulary: int, cache: str | Path, progress: Callable[[str], None] | None = None
) -> Any:
    """Prepare, or find as prepared before, the data of ``config`` for a model with ``vocabulary`` token ids.

    Raises:
        ConfigError: nothing to read, nothing left for a split, or a vocabulary that does not fit.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    return sources[config.kind].prepare(config, vocabulary, cache, progress or (lambda line: None))


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that name plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_whole(folder: Path) -> bool:
    """Whether a prepared folder is there with every file at its full size."""
    try:
        files = json.loads((folder / "card.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json`` with the sizes of the files beside it; last, since :func:`is_whole` goes by it."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != "card.json"}
    (folder / "card.json").write_text(json.dumps({**card, "files": files}, indent=1), encoding="utf-8")
