"""The LightningModule of a language model, and the callback that records, checkpoints and watches it.

Legend: B batch, T time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from workbench.accounting import account
from workbench.contract import AuxOutputs, StepCounter
from workbench.data import Batch
from workbench.evaluation import evaluate
from workbench.model import LanguageModel
from workbench.ops import dispatch
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.checkpoint import random_state, set_random_state
from workbench.training.config import RunConfig
from workbench.training.health import EPSILON_SHARE, FIELDS, Health, spread_of_gradients
from workbench.training.optimiser import build_optimiser, rate_at

DIAGNOSES = 20
"""Times a run in which its layers are watched, evenly spread; or every step of a shorter one."""


class Stopped(RuntimeError):
    """The run was asked to stop, and has written a checkpoint."""


class Training(L.LightningModule):
    """Next-token training of a :class:`LanguageModel`. No step waits for the device."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.model = LanguageModel(config.model, seed=config.seed)
        self.model.recompute = config.training.recompute
        self.sharded = False
        self.health = Health(config.training.spike_factor)
        self.step_loss: Tensor = torch.zeros(())
        self.gradient_norm: Tensor = torch.zeros(())
        self.told: dict[str, Tensor] = {}
        """Further numbers of the newest micro-batch, of this rank's share."""
        # since the last line of the log: sum of the finite losses, their number
        self.window: Tensor = torch.zeros(2, dtype=torch.float64)
        steps = config.training.steps
        self.diagnose_at = {math.ceil(steps * i / DIAGNOSES) for i in range(1, DIAGNOSES + 1)}
        self.applied: Tensor = torch.ones(())
        self.counters = [module for module in self.model.modules() if isinstance(module, StepCounter)]
        # by the counter's number: what has been counted in this step, and since the last diagnosis
        self.counts: dict[int, Tensor] = {}
        self.recent: dict[int, Tensor] = {}
        self.watched: list[AuxOutputs] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        training = self.config.training
        step, last = self.trainer.global_step + 1, (index + 1) % training.accumulate == 0
        watch = last and step in self.diagnose_at
        layer_aux = [AuxOutputs(collect_metrics=watch) for _ in (*self.model.blocks, *self.model.shortcuts)]
        objective_aux = AuxOutputs(collect_metrics=False)
        if watch:
            self.watched = layer_aux
            for counter in self.counters:
                counter.gradient_tap = torch.zeros(counter.categories, device=self.device, requires_grad=True)
        loss = self.model.loss(
            batch.tokens_BT,
            batch.targets_BT,
            segments=batch.segments_BT,
            layer_aux=layer_aux,
            objective_aux=objective_aux,
            progress=self.global_step / training.steps,
        )
        self.told = objective_aux.metrics
        self.step_loss = self.step_loss + loss.detach() / training.accumulate
        every = [*layer_aux, objective_aux]
        return loss + sum(part for aux in every for part in aux.losses) + sum(self._count(every))

    def _count(self, layer_aux: list[AuxOutputs]) -> list[Tensor]:
        """Add what was counted to the counts of the step; returns the losses that wait for them."""
        counted = {id(counter): (counts, own) for aux in layer_aux for counter, counts, own in aux.counts}
        there = [number for number, counter in enumerate(self.counters) if id(counter) in counted]
        if not there:
            return []
        found = [counted[id(self.counters[number])] for number in there]
        now = parallel.total(torch.cat([counts for counts, _ in found]))  # one message for all layers
        parts = now.split([len(counts) for counts, _ in found])
        self.counts = _added(self.counts, dict(zip(there, parts)))
        losses = [self.counters[n].step_loss(self.counts[n], own) for n, (_, own) in zip(there, found)]
        return [loss for loss in losses if loss is not None]

    def configure_model(self) -> None:
        # called again by Lightning when training starts; sharded once
        if self.device_mesh is not None and not self.sharded:
            parallel.shard(self.model, self.device_mesh["data_parallel"])
            self.sharded = True

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.gradient_norm = parallel.whole(
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.training.clip)
        )
        if (self.global_step + 1) % self.config.training.log_every == 0:  # as AdamW is about to see them
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.told = self.told | spread_of_gradients(parallel.root_mean_squares(gradients))
        # fused AdamW leaves weights, moments and step counts alone where this reads 1.0, on the device
        skipped = optimizer.found_inf = self.health.judge_gradient(self.gradient_norm)
        if skipped is not None:
            self.applied = 1 - skipped

    def configure_optimizers(self) -> Any:
        training = self.config.training
        optimiser = build_optimiser(self.model, training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_at(step, training))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def note_step(self, step: int) -> None:
        """Follow the run after optimiser step ``step``."""
        loss = parallel.mean(self.step_loss.double())
        self.health.note_step(step, loss, self.gradient_norm)
        finite = loss.isfinite()
        self.window = self.window + torch.stack((torch.where(finite, loss, 0.0), finite.double()))
        self.step_loss = torch.zeros_like(self.step_loss)
        training = self.config.training
        for number, counts in self.counts.items():
            self.counters[number].update_state(
                counts, rate_at(step - 1, training), 1 - step / training.steps, self.applied
            )

    def diagnosis(self) -> dict[int, dict[str, Tensor]]:
        """Metrics by layer if this step was watched; ends the counting of the step."""
        self.recent, counts, self.counts = _added(self.recent, self.counts), self.counts, {}
        if not self.watched:
            return {}
        said: dict[int, dict[str, Tensor]] = {}
        told = [value.detach().double() for aux in self.watched for value in aux.metrics.values()]
        if told:  # each rank's own rows, as one message
            parts = parallel.mean(torch.cat([value.flatten() for value in told])).split(
                [value.numel() for value in told]
            )
            shared = iter([part.view(value.shape) for part, value in zip(parts, told)])
        number_of = {id(counter): number for number, counter in enumerate(self.counters)}
        for layer, aux in enumerate(self.watched):
            values = {name: next(shared) for name in aux.metrics}
            for counter, _, own in aux.counts:
                number = number_of[id(counter)]
                assert counter.gradient_tap is not None
                gradient = (
                    torch.zeros_like(counter.gradient_tap)
                    if counter.gradient_tap.grad is None
                    else counter.gradient_tap.grad
                )
                gradient = parallel.mean(gradient * self.config.training.accumulate)
                values |= counter.diagnostics(counts[number], self.recent[number], own.detach(), gradient)
            if values:
                said[layer] = {name: value.detach().double() for name, value in values.items()}
        for counter in self.counters:
            counter.gradient_tap = None
        self.recent, self.watched = {}, []
        return said

    def numbers(self) -> tuple[Tensor, list[str]]:
        """Loss window, gradient norm, health and what else there is to tell, as one float64 tensor on the device, and the names
        of the last; begins a new window."""
        told = [value.double() for value in self.told.values()]
        further = [parallel.mean(torch.stack(told))] if told else []
        values = torch.cat((self.window, self.gradient_norm.double()[None], self.health.state, *further))
        self.window = torch.zeros_like(self.window)
        return values, list(self.told)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = random_state()
        checkpoint["health"] = self.health.state
        checkpoint["recent"] = self.recent

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored_random_state = checkpoint["random_state"]
        self.health.state = checkpoint["health"]
        self.recent = checkpoint.get("recent", {})

    def on_fit_start(self) -> None:
        compiles = self.config.training.compile
        self.compiled = self.device.type == "cuda" if compiles is None else compiles
        if self.compiled:
            self.model.compile_blocks()

    def on_train_start(self) -> None:
        self.step_loss = torch.zeros((), device=self.device)
        self.window = self.window.to(self.device)
        self.health.to(self.device)
        self.applied = self.applied.to(self.device)
        self.recent = {number: counts.to(self.device) for number, counts in self.recent.items()}
        state = getattr(self, "restored_random_state", None)
        if state is not None:  # last, so that nothing between loading and the first step uses numbers up
            set_random_state(state)


