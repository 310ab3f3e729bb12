"""How the arms are measured, and what is declared before the first run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.config import Config, require

__all__ = ["Confirmation", "Protocol"]


class Confirmation(Config):
    """The measurement: the chosen settings on fresh seeds, the same for every arm, on the sealed report split."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Training seeds, all different."""
    split: Literal["report", "selection"] = "report"
    """Where the arms are measured. A pilot measures on the selection split, so that the report split stays sealed."""

    def model_post_init(self, _context: Any) -> None:
        unique = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(unique, "seeds", got=list(self.seeds), expected="at least one seed, all different")


class Protocol(Config):
    """What is declared before the first run, beside question, budget, seeds, alpha and margin. Hashed at launch and
    quoted by the verdict; a later change is a deviation."""

    metric: str | None = None
    """Unit of the primary metric, checked against the data's: bits per byte."""
    effect: Annotated[float | None, Field(gt=0)] = None
    """Smallest difference of interest, in the unit of the metric: worth acting on."""
    stopping: str = "every declared seed is run, then the verdict is read once"
    """When runs stop being added."""
    exclusions: str = "none"
    """Runs or documents that are left out, and why."""
