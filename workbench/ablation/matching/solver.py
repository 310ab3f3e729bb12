"""What is held equal between arms, and the solver that makes it so.

The solver turns whole numbers (a feed-forward's width, depth, heads, experts, tokens) that the ablation names as free. It
asks the accounting what a value would cost, never a variant by name, so it works for every registered variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.accounting import account
from workbench.config import Config, ConfigError
from workbench.training.config import RunConfig

__all__ = ["LARGEST_TOLERANCE", "Budget", "knob", "quantity", "solve"]

LARGEST_TOLERANCE = 0.02
"""A difference beyond this is no match: it needs a reason."""
ROUND = 8
"""Values are multiples of this where these come within a quarter of the tolerance (ours): matrix products like such sizes."""
REACH = 8
"""A free value is looked for up to so many times the value it starts from."""


class Budget(Config):
    """What is held equal between the arms, beside tokens and data."""

    axis: Literal["parameters", "active_parameters", "flops", "cache", "seconds"] = "parameters"
    """Matched quantity: non-embedding parameters, those active for one token, training FLOPs of the whole run, bytes that
    decoding keeps, or seconds of training on this device (measured before launch and turned into a number of tokens)."""
    length: Annotated[int | None, Field(ge=1)] = None
    """Tokens at which cache bytes are matched. Default: the training context."""
    target: float | str | None = None
    """What every arm is brought to: an amount, or the name of the arm that has it. Default: the baseline."""
    free: tuple[str, ...] = ()
    """Whole-number fields of a run that the solver sets, coarse ones first: [model.feedforwards.swiglu.hidden]. Each comes
    as near the target as it can, the next takes up what is left. An arm without such a field, or that sets it itself,
    leaves it as it is."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = LARGEST_TOLERANCE
    """Largest relative difference to the target."""
    allow_mismatch: str | None = None
    """A reason to compare arms that do not match; the verdict is then labelled exploratory."""
    solved: dict[str, dict[str, int]] = {}
    """What the solver found, arm by arm. Written down at launch, and kept from then on; not given by hand."""

    def model_post_init(self, _context: Any) -> None:
        if self.tolerance > LARGEST_TOLERANCE and not self.allow_mismatch:
            raise ConfigError.at(
                "tolerance",
                got=self.tolerance,
                expected=f"at most {LARGEST_TOLERANCE:g}",
                do="Give a reason in allow_mismatch to compare arms that differ by more.",
            )
        if self.axis == "seconds" and self.free != ("training.tokens",):
            raise ConfigError.at(
                "free",
                got=list(self.free),
                expected="[training.tokens] where axis is seconds",
                do="Time is turned into a number of tokens before launch.",
            )
        for path in self.free:
            if path.rpartition(".")[2] == "seed":
                raise ConfigError.at(
                    "free", got=path, expected="a size", do="A seed is noise to average over, never a knob."
                )


def quantity(budget: Budget, run: RunConfig) -> float:
    """How much of the budget's axis a run takes; not for seconds, which are measured."""
    training = run.training
    length = budget.length or training.context if budget.axis == "cache" else training.context
    cost = account(run.model, length, element_bytes=4 if training.precision == "fp32" else 2)
    if budget.axis == "flops":
        return cost.training_flops * training.steps * training.tokens_per_step
    return {"parameters": cost.non_embedding, "active_parameters": cost.active, "cache": cost.cache_bytes}[budget.axis]


def knob(run: RunConfig, path: str) -> int | None:
    """The whole number at the dotted ``path`` of a run, defaults filled in; None where the run has none there."""
    value: Any = run
    parts = path.split(".")
    if parts[0] == "model" and len(parts) == 4 and parts[1] in ("mixers", "feedforwards"):
        field, tile = ("mixer", run.model.pattern) if parts[1] == "mixers" else ("feedforward", run.model.feedforward)
        names = tile.split()
        if parts[2] not in names:
            return None
        value, parts = getattr(run.model.layers[names.index(parts[2])], field), parts[3:]
    for part in parts:
        value = getattr(value, part, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def solve(
    make: Callable[[dict[str, int]], RunConfig], budget: Budget, free: Sequence[str], target: float
) -> dict[str, int]:
    """Values of the ``free`` fields, one after the other, at which the budget's quantity is nearest to ``target``.

    The quantity is taken to grow with every field. A value that the model cannot be built with is passed over.

    Args:
        make: the run with these fields changed; raises ConfigError where there is no such run.
        budget: the axis and the tolerance.
        free: fields that may be turned; those that the run does not have are left out.
        target: the wanted quantity, positive.

    Returns:
        only the fields that had to change; as near as they come, within the tolerance or not.
    """
    found: dict[str, int] = {}
    for path in free:
        run = make(found)
        start = knob(run, path)
        if start is None or quantity(budget, run) == target:
            continue
        value = _nearest(lambda values: make({**found, **values}), budget, run, path, start, target)
        if value != start:
            found[path] = value
    return found


def _nearest(
    make: Callable[[dict[str, int]], RunConfig], budget: Budget, run: RunConfig, path: str, start: int, target: float
) -> int:
    known: dict[int, float | None] = {start: quantity(budget, run)}

    def at(value: int) -> float | None:
        if value not in known:
            try:
                known[value] = quantity(budget, make({path: value}))
            except ConfigError:
                known[value] = None
        return known[value]

    def best() -> int:
        there = {value: amount for value, amount in known.items() if amount is not None}
        return min(there, key=lambda value: (abs(there[value] - target), abs(value - start)))

    step = run.training.tokens_per_step if path == "training.tokens" else ROUND
    _bisect(at, range(step, max(REACH * start, 8 * step) + 1, step), target)
    value = best()
    near = abs((at(value) or 0) / target - 1) <= budget.tolerance / 4
    if path != "training.tokens" and not (near and value % ROUND == 0):
        _bisect(at, range(max(1, value - ROUND), value + ROUND + 1), target)
    return best()


def _bisect(at: Callable[[int], float | None], candidates: range, target: float) -> None:
    """Ask ``at`` where the quantity passes the target, going round candidates that cannot be built."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        outwards = (
            sorted(range(low + 1, high), key=lambda i: abs(i - middle))
            if high - low < 4 * ROUND
            else _spread(low, middle, high)
        )
        for index in outwards:
            amount = at(candidates[index])
            if amount is not None:
                low, high = (index, high) if amount < target else (low, index)
                break
        else:
            return


def _spread(low: int, middle: int, high: int) -> list[int]:
    """Indices around the middle, near ones first, enough of them to meet one that can be built."""
    near = [middle + side * distance for distance in range(4 * ROUND) for side in (1, -1)]
    return [index for index in dict.fromkeys(near) if low < index < high]
