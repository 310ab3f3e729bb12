"""Configuration of text as a data source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.config import require
from workbench.data.corpora import CorpusConfig, corpora
from workbench.data.sources import SourceConfig
from workbench.metric import BITS_PER_BYTE, Metric


class DataConfig(SourceConfig):
    """Text: its corpus, splits, tokenizer and evaluation."""

    kind: Literal["text"] = "text"
    corpus: Annotated[SerializeAsAny[CorpusConfig], BeforeValidator(corpora.parse)] = Field(
        default="stdlib", validate_default=True
    )
    """Where the text comes from: stdlib, packages, files, huggingface, or a registered corpus."""
    near_duplicates: bool = True
    """Keep documents that share half of their long lines in one split. Turn it off for streams of many gigabytes: its
    memory grows with the number of lines. Exact duplicates are always dropped."""
    selection_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Fraction of the bytes in the selection split, which tuning looks at."""
    report_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Fraction of the bytes in the report split, which only confirmation runs open."""
    evaluation_documents: Annotated[int, Field(ge=1)] = 48
    """Number of evaluated documents per split."""
    evaluation_bytes: Annotated[int, Field(ge=16)] = 2048
    """Bytes evaluated per document, from its beginning."""
    tokenizer_file: str | None = None
    """A tokenizer to load (JSON of the `tokenizers` library). Default: train one on the training split."""
    tokenizer_bytes: Annotated[int, Field(ge=1)] = 8_000_000
    """Amount of the training split that the tokenizer is trained on."""

    @property
    def metric(self) -> Metric:
        return BITS_PER_BYTE

    def model_post_init(self, _context: Any) -> None:
        require(
            self.selection_fraction + self.report_fraction <= 0.6,
            "selection_fraction",
            got=self.selection_fraction,
            expected="most text left for training",
        )
