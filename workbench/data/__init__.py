"""From text and tasks to batches: corpora, splits, tokenizer, generators, packing, a loader with exact resume."""

from workbench.data.batching import BatchPlan, BatchPlanConfig, batch_plans
from workbench.data.config import DataConfig
from workbench.data.loader import StepLoader
from workbench.data.loads import RunFacts
from workbench.data.packing import TrainingStream, evaluation_batches, num_evaluation_batches
from workbench.data.sources import Source, SourceConfig, prepare, sources
from workbench.data.splits import MeasuredSplit
from workbench.data.streams import IGNORE_INDEX, Batch, RowStream, Split
from workbench.data.text import Documents, PreparedData

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchPlan",
    "BatchPlanConfig",
    "DataConfig",
    "Documents",
    "MeasuredSplit",
    "PreparedData",
    "RowStream",
    "RunFacts",
    "Source",
    "SourceConfig",
    "Split",
    "StepLoader",
    "TrainingStream",
    "batch_plans",
    "evaluation_batches",
    "num_evaluation_batches",
    "prepare",
    "sources",
]
