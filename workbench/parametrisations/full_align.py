"""The standard parametrisation with a learning rate per layer, "Adam, full align".

Published: LongCat-Flash (arXiv 2509.01322, table 1) for embedding, hidden matrices and unembedding, after Everett et
al. (arXiv 2407.05872). Ours: every other role. LongCat-Flash unties the head; a matrix that is embedding and head would
need two learning rates. It sets Adam's epsilon to 1e-16 at every size, which is a setting of the optimiser, not a rule.
"""

from __future__ import annotations

from typing import Literal

from workbench.parametrisations.base import (
    BY_FAN_IN,
    Parametrisation,
    ParametrisationConfig,
    Rule,
    parametrisations,
    rules,
)


@parametrisations.register
class FullAlign(Parametrisation):
    """Variance and learning rate by fan-in, for matrices and head; embedding and vectors constant."""

    class Config(ParametrisationConfig):
        """Full alignment."""

        kind: Literal["full_align"] = "full_align"

    rules = rules(Rule(), BY_FAN_IN, head=BY_FAN_IN)
    tied_head = False
