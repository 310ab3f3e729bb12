"""The conformance suite, for components of this repository and of other packages.

In a test module of your own package::

    from workbench.testing import MixerConformance

    class TestMine(MixerConformance):
        name = "my_mixer"

or, anywhere (a notebook cell, say), ``workbench.testing.check("my_mixer")``, which returns what failed.
"""

from workbench.testing.conformance import (
    ComponentConformance,
    EmbeddingConformance,
    FeedForwardConformance,
    MixerConformance,
    check,
    count_flops,
    registered_suites,
)
from workbench.testing.transforms import TransformConformance

__all__ = [
    "ComponentConformance",
    "EmbeddingConformance",
    "FeedForwardConformance",
    "MixerConformance",
    "TransformConformance",
    "check",
    "count_flops",
    "registered_suites",
]
