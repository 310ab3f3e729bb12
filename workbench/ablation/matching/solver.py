"""The solver that makes arms equal on the budget's axis.

It sets whole numbers (a feed-forward's width, depth, heads, experts, tokens) that the ablation names as free. It asks
the accounting what a value would cost, never a variant by name, so it works for every registered variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workbench.ablation.spec.budget import Budget
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.training.config import RunConfig

__all__ = ["quantity", "solve", "tunable_value"]

ROUND = 8
"""Values are multiples of this if such a value is within a quarter of the tolerance (our choice): matrix products are
fastest at multiples of 8."""
REACH = 8
"""A free value is searched up to this many times its initial value."""


def quantity(budget: Budget, run: RunConfig) -> float:
    """The run's amount on the budget's axis; not for seconds, which are measured."""
    if budget.axis == "flops":
        return run.training_flops
    training = run.training
    length = budget.length or training.context if budget.axis == "cache" else training.context
    cost = account(run.model, length, element_bytes=4 if training.precision == "fp32" else 2)
    return {"parameters": cost.non_embedding, "active_parameters": cost.active, "cache": cost.cache_bytes}[budget.axis]


def tunable_value(run: RunConfig, path: str) -> int | None:
    """The whole number at the dotted ``path`` of a run, defaults filled in; None if there is no whole number at
    ``path``."""
    value: Any = run
    parts = path.split(".")
    if parts[0] == "model" and len(parts) == 4 and parts[1] in ("mixers", "feedforwards"):
        field, tile = ("mixer", run.model.pattern) if parts[1] == "mixers" else ("feedforward", run.model.feedforward)
        names = tile.split()
        if parts[2] not in names:
            return None
        value, parts = getattr(run.model.layers[names.index(parts[2])], field), parts[3:]
    elif parts[:2] == ["model", "embedding"]:
        value, parts = run.model.embedding_config, parts[2:]
    for part in parts:
        value = getattr(value, part, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def solve(
    make: Callable[[dict[str, int]], RunConfig], budget: Budget, free: Sequence[str], target: float
) -> dict[str, int]:
    """Values of the ``free`` fields, one after the other, at which the budget's quantity is nearest to ``target``.

    The quantity is assumed to grow with every field. A value for which the model cannot be built is skipped.

    Args:
        make: the run with these fields changed; raises ConfigError if there is no such run.
        budget: the axis and the tolerance.
        free: fields that may be changed; those that the run does not have are skipped.
        target: the wanted quantity, positive.

    Returns:
        only the fields that had to change, as near as they come, within the tolerance or not.
    """
    solved: dict[str, int] = {}
    for path in free:
        run = make(solved)
        initial = tunable_value(run, path)
        if initial is None or quantity(budget, run) == target:
            continue
        value = _nearest(lambda values: make({**solved, **values}), budget, run, path, initial, target)
        if value != initial:
            solved[path] = value
    return solved


def _nearest(
    make: Callable[[dict[str, int]], RunConfig], budget: Budget, run: RunConfig, path: str, initial: int, target: float
) -> int:
    """The value of ``path`` at which the quantity is nearest to ``target``."""
    known: dict[int, float | None] = {initial: quantity(budget, run)}

    def quantity_at(value: int) -> float | None:
        if value not in known:
            try:
                known[value] = quantity(budget, make({path: value}))
            except ConfigError:
                known[value] = None
        return known[value]

    def best() -> int:
        amounts = {value: amount for value, amount in known.items() if amount is not None}
        return min(amounts, key=lambda value: (abs(amounts[value] - target), abs(value - initial)))

    step = run.training.tokens_per_step if path == "training.tokens" else ROUND
    _bisect(quantity_at, range(step, max(REACH * initial, 8 * step) + 1, step), target)
    value = best()
    matched = abs((quantity_at(value) or 0) / target - 1) <= budget.tolerance / 4
    if path != "training.tokens" and not (matched and value % ROUND == 0):
        _bisect(quantity_at, range(max(1, value - ROUND), value + ROUND + 1), target)
    return best()


def _bisect(quantity_at: Callable[[int], float | None], candidates: range, target: float) -> None:
    """Evaluate ``quantity_at`` around the crossing of ``target``, skipping candidates that cannot be built."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        nearest_first = sorted(range(low + 1, high), key=lambda i: abs(i - middle)) if high - low < 4 * ROUND else None
        for index in nearest_first or _neighbours(low, middle, high):
            amount = quantity_at(candidates[index])
            if amount is not None:
                low, high = (index, high) if amount < target else (low, index)
                break
        else:
            return


def _neighbours(low: int, middle: int, high: int) -> list[int]:
    """Indices around the middle, near ones first, enough of them to include one that can be built."""
    indices = [middle + side * distance for distance in range(4 * ROUND) for side in (1, -1)]
    return [index for index in dict.fromkeys(indices) if low < index < high]
