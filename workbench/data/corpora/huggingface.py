"""A data set of the Hugging Face hub by name, streamed; needs the optional library ``datasets``."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from workbench.config import ConfigError, nearest, require
from workbench.data.corpora import Corpus, CorpusConfig, corpora
from workbench.distribution import install_extra


@corpora.register
class HuggingFace(Corpus):
    """The first documents of a streamed data set."""

    class Config(CorpusConfig):
        """A data set of the Hugging Face hub."""

        kind: Literal["huggingface"] = "huggingface"
        name: str
        """Name of the data set: owner/name."""
        subset: str | None = None
        """Configuration of the data set, if it has several."""
        revision: str | None = None
        """Commit of the data set. With one, prepared data is found again without asking the hub."""
        split: str = "train"
        """Split to read."""
        field: str = "text"
        """Column with the text."""
        documents: Annotated[int, Field(ge=1)] = 20_000
        """Number of documents, from the first on."""

    def stamp(self) -> str | None:
        return self.config.identity if self.config.revision else None

    def documents(self) -> Iterator[str]:
        config = self.config
        require(
            not Path(config.name).exists(),
            "data.corpus.name",
            got=f"{config.name}, which is also a path here",
            expected="a data set of the hub: the library would read the path",
            do="Use corpus 'files' for the path, or start from another folder.",
        )
        try:
            import datasets
            from huggingface_hub import constants
        except ImportError:
            raise ConfigError.at(
                "data.corpus",
                got="huggingface",
                expected="the library `datasets`",
                do=f"Install it: {install_extra('hub')}; or use corpus 'files'.",
            ) from None
        self._check_network(constants.ENDPOINT)
        try:
            stream = datasets.load_dataset(
                config.name, config.subset, split=config.split, revision=config.revision, streaming=True
            )
            for number, row in enumerate(islice(stream, config.documents), start=1):
                text = row.get(config.field, 0)
                require(
                    text is None or isinstance(text, str),
                    "data.corpus.field",
                    got=f"{config.field!r}, which row {number} does not have as text",
                    expected="a column with text",
                    do=nearest(config.field, [name for name in row if name != config.field]),
                )
                yield text or ""  # a null is an empty document
        except ConfigError:
            raise
        except Exception as error:  # the library passes on what the network, the hub and its file formats raise
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise ConfigError.at(
                "data.corpus.name", got=f"{config.name} ({reason})", expected="a data set that the hub can stream"
            ) from None

    def _check_network(self, endpoint: str) -> None:
        """Fail at once without a network; the library would retry for most of a minute."""
        address = urlsplit(endpoint)
        try:
            if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON"):
                raise OSError("HF_HUB_OFFLINE is set")
            socket.create_connection((address.hostname or "", address.port or 443), timeout=4).close()
        except OSError as error:
            raise ConfigError.at(
                "data.corpus.name",
                got=f"{self.config.name}, but the hub cannot be reached ({error})",
                expected="a network connection",
                do="Use corpus 'files' or 'stdlib', which need none.",
            ) from None
