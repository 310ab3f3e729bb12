"""An ablation as data: arms under comparison, what is held equal, how they are tuned and confirmed."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property, partial
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.ablation.execution.launchers import Launch
from workbench.ablation.matching.solver import Budget, knob, quantity, solve
from workbench.ablation.spec.tuning import SMOOTHING, Tuning
from workbench.config import Config, ConfigError, deep_merge, expand_dotted, flatten, nearest
from workbench.contract import Range
from workbench.training.config import RunConfig


class Confirmation(Config):
    """The measurement: the chosen settings on fresh seeds, the same for every arm, on the sealed report split."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Training seeds, all different."""
    split: Literal["report", "selection"] = "report"
    """Where the arms are measured. A pilot measures on the selection split, so that the report split stays sealed."""


class Protocol(Config):
    """What is declared before the first run, beside question, budget, seeds, alpha and margin. Hashed at launch and quoted by
    the verdict; a later change is a deviation."""

    metric: str | None = None
    """Unit of the primary metric, checked against the data's: bits per byte."""
    effect: Annotated[float | None, Field(gt=0)] = None
    """Smallest difference of interest, in the unit of the metric: worth acting on."""
    stopping: str = "every declared seed is run, then the verdict is read once"
    """When runs stop being added."""
    exclusions: str = "none"
    """Runs or documents that are left out, and why."""


