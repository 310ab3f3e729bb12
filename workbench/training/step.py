"""One optimiser step: micro-batches, losses, clipping, guards, update.

Nothing here synchronises with the device; an exchange of rows between ranks that store whole experts does, in the
model.

Legend: B batch, T time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from workbench.contract import AuxOutputs, Budget, BudgetChoice, WarmUp
from workbench.data import Batch
from workbench.model import LanguageModel
from workbench.model.objectives import StepTotals, count_positions
from workbench.ops.scaled_linear import check_device
from workbench.pooled import Pooled
from workbench.training import parallel
from workbench.training.average import averaging
from workbench.training.budgets import StepLengths, budget_tuners
from workbench.training.compensation import without_rescaling
from workbench.training.config import RunConfig
from workbench.training.fp8 import use_fp8
from workbench.training.health import Health, gradient_rms_summary
from workbench.training.layer_monitors import epsilon_values, gradient_values, layers_of, watching
from workbench.training.optimiser import build_optimiser, optimiser_of
from workbench.training.qk_clip import QKClip
from workbench.training.rank_times import RankTimes
from workbench.training.roll_back import RollBack
from workbench.training.schedule import rate_at
from workbench.training.step_counters import StepCounters

DIAGNOSTIC_SNAPSHOTS = 20
"""Steps of a run whose layers write diagnostics, evenly spread; every step of a shorter run."""


class TrainStep:
    """Next-token training of a :class:`LanguageModel`, one optimiser step per call.

    The objective of a step is Σ numerators / Σ denominators over all its micro-batches and ranks, for every loss: the
    next token's, the multi-token head's, auxiliary ones. Denominators are counted first; each micro-batch of each rank
    then contributes its numerator divided by the step's denominator, and gradients are summed. So how a step is split
    changes rounding alone, unless a variant is defined on micro-batches (the capacity of experts, ``balance_over``).

    Args:
        model: on its device, and sharded or compiled if it is to be.
        optimiser: over the model's parameters; every group has an ``initial_lr``.
        config: the run.
        device: of model and batches.
        on_phase: called with ``"forward"`` and ``"backward"`` after these passes of every micro-batch, with
            ``"count"`` after a pass that only counts, and with ``"update"`` at the end of the step. For measurement.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimiser: Optimizer,
        config: RunConfig,
        device: torch.device,
        on_phase: Callable[[str], None] = lambda phase: None,
    ):
        self.model, self.optimiser, self.config, self.device, self.on_phase = model, optimiser, config, device, on_phase
        steps = config.training.steps
        self.diagnose_at = {math.ceil(steps * i / DIAGNOSTIC_SNAPSHOTS) for i in range(1, DIAGNOSTIC_SNAPSHOTS + 1)}
        self.counters = StepCounters(model)
        self.health = Health(config.training.guards, device)
        self.roll_back = (
            RollBack(model, optimiser, config.training.roll_back_window, device) if config.training.rolls_back else None
        )
        self.warm_ups = [_warm_up(layer) for layer in layers_of(model)]
        """The stage at the start of training that the mixer of each layer declares; None without one, and where whoever
        measures steps skips it."""
        clip = config.training.qk_clip
        self.qk_clip = None if clip is None else QKClip(model, clip, parallel.all_maximum)
        tuned = config.training.budgets
        self.tuner = None if tuned is None else budget_tuners[tuned.kind](config, device)
        self.step_lengths: Callable[[int], StepLengths] | None = None
        """Step (from 0) -> lengths of the documents of all ranks (:meth:`workbench.data.StepLoader.lengths`), which a
        budget tuner needs."""
        self.choices: list[list[BudgetChoice | None]] = []
        """[micro-batch][layer] what the layers of the newest step attended; None in layers without a budget."""
        self.rank_times = RankTimes(device, meets_once=config.training.ranks == "replicated")
        self.applied = torch.ones((), device=device)
        """0.0 where the optimiser skipped the newest step, else 1.0."""
        self.lr_factor = 0.0
        """Learning rate of the newest step as a fraction of the peak."""
        self.gradient_norm = torch.zeros((), device=device)
        self.gradient_metrics: dict[str, Tensor] = {}
        """Root mean squares of the newest logged step's gradients."""
        self.layer_gradients: list[dict[str, Tensor]] = []
        """Gradient norms by layer, of the newest step that writes diagnostics."""
        self.loss_window = torch.zeros(2, dtype=torch.float64, device=device)
        """Losses of all targets since the last logged step, summed over the steps whose loss is finite, and their
        number."""
        self.diagnostics: dict[int, dict[str, Tensor]] = {}
        """Values by name, by layer; empty where the newest step has no snapshot."""

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Train on the next ``accumulate`` micro-batches as optimiser step ``step`` (from 1)."""
        training = self.config.training
        growth = self.config.growth
        lr_factor = rate_at(step - 1, training)
        if growth is not None:
            lr_factor *= growth.rate_factor(step - 1, training.steps)
        self.lr_factor = lr_factor
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        micro_batches = [next(batches) for _ in range(training.accumulate)]
        self.rank_times.begin_step()
        snapshot = step in self.diagnose_at
        self._begin(micro_batches, (step - 1) / training.steps, snapshot)
        budgets = self._budgets(step)
        counted = self.counters.count_first and training.accumulate > 1
        for batch, of_layers in zip(micro_batches, budgets) if counted else ():
            with torch.no_grad(), autocast(self.device, training.precision):
                self.counters.count(self._forward(batch, of_layers, snapshot=False)[1])
            self.on_phase("count")
        step_loss = torch.zeros((), device=self.device)
        for batch, of_layers in zip(micro_batches, budgets):
            objective, loss, layers = self._objective(batch, of_layers, snapshot, counted)
            self.on_phase("forward")
            objective.backward()
            step_loss = step_loss + loss
            self.rank_times.mark()
            self.on_phase("backward")
        parallel.sum_gradients(self.model.parameters())
        self.rank_times.mark()
        if self.is_alone:
            self._drop_gradients()
        loss = parallel.all_sum(step_loss.double())
        share = training.ema.share(step, training.tokens_per_step) if training.ema is not None else None
        with averaging(self.optimiser, share):
            with without_rescaling(self.optimiser):
                self._update(step, loss)
            if self.qk_clip is not None and not self.is_alone:
                self.qk_clip(self.applied)
        applied = torch.zeros_like(self.applied) if self.is_alone else self.applied
        self.counters.update(lr_factor, 1 - step / training.steps, applied)
        if self.roll_back is not None:  # after the counters, whose buffers are part of the copies
            self.end_window(step, self.health.wants_roll_back, is_last=step == training.steps)
        self.rank_times.mark()
        self.diagnostics = self._diagnostics(layers) if snapshot else {}
        self.on_phase("update")

    def _begin(self, micro_batches: Sequence[Batch], progress: float, snapshot: bool) -> None:
        """Forget the step before, and count what the losses of this one are divided by: known before any is
        computed."""
        self.progress = progress
        counts = sum(count_positions(batch.targets_BT, batch.segments_BT) for batch in micro_batches)
        assert isinstance(counts, Tensor)
        self.totals = StepTotals.at_least_one(parallel.all_sum(counts.to(self.device, non_blocking=True)))
        self.counters.begin_step()
        if self.qk_clip is not None:
            self.qk_clip.begin_step()
        self.objective_metrics: dict[str, Pooled] = {}
        self.layer_metrics: list[dict[str, Pooled]] = [{} for _ in layers_of(self.model)]
        self.choices = []
        if snapshot:
            self.counters.attach_taps(self.device)

    @property
    def warming_up(self) -> list[bool]:
        """Whether each layer is in the stage that it declares, in the newest step."""
        return [warm_up is not None and self.progress < warm_up.fraction for warm_up in self.warm_ups]

    @property
    def is_alone(self) -> bool:
        """Whether the newest step trains nothing but what the layers in their stage choose by."""
        return any(warm_up.alone for warm_up, now in zip(self.warm_ups, self.warming_up) if warm_up and now)

    def _drop_gradients(self) -> None:
        """Of all parameters but those by which layers in their stage choose."""
        kept: set[Tensor] = set()
        for layer, now in zip(layers_of(self.model), self.warming_up):
            if now:
                kept |= {p for name, p in layer.mixer.named_parameters() if name.startswith(layer.mixer.chosen_by)}
        for parameter in self.model.parameters():
            if parameter not in kept:
                parameter.grad = None

    def _budgets(self, step: int) -> Sequence[list[Budget | None] | None]:
        """Budgets of every layer, one list per micro-batch."""
        if self.tuner is None:
            return [None] * self.config.training.accumulate
        assert self.step_lengths is not None, "a budget tuner needs the lengths of all ranks: set step_lengths"
        return self.tuner.budgets(self.step_lengths(step - 1), parallel.rank())

    def _objective(
        self, batch: Batch, budgets: list[Budget | None] | None, snapshot: bool, counted: bool
    ) -> tuple[Tensor, Tensor, list[AuxOutputs]]:
        """A micro-batch's share of the step's objective (loss plus auxiliary losses), its share of the loss (detached),
        auxiliary outputs of the layers. Shares are added, over micro-batches and ranks.

        Args:
            budgets: of every block; None for the configured numbers.
            snapshot: whether layers write metrics.
            counted: whether the counts of the whole step are known.
        """
        watches = watching(self.model, self._record) if snapshot else contextlib.nullcontext()
        with autocast(self.device, self.config.training.precision):
            with watches:
                loss, aux = self._forward(batch, budgets, snapshot)
            if not counted:
                self.counters.count(aux)
            objective = loss + sum(part for outputs in aux for part in outputs.losses) + sum(self.counters.losses(aux))
        *layers, model_aux = aux
        if self.qk_clip is not None:
            self.qk_clip.record(layers, model_aux)
        join(self.objective_metrics, model_aux.metrics)
        self.choices.append([outputs.budget for outputs in layers])
        for choice in self.choices[-1]:
            if choice is not None:
                join(self.objective_metrics, choice.metrics)
        for pooled, outputs in zip(self.layer_metrics, layers, strict=True):
            join(pooled, outputs.metrics)
        return objective, loss.detach(), layers

    def _record(self, layer: int, values: Mapping[str, Pooled]) -> None:
        join(self.layer_metrics[layer], values)

    def _forward(
        self, batch: Batch, budgets: list[Budget | None] | None, snapshot: bool
    ) -> tuple[Tensor, list[AuxOutputs]]:
        """A micro-batch's share of the loss; auxiliary outputs of the layers, then those of the model's objectives."""
        tokens_BT, targets_BT, segments_BT, _ = batch
        clips = self.qk_clip is not None
        layers = [
            AuxOutputs(snapshot, self.totals.tokens, score_maxima=[] if clips else None, warming_up=now)
            for now in self.warming_up
        ]
        model_aux = AuxOutputs(False, self.totals.mtp_tokens, score_maxima=[] if clips else None)
        loss = self.model.loss(
            tokens_BT.to(self.device, non_blocking=True),
            targets_BT.to(self.device, non_blocking=True),
            segments=segments_BT.to(self.device, non_blocking=True),
            layer_aux=layers,
            objective_aux=model_aux,
            totals=self.totals,
            progress=self.progress,
            budgets=budgets,
        )
        return loss, [*layers, model_aux]

    def _update(self, step: int, loss: Tensor) -> None:
        """Clip the gradients and update the weights, unless a guard rejects the step.

        Args:
            step: number of the step.
            loss: its loss, of all ranks.
        """
        training = self.config.training
        parameters = list(self.model.parameters())
        if step in self.diagnose_at:
            self.layer_gradients = gradient_values(layers_of(self.model))
        self.gradient_norm = parallel.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, training.clip))
        if step % training.log_every == 0:  # the gradients that the optimiser receives
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.gradient_metrics = gradient_rms_summary(parallel.root_mean_squares(gradients))
        # the optimiser leaves weights and its state unchanged where `found_inf` is 1.0, on the device
        skipped = self.health.judge(loss, self.gradient_norm)
        if skipped is not None:
            self.optimiser.found_inf = skipped  # type: ignore[attr-defined]
            self.applied = 1 - skipped
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.health.record_step(step, loss, self.gradient_norm)
        finite, targets = loss.isfinite(), self.totals.targets
        self.loss_window = self.loss_window + torch.stack(
            (torch.where(finite, loss * targets, 0.0), torch.where(finite, targets, 0.0))
        )

    def end_window(self, step: int, rejected: Tensor, *, is_last: bool) -> None:
        """Let a window of steps end, if it does with ``step``. Arguments as of :meth:`RollBack.end_step`."""
        undone = self.roll_back.end_step(step, rejected, is_last=is_last) if self.roll_back is not None else None
        if undone is not None:
            self.health.record_window(step, undone)

    def _diagnostics(self, layers: list[AuxOutputs]) -> dict[int, dict[str, Tensor]]:
        values = iter(parallel.all_pooled([number for layer in self.layer_metrics for number in layer.values()]))
        metrics = [{name: next(values) for name in layer} for layer in self.layer_metrics]
        optimiser = optimiser_of(self.config.training)
        of_epsilon = epsilon_values(layers_of(self.model), self.optimiser, optimiser, self.device)
        further = zip(self.counters.diagnostics(layers), self.layer_gradients, of_epsilon, strict=True)
        merged = [
            layer | {name: value.detach().double() for values in more for name, value in values.items()}
            for layer, more in zip(metrics, further, strict=True)
        ]
        return {layer: values for layer, values in enumerate(merged) if values}

    def measurements(self, lengths: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
        """What batch plans learn from the newest step: plain data, equal on every rank.

        Args:
            lengths: of the documents of the step (:meth:`workbench.data.StepLoader.lengths`).

        Returns:
            ``lengths``: [rank][micro-batch] tokens of every document. With a budget tuner also ``budgets``: [rank]
            [micro-batch][layer] blocks per query that were attended, None in layers without a budget.
        """
        measured: dict[str, Any] = {"lengths": [[documents.tolist() for documents in of_rank] for of_rank in lengths]}
        if self.tuner is not None:
            none = torch.full((), -1, dtype=torch.int32, device=self.device)
            blocks_AL = torch.stack(
                [
                    torch.stack([none if choice is None else choice.blocks for choice in layers])
                    for layers in self.choices
                ]
            )
            blocks_RAL = parallel.all_gathered(blocks_AL[:, : len(self.model.blocks)]).tolist()  # waits for the device
            measured["budgets"] = [
                [[None if k < 0 else k for k in layers] for layers in of_rank] for of_rank in blocks_RAL
            ]
        return measured

    def take_log_values(self) -> tuple[Tensor, list[str]]:
        """Values to log, as one float64 tensor on the device; starts a new loss window.

        Returns:
            loss window (2 values), gradient norm, state of :class:`Health`, the metrics of the newest step's objectives
            and gradients, the guards' rejections of the steps since the last call; the names of these metrics.
        """
        metrics = dict(zip(self.objective_metrics, parallel.all_pooled(list(self.objective_metrics.values()))))
        metrics |= {name: value.double() for name, value in self.gradient_metrics.items()}
        if self.qk_clip is not None:
            metrics |= self.qk_clip.metrics
        further = [torch.stack(list(metrics.values()))] if metrics else []
        values = torch.cat(
            (
                self.loss_window,
                self.gradient_norm.double()[None],
                self.health.state,
                *further,
                self.health.take_rejections(),
            )
        )
        self.loss_window = torch.zeros_like(self.loss_window)
        return values, list(metrics)


def _warm_up(layer: Any) -> WarmUp | None:
    mixer = getattr(layer, "mixer", None)  # a shortcut has none
    return None if mixer is None else mixer.warm_up()


def join(pooled: dict[str, Pooled], more: Mapping[str, Pooled]) -> None:
    """Add the numbers of a micro-batch to those of the step so far."""
    for name, number in more.items():
        before: Any = pooled.get(name)
        pooled[name] = number if before is None else before.joined(number)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Mixed precision of the forward pass; nothing with ``"fp32"``.

    Plain torch instead of Fabric's plug-in, which caches the bf16 copies of all weights until the end of the forward
    pass.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def build_step(
    model: LanguageModel, config: RunConfig, fabric: Fabric, on_phase: Callable[[str], None] = lambda phase: None
) -> tuple[TrainStep, bool]:
    """Move, shard and compile ``model`` for training and build its optimiser.

    Returns:
        the step, and whether the model is compiled.
    """
    training = config.training
    model.recompute = training.recompute
    if training.fp8 is not None:
        check_device(fabric.device, training.fp8)
        use_fp8(model, training.fp8)
    fabric.setup_module(model)  # its wrapper of `forward` is not needed
    compiled = fabric.device.type == "cuda" if training.compile is None else training.compile
    if compiled:
        # rows that are sent to other ranks take their number from the host, between two graphs
        model.compile_blocks(fullgraph=not training.expert_parallel or parallel.world_size() == 1)
    return TrainStep(model, build_optimiser(model, training), config, fabric.device, on_phase), compiled
