"""The search for each arm's hyper-parameters, as declared."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.config import Config, ConfigError, require
from workbench.distribution import install_extra
from workbench.ranges import Range
from workbench.seeding import Seed

__all__ = ["ADAPTIVE", "EXCHANGEABLE", "SMOOTHING", "Repeats", "Tuning"]

ADAPTIVE = ("tpe", "gp", "cmaes")
"""Samplers that learn from earlier trials; their draws depend on the order in which trials end."""
EXCHANGEABLE = ("random", "qmc")
"""Samplers any of whose trials might as well have come first: the best of k of them is that of a search of k trials."""
SMOOTHING = 3
"""Evaluations that are averaged before a trial is compared with others; none is pruned on fewer."""
HELD_EQUAL = ("training.tokens", "training.evaluations")
"""Fields that trials of one arm must share: they are compared at equal tokens."""
WITHOUT_EFFECT = (
    "allow_document_leaks",
    "evaluation",
    "training.batch_plan",
    "training.checkpoint_every",
    "training.compile",
    "training.deterministic",
    "training.keep_trunk",
    "training.log_every",
    "training.recompute",
)
"""Fields, with those below them, that decide how a run is carried out, measured or logged: its model is the same."""


class Repeats(Config):
    """Repeats of an arm's best settings on further seeds, so that its choice does not rest on the luck of one."""

    settings: Annotated[int, Field(ge=1)] = 3
    """Settings of each arm that are repeated: the best ones of its trials."""
    seeds: tuple[Seed, ...] = (1001, 1002)
    """Seeds that each of them is repeated on; neither ``tuning.seed`` nor confirmation seeds."""

    def model_post_init(self, _context: Any) -> None:
        unique = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        require(unique, "seeds", got=list(self.seeds), expected="at least one seed, all different")

    @property
    def runs(self) -> int:
        """Runs of each arm."""
        return self.settings * len(self.seeds)


