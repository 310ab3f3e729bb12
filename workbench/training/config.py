"""The configuration of one training run: model, data, training, start, seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.accounting import account
from workbench.config import Config, ConfigError, hash_of, require
from workbench.contract import FeedForward, ParameterRole, Role, feedforwards, mixers
from workbench.data import BatchPlan, BatchPlanConfig, RowStream, RunFacts, Source, SourceConfig, batch_plans, sources
from workbench.evaluation import DecodingConfig, DocumentSuite, Suite, SuiteConfig, suites
from workbench.guards import GuardSetting
from workbench.model.config import Layer, ModelConfig
from workbench.optimisers import OptimiserSetting, optimisers
from workbench.parametrisations import Shape, learning_rate_factor
from workbench.results import RunRecord
from workbench.seeding import COMPONENTS, Component, Seed
from workbench.status import Stage
from workbench.training.average import AverageConfig
from workbench.training.budgets import BudgetSetting
from workbench.training.qk_clip import QKClipConfig
from workbench.transforms import GrowthConfig, StartConfig, TransformSetting, build_transforms, check_transforms


class TrainingConfig(Config):
    """How a model is trained. Lengths are counted in tokens and steps, never in seconds."""

    tokens: Annotated[int, Field(ge=0)] = 400_000
    """Training tokens, rounded down to whole steps. 0 trains nothing: the run measures the weights of ``start``."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows of a micro-batch, over all devices."""
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens T of a row."""
    buckets: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Lengths of rows, rising to ``context``: every row has one document (or example), padded to the smallest length
    that it fits in, and every length is compiled once. A row then counts as ``context`` tokens. Default: all rows have
    ``context`` tokens and are packed with documents."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimiser step."""
    ranks: Literal["sharded", "replicated"] = "sharded"
    """What the ranks of a run on several devices store: shards of the weights (FSDP2), so that they wait for each other
    in every layer; or all weights, so that they wait once per step, when gradients are summed. The numbers differ by
    rounding."""
    expert_parallel: bool = False
    """Whether each of several ranks stores whole experts of every mixture, to which the tokens of all ranks are sent
    (expert parallelism), instead of shards of all experts, which are gathered for every use. Needs experts that the
    ranks can divide evenly. The numbers differ by rounding."""
    batch_plan: Annotated[SerializeAsAny[BatchPlanConfig], BeforeValidator(batch_plans.parse)] = Field(
        default="contiguous", validate_default=True
    )
    """Which rows of a global batch each rank and micro-batch takes: contiguous, or a registered plan."""
    budgets: BudgetSetting | None = None
    """How many blocks per query each layer attends in each micro-batch: {kind: dst, table: …}, or another registered
    tuner. Default: the number that the mixer's configuration sets."""
    optimiser: OptimiserSetting = Field(default="adamw", validate_default=True)
    """The optimiser: adamw (the default kind), or another registered one."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Learning-rate factors of single tensors, by shell pattern over parameter names: {"embedding.*": 0.5}."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices; vectors, gains and embeddings have none."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Maximum global gradient norm."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Learning-rate schedule: warm-up, a constant rate and decay (wsd), or warm-up and cosine."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the steps spent on warm-up."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Fraction of the steps spent on decay (wsd)."""
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """How the rate falls over the decay of a wsd schedule, of which a fraction x is done: 1 - x, 1 - sqrt(x) (arXiv
    2405.18392), or half a cosine."""
    keep_trunk: bool = False
    """Whether to keep the checkpoint at which the decay of a wsd schedule begins, from which longer runs can branch
    (`workbench branch`)."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate as a fraction of the peak."""
    guards: tuple[GuardSetting, ...] = ()
    """What watches losses and gradients, each with an action for the steps that it rejects: {kind: spike, action:
    skip}. Rejected steps are counted; 20 skipped in a row end the run as diverged. Default: none; a loss or gradient
    that is not finite ends the run."""
    roll_back_window: Annotated[int, Field(ge=2)] = 50
    """Steps that a guard with action roll_back undoes together; it returns to one to two windows before the rejected
    step."""
    qk_clip: QKClipConfig | None = None
    """Bounds on attention scores through the weights, after every step: {threshold: 100}. Default: none."""
    ema: AverageConfig | None = None
    """An exponential moving average of the weights, with which the run is measured: {decay: 0.999}. Default: none."""
    transforms: tuple[TransformSetting, ...] = ()
    """Weight transforms of the model to itself, in order: once before the first step, or with ``every`` after every
    so many steps, except the last."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass; weights and optimiser state stay fp32."""
    fp8: Literal["row", "tensor"] | None = None
    """Whether projections multiply in eight bits in training, with one scale per row or per tensor; needs precision
    bf16 and a GPU from Hopper on. Embeddings, heads, routers, experts and the gates of recurrent states stay in bf16,
    as does evaluation. Default: not."""
    compile: bool | None = None
    """Whether to compile blocks with torch.compile. Default: on CUDA devices."""
    recompute: bool = False
    """Whether to recompute activations in the backward pass instead of storing them (activation checkpointing): less
    memory, about a third more FLOPs, the same numbers."""
    deterministic: bool = False
    """Whether to raise an error on operations that are not deterministic, so that the same run on the same kind of
    device gives the same bits. Otherwise deterministic operations are used where torch has them."""
    log_every: Annotated[int, Field(ge=1)] = 5
    """Steps between lines of metrics.jsonl."""
    evaluations: Annotated[int, Field(ge=1)] = 4
    """Number of evaluations on the selection split, evenly spread; the last one at the end."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.steps >= 1 or self.tokens == 0,
            "tokens",
            got=self.tokens,
            expected=f"at least one step ({self.tokens_per_step} tokens)",
            do="Give more tokens, or a smaller batch_size, context or accumulate.",
        )
        require(
            not self.buckets or list(self.buckets) == sorted({*self.buckets, self.context}),
            "buckets",
            got=list(self.buckets),
            expected=f"rising lengths, the last of them context={self.context}",
        )
        require(
            self.warmup + (self.decay if self.schedule == "wsd" else 0) <= 1,
            "decay",
            got=self.decay,
            expected=f"at most 1 - warmup ({1 - self.warmup:g})",
        )
        require(
            self.fp8 is None or self.precision == "bf16",
            "fp8",
            got=f"{self.fp8!r} with precision {self.precision}",
            expected="precision: bf16",
        )
        require(
            self.fp8 is None or all(self.batch_size * length % 16 == 0 for length in self.buckets or (self.context,)),
            "fp8",
            got=f"{self.batch_size} rows of {' or '.join(map(str, self.buckets or (self.context,)))} tokens",
            expected="a micro-batch of a multiple of 16 tokens",
        )
        require(
            not self.expert_parallel or self.ranks == "sharded",
            "expert_parallel",
            got=f"true with ranks: {self.ranks}, which all store all weights",
            expected="ranks: sharded",
            do="Leave one of the two out.",
        )
        acting = [guard.name for guard in self.guards if guard.action != "count"]
        require(
            not acting or optimisers[self.optimiser.kind].skips_on_found_inf,
            "guards",
            got=f"{', '.join(acting)} with optimiser {self.optimiser.kind!r}",
            expected="an optimiser that can skip a step on the device",
            do="Choose another optimiser, or only count: action: count.",
        )
        require(
            not self.rolls_back or all(transform.every is None for transform in self.transforms),
            "guards",
            got="action roll_back with transforms that are applied during training",
            expected="transforms before the first step only: a return to earlier weights would undo them",
            do="Choose action: skip, or leave `every` out.",
        )

    @property
    def rolls_back(self) -> bool:
        """Whether a guard may return the run to earlier weights."""
        return any(guard.action == "roll_back" for guard in self.guards)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.context * self.accumulate

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.tokens_per_step

    @property
    def rows(self) -> int:
        """Rows of all optimiser steps."""
        return self.steps * self.batch_size * self.accumulate

    @property
    def trunk_steps(self) -> int:
        """Steps before the decay of a wsd schedule."""
        return self.steps - math.ceil(self.decay * self.steps)


def _source(data: object) -> Any:
    return sources.parse(data, default_kind="text")


class Phase(NamedTuple):
    """Steps of a run that train one model."""

    model: ModelConfig
    first: int
    """Steps before this phase."""
    last: int
    """The phase's last step, from 1."""


