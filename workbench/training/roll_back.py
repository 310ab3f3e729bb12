"""Steps undone in windows: weights and optimiser state return to an earlier step, the data and the schedule go on.

At the end of every window of W steps (those after a multiple of W up to the next), a copy of weights, buffers and
optimiser state is made. Two are retained: of the end of this window and of the one before. If a guard rejected a step
of the window, its end returns to the older copy, between W and 2 W steps before the rejected step: the
steps that led to a spike are undone with it. They are not repeated, and their data is not used again; the run has as
many steps and tokens as any other. So nothing depends on when the host learns of a spike, no step waits for it, and an
interrupted run continues to the same bits, inside a window too.

PaLM (arXiv 2204.02311, §5.1) restarted by hand about 100 steps before a spike and left out the batches around it.
Windows and the decision on the device are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.optimisers import AVERAGE
from workbench.optimisers.tensors import local
from workbench.training import parallel

RETAINED_COPIES = 2
"""Of the end of the newest window, and of the one before."""
Key = tuple[str, str]
"""Name of a tensor of the model; entry of its optimiser state, or "" for the tensor itself."""


class RollBack:
    """Copies of a run's weights and optimiser state, and the return to them.

    Args:
        model: on its device, sharded if it is to be.
        optimiser: over its parameters.
        window: W.
        device: of the model.
    """

    def __init__(self, model: nn.Module, optimiser: Optimizer, window: int, device: torch.device):
        self.model, self.optimiser, self.window = model, optimiser, window
        self.is_rejected = torch.zeros((), device=device)
        """1.0 once a step of this window is rejected."""
        self.kept = torch.zeros(2, dtype=torch.float64, device=device)
        """Steps whose work is in the older and in the newer copy."""
        self.copied_at = 0
        """Step of the newer copy."""
        self.older: dict[Key, Tensor] = {}
        self.newer: dict[Key, Tensor] = {}

    @torch.no_grad()
    def end_step(self, step: int, rejected: Tensor, *, is_last: bool) -> Tensor | None:
        """End a step; at the end of a window return where one of its steps is rejected.

        Args:
            step: its number, from 1.
            rejected: 1.0 on the device where a guard demands to roll back, else 0.0.
            is_last: whether the window ends with this step, whatever its number. A window that has ended with it does
                not end again.

        Returns:
            Steps that were undone, on the device, 0 if none; None within a window.
        """
        self.is_rejected = torch.maximum(self.is_rejected, rejected)
        if self.newer and (step == self.copied_at or (step % self.window and not is_last)):
            return None
        if not self.newer:  # after the first step, which creates the optimiser's state
            self.older, self.newer = (
                {key: _copy(tensor) for key, tensor in self._tensors()} for _ in range(RETAINED_COPIES)
            )
            self.kept, self.copied_at = torch.full_like(self.kept, step), step
            self.is_rejected = torch.zeros_like(self.is_rejected)
            return None
        returns = self.is_rejected > 0
        older_steps, newer_steps = self.kept.unbind()
        steps = newer_steps + (step - self.copied_at)
        undone = torch.where(returns, steps - older_steps, 0.0)
        for key, tensor in self._tensors():
            if key not in self.newer:  # of a parameter that has no gradient in the first windows
                start = self._untrained(key, tensor)
                self.older[key], self.newer[key] = _copy(start), _copy(start)
            here, older, newer = local(tensor), local(self.older[key]), local(self.newer[key])
            here.copy_(torch.where(returns, older, here))
            older.copy_(torch.where(returns, older, newer))
            newer.copy_(here)
        kept = torch.where(returns, older_steps, newer_steps), torch.where(returns, older_steps, steps)
        self.kept, self.copied_at = torch.stack(kept), step
        self.is_rejected = torch.zeros_like(self.is_rejected)
        return undone

    def tensors(self) -> list[Tensor]:
        """The copies in memory."""
        return [*self.older.values(), *self.newer.values()]

    def state_dict(self) -> dict[str, Any]:
        """All state, as tensors and plain data; called on every rank, complete on each."""
        copies = [
            [[*key, parallel.full_tensor(tensor).cpu()] for key, tensor in copy.items()]
            for copy in (self.older, self.newer)
        ]
        return {
            "is_rejected": self.is_rejected,
            "kept": self.kept,
            "copied_at": self.copied_at,
            "copies": copies,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for any number of ranks, once model and optimiser are restored."""
        self.is_rejected = saved["is_rejected"].to(self.is_rejected.device)
        self.kept, self.copied_at = saved["kept"].to(self.kept.device), saved["copied_at"]
        tensors = dict(self._tensors())
        self.older, self.newer = (
            {
                (name, entry): parallel.sharded_like(
                    tensor.to(tensors[name, entry].device), tensors[name, entry]
                ).clone()
                for name, entry, tensor in copy
            }
            for copy in saved["copies"]
        )

    def _tensors(self) -> Iterator[tuple[Key, Tensor]]:
        """Weights, buffers and optimiser state in use."""
        for name, tensor in self.model.state_dict().items():
            yield (name, ""), tensor
        for name, parameter in self.model.named_parameters():
            for entry, value in self.optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield (name, entry), value

    def _untrained(self, key: Key, tensor: Tensor) -> Tensor:
        """The optimiser state of a parameter that has not been trained."""
        return self.newer[key[0], ""] if key[1] == AVERAGE else torch.zeros_like(tensor)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
