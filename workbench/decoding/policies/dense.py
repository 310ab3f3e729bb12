"""Every step reads everything in the caches: the exact reference for every other policy."""

from __future__ import annotations

from typing import Literal

from workbench.decoding.policy import Policy, PolicyConfig, policies


@policies.register
class Dense(Policy):
    """The cache of each mixer. Prefill and decode compute what a full pass computes."""

    class Config(PolicyConfig):
        """Read everything."""

        kind: Literal["dense"] = "dense"
