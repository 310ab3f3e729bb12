"""Where text comes from, one file per corpus. A document is the unit of splitting and of evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from workbench.config import Config
from workbench.registry import Registry

__all__ = ["BYTE_ORDER_MARK", "Corpus", "CorpusConfig", "corpora", "decoded"]


class CorpusConfig(Config):
    """Base of a corpus's configuration. ``kind`` is the registered name."""

    kind: str


class Corpus(ABC):
    """A source of documents. Built as ``cls(config)``."""

    Config: ClassVar[type[CorpusConfig]]

    def __init__(self, config: Any):
        self.config = config

    def stamp(self) -> str | None:
        """A string that changes whenever the documents may have changed, cheap to compute; None if there is none."""
        return None

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Every document, in an order that depends on the source alone.

        Raises:
            ConfigError: nothing to read, or it cannot be read.
        """


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def decoded(data: bytes) -> str:
    """Text of a file: UTF-8 without a byte-order mark; line endings are not translated.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return data.removeprefix(BYTE_ORDER_MARK).decode()


corpora: Registry[type[Corpus]] = Registry("corpus", "workbench.data.corpora")
