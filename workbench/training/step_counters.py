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
        self.loss_inputs: dict[int, Tensor] = {}
        """Inputs of step losses on this rank, summed over the micro-batches of this step, by the counter's index.
        Only where the step has gradient taps."""
        self.recent_counts: dict[int, Tensor] = {}
        """Counts of all steps since the last diagnostics, by the counter's index. Part of a checkpoint."""

    def begin_step(self) -> None:
        """Forget the counts of the step before."""
        self.step_counts, self.loss_inputs = {}, {}

    @property
    def count_first(self) -> bool:
        """Whether the losses of a micro-batch need the counts of the whole step."""
        return any(counter.counts_first for counter in self.counters)

    def count(self, aux: Sequence[AuxOutputs]) -> None:
        """Add the counts of a micro-batch."""
        counts_by_counter = {index: counts for index, (counts, _) in self._entries(aux).items()}
        if not counts_by_counter:
            return
        summed = parallel.all_sum(torch.cat(list(counts_by_counter.values())))  # one message for all layers
        parts = summed.split([len(counts) for counts in counts_by_counter.values()])
        self.step_counts = _add(self.step_counts, dict(zip(counts_by_counter, parts)))

    def losses(self, aux: Sequence[AuxOutputs]) -> list[Tensor]:
        """Step losses of a micro-batch, which depend on what has been counted of the step."""
        losses = []
        for index, (_, loss_input) in self._entries(aux).items():
            counter = self.counters[index]
            losses.append(counter.step_loss(self.step_counts[index], loss_input))
            if counter.gradient_tap is not None:
                self.loss_inputs = _add(self.loss_inputs, {index: loss_input.detach()})
        return [loss for loss in losses if loss is not None]

    def _entries(self, aux: Sequence[AuxOutputs]) -> dict[int, tuple[Tensor, Tensor]]:
        """Counts and loss input of the counters that have run, by index, in its order."""
        entries = {id(counter): (counts, loss_input) for layer in aux for counter, counts, loss_input in layer.counts}
        return {i: entries[id(counter)] for i, counter in enumerate(self.counters) if id(counter) in entries}

    def update(self, lr_factor: float, remaining: float, applied: Tensor) -> None:
        """End a step: update the state of every counter (arguments as :meth:`StepCounter.update_state`)."""
        for index, counts in self.step_counts.items():
            self.counters[index].update_state(counts, lr_factor, remaining, applied)
        self.recent_counts = _add(self.recent_counts, self.step_counts)

    def attach_taps(self, device: torch.device) -> None:
        """Give every counter a gradient tap for this step."""
        for counter in self.counters:
            counter.gradient_tap = torch.zeros(counter.tap_size, device=device, requires_grad=True)

    def diagnostics(self, layers: Sequence[AuxOutputs]) -> list[dict[str, Tensor]]:
        """Diagnostics of every layer's counters, after a step with gradient taps.

        Removes the taps and resets the recent counts.

        Args:
            layers: auxiliary outputs of a micro-batch of the step.
        """
        index_of = {id(counter): index for index, counter in enumerate(self.counters)}
        values: list[dict[str, Tensor]] = [{} for _ in layers]
        for layer, aux in enumerate(layers):
            for counter, _, _ in aux.counts:
                tap, index = counter.gradient_tap, index_of[id(counter)]
                assert tap is not None, "attach_taps comes before the forward pass"
                gradient = torch.zeros_like(tap) if tap.grad is None else tap.grad
                loss_input, gradient = (parallel.all_sum(part) for part in (self.loss_inputs[index], gradient))
                values[layer] |= counter.diagnostics(
                    self.step_counts[index], self.recent_counts[index], loss_input, gradient
                )
        for counter in self.counters:
            counter.gradient_tap = None
        self.recent_counts = {}
        return values


def _add(total: dict[int, Tensor], more: dict[int, Tensor]) -> dict[int, Tensor]:
    return total | {index: total[index] + counts if index in total else counts for index, counts in more.items()}
