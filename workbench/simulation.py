"""Step times of parallel layouts, computed from the times of their parts.

Every number states where it comes from (:class:`Origin`). Legend: R data-parallel ranks, S pipeline stages, M
micro-batches of a rank in a step.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

import numpy as np

from workbench.config import require

__all__ = ["Event", "Origin", "Timeline", "imbalance", "mean_load", "one_forward_one_backward", "waiting_share"]


class Origin(StrEnum):
    """Where a time comes from."""

    SIMULATED = "simulated"
    """Computed from measured or assumed times of layers or stages."""
    REPLAYED = "replayed"
    """The ranks of a step ran one after another on one device, and the step is as long as the slowest."""
    REAL = "real"
    """Measured with all ranks running at once."""


class Event(NamedTuple):
    """One pass of a micro-batch through a stage."""

    stage: int
    micro_batch: int
    kind: Literal["forward", "backward"]
    start: float
    end: float


class Timeline(NamedTuple):
    """What every stage of a pipeline does in one step, simulated."""

    events: list[Event]
    """In order of their start."""
    stages: int

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max((event.end for event in self.events), default=0.0)

    @property
    def busy_S(self) -> np.ndarray:
        """(S,) seconds in which a stage computes."""
        busy_S = np.zeros(self.stages)
        for event in self.events:
            busy_S[event.stage] += event.end - event.start
        return busy_S

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        return 1 - float(self.busy_S.mean()) / self.seconds if self.seconds else 0.0


def one_forward_one_backward(forward_SM: np.ndarray, backward_SM: np.ndarray, transfer: float = 0.0) -> Timeline:
    """One step of a pipeline with the 1F1B schedule (PipeDream-flush, arXiv 2006.09503), event by event.

    Stage s begins with min(M, S - 1 - s) forward passes, then alternates a forward and a backward pass, and ends with
    the backward passes that are left. A pass starts when its stage is free and its input has arrived.

    Args:
        forward_SM: seconds of the forward pass of every micro-batch in every stage.
        backward_SM: the same of the backward pass, recomputation included.
        transfer: seconds between the end of a pass and the arrival of its output at the next stage.

    Raises:
        ConfigError: for arrays that are not of one shape (S, M).
    """
    forward_SM, backward_SM = np.asarray(forward_SM, dtype=float), np.asarray(backward_SM, dtype=float)
    require(
        forward_SM.ndim == 2 and forward_SM.shape == backward_SM.shape,
        "backward_SM",
        got=backward_SM.shape,
        expected=f"the shape (stages, micro-batches) of forward_SM, {forward_SM.shape}",
    )
    S, M = forward_SM.shape
    ends: dict[tuple[str, int, int], float] = {}
    free_S = [0.0] * S
    waiting = [_order(S, M, stage)[::-1] for stage in range(S)]
    events: list[Event] = []
    while any(waiting):
        for stage, passes in enumerate(waiting):
            while passes:
                kind, micro_batch = passes[-1]
                before = stage - 1 if kind == "forward" else stage + 1
                arrived = 0.0
                if 0 <= before < S:
                    if (kind, before, micro_batch) not in ends:
                        break
                    arrived = ends[kind, before, micro_batch] + transfer
                passes.pop()
                seconds = (forward_SM if kind == "forward" else backward_SM)[stage, micro_batch]
                start = max(free_S[stage], arrived)
                free_S[stage] = ends[kind, stage, micro_batch] = start + float(seconds)
                events.append(Event(stage, micro_batch, kind, start, free_S[stage]))
    return Timeline(sorted(events, key=lambda event: (event.start, event.stage)), S)


def _order(S: int, M: int, stage: int) -> list[tuple[Literal["forward", "backward"], int]]:
    """The passes of a stage."""
    warm_up = min(M, S - 1 - stage)
    order: list[tuple[Literal["forward", "backward"], int]] = [("forward", number) for number in range(warm_up)]
    for number in range(M - warm_up):
        order += [("forward", warm_up + number), ("backward", number)]
    return order + [("backward", number) for number in range(M - warm_up, M)]


def mean_load(forward_SM: np.ndarray, backward_SM: np.ndarray) -> float:
    """Seconds of a step if the work were spread evenly over all stages: no schedule is faster."""
    return float((np.asarray(forward_SM) + np.asarray(backward_SM)).sum() / len(forward_SM))


def imbalance(seconds_RM: np.ndarray) -> float:
    """Largest by mean time of a micro-batch, each the mean over ranks (SparseBalance, arXiv 2604.13847, eq. 11)."""
    seconds_M = np.asarray(seconds_RM).mean(axis=0)
    return float(seconds_M.max() / seconds_M.mean())


def waiting_share(seconds_RM: np.ndarray) -> float:
    """Share of the ranks' time spent waiting for the slowest at the end of a step: 1 - mean / max of their sums."""
    seconds_R = np.asarray(seconds_RM).sum(axis=1)
    return float(1 - seconds_R.mean() / seconds_R.max())