def _added(total: dict[int, Tensor], more: dict[int, Tensor]) -> dict[int, Tensor]:
    return total | {number: total[number] + counts if number in total else counts for number, counts in more.items()}


class Recorder(Callback):
    """Writes metrics (rank 0), evaluates on the selection split, checkpoints, and obeys a request to stop.

    Args:
        folder: where to write.
        selection: documents of the selection split.
        should_stop: asked after every step.
        tell: is given every line of the log as it is written.
        seen_flops: training FLOPs per token within the documents that rows are packed from, for the rate of arithmetic;
            default as if every row were one document.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        selection: Any,
        should_stop: Callable[[], bool],
        tell: Callable[[dict[str, Any]], None] | None = None,
        seen_flops: float | None = None,
    ):
        self.folder, self.config, self.selection, self.should_stop = folder, config, selection, should_stop
        self.tell = tell or (lambda row: None)
        self.seen_flops = seen_flops
        training = config.training
        cost = account(config.model, training.context)
        self.flops_per_step = cost.training_flops * training.tokens_per_step
        self.evaluate_at = {
            round(training.steps * i / training.evaluations) for i in range(1, training.evaluations + 1)
        }
        self.seconds = 0.0
        self.step = self.logged_step = 0
        self.started: float | None = None
        self.first_step_told = self.epsilon_told = False
        self.untimed = 0  # steps since the last line of the log that took no training time
        self.pending: tuple[dict[str, Any], Tensor, list[str], torch.cuda.Event | None] | None = None
        self.diagnoses: list[tuple[int, dict[int, dict[str, Tensor]]]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]
        self.step = self.logged_step = state["step"]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.started, self.before = time.perf_counter(), self.seconds

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.step:  # still accumulating
            return
        training = self.config.training
        self.step = trainer.global_step
        module.note_step(self.step)
        diagnosis = module.diagnosis()
        if diagnosis:
            self.diagnoses.append((self.step, _to_host(diagnosis)))
        assert self.started is not None
        if not self.first_step_told:
            self.first_step_told = True
            if module.device.type == "cuda":
                torch.cuda.synchronize()  # once: start-up ends when the first step has really been done
            self.first_step_seconds = time.perf_counter() - self.started
            if module.compiled:  # start-up, not training: it would say more about the compiler than about the model
                self.started += self.first_step_seconds
                self.untimed = 1
            if parallel.rank() == 0:
                self.folder.event("first_step", seconds=self.first_step_seconds)
                self.folder.add_to_environment(paths=dispatch.recorded())
        evaluates = self.step in self.evaluate_at
        stops = self._stops(module.device)
        branches = training.keep_trunk and training.schedule == "wsd" and self.step == training.trunk_steps
        saves = stops or branches or self.step % training.checkpoint_every == 0 or self.step == training.steps
        # a checkpoint falls on a logged step, so that a resumed run writes the same lines
        if self.step % training.log_every == 0 or evaluates or saves:
            self._log(module, evaluates, now=evaluates or saves)
        if saves:
            trainer.save_checkpoint(self.folder.path / "checkpoint" / f"step-{self.step}")
        if branches:
            trainer.save_checkpoint(self.folder.path / "trunk" / f"step-{self.step}")
        if stops and self.step < training.steps:
            raise Stopped(f"asked to stop; step {self.step} is saved")

    def _stops(self, device: torch.device) -> bool:
        """Whether to stop now. Ranks decide together, and so only where they wait for each other anyway."""
        if parallel.world() > 1 and self.step % self.config.training.log_every:
            return False
        return parallel.any_rank(self.should_stop(), device)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self._write()

    def _log(self, module: Any, evaluates: bool, now: bool) -> None:
        """Put a line of the log together. Its numbers are copied from the device while training goes on, and written
        with the next line; ``now`` waits for them."""
        self._write()
        training = self.config.training
        window = self.step - self.logged_step
        values, told = module.numbers()
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            if now:
                event.synchronize()
        assert self.started is not None
        clock = time.perf_counter()
        self.seconds = self.before + clock - self.started
        elapsed = self.seconds - getattr(self, "logged_seconds", self.before)
        timed, self.untimed = window - self.untimed, 0
        steps_per_second = timed / max(1e-9, elapsed) if timed else window / self.first_step_seconds
        speed = steps_per_second * training.tokens_per_step
        row = {
            "step": self.step,
            "tokens": self.step * training.tokens_per_step,
            "flops": self.step * self.flops_per_step,
            "seconds": self.seconds,
            "learning_rate": training.learning_rate * rate_at(self.step - 1, training),
            "tokens_per_second": speed,
            "flops_per_second": speed * (self.seen_flops or self.flops_per_step / training.tokens_per_step),
        }
        self.pending = row, values, told, event
        self.logged_step, self.logged_seconds = self.step, self.seconds
        if now:
            self._write(module if evaluates else None)
        self.started += time.perf_counter() - clock if evaluates else 0.0  # evaluation is not training time

    def _write(self, evaluated: Any = None) -> None:
        """Write the pending line, if there is one.

        Raises:
            Diverged: when its numbers say so.
        """
        if self.pending is None:
            return
        (row, values, told, event), self.pending = self.pending, None
        if event is not None:
            event.synchronize()
        total, count, norm, *rest = values.tolist()
        health = dict(zip(FIELDS, rest))
        Health.check(health)
        row |= {"loss": total / count if count else math.nan, "gradient_norm": norm}
        row |= dict(zip(told, rest[len(FIELDS) :]))
        smallest, epsilon = row.get("gradient_rms_min", 0.0), self.config.training.epsilon
        if smallest and epsilon > EPSILON_SHARE * smallest and not self.epsilon_told and parallel.rank() == 0:
            self.epsilon_told = True
            self.folder.event("epsilon_near_gradients", step=row["step"], epsilon=epsilon, gradient_rms_min=smallest)
        if self.config.training.spike_factor is not None:
            row["skipped"] = int(health["skipped"])
        if evaluated is not None:
            training = self.config.training
            measured = evaluate(
                evaluated.model,
                self.selection,
                batch_size=training.batch_size,
                context=training.context,
                precision=training.precision,
            )
            row["selection_value"] = self.config.data.metric.of(measured)
        if parallel.rank() == 0:
            self.folder.add_metrics(row)
            # those of this line or of earlier ones: the copies ended before its own
            ready = [diagnosis for diagnosis in self.diagnoses if diagnosis[0] <= row["step"]]
            self.folder.add_diagnostics(
                {"step": step, "layer": layer, "values": {name: _plain(value) for name, value in values.items()}}
                for step, layers in ready
                for layer, values in layers.items()
            )
            self.tell(row)
        self.diagnoses = [diagnosis for diagnosis in self.diagnoses if diagnosis[0] > row["step"]]


def _to_host(layers: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """The same on the CPU, by one copy that nobody waits for."""
    values = [value for named in layers.values() for value in named.values()]
    flat = torch.cat([value.flatten() for value in values]).to("cpu", non_blocking=True)
    parts = iter(flat.split([value.numel() for value in values]))
    return {
        layer: {name: next(parts).view(value.shape) for name, value in named.items()} for layer, named in layers.items()
    }


def _plain(value: Tensor) -> Any:
    """A number, or a list of numbers; None where one is not finite."""
    numbers = [number if math.isfinite(number) else None for number in value.flatten().tolist()]
    return numbers if value.dim() else numbers[0]
