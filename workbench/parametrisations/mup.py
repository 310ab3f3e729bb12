"""Maximal update parametrisation (µP) for Adam.

Read in public code (EleutherAI/nanoGPT-mup): variances and learning rates of embedding and hidden matrices, logits
multiplied by α_out / s, attention scores divided by the channels of a head instead of their root, weight decay
constant. Ours: an untied head (as the tied one there), routers, experts, latents, vectors; every rule for optimisers
other than Adam.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.parametrisations.base import (
    BY_FAN_IN,
    Parametrisation,
    ParametrisationConfig,
    Power,
    Rule,
    parametrisations,
    rules,
)


class MupConfig(ParametrisationConfig):
    """Fields of µP and of what is built on it."""

    input_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """α_in: multiplier of the embedding's output, at every width."""
    output_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """α_out: multiplier of the logits at the base."""


@parametrisations.register
class Mup(Parametrisation):
    """Embedding and head constant, matrices by fan-in, logits by 1/s."""

    class Config(MupConfig):
        """µP."""

        kind: Literal["mup"] = "mup"

    rules = rules(Rule(), BY_FAN_IN)
    logits = Power(-1)
    scores = Power(-0.5)
    gradient = Power(1)

    def __init__(self, config: Any):
        super().__init__(config)
        self.input_multiplier, self.output_multiplier = config.input_multiplier, config.output_multiplier
