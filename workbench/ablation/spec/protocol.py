"""How the arms are measured, and what is declared before the first run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from workbench.config import Config, ConfigError, require
from workbench.seeding import COMPONENTS, Component, Seed

__all__ = [
    "FEW_SEEDS",
    "FIRST_LOOK",
    "Components",
    "Confirmation",
    "Protocol",
    "ScoreMetric",
    "Stopping",
    "seeds_caution",
]

FIRST_LOOK = 4
"""Fewest paired seeds at which a verdict may be read before the last."""
FEW_SEEDS = 5
"""Paired seeds below which only large differences can be shown, and no plan rests on their standard deviation (our
choice): a 95 % interval of an sd from four values spans 0.57 to 3.7 times the estimate."""


DESIGNS = (
    "`fixed` reads the verdict once; `{looks: [4, 6, 8]}` reads it at these numbers of paired seeds; "
    "`{anytime: true}` adds seeds until it decides. Text declares no level, so nothing would keep alpha."
)


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


def seeds_caution(seeds: int) -> str:
    """What too few confirmation seeds mean for the verdict; empty if there are enough."""
    if seeds >= FEW_SEEDS:
        return ""
    few = f"{seeds} seed{'s' * (seeds != 1)}"
    if seeds < FIRST_LOOK:
        return f"{few}: no verdict can come of it, since differences are claimed from {FIRST_LOOK} paired seeds on."
    return f"{few} show only differences of more than twice their sd over seeds; more seeds show smaller ones."


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

    @property
    def caution(self) -> str:
        """What too few seeds mean for the verdict; empty if there are enough."""
        return seeds_caution(len(self.independent_seeds))

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


class Stopping(Config):
    """When the report values are read, and when runs stop being added. Three designs:

    - *fixed*, the default (``fixed``, or no field): every declared seed is run, then the verdict is read once;
    - *group-sequential* (``{looks: [4, 6, 8]}``): the verdict is read at these numbers of paired seeds, at levels that
      keep alpha over all looks;
    - *anytime-valid* (``{anytime: true}``): the verdict is read after the first seeds and after every further step, by
      a confidence sequence that holds at all numbers of seeds at once; up to all declared seeds, or until it decides.

    An arm that is decided at a look stops; the baseline runs as long as any arm does.
    """

    looks: tuple[Annotated[int, Field(ge=FIRST_LOOK)], ...] = ()
    """Paired seeds at each look of a group-sequential design, increasing."""
    anytime: bool = False
    """Whether the design is anytime-valid."""
    first: Annotated[int, Field(ge=FIRST_LOOK)] = FIRST_LOOK
    """Paired seeds at the first look of an anytime-valid design."""
    step: Annotated[int, Field(ge=1)] = 1
    """Paired seeds between two looks of an anytime-valid design."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Differences that an anytime-valid design is made for, in units of their sd over seeds. It holds alpha whatever
    the scale, and decides soonest where the difference is about as large."""

    def model_post_init(self, _context: Any) -> None:
        require(
            not (self.looks and self.anytime),
            "",
            got="both looks and anytime",
            expected="one design",
            do=DESIGNS,
        )
        require(
            all(a < b for a, b in pairwise(self.looks)), "looks", got=list(self.looks), expected="increasing numbers"
        )
        given = {name: getattr(self, name) for name in ("first", "step", "scale")}
        require(
            self.anytime or all(value == type(self).model_fields[name].default for name, value in given.items()),
            "anytime",
            got=False,
            expected="true, as first, step or scale is given",
        )

    @property
    def is_sequential(self) -> bool:
        """Whether the verdict may be read before the last seed."""
        return self.anytime or bool(self.looks)

    def looks_at(self, num_seeds: int) -> tuple[int, ...]:
        """Paired seeds at every look of an ablation that declares ``num_seeds`` of them."""
        if self.anytime:
            return *range(self.first, num_seeds, self.step), num_seeds
        return self.looks or (num_seeds,)

    def sentence(self, num_seeds: int) -> str:
        """The design in words."""
        if self.anytime:
            every = "each further one" if self.step == 1 else f"every {self.step} further ones"
            return (
                f"anytime-valid, a confidence sequence for the paired difference (scale {self.scale:g} sd): read after "
                f"{self.first} seeds and after {every} up to {num_seeds}; a decided arm stops"
            )
        if self.looks:
            *others, last = map(str, self.looks)
            looks = f"{', '.join(others)} and {last}" if others else last
            return f"group-sequential, read at {looks} paired seeds at levels that keep alpha; a decided arm stops"
        return "every declared seed is run, then the verdict is read once"


class ScoreMetric(Config):
    """A score that an evaluation suite measures of every confirmation run."""

    suite: str
    """Name of a suite under ``evaluation``."""
    task: str | None = None
    """One of its tasks. Default: the mean over all of them, each with the same weight."""
    metric: str
    """Unit or published name of the score, as in the table of scores: ``accuracy``, ``bits per byte``."""
    where: dict[str, int | float | str] = {}
    """Labels of the documents that count, such as {length: 4096}. Default: all documents."""
    effect: Annotated[float | None, Field(gt=0)] = None
    """Smallest difference of interest, in the unit of this score."""
    margin: Annotated[float | None, Field(gt=0)] = None
    """Equivalence margin in the unit of this score; without one no arm can be called equivalent by it."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.margin is None or self.effect is None or self.margin <= self.effect,
            "margin",
            got=self.margin,
            expected=f"at most effect={self.effect}",
            do="A difference that does not matter cannot be larger than one that does.",
        )

    @property
    def subject(self) -> str:
        """What is measured, in words: ``ruler vt, length 4096``."""
        named = " ".join(filter(None, (self.suite, self.task)))
        return ", ".join([named, *(f"{name} {value}" for name, value in self.where.items())])

    @property
    def label(self) -> str:
        """The score in words: ``ruler vt, length 4096: accuracy``."""
        return f"{self.subject}: {self.metric}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What is measured, without effect and margin."""
        return self.suite, self.task, self.metric, *sorted(self.where.items())


