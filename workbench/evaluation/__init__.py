"""How good a model is on a split of documents."""

from workbench.evaluation.measure import evaluate

__all__ = ["evaluate"]
