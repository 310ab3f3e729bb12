"""Evaluation of a model: suites, their long table, and inspection of trained layers."""

from workbench.evaluation.decoded import Decoder, DecodingConfig
from workbench.evaluation.measure import check_score, check_suites, measure_suite
from workbench.evaluation.suites import (
    Conditions,
    DocumentSuite,
    Evaluation,
    Journal,
    Measured,
    Results,
    Score,
    Settings,
    Suite,
    SuiteConfig,
    suites,
)

__all__ = [
    "Conditions",
    "Decoder",
    "DecodingConfig",
    "DocumentSuite",
    "Evaluation",
    "Journal",
    "Measured",
    "Results",
    "Score",
    "Settings",
    "Suite",
    "SuiteConfig",
    "check_score",
    "check_suites",
    "measure_suite",
    "suites",
]
