"""A frozen probe: one logistic regression per value on the hidden states of one block.

Legend: N arguments, J values, D model width, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.evaluation.human_values.states import POOLS

STEPS = 200
"""Most iterations of L-BFGS; a regression ends earlier once its gradient is below :data:`TOLERANCE`."""
TOLERANCE = 1e-5


class Probe(NamedTuple):
    """The chosen probe and what it gives."""

    block: int
    """0 is the embedding, l the output of block l."""
    pool: str
    """Way of pooling over tokens."""
    penalty: float
    validation_loss: float
    """Nats per argument and value."""
    values: tuple[np.ndarray, ...]
    """(N, J) log-odds of the arguments of every further set, the validation set first."""


def fit(features: Tensor, labels: Tensor, penalty: float, start: Tensor | None = None) -> Tensor:
    """(D + 1, J) weights and, last, biases that minimise the mean over arguments of Σ_j BCE_j + penalty/2 · |w|².

    Biases are not penalised. The labels' problems are separate; they are solved as one, by L-BFGS in fp64.

    Args:
        features: (N, D).
        labels: (N, J).
        penalty: positive.
        start: weights to start from, such as those of the next larger penalty.
    """
    x, y = features.double(), labels.double()
    weights = torch.zeros(x.shape[1] + 1, y.shape[1], dtype=torch.float64, device=x.device)
    if start is not None:
        weights.copy_(start)
    weights.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=STEPS, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        fit_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1).mean()
        total = fit_loss + penalty / 2 * weights[:-1].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    return weights.detach()


def probe(states: Sequence[Tensor], labels: Sequence[np.ndarray], penalties: Sequence[float]) -> Probe:
    """Fit probes on every block, pooling and penalty, and choose the one of least validation loss.

    Args:
        states: (L + 1, 2, N, D) of the training, the validation and all further sets (:func:`hidden_states`).
        labels: (N, J) of the training and the validation set.
        penalties: weights of the squared norm, any order.
    """
    train_y, validation_y = (torch.from_numpy(np.asarray(part, np.float64)) for part in labels)
    best: Probe | None = None
    for block in range(states[0].shape[0]):
        for pool, name in enumerate(POOLS):
            parts = [part[block, pool].double() for part in states]
            mean, scale = parts[0].mean(0), parts[0].std(0, correction=0).clamp_min(1e-6)
            train_x, *others = ((part - mean) / scale for part in parts)
            weights: Tensor | None = None
            for penalty in sorted(penalties, reverse=True):
                weights = fit(train_x, train_y, penalty, weights)
                logits = [part @ weights[:-1] + weights[-1] for part in others]
                loss = float(torch.nn.functional.binary_cross_entropy_with_logits(logits[0], validation_y))
                if best is None or loss < best.validation_loss:
                    best = Probe(block, name, penalty, loss, tuple(part.numpy() for part in logits))
    assert best is not None
    return best
