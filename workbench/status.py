"""Statuses of a run and stages of an ablation. On disk they are plain strings."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["ENDED", "FAILED", "LOST", "RETRYABLE", "Stage", "Status"]


class Stage(StrEnum):
    """What a run is for."""

    TUNING = "tuning"
    """Searches an arm's hyper-parameters; measured on the selection split."""
    REPEAT = "repeat"
    """Repeats one of the best settings of an arm's search on a further seed; measured on the selection split."""
    CONFIRMATION = "confirmation"
    """Measures the chosen setting on a fresh seed; the only stage that may read the report split."""


class Status(StrEnum):
    """The state of a run, and of the Optuna trial that stands for it."""

    WAITING = "waiting"
    """Created, not started."""
    RUNNING = "running"
    """A process is training it."""
    INTERRUPTED = "interrupted"
    """Stopped on request after a checkpoint, or by files that cannot be read or written; resumes with the next
    launch."""
    KILLED = "killed"
    """Its process died; resumes from its last checkpoint."""
    HUNG = "hung"
    """Killed because it made no progress; resumes from its last checkpoint."""
    DONE = "done"
    DIVERGED = "diverged"
    """NaN or exploding loss: a result, run again only where the protocol declares it."""
    OUT_OF_MEMORY = "out_of_memory"
    CRASHED = "crashed"
    """Ended by an exception."""
    PRUNED = "pruned"
    """Stopped early because it fell behind the other tuning trials of its arm."""
    INVALID = "invalid"
    """A trial, never a run: its hyper-parameters give no valid configuration, or one off the budget."""
    SURPLUS = "surplus"
    """A trial, never a run: created by Optuna when two workers asked for the last waiting one."""


ENDED = (Status.DONE, Status.DIVERGED, Status.OUT_OF_MEMORY, Status.CRASHED, Status.PRUNED)
"""A run with one of these has a result and is not resumed by itself."""
RETRYABLE = (Status.CRASHED, Status.OUT_OF_MEMORY)
"""Failures that say nothing about the model; a confirmation run is run again once, any run when launched again."""
LOST = (Status.KILLED, Status.HUNG)
"""The process is gone; the run resumes from its last checkpoint, a limited number of times."""
FAILED = (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.CRASHED, *LOST)
"""Everything that went wrong."""
