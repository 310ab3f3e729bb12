"""Coordinate check: do activations, and their changes by a few optimiser steps, keep their size over width or depth?

A parametrisation whose rules have the right powers keeps them; a wrong power shows before any sweep. The idea is that
of the public µP code (microsoft/mup); quantities, bounds and statistics are ours.

Legend: B batch, T time, D model width, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from scipy import stats
from torch import Tensor

from workbench import seeding
from workbench.config import require
from workbench.contract import AuxOutputs
from workbench.environment import choose_device
from workbench.feedforwards.router import Router
from workbench.model import LanguageModel
from workbench.model.block import Block
from workbench.training.config import RunConfig
from workbench.training.optimiser import build_optimiser

__all__ = ["CHANGE_BOUND", "START_BOUND", "CoordinateCheck", "coordinate_check"]

START_BOUND = 0.05
"""Largest slope with which the size of hidden states at the start counts as flat."""
CHANGE_BOUND = 0.10
"""Largest slope with which a change by optimiser steps counts as flat."""
SCHEMA: dict[str, Any] = {
    "width": pl.Int64,
    "depth": pl.Int64,
    "seed": pl.Int64,
    "step": pl.Int64,
    "quantity": pl.String,
    "value": pl.Float64,
}
CHECKED = ("hidden", "router")
"""Quantities whose changes decide; of the others slopes are shown. Logits approach their slope only over many steps."""


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of activations over sizes of the model."""

    over: Literal["width", "depth"]
    table: pl.DataFrame
    """Columns: width, depth, seed, step, quantity, value. Quantities: ``embedding``, ``hidden`` (output of the last
    block), ``mixer`` and ``feedforward`` (mean over blocks), ``router`` (scores of experts), ``logits``, each the mean
    absolute number, and with `` change`` the mean absolute difference from the start."""

    def slopes(self) -> pl.DataFrame:
        """Slope of log value over log size, least squares for each seed.

        Columns: quantity, step, slope (mean over seeds), low, high (95 % t-interval over seeds; null with one seed),
        bound (null where the slope decides nothing), flat (null likewise).
        """
        rows = []
        last = int(self.table["step"].max() or 0)  # type: ignore[arg-type]
        for (quantity, step), group in self.table.group_by(["quantity", "step"], maintain_order=True):
            is_change = str(quantity).endswith(" change")
            if step != (last if is_change else 0):
                continue
            slopes = [_slope(part, self.over) for _, part in group.group_by("seed", maintain_order=True)]
            low, high = _interval(slopes)
            bound = None
            if str(quantity).removesuffix(" change") in CHECKED and is_change:
                bound = CHANGE_BOUND
            elif quantity == "hidden" and self.over == "width":
                bound = START_BOUND
            slope = float(np.mean(slopes))
            rows.append((quantity, step, slope, low, high, bound, None if bound is None else abs(slope) <= bound))
        names = ["quantity", "step", "slope", "low", "high", "bound", "flat"]
        return pl.DataFrame(rows, schema=names, orient="row", strict=False)

    @property
    def is_flat(self) -> bool:
        """Whether every slope that decides is within its bound."""
        return bool(self.slopes()["flat"].drop_nulls().all())


def coordinate_check(
    config: RunConfig,
    sizes: Sequence[int],
    over: Literal["width", "depth"] = "width",
    *,
    steps: int = 6,
    seeds: Sequence[int] = (0, 1, 2),
    batch: tuple[int, int] = (4, 32),
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> CoordinateCheck:
    """Train models of several sizes for a few steps on one fixed batch of random tokens, in fp32.

    The learning rate is the run's peak without a schedule; gradients are not clipped.

    Args:
        config: model and optimiser; its size ``over`` is replaced.
        sizes: widths or depths, at least two.
        steps: optimiser steps.
        seeds: of initial values and batch.
        batch: rows and tokens (B, T).
        device: its name.
        progress: called with a line for every size.

    Raises:
        ConfigError: when a size cannot be built, there are fewer than two, or this machine has no such device.
    """
    on = choose_device(device)
    require(len(set(sizes)) >= 2, f"{over}s", got=list(sizes), expected="at least two sizes")
    rows: list[tuple[Any, ...]] = []
    for size in sizes:
        run = config.changed(model=config.model.changed(**{over: size}))
        if progress:
            progress(f"{over} {size}")
        for seed in seeds:
            for step, quantities in enumerate(_trajectory(run, steps, seed, batch, on)):
                values = quantities.items()
                rows += [(run.model.width, run.model.depth, seed, step, name, value) for name, value in values]
    return CoordinateCheck(over, pl.DataFrame(rows, schema=SCHEMA, orient="row"))


def _trajectory(
    run: RunConfig, steps: int, seed: int, batch: tuple[int, int], device: torch.device
) -> Iterator[dict[str, float]]:
    """Quantities before the first step and after each."""
    model = LanguageModel(run.model, seed=seed).to(device)
    generator = seeding.generator(seed, "coordinates")
    tokens_BT = torch.randint(run.model.vocabulary, (batch[0], batch[1] + 1), generator=generator).to(device)
    optimiser = build_optimiser(model, run.training)
    start: dict[str, list[Tensor]] = {}
    for step in range(steps + 1):
        with _recording(model) as activations:
            layer_aux = [AuxOutputs(collect_metrics=False) for _ in (*model.blocks, *model.shortcuts)]
            loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:], layer_aux=layer_aux)
            with torch.no_grad():
                activations["logits"] = [model.logits(model(tokens_BT[:, :-1]))]
        start = start or activations
        yield _sizes(activations) | {
            f"{name} change": _size([now - then for now, then in zip(tensors, start[name])])
            for name, tensors in activations.items()
            if step
        }
        for aux in layer_aux:
            loss = loss + sum(aux.losses)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@contextmanager
def _recording(model: LanguageModel) -> Iterator[dict[str, list[Tensor]]]:
    """Activations of the first pass through the model, by quantity."""
    activations: dict[str, list[Tensor]] = {}
    seen: set[tuple[str, int]] = set()

    def record(name: str, module: Any, output: Any) -> None:
        if (name, id(module)) not in seen:
            seen.add((name, id(module)))
            activations.setdefault(name, []).append(
                (module.stream(output) if isinstance(module, Block) else output).detach()
            )

    def hook(name: str, module: Any) -> Any:
        return module.register_forward_hook(lambda module, inputs, output: record(name, module, output))

    def router_hook(module: Router) -> Any:
        return module.register_forward_hook(
            lambda module, inputs, output: record("router", module, module.scores(inputs[0])[0])
        )

    blocks: list[Any] = list(model.blocks)
    handles = [hook("embedding", model.embedding), hook("hidden", blocks[-1])]
    handles += [hook(name, getattr(block, name)) for block in blocks for name in ("mixer", "feedforward")]
    handles += [router_hook(module) for module in model.modules() if isinstance(module, Router)]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def _sizes(activations: Mapping[str, list[Tensor]]) -> dict[str, float]:
    return {name: _size(tensors) for name, tensors in activations.items()}


def _size(tensors: Sequence[Tensor]) -> float:
    """Mean absolute number."""
    return float(torch.stack([tensor.float().abs().mean() for tensor in tensors]).mean())


def _slope(rows: pl.DataFrame, over: str) -> float:
    values = rows["value"].to_numpy()
    if not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan
    return float(np.polyfit(np.log(rows[over].to_numpy()), np.log(values), 1)[0])


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % t-interval of the mean."""
    if len(values) < 2:
        return None, None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(low), float(high)
