"""When a run is saved, what a checkpoint contains, and how many are retained."""

from __future__ import annotations

import shutil
from pathlib import Path

from workbench.data import StepLoader
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    step_of,
)
from workbench.training.config import RunConfig
from workbench.training.step import TrainStep
from workbench.training.throughput import Throughput

RETAINED = 2
"""Checkpoints retained: the newest, and the one before it in case the newest is damaged later."""


class Checkpointer:
    """Saves and restores a run.

    Args:
        folder: of the run.
        config: the run.
        train_step: model, optimiser, counters and health.
        loader: the training batches.
        throughput: the run's clock.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        train_step: TrainStep,
        loader: StepLoader,
        throughput: Throughput,
    ):
        self.folder, self.training = folder, config.training
        self.train_step, self.loader, self.throughput = train_step, loader, throughput
        keeps_trunk = self.training.keep_trunk and self.training.schedule == "wsd"
        self.trunk_step = self.training.trunk_steps if keeps_trunk else None

    def due(self, step: int) -> bool:
        """Whether ``step`` is to be saved."""
        return step % self.training.checkpoint_every == 0 or step in (self.training.steps, self.trunk_step)

    def save(self, step: int) -> None:
        """Save after ``step``: every rank takes part, rank 0 writes."""
        train_step = self.train_step
        weights, optimiser = parallel.full_state(train_step.model, train_step.optimiser)
        copies = {} if train_step.roll_back is None else {"roll_back": train_step.roll_back.state_dict()}
        if parallel.is_rank_zero():
            state = {
                "step": step,
                "seconds": self.throughput.seconds,
                "model": weights,
                "optimiser": optimiser,
                "counters": train_step.counters.recent_counts,
                "health": train_step.health.state_dict(),
                "loss_window": train_step.loss_window,
                **copies,
                "loader": self.loader.state_dict(),
                "random_state": random_state(),
            }
            folder = self.folder.path / "checkpoint"
            self.folder.sync_logs()  # what a checkpoint continues is on the disk before it
            save_checkpoint(state, folder / f"step-{step}")
            self._remove_old(step)
            if step == self.trunk_step:
                save_checkpoint(state, self.folder.path / "trunk" / f"step-{step}")
        parallel.barrier()  # a rank that exits while rank 0 still writes would count as failed

    def _remove_old(self, step: int) -> None:
        """Remove the checkpoints that are no longer retained after ``step``."""
        # a newer one is damaged, or the run would have continued from it: it is left until its step is reached
        older = [path for path in checkpoints_in(self.folder.path / "checkpoint") if step_of(path) <= step]
        for path in older[:-RETAINED]:
            shutil.rmtree(path, ignore_errors=True)

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint ``path``, saved by any number of ranks."""
        if parallel.is_rank_zero():
            self._remove_old(step_of(path))  # a process was killed after the save and before, or while, they went
        state = load_checkpoint(path)
        step, device = self.train_step, self.train_step.device
        parallel.load_full_state(step.model, step.optimiser, state["model"], state["optimiser"])
        step.counters.recent_counts = {index: counts.to(device) for index, counts in state["counters"].items()}
        step.health.load_state_dict(state["health"])
        if step.roll_back is not None:
            step.roll_back.load_state_dict(state["roll_back"])
        step.loss_window = state["loss_window"].to(device)
        self.loader.load_state_dict(state["loader"])
        self.throughput.seconds = state["seconds"]
        set_random_state(state["random_state"])