class Tuning(Config):
    """The search for each arm's own setting: equal effort for every arm, judged on the selection split."""

    trials: Annotated[int, Field(ge=0, le=100_000)] = 3
    """Trials per arm, in total; with ``policy: per_dimension`` for each field that the arm tunes. 0 uses the base's
    settings unchanged."""
    policy: Literal["equal", "per_dimension"] = "equal"
    """How trials are shared out. equal: as many for every arm, so that none is favoured, but an arm with more tuned
    fields searches each of them less and may lose for that reason alone. per_dimension: ``trials`` for each tuned
    field, so that arms are searched about equally well, but one with more fields costs, and tries, more. The cost card
    shows both."""
    sampler: Literal["grid", "random", "qmc", "tpe", "gp", "cmaes"] = "random"
    """How settings are drawn. grid, random and qmc (a scrambled Sobol sequence) draw the same points for every arm, and
    are what published comparisons should use. tpe, gp and cmaes learn from earlier trials, so their curves depend on
    the order."""
    sampler_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler, the same for every arm."""
    space: dict[str, Range] = {}
    """Dotted fields of a run and their ranges: {training.learning_rate: {low: 1e-3, high: 1e-2, log: true}}."""
    variants: bool = False
    """Whether each arm's mixers, feed-forwards, embedding and optimiser add their search spaces; ranges in ``space``
    override theirs."""
    startup_trials: Annotated[int, Field(ge=1)] = 4
    """First trials of every arm: the same settings in every arm, never pruned. An adaptive sampler starts after
    them."""
    enqueue: tuple[dict[str, int | float | str | bool], ...] = ()
    """Settings that every arm tries before anything is drawn (known good ones), counted among its trials. Missing
    fields are drawn; fields that an arm does not tune are ignored."""
    warm_start: tuple[str, ...] = ()
    """Folders of earlier ablations whose finished tuning trials an adaptive sampler starts from, arm by arm of the same
    name. They do not count as trials and are never chosen."""
    pruner: Literal["none", "median", "hyperband"] = "none"
    """Stops hopeless trials early, only ever by comparison inside one arm, at equal tokens, after warm-up, on the mean
    of three evaluations."""
    seed: Seed = 1000
    """Seed of every trial; not one of the confirmation seeds."""
    repeats: Repeats | None = None
    """Repeats of each arm's best settings on further seeds; the setting with the best mean is chosen. Default: the best
    trial is chosen."""
    interpolate: bool = False
    """Whether an arm is confirmed at the optimum of a parabola through its best trials, where there is one between
    them, rather than at a setting that was tried. Every arm must tune one numeric field and no other."""

    def model_post_init(self, _context: Any) -> None:
        for name in self.space:
            self.check_field(name)
        for i, setting in enumerate(self.enqueue):
            for name in setting:
                self.check_field(name, f"enqueue[{i}]")
        require(
            self.sampler != "cmaes" or importlib.util.find_spec("cmaes") is not None,
            "sampler",
            got="cmaes",
            expected="a sampler whose package is installed",
            do=f"{install_extra('search')}, or use tpe or gp.",
        )
        require(
            not self.warm_start or self.sampler in ADAPTIVE,
            "warm_start",
            got=list(self.warm_start),
            expected=f"nothing: {self.sampler} does not learn",
            do=f"Use one of {', '.join(ADAPTIVE)}.",
        )
        require(
            not self.enqueue or self.sampler != "grid",
            "enqueue",
            got=list(self.enqueue),
            expected="nothing: a grid is its points",
        )
        require(
            len(self.enqueue) <= self.trials,
            "enqueue",
            got=f"{len(self.enqueue)} settings",
            expected=f"at most the {self.trials} trials",
        )
        require(
            self.policy == "equal" or self.sampler != "grid",
            "policy",
            got=self.policy,
            expected="equal: a grid has the points that its ranges list",
        )
        require(
            self.repeats is None or self.repeats.settings <= self.trials,
            "repeats.settings",
            got=self.repeats and self.repeats.settings,
            expected=f"at most the {self.trials} trials",
        )
        require(
            self.repeats is None or self.seed not in self.repeats.seeds,
            "repeats.seeds",
            got=self.seed,
            expected="other seeds than tuning.seed",
            do="The trials have that seed already.",
        )
        require(
            not self.interpolate or self.trials == 0 or self.trials >= 3,
            "interpolate",
            got=f"{self.trials} trials",
            expected="at least 3 to fit a parabola to, or none",
            do="Set tuning.interpolate to false, or try more settings.",
        )

    @staticmethod
    def check_field(name: str, path: str = "space") -> None:
        """Raise ConfigError if a field may not be searched.

        Args:
            name: of the field.
            path: where it was written, for the message.
        """
        if {"seed", "seeds"} & set(name.split(".")):
            raise ConfigError.at(
                path,
                got=name,
                expected="hyper-parameters only",
                do="A seed is noise to average over, never a hyper-parameter.",
            )
        if name in HELD_EQUAL:
            raise ConfigError.at(
                path,
                got=name,
                expected="fields that may differ between trials",
                do="Trials are compared at equal tokens: set it in `base`.",
            )
        if name == "data" or name.startswith("data."):
            raise ConfigError.at(
                path,
                got=name,
                expected="fields that a trial reads",
                do="Data are prepared once, at launch, and every trial trains on them: set it in `base` or in an arm.",
            )
        if any(name == field or name.startswith(f"{field}.") for field in WITHOUT_EFFECT):
            raise ConfigError.at(
                path,
                got=name,
                expected="fields that change the trained model",
                do="It decides how a run is carried out, measured or logged: set it in `base`.",
            )

    @property
    def num_shared(self) -> int:
        """The first trials, whose settings all arms share and which are never pruned."""
        return min(self.trials, max(self.startup_trials, len(self.enqueue)))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds behind a choice: that of the trials, then those of repeats."""
        return self.seed, *(self.repeats.seeds if self.repeats else ())

    @property
    def num_repeats(self) -> int:
        """Runs of an arm that repeat its best settings."""
        return self.repeats.runs if self.repeats else 0

    def num_trials(self, fields: int) -> int:
        """Trials of an arm that tunes so many fields."""
        return self.trials * (fields if self.policy == "per_dimension" else 1)

    def describe(self) -> str:
        """The search in words, without a full stop."""
        if not self.trials:
            return "none, every arm trains with its given settings"
        each = " for each field that it tunes" if self.policy == "per_dimension" else ""
        words = [f"{self.trials} trials per arm{each} ({self.sampler}, seed {self.seed})"]
        if self.repeats:
            seeds = ", ".join(map(str, self.repeats.seeds))
            words += [f"the best {self.repeats.settings} repeated on seeds {seeds}, the best mean chosen"]
        if self.interpolate:
            words += ["confirmed at the fitted optimum between trials"]
        return "; ".join(words)
