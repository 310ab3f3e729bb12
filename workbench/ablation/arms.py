"""The arms of an ablation, resolved once: runs, search spaces, settings fixed before launch, the budget's solution."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

from workbench.ablation.matching.solver import quantity, solve, tunable_value
from workbench.ablation.search.draws import check_enqueued, fixed_points
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.tuning import SMOOTHING
from workbench.config import ConfigError, Problem, deep_merge, expand_dotted, flatten, nearest, require
from workbench.formatting import share
from workbench.metric import Metric
from workbench.optimisers import optimisers
from workbench.ranges import Range
from workbench.status import Stage
from workbench.training.config import RunConfig

__all__ = ["Arm", "Arms", "resolve"]

T = TypeVar("T")


class Arm:
    """One arm of an ablation.

    Args:
        config: the ablation.
        name: of the arm.
        solved: fields that the budget's solver sets in it.
        weights: fingerprints of initial weights, by source, as they were at launch.
    """

    space: Mapping[str, Range] = {}
    """Dotted field -> range. Fields of variants that the arm does not have are left out."""
    points: list[dict[str, Any]] = []
    """The settings that are fixed before launch, one per tuning trial; empty mappings where an adaptive sampler
    decides. Arms share a field's values."""

    def __init__(self, config: AblationConfig, name: str, solved: Mapping[str, int], weights: Mapping[str, str]):
        self.name, self.solved, self._weights = name, dict(solved), weights
        self._seed, self._confirmation, self._planned = config.tuning.seed, config.confirmation, config.planned
        self._base, self._changes = expand_dotted(config.base), expand_dotted(config.arms[name])
        self._parsed = lru_cache(maxsize=256)(lambda key: self.parse(*json.loads(key)))

    def run(self, seed: int | None = None, hyperparameters: Mapping[str, Any] | None = None) -> RunConfig:
        """The run of this arm, with the solver's and then the tuned values merged into it.

        Args:
            seed: default the seed of tuning runs.
            hyperparameters: dotted field -> value.

        Raises:
            ConfigError: with paths below ``arms.<arm>`` (or ``base`` if the mistake is there).
        """
        key = json.dumps([{**self.solved, **(hyperparameters or {})}, self._seed if seed is None else seed])
        return self._parsed(key)

    @property
    def planned(self) -> dict[Stage, int]:
        """Stage -> training runs."""
        return self._planned(len(self.space))

    def first_run(self) -> RunConfig:
        """The run as its first tuning trial trains it."""
        return self.run(hyperparameters=self.points[0] if self.points else None)

    def sets(self, path: str) -> bool:
        """Whether the arm's own changes set the field at ``path``."""
        return path in flatten(self._changes)

    def parse(self, values: Mapping[str, Any], seed: int | None = None) -> RunConfig:
        """The run with ``values`` merged into it, the solver's left out."""
        changes = expand_dotted(values)
        seed = self._seed if seed is None else seed
        seeds = {"seed": seed, "seeds": self._confirmation.component_seeds(seed)}
        merged = deep_merge(deep_merge(deep_merge(self._base, self._changes), changes), seeds)
        try:
            return RunConfig.parse(merged).pinned(self._weights)
        except ConfigError as error:
            problems = [replace(p, path=f"{self._origin(p.path, changes)}.{p.path}") for p in error.problems]
            raise ConfigError(problems) from None

    def _origin(self, path: str, changes: Mapping[str, Any]) -> str:
        """``base`` or ``arms.<arm>``: where the field at ``path`` of the run was written."""
        prefix = path.replace("[", ".[") + "."

        def sets(fields: Mapping[str, Any]) -> bool:
            names = (f"{name}." for name in flatten(fields))
            return any(prefix.startswith(name) or name.startswith(prefix) for name in names)

        return "base" if sets(self._base) and not sets({**self._changes, **changes}) else f"arms.{self.name}"


