"""Configuration of text as a data source."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

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
    selection_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Size of the selection split, which tuning looks at, as a fraction of the clusters of near-duplicates."""
    report_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.125
    """Size of the report split, which only confirmation runs open, and of the pilot split: clusters each."""
    evaluation_documents: Annotated[int, Field(ge=1)] = 256
    """Documents in the report split and in the pilot split, at most; the others are trained on."""
    selection_documents: Annotated[int, Field(ge=1)] = 32
    """Documents in the selection split, at most, and no more than ``evaluation_documents``: it is evaluated again and
    again during a run."""
    evaluation_bytes: Annotated[int, Field(ge=16)] = 8192
    """Bytes evaluated per document, from its beginning."""
    tokenizer_file: str | None = None
    """A tokenizer to load (JSON of the `tokenizers` library). Default: train one on the training split."""
    tokenizer_bytes: Annotated[int, Field(ge=1)] = 8_000_000
    """Amount of the training split that the tokenizer is trained on."""

    measured_only: ClassVar[frozenset[str]] = frozenset({"evaluation_bytes"})

    @property
    def metric(self) -> Metric:
        return BITS_PER_BYTE

    def model_post_init(self, _context: Any) -> None:
        require(
            self.selection_fraction + 2 * self.report_fraction <= 0.6,
            "report_fraction",
            got=f"{self.report_fraction} twice (report and pilot) beside selection_fraction={self.selection_fraction}",
            expected="most text left for training",
        )