class Protocol(Config):
    """What is declared before the first run, beside question, budget, seeds, alpha and margin. Hashed at launch and
    quoted by the verdict; a later change is a deviation."""

    metric: str | None = None
    """Unit of the primary metric, checked against the data's: bits per byte."""
    effect: Annotated[float | None, Field(gt=0)] = None
    """Smallest difference of interest, in the unit of the metric: worth acting on."""
    secondary: tuple[ScoreMetric, ...] = ()
    """Scores of suites under ``evaluation`` that the arms are compared by as well, most important first. An arm's
    scores are tested in this order, a family of their own that leaves the error rates of the primary metric as they
    are. Suites that are not named here are described, not judged."""
    control_variate: str | None = None
    """An earlier ablation in the same folder of results, such as ``NAME-pilot``, whose runs at the same settings on
    other seeds take seed noise out of the differences. It must not have opened the report split."""
    comparisons: Literal["baseline", "all_pairs"] = "baseline"
    """Which differences are claimed: of each arm to the baseline, or of every two arms. All claims are one family, so
    pairs need more seeds."""
    stopping: Stopping = Stopping()
    """When the verdict is read and runs stop being added: ``fixed``, ``{looks: [4, 6, 8]}`` or ``{anytime: true}``."""
    exclusions: str = "none"
    """Runs or documents that are left out, and why."""
    rerun_diverged: bool = False
    """Whether a confirmation run that diverged is run again once, from its first step. One that crashed or ran out of
    memory always is, from its checkpoint. The verdict names every run that was run again and how it ended before."""

    @field_validator("stopping", mode="before")
    @classmethod
    def _parse_stopping(cls, value: Any) -> Any:
        if value == "fixed":
            return Stopping()
        if not isinstance(value, Stopping | Mapping):
            raise ConfigError.at("", got=value, expected="a design: `fixed`, or one that keeps alpha", do=DESIGNS)
        return Stopping.parse(value)

    def model_post_init(self, _context: Any) -> None:
        keys = [metric.key for metric in self.secondary]
        for index, key in enumerate(keys):
            require(
                key not in keys[:index],
                f"secondary[{index}]",
                got=self.secondary[index].label,
                expected="every score once",
            )

    @model_serializer(mode="wrap")
    def _without_secondary(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an empty list of secondary metrics: hashes of ablations that declare none stay as they are."""
        plain: dict[str, Any] = serialize(self)
        if not self.secondary:
            plain.pop("secondary", None)
        return plain
