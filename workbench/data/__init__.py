"""Text and tasks to batches: corpora, splits, tokenizer, generators, packing, a loader that resumes exactly."""

from workbench.data.config import DataConfig
from workbench.data.loader import StepLoader
from workbench.data.packing import Batch, RowStream, TrainingStream, evaluation_batches
from workbench.data.preparation import Documents, PreparedData
from workbench.data.sources import Source, SourceConfig, prepare, sources

__all__ = [
    "Batch",
    "DataConfig",
    "Documents",
    "PreparedData",
    "RowStream",
    "Source",
    "SourceConfig",
    "StepLoader",
    "TrainingStream",
    "evaluation_batches",
    "prepare",
    "sources",
]
