"""What arms are judged by: a ratio of sums over documents. A data source names its primary metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ANSWER_ERRORS", "ANSWER_LOSS", "BITS_PER_BYTE", "NATS_PER_TOKEN", "Metric"]


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over the documents (or examples) of a split. Lower is better, always: accuracy is counted as
    errors.

    ``suite``, ``task`` and ``unit`` select its rows in the table of evaluations.
    """

    name: str
    """What is measured: "loss", "error rate"."""
    unit: str
    """"<plural> per <singular>", so that it reads in a sentence after a number: "bits per byte"."""
    numerator: str
    """Column of the documents that is summed in the numerator."""
    denominator: str
    """Column that is summed in the denominator; positive."""
    scale: float = 1.0
    """Factor of the numerator."""
    # not compared: ablations archived before the table of evaluations do not name them
    suite: str = field(default="loss", compare=False)
    """Registered suite that measures it (:mod:`workbench.evaluation.suites`)."""
    task: str = field(default="text", compare=False)
    """Task of the suite, by default the kind of the data source."""
    upper: float | None = field(default=None, compare=False)
    """Largest value it can take: 1 for error rates, whose seeds may be all right or all wrong, so that they are judged
    by exact tests; None for a loss, which has no bound and is judged by t. The least is 0."""

    @property
    def short(self) -> str:
        """The unit for a heading: "bits/byte"."""
        return self.unit.replace(" per ", "/")

    def of(self, columns: Mapping[str, Any]) -> float:
        """The metric over documents, arrays by column."""
        return float(self.scale * columns[self.numerator].sum() / columns[self.denominator].sum())

    def plain(self) -> dict[str, Any]:
        """Plain data, fit for JSON; ``Metric(**plain)`` restores the metric."""
        return asdict(self)


BITS_PER_BYTE = Metric("loss", "bits per byte", "nll_nats", "bytes", 1 / math.log(2))
"""Loss of text, independent of the tokenizer."""
NATS_PER_TOKEN = Metric("loss", "nats per token", "nll_nats", "targets")
"""Loss of text as training reports it; depends on the tokenizer."""
ANSWER_LOSS = Metric("loss", "bits per answer", "nll_nats", "answers", 1 / math.log(2), suite="answers")
"""Loss of answers, summed over the tokens of each."""
ANSWER_ERRORS = Metric("error rate", "errors per answer", "errors", "answers", suite="answers", upper=1.0)
"""1 − accuracy: an answer is right when each of its tokens is the most likely one."""
