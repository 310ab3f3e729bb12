"""The values that a hyper-parameter may take in a search."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from workbench.config import Config, ConfigError

__all__ = ["Range"]


class Range(Config):
    """Values a hyper-parameter may take in a search: either ``values``, or an interval ``low`` to ``high``."""

    values: tuple[int | float | str | bool, ...] = ()
    """The listed values, and only those (a grid)."""
    low: int | float | None = None
    """Lower end of an interval, included."""
    high: int | float | None = None
    """Upper end of an interval, included."""
    log: bool = False
    """Whether the interval is searched on a logarithmic scale."""

    def model_post_init(self, _context: Any) -> None:
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ConfigError.at("", got=self.plain(), expected="either `values`, or both `low` and `high`")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ConfigError.at("low", got=self.low, expected=f"less than high={self.high}")
        if self.log and (self.low is None or self.low <= 0):
            raise ConfigError.at("log", got=f"low={self.low}", expected="a positive interval for a logarithmic search")

    def __contains__(self, value: Any) -> bool:
        if self.values:
            return any(value == valid and isinstance(value, bool) == isinstance(valid, bool) for valid in self.values)
        assert self.low is not None and self.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return isinstance(value, int) or not self.is_integer

    @property
    def is_integer(self) -> bool:
        """Whether an interval holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def is_numeric(self) -> bool:
        """Whether it holds more than one number and nothing else, so that its values have an order and a distance."""
        return not self.values or (
            len(set(self.values)) > 1
            and all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)
        )

    @property
    def is_logarithmic(self) -> bool:
        """Whether distances on a numeric range are ratios: as declared, or where that spaces listed values more evenly
        (ours): 1, 3, 9 is logarithmic, 1, 2, 3 is not."""
        if not self.values:
            return self.log
        numbers = sorted({float(value) for value in self.values}) if self.is_numeric else [0.0]
        if numbers[0] <= 0:
            return False
        return _unevenness([math.log(number) for number in numbers]) <= _unevenness(numbers)

    def describe(self) -> str:
        """The range in words."""
        return repr(list(self.values)) if self.values else f"{self.low!r} to {self.high!r}"


def _unevenness(numbers: list[float]) -> float:
    """The largest gap between neighbours relative to the smallest one."""
    gaps = [high - low for low, high in pairwise(numbers)]
    return max(gaps) / min(gaps)
