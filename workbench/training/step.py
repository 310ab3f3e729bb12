"""One optimiser step: micro-batches, losses, clipping, spike skipping, update.

Nothing here synchronises with the device.

Legend: B batch, T time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from workbench.contract import AuxOutputs
from workbench.data import Batch
from workbench.model import LanguageModel
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.health import Health, gradient_rms_summary
from workbench.training.optimiser import build_optimiser
from workbench.training.schedule import rate_at
from workbench.training.step_counters import StepCounters

DIAGNOSTIC_SNAPSHOTS = 20
"""Steps of a run whose layers write diagnostics, evenly spread; every step of a shorter run."""


class TrainStep:
    """Next-token training of a :class:`LanguageModel`, one optimiser step per call.

    Args:
        model: on its device, and sharded or compiled if it is to be.
        optimiser: over the model's parameters; every group has an ``initial_lr``.
        config: the run.
        device: of model and batches.
        on_phase: called with ``"forward"`` and ``"backward"`` after these passes of every micro-batch, and with
            ``"update"`` at the end of the step. For measurement.
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
        self.health = Health(config.training.spike_factor, device)
        self.applied = torch.ones((), device=device)
        """0.0 where the optimiser skipped the newest step, else 1.0."""
        self.gradient_norm = torch.zeros((), device=device)
        self.extra_metrics: dict[str, Tensor] = {}
        """Further values to log: of this rank's newest micro-batch, and of the gradients on logged steps."""
        self.loss_window = torch.zeros(2, dtype=torch.float64, device=device)
        """Sum of the finite losses since the last logged step, and their number."""
        self.diagnostics: dict[int, dict[str, Tensor]] = {}
        """Values by name, by layer; empty where the newest step has no snapshot."""

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Train on the next ``accumulate`` micro-batches as optimiser step ``step`` (from 1)."""
        training = self.config.training
        lr_factor = rate_at(step - 1, training)
        for group in self.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.counters.begin_step()
        step_loss = torch.zeros((), device=self.device)
        for micro_batch in range(1, training.accumulate + 1):
            snapshot = step in self.diagnose_at and micro_batch == training.accumulate
            loss, objective, layers = self._forward(next(batches), (step - 1) / training.steps, snapshot)
            self.on_phase("forward")
            # the one place where losses are normalised: the mean over micro-batches of their own means
            (objective / training.accumulate).backward()
            step_loss = step_loss + loss / training.accumulate
            self.on_phase("backward")
        self._update(step)
        self._follow(step, step_loss)
        self.counters.update(lr_factor, 1 - step / training.steps, self.applied)
        self.diagnostics = self._diagnostics(layers) if snapshot else {}
        self.on_phase("update")

    def _forward(self, batch: Batch, progress: float, snapshot: bool) -> tuple[Tensor, Tensor, list[AuxOutputs]]:
        """Loss (detached), objective (loss plus auxiliary losses), auxiliary outputs of the layers."""
        tokens_BT, targets_BT, segments_BT, _ = batch
        layers = [AuxOutputs(collect_metrics=snapshot) for _ in (*self.model.blocks, *self.model.shortcuts)]
        model_aux = AuxOutputs(collect_metrics=False)
        if snapshot:
            self.counters.attach_taps(self.device)
        with autocast(self.device, self.config.training.precision):
            loss = self.model.loss(
                tokens_BT.to(self.device, non_blocking=True),
                targets_BT.to(self.device, non_blocking=True),
                segments=segments_BT.to(self.device, non_blocking=True),
                layer_aux=layers,
                objective_aux=model_aux,
                progress=progress,
            )
            aux = [*layers, model_aux]
            objective = loss + sum(part for outputs in aux for part in outputs.losses) + sum(self.counters.collect(aux))
        self.extra_metrics = model_aux.metrics
        return loss.detach(), objective, layers

    def _update(self, step: int) -> None:
        training = self.config.training
        parameters = list(self.model.parameters())
        self.gradient_norm = parallel.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, training.clip))
        if step % training.log_every == 0:  # the gradients that the optimiser receives
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.extra_metrics |= gradient_rms_summary(parallel.root_mean_squares(gradients))
        # the optimiser leaves weights and its state unchanged where `found_inf` is 1.0, on the device
        skipped = self.health.judge_gradient(self.gradient_norm)
        if skipped is not None:
            self.optimiser.found_inf = skipped  # type: ignore[attr-defined]
            self.applied = 1 - skipped
        self.optimiser.step()
        self.optimiser.zero_grad()

    def _follow(self, step: int, step_loss: Tensor) -> None:
        loss = parallel.all_mean(step_loss.double())
        self.health.record_step(step, loss, self.gradient_norm)
        finite = loss.isfinite()
        self.loss_window = self.loss_window + torch.stack((torch.where(finite, loss, 0.0), finite.double()))

    def _diagnostics(self, layers: list[AuxOutputs]) -> dict[int, dict[str, Tensor]]:
        metrics = [{name: value.detach().double() for name, value in aux.metrics.items()} for aux in layers]
        values = [value for layer in metrics for value in layer.values()]
        if values:  # each rank measured its own rows; one message
            mean = parallel.all_mean(torch.cat([value.flatten() for value in values]))
            parts = iter(mean.split([value.numel() for value in values]))
            metrics = [{name: next(parts).view(value.shape) for name, value in layer.items()} for layer in metrics]
        counted = self.counters.diagnostics(layers, gradient_scale=self.config.training.accumulate)
        merged = [layer | {k: v.detach().double() for k, v in more.items()} for layer, more in zip(metrics, counted)]
        return {layer: values for layer, values in enumerate(merged) if values}

    def take_log_values(self) -> tuple[Tensor, list[str]]:
        """Values to log, as one float64 tensor on the device; starts a new loss window.

        Returns:
            loss window (2 values), gradient norm, state of :class:`Health`, :attr:`extra_metrics`; the names of the
            last.
        """
        extra = [value.double() for value in self.extra_metrics.values()]
        means = [parallel.all_mean(torch.stack(extra))] if extra else []
        values = torch.cat((self.loss_window, self.gradient_norm.double()[None], self.health.state, *means))
        self.loss_window = torch.zeros_like(self.loss_window)
        return values, list(self.extra_metrics)


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
    fabric.setup_module(model)  # its wrapper of `forward` is not needed
    compiled = fabric.device.type == "cuda" if training.compile is None else training.compile
    if compiled:
        model.compile_blocks()
    return TrainStep(model, build_optimiser(model, training), config, fabric.device, on_phase), compiled
