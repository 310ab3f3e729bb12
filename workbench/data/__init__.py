"""Text to batches: corpora, splits, tokenizer, packing, a loader that resumes exactly."""

from workbench.data.config import DataConfig
from workbench.data.loader import StepLoader
from workbench.data.packing import Batch, TrainingStream, evaluation_batches
from workbench.data.preparation import Documents, PreparedData, prepare

__all__ = [
    "Batch",
    "DataConfig",
    "Documents",
    "PreparedData",
    "StepLoader",
    "TrainingStream",
    "evaluation_batches",
    "prepare",
]
