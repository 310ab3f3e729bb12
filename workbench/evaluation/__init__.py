"""How good a model is on a split of documents."""

from workbench.evaluation.bits import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
