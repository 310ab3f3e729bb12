"""Times of the ranks of a run, measured while it trains.

Where every rank stores the whole model, ranks meet once per step, to sum gradients: a rank works until it gets there,
and waits for the last one. The shortest sum of a step is that of the last rank, which waits for nobody, so what the sum
takes longer on another rank is waiting. Ranks that share the weights wait in every layer: their times of a micro-batch
include it, and waiting alone is not known.

Legend: R ranks, S steps, A micro-batches of a rank in a step.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import torch

from workbench.training import parallel


class RankTimes:
    """The clock of one rank. A mark costs nothing on the host; on a GPU it is an event in its stream.

    Args:
        device: of the training.
        meets_once: whether ranks wait for each other at the sum of gradients only.
    """

    def __init__(self, device: torch.device, *, meets_once: bool):
        self.device, self.meets_once = device, meets_once
        self.is_alone = parallel.world_size() == 1
        self.steps: list[list[Any]] = []
        """Marks of every step since the last :meth:`take`: its beginning, the end of each micro-batch, of the sum of
        gradients, of the update."""

    def begin_step(self) -> None:
        """Call at the beginning of a step."""
        if not self.is_alone:
            self.steps.append([])
        self.mark()

    def mark(self) -> None:
        """Call after every micro-batch, after the sum of gradients and after the update."""
        if self.is_alone:
            return
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.steps[-1].append(event)
        else:
            self.steps[-1].append(time.perf_counter())

    def take(self) -> dict[str, Any]:
        """What the steps since the last call show; every rank calls it, and it waits for the device. Empty for a single
        process.

        Returns:
            ``step_seconds``: mean time of a step, of the slowest rank. ``rank_imbalance``: mean over steps of the
            longest time that a rank works, divided by the ranks' mean. ``waiting``: share of the ranks' time that they
            wait for others, where that is known. ``ranks``: the newest step: seconds of every ``micro_batches`` [rank]
            [micro-batch], of ``waiting`` [rank] if known, and of the ``step`` [rank].
        """
        steps, self.steps = self.steps, []
        if not steps:
            return {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds_SA = torch.tensor([_intervals(marks) for marks in steps], dtype=torch.float64)
        gathered = parallel.all_gathered(seconds_SA.to(self.device)).cpu().numpy()
        return _summary(gathered, meets_once=self.meets_once)


def _intervals(marks: list[Any]) -> list[float]:
    if isinstance(marks[0], float):
        return np.diff(marks).tolist()
    return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(marks)]


def _summary(seconds: np.ndarray, *, meets_once: bool) -> dict[str, Any]:
    """See :meth:`RankTimes.take`.

    Args:
        seconds: (R, S, A + 2) of every micro-batch, of the sum of gradients, of the update.
    """
    work_RS, sum_RS, steps_RS = seconds[..., :-2].sum(-1), seconds[..., -2], seconds.sum(-1)
    row: dict[str, Any] = {
        "step_seconds": float(steps_RS.max(0).mean()),
        "rank_imbalance": float((work_RS.max(0) / work_RS.mean(0)).mean()),
    }
    ranks = {"micro_batches": seconds[:, -1, :-2].tolist(), "step": steps_RS[:, -1].tolist()}
    if meets_once:
        waiting_RS = sum_RS - sum_RS.min(0)
        row["waiting"] = float(waiting_RS.sum() / steps_RS.sum())
        ranks["waiting"] = waiting_RS[:, -1].tolist()
    return {**row, "ranks": ranks}
