"""Configuration of text as the data of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.config import ConfigError
from workbench.data.corpora import CorpusConfig, corpora
from workbench.data.sources import SourceConfig
from workbench.metric import BITS_PER_BYTE, Metric


class DataConfig(SourceConfig):
    """Which text, and how it is split, tokenized and measured."""

    kind: Literal["text"] = "text"
    corpus: Annotated[SerializeAsAny[CorpusConfig], BeforeValidator(corpora.parse)] = Field(
        default="stdlib", validate_default=True
    )
    """Where the text comes from: stdlib, files, huggingface, or a registered corpus."""
    near_duplicates: bool = True
    """Whether documents that share half of their long lines stay in one split. Off for streams of many gigabytes: memory
    grows with the number of lines. Repeated documents are dropped in any case."""
    selection_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the bytes in the selection split, which tuning looks at."""
    report_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the bytes in the report split, which only confirmation runs open."""
    evaluation_documents: Annotated[int, Field(ge=1)] = 48
    """Documents of a split that are measured."""
    evaluation_bytes: Annotated[int, Field(ge=16)] = 2048
    """Bytes of each that are measured, from its beginning."""
    tokenizer_file: str | None = None
    """An existing tokenizer (JSON of the `tokenizers` library) instead of one trained on the training split."""
    tokenizer_bytes: Annotated[int, Field(ge=1)] = 8_000_000
    """Bytes of the training split that the tokenizer is trained on."""

    @property
    def metric(self) -> Metric:
        return BITS_PER_BYTE

    def model_post_init(self, _context: Any) -> None:
        if self.selection_fraction + self.report_fraction > 0.6:
            raise ConfigError.at(
                "selection_fraction", got=self.selection_fraction, expected="most text left for training"
            )
