"""How the arms are measured, and what is declared before the first run."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from workbench.config import Config, ConfigError, require
from workbench.seeding import COMPONENTS, Component, Seed

__all__ = ["Components", "Confirmation", "Protocol"]


class Components(Config):
    """How many seeds of each component are crossed: every combination is one run."""

    init: Annotated[int, Field(ge=1)] = 1
    """Seeds of the initial weights."""
    order: Annotated[int, Field(ge=1)] = 1
    """Seeds of the data order."""
    other: Annotated[int, Field(ge=1)] = 1
    """Seeds of everything else (dropout, router noise, sampling)."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.runs > 1,
            "",
            got="one seed of every component",
            expected="at least two of one",
            do="Such as {init: 3}.",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of seeds of each component."""
        return self.init, self.order, self.other

    @property
    def runs(self) -> int:
        """Number of runs."""
        return math.prod(self.shape)

    def levels(self, number: int) -> dict[Component, int]:
        """Which of its seeds each component of run ``number`` has; the last component varies fastest."""
        return dict(zip(COMPONENTS, map(int, np.unravel_index(number, self.shape))))


class Confirmation(Config):
    """The measurement: the chosen settings on fresh seeds, the same for every arm, on the sealed report split."""

    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Training seeds, all different."""
    components: Components | None = None
    """Runs that cross seeds of single components, to learn what the noise consists of (`workbench components`). Run i
    has number ``seeds[i]``; level k of a component is ``seeds[k]``. Default of ``seeds``: 0, 1, 2, …"""
    split: Literal["report", "pilot"] = "report"
    """Where the arms are measured. A pilot measures on the pilot split, documents drawn like those of the report split:
    its noise is the report's noise, and the report split stays sealed."""

    @model_validator(mode="before")
    @classmethod
    def _number_runs(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("components") or "seeds" in data:
            return data
        try:
            components = Components.parse(data["components"])
        except ConfigError as error:
            raise error.under("components") from None
        return {**data, "components": components, "seeds": tuple(range(components.runs))}

    def model_post_init(self, _context: Any) -> None:
        unique = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(unique, "seeds", got=list(self.seeds), expected="at least one seed, all different")
        require(
            self.components is None or self.components.runs == len(self.seeds),
            "seeds",
            got=f"{len(self.seeds)} numbers",
            expected=f"one for each of the {self.components and self.components.runs} runs of confirmation.components",
        )

    def component_seeds(self, seed: int) -> dict[Component, int]:
        """Component -> its seed in confirmation run ``seed``; empty if that seed drives all of them."""
        if self.components is None or seed not in self.seeds:
            return {}
        levels = self.components.levels(self.seeds.index(seed))
        return {component: self.seeds[level] for component, level in levels.items()}

    @property
    def independent_seeds(self) -> tuple[int, ...]:
        """Those of ``seeds`` whose runs share no component's seed, except of components that have one seed only."""
        if self.components is None:
            return self.seeds
        varied = [component for component, count in zip(COMPONENTS, self.components.shape) if count > 1]
        levels = [self.components.levels(number) for number in range(self.components.runs)]
        return tuple(seed for seed, level in zip(self.seeds, levels) if len({level[name] for name in varied}) == 1)


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
