"""Evaluation of a model on a data source: suites, their long table, and inspection of trained layers."""

from workbench.evaluation.measure import evaluate
from workbench.evaluation.suites import Evaluation, Results, Settings, Suite, SuiteConfig, suites

__all__ = ["Evaluation", "Results", "Settings", "Suite", "SuiteConfig", "evaluate", "suites"]