class Arms(Mapping[str, Arm]):
    """The arms of an ablation by name, the baseline first. Made by :func:`resolve`."""

    def __init__(self, config: AblationConfig, arms: Mapping[str, Arm], target: float | None):
        self.config = config
        self.target = target
        """The amount that every arm's quantity of the budget's axis is brought to; None for seconds."""
        self._arms = dict(arms)

    def __getitem__(self, name: str) -> Arm:
        return self._arms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arms)

    def __len__(self) -> int:
        return len(self._arms)

    @property
    def baseline(self) -> Arm:
        return next(iter(self._arms.values()))

    @property
    def metric(self) -> Metric:
        """What the arms are judged by."""
        return self.baseline.run().data.metric

    @property
    def solved(self) -> dict[str, dict[str, int]]:
        """Arm -> fields that the budget's solver sets in it; arms without any are left out."""
        return {name: arm.solved for name, arm in self.items() if arm.solved}

    @property
    def weights(self) -> dict[str, str]:
        """Fingerprints of the initial weights of all settings that are fixed before launch, by
        :attr:`~workbench.transforms.StartConfig.source`."""
        runs = (arm.run(hyperparameters=point) for arm in self.values() for point in ({}, *arm.points))
        starts = (run.pinned().start for run in runs)
        return {start.source: start.fingerprint for start in starts if start is not None and start.fingerprint}

    def check_setting(self, name: str, hyperparameters: Mapping[str, Any]) -> None:
        """Raise ConfigError if a setting makes no valid run of an arm, or moves it off the budget beyond the tolerance.

        Seconds are known only for what was measured. Training FLOPs are used instead (our choice), relative to those of
        the arm without the setting.
        """
        arm, budget = self[name], self.config.budget
        run = arm.run(hyperparameters=hyperparameters)
        if budget.allow_mismatch:
            return
        axis = budget.changed(axis="flops") if budget.axis == "seconds" else budget
        untuned, amount = quantity(axis, arm.run()), quantity(axis, run)
        mismatch = amount / (untuned if self.target is None else self.target) - 1
        if amount == untuned or abs(mismatch) <= budget.tolerance:  # an arm that is off untuned is refused at launch
            return

        def shift(field: str) -> float:
            try:
                return abs(quantity(axis, arm.run(hyperparameters={field: hyperparameters[field]})) - untuned)
            except ConfigError:  # not a valid run without the other fields
                return 0.0

        field = max(hyperparameters, key=shift)
        raise ConfigError.at(
            f"tuning.space.{field}",
            got=hyperparameters[field],
            expected=f"settings of arm {name!r} within {budget.tolerance:.1%} of the budget, not {share(mismatch)} "
            f"(budget.axis={budget.axis})",
            do="Tune only what the matched quantity does not depend on (a range in tuning.space overrides a "
            "variant's own), or give a reason in budget.allow_mismatch.",
        )


def resolve(
    config: AblationConfig,
    solved: Mapping[str, Mapping[str, int]] | None = None,
    weights: Mapping[str, str] | None = None,
) -> Arms:
    """Resolve an ablation's description: parse every arm's run, match the budget, derive search spaces and settings.

    Args:
        config: the description.
        solved: what the budget's solver found when the ablation was launched; without it the solver runs now. Values
            for seconds have to be measured first (:mod:`workbench.ablation.cost.timing`).
        weights: fingerprints of initial weights, by source, as recorded at launch; others are read from the folders.

    Raises:
        ConfigError: with the mistakes of all arms at once, each with its field path.
    """
    arms = {name: Arm(config, name, (solved or {}).get(name, {}), weights or {}) for name in config.order}
    _collect(lambda arm: arm.parse({}), arms.values())
    target = _match_budget(config, arms, solved is not None)
    resolved = Arms(config, arms, target)
    _collect(lambda arm: _check_run(resolved, arm), arms.values())
    for arm, space in zip(arms.values(), _collect(lambda arm: _space(config, arm), arms.values())):
        arm.space = space
    _set_points(config, arms)
    _collect(lambda arm: _check_points(resolved, arm), arms.values())
    return resolved


def _collect(check: Callable[[Arm], T], arms: Iterable[Arm]) -> list[T]:
    """``check`` of every arm; raises the mistakes of all of them together, one that several share once."""
    results: list[T] = []
    problems: dict[Problem, None] = {}
    for arm in arms:
        try:
            results.append(check(arm))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))
    return results


def _match_budget(config: AblationConfig, arms: Mapping[str, Arm], is_solved: bool) -> float | None:
    """Set what the solver finds in every arm, unless it is known; the budget's target, None for seconds."""
    budget = config.budget
    for path in budget.free:
        require(
            any(tunable_value(arm.parse({}), path) is not None for arm in arms.values()),
            "budget.free",
            got=path,
            expected="a field of a run that holds a whole number",
            do="Such as model.feedforwards.swiglu.hidden, model.depth or training.tokens.",
        )
    if budget.axis == "seconds":
        return None
    reference = config.reference_arm
    if reference is None:
        assert isinstance(budget.target, int | float)
        target = float(budget.target)
    else:
        target = quantity(budget, arms[reference].parse({}))
    require(
        target > 0,
        "budget.axis",
        got=f"{budget.axis}, of which {reference} has none",
        expected="a quantity that the target has",
    )
    for arm in arms.values() if not is_solved else ():
        free = [path for path in budget.free if not arm.sets(path)]
        if free and arm.name != reference:
            arm.solved = solve(arm.parse, budget, free, target)
    return target


def _check_points(arms: Arms, arm: Arm) -> None:
    for point in arm.points:
        arms.check_setting(arm.name, point)


