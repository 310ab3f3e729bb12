"""An ablation as data: arms under comparison, what is matched, how they are tuned and confirmed.

Parsing checks the fields and how they agree with one another. What needs a model (arms, budget, search space) is
checked by :func:`workbench.ablation.arms.resolve`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from workbench.ablation.spec.budget import Budget
from workbench.ablation.spec.launch import Launch
from workbench.ablation.spec.protocol import Confirmation, Protocol
from workbench.ablation.spec.tuning import Tuning
from workbench.config import Config, expand_dotted, nearest, require
from workbench.results.ledger import FILE
from workbench.results.views import FILE as VIEWS
from workbench.status import Stage

__all__ = ["AblationConfig", "check_arm_name"]


MAX_NAME = 80
"""Bytes of a name: a folder of a run is named by stage, arm, identity and seed, in at most 255."""
DERIVED = ("-pilot", "-components")
"""Suffixes of the ablations that are made from another one; its name may have all of :data:`MAX_NAME`."""
RESERVED_NAMES = (
    *("ablations", "archives", "benchmarks", "cache", "calibration", "exports", "reports", "runs"),
    *(FILE, Path(FILE).with_suffix(".lock").name, VIEWS),
)
"""What a folder of results may have beside ablations."""


def check_arm_name(name: str) -> None:
    """Check a name for an arm.

    Raises:
        ConfigError: if it has other characters than names of arms may have, or too many.
    """
    require(
        re.fullmatch(r"[\w .+:²-]+", name),
        f"arms.{name}",
        got=name,
        expected="a name of letters, digits, space, . + : - _",
    )
    require(
        _size(name) <= MAX_NAME,
        f"arms.{name[:20]}…",
        got=f"…{name[-20:]}, a name of {_size(name)} bytes",
        expected=f"at most {MAX_NAME}: names become names of files",
    )


def _size(name: str) -> int:
    return len(name.encode())


class AblationConfig(Config):
    """Everything about one ablation. Its hash is its identity."""

    @classmethod
    def check_kind(cls, data: Mapping[str, Any], origin: str) -> None:
        """Refuse the file of a single run."""
        require(
            "arms" in data or not {"model", "training"} & {*data},
            origin,
            got="a single training run (it has no `arms`)",
            expected="an ablation",
            do=f"Train it with: workbench train {origin}",
        )

    name: str
    """Name of the folder below results/: letters, digits, dot, dash, underscore."""
    question: str = ""
    """The question in one sentence, with the direction expected."""
    base: dict[str, Any] = {}
    """Fields of a run that all arms share."""
    arms: dict[str, dict[str, Any]]
    """Arms by name; each is its difference from the base."""
    baseline: str | None = None
    """The arm the others are compared with. Default: the first."""
    budget: Budget = Budget()
    """What is matched between the arms."""
    tuning: Tuning = Tuning()
    """How each arm's hyper-parameters are searched."""
    confirmation: Confirmation = Confirmation()
    """How the arms are measured."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Bound of two error rates of the verdict, each over all comparisons: any false better or worse, any false
    equivalent."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Equivalence margin in the unit of the data's metric (text: bits per byte); without one no arm can be called
    equivalent."""
    protocol: Protocol = Protocol()
    """What else is declared before the first run."""
    exploratory: str | None = None
    """Why this ablation's verdicts are exploratory, if they are."""
    deviation: str | None = None
    """Why the analysis (question, alpha, margin, protocol, further seeds) is changed after launch. Quoted by the
    verdict, which is then exploratory."""
    launch: Launch = Field(default_factory=Launch)
    """How the work is carried out."""

    def model_post_init(self, _context: Any) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9._-]+", self.name) and not self.name.startswith("."),
            "name",
            got=self.name,
            expected="letters, digits, dot, dash and underscore only",
        )
        suffix = next(filter(self.name.endswith, DERIVED), "")
        own_name = self.name.removesuffix(suffix)
        require(
            _size(own_name) <= MAX_NAME,
            "name",
            got=f"…{own_name[-20:]}, a name of {_size(own_name)} bytes",
            expected=f"at most {MAX_NAME}: names become names of files",
        )
        require(
            self.name not in RESERVED_NAMES,
            "name",
            got=self.name,
            expected=f"another name than {', '.join(RESERVED_NAMES)}, which folders of results have for other things",
        )
        require(self.arms, "arms", got="no arm", expected="at least one arm")
        for arm in self.arms:
            check_arm_name(arm)
        require(
            self.baseline is None or self.baseline in self.arms,
            "baseline",
            got=self.baseline,
            expected="the name of an arm",
            do=nearest(self.baseline, self.arms),
        )
        for seed in self.tuning.seeds:
            require(
                seed not in self.confirmation.seeds,
                "tuning.seed" if seed == self.tuning.seed else "tuning.repeats.seeds",
                got=seed,
                expected="none of the confirmation seeds",
                do="The report must not reuse the run that was selected.",
            )
        stopping, num_seeds = self.protocol.stopping, len(self.confirmation.seeds)
        require(
            max(stopping.looks, default=0) <= num_seeds,
            "protocol.stopping.looks",
            got=list(stopping.looks),
            expected=f"at most {num_seeds}, the number of confirmation seeds",
            do="Declare more confirmation.seeds, or earlier looks.",
        )
        require(
            not stopping.anytime or stopping.first <= num_seeds,
            "protocol.stopping.first",
            got=stopping.first,
            expected=f"at most {num_seeds}, the number of confirmation seeds",
        )
        require(
            not stopping.is_sequential or len(self.arms) > 1,
            "protocol.stopping",
            got="one arm",
            expected="an arm beside the baseline, to be decided at a look",
        )
        require(
            not (stopping.is_sequential and self.confirmation.components),
            "confirmation.components",
            got="runs that share seeds of components",
            expected="a separate seed for every run of a sequential design",
            do="Use protocol.stopping=fixed.",
        )
        require(
            self.margin is None or self.protocol.effect is None or self.margin <= self.protocol.effect,
            "margin",
            got=self.margin,
            expected=f"at most protocol.effect={self.protocol.effect}",
            do="A difference that does not matter cannot be larger than one that does.",
        )
        target = self.budget.target
        require(
            not isinstance(target, str) or target in self.arms,
            "budget.target",
            got=target,
            expected="an amount, or the name of an arm",
            do=nearest(target, self.arms),
        )
        for path in self.budget.free:
            require(
                path not in self.tuning.space,
                "budget.free",
                got=path,
                expected="a field that is not tuned",
                do="Remove it from tuning.space: the budget decides it.",
            )

    @property
    def order(self) -> list[str]:
        """Arm names, the baseline first."""
        baseline = self.baseline or next(iter(self.arms))
        return [baseline, *(arm for arm in self.arms if arm != baseline)]

    @property
    def reference_arm(self) -> str | None:
        """The arm whose quantity is the budget's target; None if the target is a number."""
        target = self.budget.target
        return self.order[0] if target is None else target if isinstance(target, str) else None

    def planned(self, fields: int) -> dict[Stage, int]:
        """Stage -> runs of an arm that tunes so many fields."""
        return {
            Stage.TUNING: self.tuning.num_trials(fields),
            Stage.REPEAT: self.tuning.num_repeats,
            Stage.CONFIRMATION: len(self.planned_seeds),
        }

    @property
    def looks(self) -> tuple[int, ...]:
        """Paired seeds at every look of the declared design; one number if the verdict is read once."""
        return self.protocol.stopping.looks_at(len(self.confirmation.seeds))

    @property
    def planned_seeds(self) -> tuple[int, ...]:
        """Confirmation seeds up to the last look: the most that an arm is run on."""
        return self.confirmation.seeds[: self.looks[-1]]

    def canonical(self) -> dict[str, Any]:
        """Plain data without how the work is carried out; the identity is its hash."""
        plain = self.plain()
        del plain["launch"], plain["deviation"]
        return {
            **plain,
            "baseline": self.order[0],
            "base": expand_dotted(self.base),
            "arms": [[arm, expand_dotted(change)] for arm, change in self.arms.items()],
        }
