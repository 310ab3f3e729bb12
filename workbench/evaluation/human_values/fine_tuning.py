"""Full fine-tuning: all weights of a copy of the model and a head of twenty sigmoids on the last token.

The loss of an argument is −Σ_j [y_j log σ(x_j) + (1 − y_j) log(1 − σ(x_j))]. Every arm gets the same learning rates
and epochs; the rate and the epoch of least validation loss are kept.

Legend: N arguments, B batch, J values, D model width, H hidden width of a value's head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from workbench import seeding
from workbench.evaluation.human_values.states import batches, padded
from workbench.evaluation.suites import Settings
from workbench.model import LanguageModel

HIDDEN = 64
"""Hidden width H of a value's head."""


class Recipe(NamedTuple):
    """How models are fine-tuned."""

    head: Literal["linear", "per value"] = "linear"
    """One matrix, or for every value a network of its own with one hidden layer."""
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """Peak learning rates that are tried."""
    epochs: int = 4
    batch_size: int = 32
    """Arguments of a step."""
    layer_decay: float = 1.0
    """Learning rate of a block as a factor of that of the next one; 1 trains all alike."""
    warmup: float = 0.1
    """Fraction of the steps; the rate then decays linearly to zero."""
    weight_decay: float = 0.01
    """Of matrices."""


class Tuned(NamedTuple):
    """What a fine-tuned model gives."""

    learning_rate: float
    epoch: int
    """From 1."""
    validation_loss: float
    """Nats per argument and value."""
    values: tuple[np.ndarray, ...]
    """(N, J) log-odds of the arguments of every evaluated set, the validation set first."""


class LinearHead(nn.Module):
    """(B, D) -> (B, J) log-odds by one matrix."""

    def __init__(self, width: int, values: int, seed: int):
        super().__init__()
        self.weight = nn.Parameter(_normal((values, width), width, seed, "weight"))
        self.bias = nn.Parameter(torch.zeros(values))

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD @ self.weight.T + self.bias


class PerValueHead(nn.Module):
    """(B, D) -> (B, J) log-odds, each by a network of its own: w · GELU(W x + b) + c."""

    def __init__(self, width: int, values: int, seed: int):
        super().__init__()
        self.up = nn.Parameter(_normal((values, HIDDEN, width), width, seed, "up"))
        self.up_bias = nn.Parameter(torch.zeros(values, HIDDEN))
        self.down = nn.Parameter(_normal((values, HIDDEN), HIDDEN, seed, "down"))
        self.bias = nn.Parameter(torch.zeros(values))

    def forward(self, x_BD: Tensor) -> Tensor:
        hidden_BJH = nn.functional.gelu(torch.einsum("bd,jhd->bjh", x_BD, self.up) + self.up_bias)
        return torch.einsum("bjh,jh->bj", hidden_BJH, self.down) + self.bias


HEADS: dict[str, Callable[[int, int, int], nn.Module]] = {"linear": LinearHead, "per value": PerValueHead}


def parameter_groups(model: LanguageModel, head: nn.Module, recipe: Recipe, rate: float) -> list[dict[str, Any]]:
    """One group per parameter with its learning rate: ``rate`` for the head, the final norm and the last block, times
    ``layer_decay`` for every block below, and once more for the embedding. Vectors have no weight decay."""
    depth = len(model.blocks)
    below: dict[int, int] = {}
    for index, block in enumerate(model.blocks):
        below |= {id(parameter): depth - 1 - index for parameter in block.parameters()}
    below |= {id(parameter): depth for parameter in model.embedding.parameters()}
    return [
        {
            "params": [parameter],
            "lr": rate * recipe.layer_decay ** below.get(id(parameter), 0),
            "weight_decay": recipe.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for parameter in (*model.parameters(), *head.parameters())
    ]


def fine_tune(
    model: LanguageModel,
    rows: Sequence[Sequence[Sequence[int]]],
    labels: Sequence[np.ndarray],
    recipe: Recipe,
    settings: Settings,
    *,
    seed: int = 0,
) -> Tuned:
    """Fine-tune copies of ``model``, one per learning rate.

    Args:
        model: left as it is.
        rows: token ids of the training, the validation and all further sets.
        labels: (N, J) of the training and the validation set.
        recipe: rates, epochs, head.
        settings: precision, and the batches of evaluation.
        seed: of the head's initial weights and the order of the arguments.
    """
    best: Tuned | None = None
    for rate in recipe.learning_rates:
        tuned = _train(model, rows, labels, recipe, settings, rate, seed)
        if best is None or tuned.validation_loss < best.validation_loss:
            best = tuned
    assert best is not None
    return best


def _train(
    original: LanguageModel,
    rows: Sequence[Sequence[Sequence[int]]],
    labels: Sequence[np.ndarray],
    recipe: Recipe,
    settings: Settings,
    rate: float,
    seed: int,
) -> Tuned:
    device = original.embedding.weight.device
    model = copy.deepcopy(original).requires_grad_(True)
    head = HEADS[recipe.head](model.config.width or 0, labels[0].shape[1], seed).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(model, head, recipe, rate))
    train_y, validation_y = (torch.from_numpy(np.asarray(part, np.float32)).to(device) for part in labels)
    per_epoch = math.ceil(len(rows[0]) / recipe.batch_size)
    steps = recipe.epochs * per_epoch
    warmup = max(1, round(recipe.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    best: Tuned | None = None
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order = seeding.counter_generator(seed, epoch).permutation(len(rows[0]))
        for first in range(0, len(order), recipe.batch_size):
            indices = order[first : first + recipe.batch_size]
            with torch.enable_grad():
                logits = _logits(model, head, [rows[0][i] for i in indices], settings)
                losses = nn.functional.binary_cross_entropy_with_logits(logits, train_y[indices], reduction="none")
                losses.sum(1).mean().backward()
            nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
        values = tuple(_evaluate(model, head, part, settings) for part in rows[1:])
        logits = torch.from_numpy(values[0]).to(device)
        loss = float(nn.functional.binary_cross_entropy_with_logits(logits, validation_y.double()))
        if math.isfinite(loss) and (best is None or loss < best.validation_loss):
            best = Tuned(rate, epoch, loss, values)
    if best is None:
        nothing = tuple(np.zeros((len(part), labels[0].shape[1])) for part in rows[1:])
        return Tuned(rate, recipe.epochs, math.inf, nothing)
    return best


def _logits(model: LanguageModel, head: nn.Module, rows: Sequence[Sequence[int]], settings: Settings) -> Tensor:
    """(B, J) fp32 log-odds from the final state of the last token."""
    device = model.embedding.weight.device
    tokens_BT, segments_BT = padded(rows, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        hidden_BTD = model(tokens_BT, segments=segments_BT)
    last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
    result: Tensor = head(hidden_BTD[torch.arange(len(rows), device=device), last_B].float())
    return result


@torch.no_grad()
def _evaluate(model: LanguageModel, head: nn.Module, rows: Sequence[Sequence[int]], settings: Settings) -> np.ndarray:
    """(N, J) log-odds."""
    model.eval()
    parts = [
        (indices, _logits(model, head, [rows[i] for i in indices], settings)) for indices in batches(rows, settings)
    ]
    values = np.empty((len(rows), parts[0][1].shape[1]))
    for indices, logits in parts:
        values[indices] = logits.cpu().double().numpy()
    return values


def _normal(shape: tuple[int, ...], fan_in: int, seed: int, name: str) -> Tensor:
    return torch.randn(shape, generator=seeding.generator(seed, f"human values/{name}")) / math.sqrt(fan_in)
