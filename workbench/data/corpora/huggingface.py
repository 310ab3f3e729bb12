"""A data set of the Hugging Face hub by name, streamed; needs the optional library ``datasets``."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from workbench.config import ConfigError, nearest
from workbench.data.corpora import Corpus, CorpusConfig, corpora


@corpora.register
class HuggingFace(Corpus):
    """The first documents of a streamed data set."""

    class Config(CorpusConfig):
        """A data set of the Hugging Face hub."""

        kind: Literal["huggingface"] = "huggingface"
        name: str
        """Name of the data set: owner/name."""
        subset: str | None = None
        """Configuration of the data set, where it has several."""
        revision: str | None = None
        """Commit of the data set; with one, what has been prepared is found again without asking the hub."""
        split: str = "train"
        """Split to read."""
        field: str = "text"
        """Column that holds the text."""
        documents: Annotated[int, Field(ge=1)] = 20_000
        """How many documents to take, from the first."""

    def stamp(self) -> str | None:
        return self.config.identity if self.config.revision else None

    def documents(self) -> Iterator[str]:
        config = self.config
        try:
            import datasets
            from huggingface_hub import constants
        except ImportError:
            raise ConfigError.at(
                "data.corpus",
                got="huggingface",
                expected="the library `datasets`",
                do="Install it: pip install 'workbench[hub]'; or use corpus 'files'.",
            ) from None
        # the library retries for most of a minute before it says that there is no network
        address = urlsplit(constants.ENDPOINT)
        try:
            if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON"):
                raise OSError("HF_HUB_OFFLINE is set")
            socket.create_connection((address.hostname or "", address.port or 443), timeout=4).close()
        except OSError as error:
            raise ConfigError.at(
                "data.corpus.name",
                got=f"{config.name}, but the hub cannot be reached ({error})",
                expected="a network connection",
                do="Use corpus 'files' or 'stdlib', which need none.",
            ) from None
        try:
            stream = datasets.load_dataset(
                config.name, config.subset, split=config.split, revision=config.revision, streaming=True
            )
            for row in islice(stream, config.documents):
                if not isinstance(row.get(config.field), str):
                    raise ConfigError.at(
                        "data.corpus.field",
                        got=config.field,
                        expected="a column that holds text",
                        do=nearest(config.field, row),
                    )
                yield row[config.field]
        except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError.at(
                "data.corpus.name", got=config.name, expected="a data set of the hub", do=str(error).splitlines()[0]
            ) from None
