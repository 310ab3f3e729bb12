"""What a verdict is about: the chosen setting of every arm, measured on certain documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench import formatting

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """What was compared, and on what. A verdict holds for these settings on these documents."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arm -> its chosen values of the tuned fields, by dotted path; empty for an arm that was not tuned."""
    source: str = ""
    """Name of the data: "stdlib", "mqar"."""
    split: str = "report"
    documents: int | None = None
    """Documents (or examples) that were measured."""
    clusters: int | None = None
    """Clusters of near-duplicates that they belong to."""
    size: int | None = None
    """Sum of the metric's denominator over them, in ``size_unit``."""
    size_unit: str = "bytes"
    overlap: float | None = None
    """Share of their 13-token shingles that the training text contains as well; None if it was not measured."""
    look: int | None = None
    """How many times these documents have been opened, this one included; None if looks were not counted."""

    def setting(self, arm: str) -> str:
        """The arm's setting in words: "learning_rate 0.003, warmup 0.1"; empty if nothing was tuned."""
        return formatting.setting(self.settings.get(arm, {}))

    def named(self, arm: str) -> str:
        """The arm with its setting: "full at learning_rate 0.003"."""
        setting = self.setting(arm)
        return f"{arm} at {setting}" if setting else arm

    def sentence(self) -> str:
        """The documents in words, for the head of a verdict; empty if they are unknown."""
        if self.documents is None:
            return ""
        text = f"Measured on {self.documents:,} {'documents' if self.size_unit == 'bytes' else 'examples'}"
        details = [] if self.clusters in (None, self.documents) else [f"{self.clusters:,} clusters"]
        details += [] if self.size is None else [f"{self.size:,} {self.size_unit}"]
        text += f" ({', '.join(details)})" if details else ""
        text += f" of {self.source}, {self.split} split" if self.source else f" of the {self.split} split"
        clauses = [text]
        if self.overlap is not None:
            clauses.append(f"{100 * self.overlap:.0f} % of their 13-token shingles are in the training text")
        if self.look is not None:
            clauses.append(f"look {self.look} at these documents")
        return f"{'; '.join(clauses)}. The verdict is about the chosen setting of each arm on these documents."
