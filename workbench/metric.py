"""What arms are judged by. A data source tells its metric; nothing else knows what is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ANSWER_ERRORS", "ANSWER_LOSS", "BITS_PER_BYTE", "Metric"]


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over the documents (or examples) of a split. Lower is better, always: who thinks in accuracy
    counts errors.
    """

    name: str
    """What is measured: "loss", "error rate"."""
    unit: str
    """A plural "per" a singular, so that it reads in a sentence behind a number: "bits per byte"."""
    numerator: str
    """Column of the measured documents that is summed above the line."""
    denominator: str
    """Column that is summed below it; positive."""
    scale: float = 1.0
    """Factor of the numerator."""

    @property
    def short(self) -> str:
        """The unit for a heading: "bits/byte"."""
        return self.unit.replace(" per ", "/")

    def of(self, columns: Mapping[str, Any]) -> float:
        """The metric of measured documents, arrays by column."""
        return float(self.scale * columns[self.numerator].sum() / columns[self.denominator].sum())

    def plain(self) -> dict[str, Any]:
        """As plain data, fit for JSON; ``Metric(**plain)`` is the metric again."""
        return asdict(self)


BITS_PER_BYTE = Metric("loss", "bits per byte", "nll_nats", "bytes", 1 / math.log(2))
"""Loss of text, independent of the tokenizer."""
ANSWER_LOSS = Metric("loss", "bits per answer", "nll_nats", "answers", 1 / math.log(2))
"""Loss of answers, all tokens of one together."""
ANSWER_ERRORS = Metric("error rate", "errors per answer", "errors", "answers")
"""1 − accuracy: an answer counts as right when every token of it is the most likely one."""
