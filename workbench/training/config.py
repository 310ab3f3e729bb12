"""What one training run is: model, data, training, seed."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.accounting import account
from workbench.config import Config, ConfigError, require
from workbench.data import BatchPlanConfig, SourceConfig, batch_plans, sources
from workbench.model.config import ModelConfig
from workbench.results import RunRecord
from workbench.status import Stage
from workbench.transforms import StartConfig, TransformSetting, build_transforms, check_transforms


class TrainingConfig(Config):
    """How a model is trained. Everything is counted in tokens and steps, never in seconds."""

    tokens: Annotated[int, Field(ge=1)] = 400_000
    """Training tokens, rounded down to whole steps."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows in one micro-batch."""
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens T in one row."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches in one optimiser step."""
    batch_plan: Annotated[SerializeAsAny[BatchPlanConfig], BeforeValidator(batch_plans.parse)] = Field(
        default="contiguous", validate_default=True
    )
    """Which rows of a global batch each rank and micro-batch takes: contiguous, or a registered plan."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of AdamW."""
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Learning-rate factor of single tensors, by shell pattern over parameter names: {"embedding.*": 0.5}."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices; vectors, gains and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment coefficients."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Learning rate over steps: warm-up–stable–decay (linear decay), or warm-up and cosine."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps spent warming up."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps spent decaying (wsd)."""
    keep_trunk: bool = False
    """Whether the checkpoint at which a wsd schedule's decay begins is kept, so that longer runs can begin with this one's
    trunk (`workbench branch`)."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    spike_factor: Annotated[float | None, Field(gt=1)] = None
    """Skip an optimiser step whose gradient norm is not finite or more than so many times its running mean; skipped steps
    are counted, and 20 in a row end the run as diverged. Default: nothing is skipped."""
    transforms: tuple[TransformSetting, ...] = ()
    """Weight transforms of the model to itself, in order: once before the first step, or with ``every`` after every so many
    steps, the last one excepted."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and optimiser stay fp32."""
    compile: bool | None = None
    """Whether blocks are compiled by torch.compile. Default: on CUDA devices."""
    recompute: bool = False
    """Whether a block's activations are computed again in the backward pass instead of being kept: less memory, about a
    third more arithmetic, the same numbers."""
    deterministic: bool = False
    """Whether the same run on the same kind of device must give the same bits: an operation that cannot ends the run with its name.
    Without it deterministic operations are taken where torch has them, and nothing is refused."""
    log_every: Annotated[int, Field(ge=1)] = 5
    """Steps between lines in metrics.jsonl."""
    evaluations: Annotated[int, Field(ge=1)] = 4
    """Evaluations on the selection split, evenly spread; the last at the end."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""

    def model_post_init(self, _context: Any) -> None:
        if self.steps < 1:
            raise ConfigError.at(
                "tokens",
                got=self.tokens,
                expected=f"at least one step ({self.tokens_per_step} tokens)",
                do="Give more tokens, or a smaller batch_size, context or accumulate.",
            )
        if self.warmup + (self.decay if self.schedule == "wsd" else 0) > 1:
            raise ConfigError.at("decay", got=self.decay, expected=f"at most 1 - warmup ({1 - self.warmup:g})")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context * self.accumulate

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.tokens_per_step

    @property
    def trunk_steps(self) -> int:
        """Steps before the decay of a wsd schedule."""
        return self.steps - math.ceil(self.decay * self.steps)


def _source(data: object) -> Any:
    return sources.parse(data, default_kind="text")


class RunConfig(Config):
    """One training run, whole. Its hash is the run's identity."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: Annotated[SerializeAsAny[SourceConfig], BeforeValidator(_source)] = Field(default={}, validate_default=True)
    """What it is trained and measured on: text (the default kind), or a registered task such as mqar or needle."""
    training: TrainingConfig = TrainingConfig()
    """The training."""
    start: StartConfig | None = None
    """Trained weights to start from, and how they are transformed. Default: random weights."""
    seed: int = 0
    """Seed of the run; initial weights and data order derive from it separately. Never a search dimension."""

    allow_document_leaks: bool = False
    """Whether components that cannot keep the packed documents of a row apart may train. The result says so."""

    def model_post_init(self, _context: Any) -> None:
        without = self.model.lacking("segments")
        require(
            self.allow_document_leaks or not without,
            "model",
            got=", ".join(without),
            expected="components that keep the packed documents of a row apart",
            do="Choose others, or set allow_document_leaks: true to train across documents.",
        )
        try:
            self.data.check(self.model.vocabulary or 0, self.training.context)
        except ConfigError as error:
            raise error.under("data") from None
        for index, transform in enumerate(build_transforms(self.training.transforms)):
            try:
                check_transforms([transform], self.model, self.model)
            except ConfigError as error:
                raise error.under(f"training.transforms[{index}]") from None

    def canonical(self) -> dict[str, Any]:
        start = None if self.start is None else self.start.canonical()
        plain = self.plain()
        if not self.allow_document_leaks:
            del plain["allow_document_leaks"]
        for name in ("deterministic", "keep_trunk", "transforms"):
            if not plain["training"][name]:
                del plain["training"][name]  # what is off changes no identity
        if plain["training"]["batch_plan"]["kind"] == "contiguous":
            del plain["training"]["batch_plan"]
        return {**plain, "model": self.model.canonical(), "start": start}


def describe_run(config: RunConfig, data: str, *, arm: str, stage: str, **about: Any) -> RunRecord:
    """The record of a run: its configuration, its identity and what follows from them.

    Args:
        config: the run.
        data: fingerprint of its prepared data.
        arm, stage: its role in the ablation.
        about: further fields of :class:`RunRecord`.
    """
    return RunRecord(
        arm=arm,
        stage=Stage(stage),
        seed=config.seed,
        identity=config.identity,
        data=data,
        steps=config.training.steps,
        tokens=config.training.steps * config.training.tokens_per_step,
        parameters=account(config.model, config.training.context).parameters,
        config=config.plain(),
        metric=config.data.metric,
        **about,
    )
