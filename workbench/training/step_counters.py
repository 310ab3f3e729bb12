"""Counts of a model's step counters (:class:`workbench.contract.StepCounter`) over one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.contract import AuxOutputs, StepCounter
from workbench.training import parallel


class StepCounters:
    """All step counters of a model, their counts summed over ranks and over the micro-batches of a step.

    Nothing here synchronises with the device.
    """

    def __init__(self, model: nn.Module):
        self.counters = [module for module in model.modules() if isinstance(module, StepCounter)]
        self.step_counts: dict[int, Tensor] = {}
        """Counts of this step, by the counter's index."""
        self.recent_counts: dict[int, Tensor] = {}
        """Counts of all steps since the last diagnostics, by the counter's index. Part of a checkpoint."""

    def begin_step(self) -> None:
        """Forget the counts of the step before."""
        self.step_counts = {}

    def collect(self, aux: Sequence[AuxOutputs]) -> list[Tensor]:
        """Add the counts of a micro-batch.

        Returns:
            The step losses of the micro-batch, which depend on the counts of the step so far.
        """
        entries = {id(counter): (counts, loss_input) for layer in aux for counter, counts, loss_input in layer.counts}
        indices = [index for index, counter in enumerate(self.counters) if id(counter) in entries]
        if not indices:
            return []
        counts_by_counter = [entries[id(self.counters[index])][0] for index in indices]
        summed = parallel.all_sum(torch.cat(counts_by_counter))  # one message for all layers
        parts = summed.split([len(counts) for counts in counts_by_counter])
        self.step_counts = _add(self.step_counts, dict(zip(indices, parts)))
        losses = []
        for index in indices:
            counter = self.counters[index]
            losses.append(counter.step_loss(self.step_counts[index], entries[id(counter)][1]))
        return [loss for loss in losses if loss is not None]

    def update(self, lr_factor: float, remaining: float, applied: Tensor) -> None:
        """End a step: update the state of every counter (arguments as :meth:`StepCounter.update_state`)."""
        for index, counts in self.step_counts.items():
            self.counters[index].update_state(counts, lr_factor, remaining, applied)
        self.recent_counts = _add(self.recent_counts, self.step_counts)

    def attach_taps(self, device: torch.device) -> None:
        """Give every counter a gradient tap for the next micro-batch."""
        for counter in self.counters:
            counter.gradient_tap = torch.zeros(counter.tap_size, device=device, requires_grad=True)

    def diagnostics(self, layers: Sequence[AuxOutputs], gradient_scale: float) -> list[dict[str, Tensor]]:
        """Diagnostics of every layer's counters, after a step whose last micro-batch had gradient taps.

        Removes the taps and resets the recent counts.

        Args:
            layers: auxiliary outputs of that micro-batch.
            gradient_scale: factor that undoes the scaling of the micro-batch's loss.
        """
        index_of = {id(counter): index for index, counter in enumerate(self.counters)}
        values: list[dict[str, Tensor]] = [{} for _ in layers]
        for layer, aux in enumerate(layers):
            for counter, _, loss_input in aux.counts:
                tap = counter.gradient_tap
                assert tap is not None, "attach_taps comes before the forward pass"
                gradient = torch.zeros_like(tap) if tap.grad is None else tap.grad
                gradient = parallel.all_mean(gradient * gradient_scale)
                index = index_of[id(counter)]
                values[layer] |= counter.diagnostics(
                    self.step_counts[index], self.recent_counts[index], loss_input.detach(), gradient
                )
        for counter in self.counters:
            counter.gradient_tap = None
        self.recent_counts = {}
        return values


def _add(total: dict[int, Tensor], more: dict[int, Tensor]) -> dict[int, Tensor]:
    return total | {index: total[index] + counts if index in total else counts for index, counts in more.items()}