def _check_run(arms: Arms, arm: Arm) -> None:
    config, metric, run = arms.config, arms.metric, arm.run()
    require(
        run.data.metric == metric,
        f"arms.{arm.name}.data",
        got=run.data.metric.unit,
        expected=f"the baseline's metric, {metric.unit}",
        do="Compare arms on one kind of data.",
    )
    if run.start is not None and run.start.is_paired and not run.start.fingerprint:
        for seed in (*(config.tuning.seeds if config.tuning.trials else ()), *config.planned_seeds):
            try:
                run.start.folder_of(seed)
            except ConfigError as error:
                raise error.under(f"arms.{arm.name}") from None
    devices = config.launch.devices
    require(
        run.training.batch_size % devices == 0,
        f"arms.{arm.name}.training.batch_size",
        got=run.training.batch_size,
        expected=f"a multiple of launch.devices={devices}, which share its rows",
    )
    try:
        run.check_experts(devices)
    except ConfigError as error:
        raise error.under(f"arms.{arm.name}") from None
    first, second = (arm.run(seed).identity for seed in (config.tuning.seed, *config.confirmation.seeds)[:2])
    require(
        first != second,
        "base.seeds",
        got="a seed for every component, so that every run is the same",
        expected="at least one of init, order, other left to the run's seed",
    )
    require(
        config.protocol.metric in (None, metric.unit),
        "protocol.metric",
        got=config.protocol.metric,
        expected=f"the data's metric, {metric.unit!r}",
    )
    _check_secondary(config, run)
    require(
        config.tuning.pruner == "none" or run.training.evaluations > SMOOTHING,
        "base.training.evaluations",
        got=run.training.evaluations,
        expected=f"at least {SMOOTHING + 1} to prune by",
        do="Or set tuning.pruner: none.",
    )


def _check_secondary(config: AblationConfig, run: RunConfig) -> None:
    """Check that a suite measures every secondary metric at the end of the run, on the documents that it is judged on.
    Tasks and names of metrics are checked at launch, with the data."""
    suites = {suite.label: suite for suite in run.evaluation}
    for index, score in enumerate(config.protocol.secondary):
        path, suite = f"protocol.secondary[{index}].suite", suites.get(score.suite)
        if suite is None:
            do = nearest(score.suite, suites) if suites else "List the suite under base.evaluation."
            raise ConfigError.at(path, got=score.suite, expected="the name of a suite under evaluation", do=do)
        require(
            "end" in suite.when,
            path,
            got=f"{score.suite}, which measures after steps {', '.join(map(str, suite.when))}",
            expected="a suite that measures the end of a run",
            do="Add `end` to its field `when`.",
        )
        require(
            suite.split == "report",
            path,
            got=f"{score.suite}, which measures the {suite.split} split",
            expected="a suite that measures the report split",
            do="Tuning has seen the others.",
        )


def _space(config: AblationConfig, arm: Arm) -> dict[str, Range]:
    """Search space of an arm: the declared fields that its model has.

    With ``tuning.variants``, the search spaces of its components and of its optimiser as well.
    """
    model = arm.run().model
    components = [(f"model.{path}.", cls, component) for path, cls, component in model.settings()]

    def exists(name: str) -> bool:
        if name.startswith("model.embedding."):  # of one embedding; its fields depend on the kind
            return name.removeprefix("model.embedding.") in type(model.embedding_config).model_fields
        prefixes = tuple(prefix for prefix, _, _ in components)
        return not name.startswith(("model.mixers.", "model.feedforwards.")) or name.startswith(prefixes)

    space = {name: choice for name, choice in config.tuning.space.items() if exists(name)}
    if not config.tuning.variants:
        return space
    optimiser = arm.run().training.optimiser
    added = [(prefix, cls.search_space(component, model.width or 0)) for prefix, cls, component in components]
    added.append(("training.optimiser.", optimisers[optimiser.kind].search_space(optimiser)))
    for prefix, component_space in added:
        for name, choice in component_space.items():
            config.tuning.check_field(prefix + name)
            space.setdefault(prefix + name, choice)
    return space


def _set_points(config: AblationConfig, arms: Mapping[str, Arm]) -> None:
    spaces = {name: arm.space for name, arm in arms.items()}
    from_variants = sorted({name for space in spaces.values() for name in space} - set(config.tuning.space))
    names = [*config.tuning.space, *from_variants]
    try:
        if config.tuning.interpolate:
            _check_interpolated(spaces)
        check_enqueued(config.tuning, spaces)
        for arm, points in zip(
            arms.values(), _collect(lambda arm: fixed_points(config.tuning, arm.space, names), arms.values())
        ):
            arm.points = points
    except ConfigError as error:
        raise error.under("tuning") from None


def _check_interpolated(spaces: Mapping[str, Mapping[str, Range]]) -> None:
    """Raise ConfigError if an arm tunes anything but one numeric field: it would be confirmed at a worse setting than
    the arms that are interpolated."""
    for arm, space in spaces.items():
        is_fit = len(space) == 1 and all(choice.is_numeric for choice in space.values())
        require(
            is_fit
            and not any(choice.values and all(isinstance(v, int) for v in choice.values) for choice in space.values()),
            "interpolate",
            got=f"{', '.join(space) or 'nothing'} tuned in arm {arm!r}",
            expected="one numeric field in every arm, not listed as whole numbers",
        )
