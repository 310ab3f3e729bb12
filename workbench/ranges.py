"""The values that a hyper-parameter may take in a search."""

from __future__ import annotations

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

    def describe(self) -> str:
        """The range in words."""
        return repr(list(self.values)) if self.values else f"{self.low!r} to {self.high!r}"
