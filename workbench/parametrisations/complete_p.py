"""CompleteP (arXiv 2505.01618): µP that transfers over depth too.

Published (abstract): α = 1. Read in public code (nanoGPT-mup, branch completep): residual branches multiplied by m^-α,
learning rates inside them by m^(α - 1), weight decay of hidden matrices by s, Adam's epsilon by s^-1 m^-α, no factor
1/(2 L) of the initial variance. Ours: the matrices that write the residual stream start as in the base model, so that
the base is the same model in every parametrisation; epsilon outside of the branches has no factor of the depth, as
gradients there have none. The multi-token head's projection and norms are outside; its block is a branch.

At the start branches add up at random: with m^-1 their sum shrinks as m^-1/2, so that the residual stream keeps its
size over the depth only where the embedding carries it. An embedding of this workbench starts at 0.5 / sqrt(base width)
and needs an input_multiplier of about 2 · sqrt(base width) for unit size, or the embedding's amplify: norm.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.parametrisations.base import Power, Rule, parametrisations, rules
from workbench.parametrisations.mup import Mup, MupConfig


@parametrisations.register
class CompleteP(Mup):
    """µP with branches by m^-α, weight decay and epsilon by width and depth."""

    class Config(MupConfig):
        """CompleteP."""

        kind: Literal["complete_p"] = "complete_p"
        alpha: Annotated[float, Field(ge=0.5, le=1)] = 1.0
        """Power of the depth by which residual branches are divided."""
        scale_epsilon: bool = True
        """Whether Adam's epsilon follows the size of gradients. The description of the public code names the residual
        multiplier alone; the code scales epsilon too."""

    residual_variance = 0.0
    keeps_decay = True

    def __init__(self, config: Any):
        super().__init__(config)
        alpha = config.alpha
        epsilon = Power(-1, -alpha) if config.scale_epsilon else Power()
        vector = Rule(learning_rate=Power(0, alpha - 1), epsilon=epsilon)
        matrix = Rule(variance=Power(-1), learning_rate=Power(-1, alpha - 1), epsilon=epsilon)
        self.rules = rules(vector, matrix)
        self.branches = Power(0, -alpha)
        self.gradient = Power(1, 2 * alpha - 1)
