"""Evaluation of a model on a data source: suites, their long table, and inspection of trained layers."""

from workbench.evaluation.suites import (
    DocumentSuite,
    Evaluation,
    Results,
    Settings,
    Suite,
    SuiteConfig,
    evaluate,
    suites,
)

__all__ = [
    "DocumentSuite",
    "Evaluation",
    "Results",
    "Settings",
    "Suite",
    "SuiteConfig",
    "evaluate",
    "suites",
]
