"""Training time and speed. Compilation and evaluation are not training time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from workbench.accounting import account
from workbench.training.config import RunConfig


class Throughput:
    """Clock of a run.

    Args:
        config: the run.
        seen_flops: training FLOPs per token within the documents that rows are packed from, of every phase of the run;
            default as if every row were one document.
        now: current time in seconds.
    """

    def __init__(
        self, config: RunConfig, seen_flops: Sequence[float] | None = None, now: Callable[[], float] = time.perf_counter
    ):
        self.now = now
        training = config.training
        self.tokens_per_step = training.tokens_per_step
        self.phases = config.phases
        self.flops_per_token = [account(phase.model, training.context).training_flops for phase in self.phases]
        self.seen_flops = self.flops_per_token if seen_flops is None else seen_flops
        self.seconds = 0.0
        """Training time up to the last :meth:`row`, over all processes of the run. Part of a checkpoint."""
        self.last_step = 0
        self.untimed_steps = 0
        self.first_step_seconds = 0.0

    def start(self, step: int) -> None:
        """Start the clock after ``step`` steps."""
        self.last_step = step
        self.origin = self.now() - self.seconds

    def end_first_step(self, *, compiled: bool) -> float:
        """Seconds of this process's first step; where it compiled the model, they are not training time."""
        self.first_step_seconds = self.now() - self.origin - self.seconds
        if compiled:
            self.origin += self.first_step_seconds
            self.untimed_steps = 1
        return self.first_step_seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time is not training time."""
        start = self.now()
        yield
        self.origin += self.now() - start

    def tick(self, step: int) -> None:
        """Count the time up to ``step``, for a checkpoint."""
        if step > self.last_step:
            self.row(step)

    def row(self, step: int) -> dict[str, Any]:
        """Progress after ``step`` steps, and speed since the last call."""
        seconds = self.now() - self.origin
        steps, elapsed = step - self.last_step, seconds - self.seconds
        seen_flops = next(flops for phase, flops in zip(self.phases, self.seen_flops) if step <= phase.last)
        timed_steps = steps - self.untimed_steps
        rate = timed_steps / max(1e-9, elapsed) if timed_steps else steps / self.first_step_seconds
        self.seconds, self.last_step, self.untimed_steps = seconds, step, 0
        return {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "flops": self.flops_until(step),
            "seconds": seconds,
            "tokens_per_second": rate * self.tokens_per_step,
            "flops_per_second": rate * self.tokens_per_step * seen_flops,
        }

    def flops_until(self, step: int) -> float:
        """Training FLOPs of the first ``step`` steps, those of a small model included."""
        return sum(
            max(0, min(step, phase.last) - phase.first) * (flops * self.tokens_per_step)
            for phase, flops in zip(self.phases, self.flops_per_token)
        )