class Seeds(Config):
    """Seeds of single components of a run's randomness. None: the run's ``seed``."""

    init: Seed | None = None
    """Initial weights."""
    order: Seed | None = None
    """Order of the training data; of a task, its training examples."""
    other: Seed | None = None
    """The global generators of Python, numpy and torch, from which a variant draws dropout, router noise or samples."""


SuiteSettings: TypeAlias = tuple[Annotated[SerializeAsAny[SuiteConfig], BeforeValidator(suites.parse)], ...]
"""Suites by name, or as mappings with their ``kind``."""


def check_names(configs: tuple[SuiteConfig, ...]) -> None:
    """Raise ConfigError when two suites have one name."""
    names = [config.label for config in configs]
    for index, name in enumerate(names):
        require(
            name not in names[:index],
            f"evaluation[{index}].name",
            got=name,
            expected="a separate name for every suite",
            do="Two suites of one kind need names: {kind: …, name: …}.",
        )


RECORDED_ONLY = ("log_every", "evaluations", "checkpoint_every", "keep_trunk")
"""Fields of :class:`TrainingConfig` that decide what is recorded and leave the weights as they are."""


class RunConfig(Config):
    """One training run. Its hash is the run's identity."""

    @classmethod
    def check_kind(cls, data: Mapping[str, Any], origin: str) -> None:
        """Refuse the file of an ablation."""
        require(
            "arms" not in data,
            origin,
            got="an ablation (it has `arms`)",
            expected="a single training run",
            do=f"Run it with: workbench run {origin}",
        )

    model: ModelConfig = ModelConfig()
    """The model."""
    data: Annotated[SerializeAsAny[SourceConfig], BeforeValidator(_source)] = Field(default={}, validate_default=True)
    """Training and evaluation data: text (the default kind), or a registered task such as mqar or needle."""
    training: TrainingConfig = TrainingConfig()
    """The training."""
    start: StartConfig | None = None
    """Trained weights to start from, and how they are transformed. Default: random weights."""
    growth: GrowthConfig | None = None
    """A smaller model that the run trains first, and how it grows into ``model``. Default: none."""
    evaluation: SuiteSettings = ()
    """Suites that measure the run beside the primary metric, at its end or after the steps that they name. Their
    results are in separate tables and change nothing that the run is judged on. In an ablation they measure
    confirmation runs only."""
    decoding: DecodingConfig | None = None
    """The decoding policy that everything is measured through, and how documents are read. Needs training.tokens: 0.
    Default: every document is read in one pass."""
    seed: Seed = 0
    """Seed of the run; initial weights, data order and everything else are derived from it separately. Never tuned."""
    seeds: Seeds = Seeds()
    """Seeds of single components instead: {order: 3} changes the data order and nothing else."""
    allow_document_leaks: bool = False
    """Whether components that cannot separate the packed documents of a row may train. The result carries a caution."""

    @property
    def primary_suite(self) -> DocumentSuite:
        """The suite of the primary metric, which runs at every evaluation."""
        kind = self.data.metric.suite
        suite: Suite = suites[kind](suites.parse(kind))
        assert isinstance(suite, DocumentSuite)
        return suite

    def suites_at(self, moment: int | Literal["end"]) -> tuple[SuiteConfig, ...]:
        """The suites that measure the run after an optimiser step, or at its end."""
        return tuple(config for config in self.evaluation if moment in config.when)

    def seed_of(self, component: Component) -> int:
        """The seed of initial weights (init), data order (order) or everything else (other)."""
        seed: int | None = getattr(self.seeds, component)
        return self.seed if seed is None else seed

    def model_post_init(self, _context: Any) -> None:
        without = self.model.lacking("segments")
        require(
            self.allow_document_leaks or not without,
            "model",
            got=", ".join(without),
            expected="components that separate the packed documents of a row",
            do="Choose others, or set allow_document_leaks: true to train across documents.",
        )
        require(
            self.model.readout == self.data.readout,
            "model.readout",
            got=self.model.readout,
            expected=f"{self.data.readout} with data of kind {self.data.kind!r}",
            do=f"Set model.readout: {self.data.readout}." if self.data.readout else "Leave model.readout out.",
        )
        require(
            self.model.lora is None or self.start is not None,
            "model.lora",
            got="adapters of random weights",
            expected="trained weights to start from",
            do="Give start.folder, or leave the adapters out.",
        )
        self._check_measured_only()
        try:
            self.data.check(self.model.vocabulary or 0, self.training.context)
        except ConfigError as error:
            raise error.under("data") from None
        family = optimisers[self.training.optimiser.kind](self.training.optimiser).update_family
        one = Shape(1, 1)
        for role in Role:  # raises where the parametrisation has no rule for updates of this optimiser
            learning_rate_factor(self.model.parametrised, role, family(ParameterRole.of(role)), one, one, 1.0)
        if self.growth is not None:
            require(
                self.training.steps > 1,
                "training.tokens",
                got=self.training.tokens,
                expected="two steps: one per model",
            )
            self.growth.check(self.model)
        if self.training.budgets is not None:
            try:
                for phase in self.phases:
                    self.training.budgets.check(phase.model)
            except ConfigError as error:
                raise error.under("training.budgets") from None
        if self.training.qk_clip is not None:
            try:
                for phase in self.phases:
                    self.training.qk_clip.check(phase.model)
            except ConfigError as error:
                raise error.under("training.qk_clip") from None
        check_names(self.evaluation)
        for index, suite in enumerate(self.evaluation):
            try:
                suite.check(self.model.vocabulary or 0, self.training.context)
            except ConfigError as error:
                raise error.under(f"evaluation[{index}]") from None
            late = [moment for moment in suite.when if moment != "end" and moment >= self.training.steps]
            require(
                not late,
                f"evaluation[{index}].when",
                got=late,
                expected=f"steps before the last one ({self.training.steps}), or end",
            )
        for index, transform in enumerate(build_transforms(self.training.transforms)):
            try:
                for phase in self.phases:
                    check_transforms([transform], phase.model, phase.model)
            except ConfigError as error:
                raise error.under(f"training.transforms[{index}]") from None

    def _check_measured_only(self) -> None:
        """Check what a run without training may have."""
        is_trained = self.training.tokens > 0
        require(
            is_trained or self.start is not None,
            "training.tokens",
            got=0,
            expected="trained weights to measure",
            do="Give start.folder, or tokens to train on.",
        )
        require(
            is_trained or (self.growth is None and self.training.ema is None and self.training.qk_clip is None),
            "training.tokens",
            got="0, with growth, ema or qk_clip",
            expected="none of these where nothing is trained",
        )
        require(
            self.decoding is None or not is_trained,
            "decoding",
            got=f"a policy in a run that trains on {self.training.tokens} tokens",
            expected="finished weights: training.tokens: 0 and start.folder",
            do="Train without it; then measure the runs of that ablation, paired by seed, in another one.",
        )
        if self.decoding is not None:
            try:
                self.decoding.check(self.model)
            except ConfigError as error:
                raise error.under("decoding") from None

    def canonical(self) -> dict[str, Any]:
        start = None if self.start is None else self.start.canonical()
        plain = self.plain()
        if not self.allow_document_leaks:
            del plain["allow_document_leaks"]
        del plain["seeds"]
        if len(seeds := {self.seed_of(component) for component in COMPONENTS}) == 1:
            plain["seed"] = seeds.pop()
        else:
            plain["seed"] = {component: self.seed_of(component) for component in COMPONENTS}
        plain["training"]["batch_plan"] = self.training.batch_plan.canonical()
        if self.training.budgets is not None:
            plain["training"]["budgets"] = self.training.budgets.canonical()
        for name in (
            "budgets",
            "deterministic",
            "ema",
            "expert_parallel",
            "fp8",
            "keep_trunk",
            "qk_clip",
            "transforms",
        ):
            if not plain["training"][name]:
                del plain["training"][name]  # off: the run is the same
        if self.training.schedule == "cosine" or self.training.decay_shape == "linear":
            del plain["training"]["decay_shape"]
        if not self.training.rolls_back:
            del plain["training"]["roll_back_window"]
        # under the name of the field that was here first, so that runs without guards keep their identity
        plain["training"]["spike_factor"] = plain["training"].pop("guards") or None
        if not plain["training"]["buckets"]:
            del plain["training"]["buckets"]
        if plain["training"]["ranks"] == "sharded":
            del plain["training"]["ranks"]
        if plain["training"]["batch_plan"]["kind"] == "contiguous":
            del plain["training"]["batch_plan"]
        if not plain["evaluation"]:
            del plain["evaluation"]
        if self.decoding is None:
            del plain["decoding"]
        elif self.decoding.cache_dtype == "model":
            del plain["decoding"]["cache_dtype"]
        if self.growth is None:
            del plain["growth"]
        else:
            plain["growth"]["model"] = self.growth.small(self.model).canonical()
        return {**plain, "model": self.model.canonical(), "start": start}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What the run trains, in order: its model, or a small one and then its model."""
        steps = self.training.steps
        if self.growth is None:
            return (Phase(self.model, 0, steps),)
        grows = self.growth.step(steps)
        return Phase(self.growth.small(self.model), 0, grows), Phase(self.model, grows, steps)

    def phase_at(self, step: int) -> Phase:
        """The phase whose model a checkpoint of ``step`` contains; that of the step at which it ends is written before
        the model grows."""
        return next(phase for phase in self.phases if step <= phase.last)

    def of(self, phase: Phase) -> RunConfig:
        """The run as it is in one of its phases: with the model of that phase."""
        return self if phase.model is self.model else self.model_copy(update={"model": phase.model, "growth": None})

    def check_experts(self, devices: int) -> None:
        """Check that ``devices`` ranks can divide the experts of every layer, if they are to
        (``training.expert_parallel``).

        Raises:
            ConfigError: where they cannot.
        """
        if not self.training.expert_parallel or devices == 1:
            return
        for phase in self.phases:
            model = phase.model
            blocks = [*model.layers, *([model.mtp_layer] if model.mtp_layer else [])]
            for config in dict.fromkeys([*(layer.feedforward for layer in blocks), *model.shortcuts]):
                cls = feedforwards[config.kind]
                assert issubclass(cls, FeedForward)
                experts = cls.num_experts(config)
                roles = [role if isinstance(role, Role) else role.role for role in cls.roles.values()]
                require(
                    experts > 0 or Role.EXPERT not in roles,
                    "training.expert_parallel",
                    got=f"true with feed-forward {config.kind!r}, whose experts stay on every rank",
                    expected="feed-forwards whose experts ranks can divide (`num_experts`)",
                    do="Choose another feed-forward, or set training.expert_parallel: false.",
                )
                nearest = max(devices, round(experts / devices) * devices)
                require(
                    experts % devices == 0,
                    f"model.feedforwards.{config.kind}.experts",
                    got=experts,
                    expected=f"a multiple of the {devices} devices, each of which stores equally many",
                    do=f"Nearest: {nearest}. Or set training.expert_parallel: false.",
                )

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole training, those of a small model included."""
        training = self.training
        per_token = [account(phase.model, training.context).training_flops for phase in self.phases]
        steps = [phase.last - phase.first for phase in self.phases]
        return sum(flops * number * training.tokens_per_step for flops, number in zip(per_token, steps))

    def pinned(self, weights: Mapping[str, str] | None = None) -> RunConfig:
        """With the fingerprint of the initial weights and of the files of its batch plan and budget tuner, so that its
        identity needs no files.

        Args:
            weights: source (:attr:`StartConfig.source`) -> fingerprint; default what the folder contains. Those that it
                lacks stay as they are.
        """
        plan, budgets = self.training.batch_plan, self.training.budgets
        pinned = {"batch_plan": plan.pinned(), "budgets": budgets.pinned() if budgets is not None else None}
        if pinned["batch_plan"] is not plan or pinned["budgets"] is not budgets:
            return self.changed(training=self.training.changed(**pinned)).pinned(weights)
        if self.start is None or self.start.fingerprint:
            return self
        if weights is None:
            return self.changed(start=self.start.pinned())
        known = weights.get(self.start.source)
        return self if known is None else self.changed(start=self.start.changed(fingerprint=known))

    def epochs(self, data: Source) -> float | None:
        """How often training reads the text of ``data``; None for a task, whose rows are all new."""
        return self.stream(data).epochs(self.training.rows)

    def stream(self, data: Source) -> RowStream:
        """The training rows of ``data``."""
        training = self.training
        return data.stream(context=training.context, seed=self.seed_of("order"), buckets=training.buckets)

    @property
    def batch_plan(self) -> BatchPlan:
        """The plan that distributes the rows of a step over ranks and micro-batches."""
        model = self.model
        facts = RunFacts(
            flops=lambda length: account(model, length).training_flops * length,
            budgets=tuple(_configured_blocks(layer) for layer in model.layers),
            wait="step" if self.training.ranks == "replicated" else "micro_batch",
        )
        plan = self.training.batch_plan
        return batch_plans[plan.kind](plan, facts)

    @property
    def setting(self) -> str:
        """Twelve hexadecimal digits of what decides the trained weights and how they are read, except the seed: two
        runs with the same setting and seed have the same weights, whatever they are measured on and however often they
        are logged."""
        plain = self.canonical()
        for name in ("seed", "evaluation"):
            plain.pop(name, None)
        plain["data"] = {name: value for name, value in plain["data"].items() if name not in self.data.measured_only}
        plain["training"] = {name: value for name, value in plain["training"].items() if name not in RECORDED_ONLY}
        return hash_of(plain)


def _configured_blocks(layer: Layer) -> int | None:
    """Blocks per query of a layer; None where it selects none."""
    per_query = mixers[layer.mixer.kind].blocks_per_query(layer.mixer)
    return None if per_query is None else per_query.configured


def describe_run(config: RunConfig, data: str, *, arm: str, stage: str, **about: Any) -> RunRecord:
    """The record of a run: its configuration, its identity and what follows from them.

    Args:
        config: the run.
        data: fingerprint of its prepared data.
        arm: its arm in the ablation.
        stage: its stage in the ablation.
        about: further fields of :class:`RunRecord`.
    """
    config = config.pinned()
    return RunRecord(
        arm=arm,
        stage=Stage(stage),
        seed=config.seed,
        identity=config.identity,
        setting=config.setting,
        data=data,
        steps=config.training.steps,
        tokens=config.training.steps * config.training.tokens_per_step,
        parameters=account(config.model, config.training.context).parameters,
        config=config.plain(),
        metric=config.data.metric,
        **about,
    )