class AblationConfig(Config):
    """Everything about one ablation. Its hash is its identity."""

    name: str
    """Name of the folder below results/: letters, digits, dot, dash, underscore."""
    question: str = ""
    """What is asked, in one sentence, with the direction expected."""
    base: dict[str, Any] = {}
    """Fields of a run that all arms share."""
    arms: dict[str, dict[str, Any]]
    """Arms by name; each is its difference from the base."""
    baseline: str | None = None
    """The arm the others are compared with. Default: the first."""
    budget: Budget = Budget()
    """What is held equal."""
    tuning: Tuning = Tuning()
    """How each arm's setting is found."""
    confirmation: Confirmation = Confirmation()
    """How the arms are measured."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Family-wise error rate of the verdict."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Equivalence margin in the unit of the data's metric (text: bits per byte); without one no arm can be called equivalent."""
    protocol: Protocol = Protocol()
    """What else is declared before the first run."""
    exploratory: str | None = None
    """Why this ablation's verdicts are exploratory, if they are."""
    deviation: str | None = None
    """Why the analysis (question, alpha, margin, protocol, further seeds) is changed after launch. The verdict says so and is
    exploratory."""
    launch: Launch = Launch()
    """How the work is carried out."""

    def model_post_init(self, _context: Any) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name.startswith("."):
            raise ConfigError.at("name", got=self.name, expected="letters, digits, dot, dash and underscore only")
        if not self.arms:
            raise ConfigError.at("arms", got="no arm", expected="at least one arm")
        for arm in self.arms:
            if not re.fullmatch(r"[\w .+:²-]+", arm):
                raise ConfigError.at(f"arms.{arm}", got=arm, expected="a name of letters, digits, space, . + : - _")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ConfigError.at(
                "baseline", got=self.baseline, expected="the name of an arm", do=nearest(self.baseline, self.arms)
            )
        seeds = self.confirmation.seeds
        if len(set(seeds)) != len(seeds) or not seeds:
            raise ConfigError.at("confirmation.seeds", got=list(seeds), expected="at least one seed, all different")
        if self.tuning.seed in seeds:
            raise ConfigError.at(
                "tuning.seed",
                got=self.tuning.seed,
                expected="none of the confirmation seeds",
                do="The report must not reuse the run that was selected.",
            )
        self._check_budget()
        metric = self.run(self.order[0], seed=self.tuning.seed).data.metric
        if self.protocol.metric not in (None, metric.unit):
            raise ConfigError.at(
                "protocol.metric", got=self.protocol.metric, expected=f"the data's metric, {metric.unit!r}"
            )
        if self.margin is not None and self.protocol.effect is not None and self.margin > self.protocol.effect:
            raise ConfigError.at(
                "margin",
                got=self.margin,
                expected=f"at most protocol.effect={self.protocol.effect:g}",
                do="What would not matter cannot be larger than what would.",
            )
        for arm in self.arms:
            own = self.run(arm, seed=self.tuning.seed).data.metric
            if own != metric:
                raise ConfigError.at(
                    f"arms.{arm}.data",
                    got=own.unit,
                    expected=f"the baseline's metric, {metric.unit}",
                    do="Compare arms on one sort of data.",
                )
            if self.tuning.pruner != "none" and (given := self.run(arm, seed=0).training.evaluations) <= SMOOTHING:
                raise ConfigError.at(
                    "base.training.evaluations",
                    got=given,
                    expected=f"at least {SMOOTHING + 1} to prune by",
                    do="Or take tuning.pruner: none.",
                )
            for point in self.points(arm):
                self.check_setting(arm, point)

    def check_setting(self, arm: str, setting: dict[str, Any]) -> None:
        """Raise ConfigError where a setting makes no run of ``arm``, or takes it off the budget, beyond the tolerance.

        Seconds are known only of what was measured. Training FLOPs stand in for them (ours), against those of the arm as it is.
        """
        run = self.run(arm, seed=self.tuning.seed, hyperparameters=setting)
        if self.budget.allow_mismatch:
            return
        plain = self.run(arm, seed=self.tuning.seed)
        seconds = self.budget.axis == "seconds"
        budget = self.budget.changed(axis="flops") if seconds else self.budget
        own, amount = quantity(budget, plain), quantity(budget, run)
        off = amount / (own if seconds else self.target) - 1
        if amount == own or abs(off) <= budget.tolerance:  # an arm that is off untuned is told before launch
            return

        def moved(name: str) -> float:
            try:
                return abs(quantity(budget, self.run(arm, seed=0, hyperparameters={name: setting[name]})) - own)
            except ConfigError:  # no run without the others
                return 0.0

        name = max(setting, key=moved)
        raise ConfigError.at(
            f"tuning.space.{name}",
            got=setting[name],
            expected=f"settings of arm {arm!r} within {budget.tolerance:.1%} of the budget, not {off:+.1%} (budget.axis={self.budget.axis})",
            do="Tune only what the matched quantity does not depend on (a range in tuning.space overrides a "
            "variant's own), or give a reason in budget.allow_mismatch.",
        )

    def _check_budget(self) -> None:
        budget = self.budget
        if isinstance(budget.target, str) and budget.target not in self.arms:
            raise ConfigError.at(
                "budget.target",
                got=budget.target,
                expected="an amount, or the name of an arm",
                do=nearest(budget.target, self.arms),
            )
        if isinstance(budget.target, int | float) and budget.target <= 0:
            raise ConfigError.at("budget.target", got=budget.target, expected="a positive amount")
        runs = [self._run(arm, self.tuning.seed) for arm in self.order]
        for path in budget.free:
            if all(knob(run, path) is None for run in runs):
                raise ConfigError.at(
                    "budget.free",
                    got=path,
                    expected="a field of a run that holds a whole number",
                    do="Such as model.feedforwards.swiglu.hidden, model.depth or training.tokens.",
                )
            if path in self.tuning.space:
                raise ConfigError.at(
                    "budget.free",
                    got=path,
                    expected="a field that is not tuned",
                    do="Take it out of tuning.space: the budget decides it.",
                )
        if self.budget.axis != "seconds" and not self.target > 0:
            raise ConfigError.at(
                "budget.axis",
                got=f"{budget.axis}, of which {self.like} has none",
                expected="a quantity that the target has",
            )

    @property
    def order(self) -> list[str]:
        """Arm names, the baseline first."""
        baseline = self.baseline or next(iter(self.arms))
        return [baseline, *(arm for arm in self.arms if arm != baseline)]

    @cached_property
    def solved(self) -> dict[str, dict[str, int]]:
        """Arm -> what the budget's solver sets in it; as written down at launch, once it was. Empty for seconds until they
        have been measured."""
        budget = self.budget
        if budget.solved or not budget.free or budget.axis == "seconds":
            return budget.solved
        target = self.target
        solved = {}
        for arm in self.order:
            own = flatten(expand_dotted(self.arms[arm]))
            free = [path for path in budget.free if path not in own]
            if arm == self.like or not free:
                continue
            solved[arm] = solve(partial(self._run, arm, self.tuning.seed), budget, free, target)
        return {arm: values for arm, values in solved.items() if values}

    @property
    def like(self) -> str | None:
        """The arm whose quantity is the budget's target; None where the target is a number."""
        target = self.budget.target
        return self.order[0] if target is None else target if isinstance(target, str) else None

    @cached_property
    def target(self) -> float:
        """What every arm's quantity of the budget's axis is brought to (not for seconds)."""
        if isinstance(self.budget.target, int | float):
            return float(self.budget.target)
        assert self.like is not None
        return quantity(self.budget, self._run(self.like, self.tuning.seed))

    def fixed(self, solved: dict[str, dict[str, int]] | None = None) -> AblationConfig:
        """This ablation with the solver's values written down."""
        return self.changed(budget=self.budget.changed(solved=self.solved if solved is None else solved))

    def run(self, arm: str, *, seed: int, hyperparameters: dict[str, Any] | None = None) -> RunConfig:
        """The run of ``arm`` with the solver's and then the tuned values laid over it.

        Raises:
            ConfigError: with paths below ``arms.<arm>`` (or ``base`` where the mistake is there).
        """
        return self._run(arm, seed, {**self.solved.get(arm, {}), **(hyperparameters or {})})

    def _run(self, arm: str, seed: int, values: dict[str, Any] | None = None) -> RunConfig:
        merged = deep_merge(expand_dotted(self.base), expand_dotted(self.arms[arm]))
        merged = deep_merge(merged, expand_dotted(values or {}))
        try:
            return RunConfig.parse({**merged, "seed": seed})
        except ConfigError as error:
            own = {**expand_dotted(self.arms[arm]), **(values or {})}
            told = [
                replace(problem, path=f"{self._home(arm, own, problem.path)}.{problem.path}")
                for problem in error.problems
            ]
            raise ConfigError(told) from None

    def _home(self, arm: str, own: dict[str, Any], path: str) -> str:
        """Whether what stands at ``path`` of an arm's run was written in ``base`` or in the arm."""

        def sets(fields: dict[str, Any]) -> bool:
            place = path.replace("[", ".[") + "."
            names = (f"{name}." for name in flatten(expand_dotted(fields)))
            return any(place.startswith(name) or name.startswith(place) for name in names)

        return "base" if sets(self.base) and not sets(own) else f"arms.{arm}"

    def space(self, arm: str) -> dict[str, Range]:
        """Dotted field -> range, for one arm. Fields of variants that the arm does not have are left out."""
        return self._spaces[arm]

    @cached_property
    def _spaces(self) -> dict[str, dict[str, Range]]:
        return {arm: self._space(arm) for arm in self.order}

    def _space(self, arm: str) -> dict[str, Range]:
        run = self.run(arm, seed=self.tuning.seed)
        mixers = {layer.mixer for layer in run.model.layers}
        has = [("mixers" if config in mixers else "feedforwards", cls, config) for cls, config in run.model.variants()]
        prefixes = tuple(f"model.{field}.{config.kind}." for field, _, config in has)
        space = {
            name: choice
            for name, choice in self.tuning.space.items()
            if not re.match(r"model\.(mixers|feedforwards)\.", name) or name.startswith(prefixes)
        }
        if self.tuning.variants:
            for prefix, (_, cls, config) in zip(prefixes, has):
                for name, choice in cls.search_space(config, run.model.width or 0).items():
                    self.tuning.check_field(prefix + name)
                    space.setdefault(prefix + name, choice)
        return space

    def points(self, arm: str) -> list[dict[str, Any]]:
        """The settings that are fixed before launch, one a tuning trial; empty mappings where the sampler decides.

        Arms share a field's values: they do not depend on the arm.
        """
        spaces = self._spaces
        own = sorted({name for space in spaces.values() for name in space} - set(self.tuning.space))
        try:
            self.tuning.check_enqueued(spaces)
            return self.tuning.points(spaces[arm], [*self.tuning.space, *own])
        except ConfigError as error:
            raise error.under("tuning") from None

    def canonical(self) -> dict[str, Any]:
        """Without how the work is carried out."""
        plain = self.plain()
        del plain["launch"], plain["deviation"]
        # measured seconds differ from one time to the next
        plain["budget"]["solved"] = {} if self.budget.axis == "seconds" else self.solved
        return {
            **plain,
            "baseline": self.order[0],
            "base": expand_dotted(self.base),
            "arms": [[arm, expand_dotted(change)] for arm, change in self.arms.items()],
        }
