"""Intervals and time limits of workers and trials."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_TIMING", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Intervals and time limits, in seconds."""

    poll: float = 0.1
    """Between two looks at a running trial."""
    idle: float = 1.0
    """A worker's pause if all trials are taken, or the database does not answer."""
    stop_timeout: float = 600.0
    """For a stopping trial to end its step (minutes in a large model) and write a checkpoint; then it is killed."""
    stack_dump_timeout: float = 2.0
    """For a hung process to dump its stack traces before it is killed."""
    storage_timeout: float = 60.0
    """For which the studies' database may be unreachable before a worker ends."""
    first_heartbeat: float = 30.0
    """Within which a worker that took a trial has recorded its first heartbeat."""
    job_lookup: float = 180.0
    """After which a launcher knows every job that was submitted to it; an unknown job is lost."""


DEFAULT_TIMING = Timing()
