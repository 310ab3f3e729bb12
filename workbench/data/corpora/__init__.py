"""Where text comes from, one file a corpus. A document is the unit of splitting and of measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from workbench.config import Config
from workbench.registry import Registry


class CorpusConfig(Config):
    """Base of a corpus's configuration. ``kind`` is the registered name."""

    kind: str


class Corpus(ABC):
    """A source of documents. Built as ``cls(config)``."""

    Config: ClassVar[type[CorpusConfig]]

    def __init__(self, config: Any):
        self.config = config

    def stamp(self) -> str | None:
        """Something quickly found that changes whenever the documents may have changed; None where there is nothing."""
        return None

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Every document, in an order that depends on the source alone.

        Raises:
            ConfigError: when there is nothing to read, or it cannot be read.
        """


corpora: Registry[type[Corpus]] = Registry("corpus", "workbench.data.corpora")

__all__ = ["Corpus", "CorpusConfig", "corpora"]
