"""The LightningModule of a language model, and the callback that records, checkpoints and watches it.

Legend: B batch, T time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from workbench.accounting import account
from workbench.contract import Side
from workbench.data import Batch
from workbench.evaluation import evaluate
from workbench.model import LanguageModel
from workbench.results import RunFolder
from workbench.training.checkpoint import random_state, set_random_state
from workbench.training.config import RunConfig
from workbench.training.optimiser import build_optimiser, rate_at

RISING_STEPS = 200
"""A loss above its first value for so many steps in a row counts as divergence."""


class Diverged(RuntimeError):
    """The loss stopped being finite, or stayed above its first value. ``step`` says where (from 1)."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"{reason} at step {step}")
        self.step = step


class Stopped(RuntimeError):
    """The run was asked to stop, and has written a checkpoint."""


class Training(L.LightningModule):
    """Next-token training of a :class:`LanguageModel`.

    Whether the loss is finite is followed on the device, without waiting for it, and read when metrics are logged.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.model = LanguageModel(config.model, seed=config.seed)
        self.loss_sum: Tensor = torch.zeros(())
        self.gradient_norm: Tensor = torch.zeros(())
        self.window_before: Tensor = torch.zeros((), dtype=torch.float64)
        # first loss, steps in a row above it, first bad step (0: none)
        self.health: Tensor = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        sides = [Side() for _ in self.model.blocks]
        losses_BT = self.model.token_losses(batch.tokens_BT, batch.targets_BT, segments=batch.segments_BT, sides=sides)
        loss = losses_BT.sum() / (batch.targets_BT >= 0).sum()
        self.loss_sum = self.loss_sum + loss.detach()
        return loss + sum(part for side in sides for part in side.losses)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.training.clip)

    def configure_optimizers(self) -> Any:
        training = self.config.training
        optimiser = build_optimiser(self.model, training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_at(step, training))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def note_step(self, step: int) -> None:
        """Follow the health of the run after optimiser step ``step``."""
        total = self.loss_sum.double()
        loss, self.window_before = (total - self.window_before) / self.config.training.accumulate, total
        first, rising, bad = self.health.unbind()
        first = torch.where(first == 0, loss, first)
        rising = torch.where(loss > first, rising + 1, 0.0)
        ill = ~(loss.isfinite() & self.gradient_norm.isfinite()) | (rising >= RISING_STEPS)
        self.health = torch.stack((first, rising, torch.where((bad == 0) & ill, float(step), bad)))

    def raise_if_diverged(self) -> None:
        """Raises Diverged with the first bad step. Waits for the device."""
        _, rising, bad = self.health.tolist()
        if bad:
            rose = rising >= RISING_STEPS
            raise Diverged(int(bad), f"the loss stayed above its start for {RISING_STEPS} steps" if rose
                           else "the loss or its gradient is not finite")  # fmt: skip

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = random_state()
        checkpoint["health"] = self.health

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored_random_state = checkpoint["random_state"]
        self.health = checkpoint["health"]

    def on_train_start(self) -> None:
        self.loss_sum = torch.zeros((), device=self.device)
        self.window_before = torch.zeros((), device=self.device, dtype=torch.float64)
        self.health = self.health.to(self.device)
        state = getattr(self, "restored_random_state", None)
        if state is not None:  # last, so that nothing between loading and the first step uses numbers up
            set_random_state(state)


class Recorder(Callback):
    """Writes metrics, evaluates on the selection split, checkpoints, and obeys a request to stop.

    Args:
        folder: where to write.
        selection: documents of the selection split.
        should_stop: asked after every step.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, selection: Any, should_stop: Callable[[], bool]):
        self.folder, self.config, self.selection, self.should_stop = folder, config, selection, should_stop
        training = config.training
        cost = account(config.model, training.context)
        self.flops_per_step = cost.training_flops * training.tokens_per_step
        self.evaluate_at = {
            round(training.steps * i / training.evaluations) for i in range(1, training.evaluations + 1)
        }
        self.seconds = 0.0
        self.step = self.logged_step = self.saved_step = 0
        self.started: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]
        self.step = self.logged_step = self.saved_step = state["step"]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.started, self.before = time.perf_counter(), self.seconds

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.step:  # still accumulating
            return
        training = self.config.training
        self.step = trainer.global_step
        module.note_step(self.step)
        evaluates = self.step in self.evaluate_at
        stops = self.should_stop()
        saves = stops or self.step % training.checkpoint_every == 0 or self.step == training.steps
        # a checkpoint falls on a logged step, so that a resumed run writes the same lines
        if self.step % training.log_every == 0 or evaluates or saves:
            self._log(module, evaluates)
        if saves:
            trainer.save_checkpoint(self.folder.path / "checkpoint" / f"step-{self.step}")
            self.saved_step = self.step
        if stops and self.step < training.steps:
            raise Stopped(f"asked to stop; step {self.step} is saved")

    def _log(self, module: Any, evaluates: bool) -> None:
        training = self.config.training
        window = self.step - self.logged_step
        loss = float(module.loss_sum) / (window * training.accumulate)
        now = time.perf_counter()
        assert self.started is not None
        self.seconds = self.before + now - self.started
        module.raise_if_diverged()
        previous = getattr(self, "logged_seconds", self.before)
        row = {
            "step": self.step,
            "tokens": self.step * training.tokens_per_step,
            "flops": self.step * self.flops_per_step,
            "seconds": self.seconds,
            "loss": loss,
            "learning_rate": training.learning_rate * rate_at(self.step - 1, training),
            "gradient_norm": float(module.gradient_norm),
            "tokens_per_second": window * training.tokens_per_step / max(1e-9, self.seconds - previous),
        }
        if evaluates:
            measured = evaluate(
                module.model, self.selection, batch_size=training.batch_size, context=training.context,
                precision=training.precision,
            )  # fmt: skip
            row["selection_bpb"] = measured.bits_per_byte
            self.started += time.perf_counter() - now  # evaluation is not training time
        self.folder.add_metrics(row)
        self.logged_step, self.logged_seconds = self.step, self.seconds
        module.loss_sum = torch.zeros_like(module.loss_sum)
        module.window_before = torch.zeros_like(module.window_before)
