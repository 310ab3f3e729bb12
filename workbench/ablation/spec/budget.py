"""The budget: what is matched between the arms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.config import Config, require

__all__ = ["LARGEST_TOLERANCE", "Budget"]

LARGEST_TOLERANCE = 0.02
"""A larger relative difference is not a match: it needs a reason."""


class Budget(Config):
    """What is matched between the arms, beside tokens and data."""

    axis: Literal["parameters", "active_parameters", "flops", "cache", "seconds"] = "parameters"
    """Matched quantity: non-embedding parameters, those active for one token, training FLOPs of the whole run, bytes of
    the decode cache, or seconds of training on this device (measured before launch and converted to a number of
    tokens)."""
    length: Annotated[int | None, Field(ge=1)] = None
    """Tokens at which cache bytes are matched. Default: the training context."""
    target: float | str | None = None
    """What every arm is brought to: an amount, or the name of the arm that has it. Default: the baseline."""
    free: tuple[str, ...] = ()
    """Whole-number fields of a run that the solver sets, coarse ones first: [model.feedforwards.swiglu.hidden]. They
    are solved one after another; each minimises the remaining mismatch. An arm without such a field, or that sets it
    itself, keeps its value."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = LARGEST_TOLERANCE
    """Largest relative difference to the target."""
    allow_mismatch: str | None = None
    """A reason to compare arms that do not match; the verdict is then labelled exploratory."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.tolerance <= LARGEST_TOLERANCE or self.allow_mismatch,
            "tolerance",
            got=self.tolerance,
            expected=f"at most {LARGEST_TOLERANCE:g}",
            do="Give a reason in allow_mismatch to compare arms that differ by more.",
        )
        require(
            self.axis != "seconds" or self.free == ("training.tokens",),
            "free",
            got=list(self.free),
            expected="[training.tokens] where axis is seconds",
            do="Time is converted to a number of tokens before launch.",
        )
        require(
            not isinstance(self.target, int | float) or self.target > 0,
            "target",
            got=self.target,
            expected="a positive amount",
        )
        for path in self.free:
            require(
                not {"seed", "seeds"} & set(path.split(".")),
                "free",
                got=path,
                expected="a size",
                do="A seed is noise to average over, never a hyper-parameter.",
            )
