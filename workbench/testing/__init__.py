"""The conformance suite, for components of this repository and of other packages.

In a test module of your own package::

    from workbench.testing import MixerConformance

    class TestMine(MixerConformance):
        name = "my_mixer"

or, anywhere (a notebook cell, say), ``workbench.testing.check("my_mixer")``, which returns what failed.
"""

from workbench.testing.component import ComponentConformance
from workbench.testing.conformance import check, registered_suites
from workbench.testing.embeddings import EmbeddingConformance
from workbench.testing.feedforwards import FeedForwardConformance
from workbench.testing.measure import count_flops, relative_error
from workbench.testing.mixers import MixerConformance
from workbench.testing.policies import PolicyConformance
from workbench.testing.residuals import ResidualConformance
from workbench.testing.transforms import TransformConformance

__all__ = [
    "ComponentConformance",
    "EmbeddingConformance",
    "FeedForwardConformance",
    "MixerConformance",
    "PolicyConformance",
    "ResidualConformance",
    "TransformConformance",
    "check",
    "count_flops",
    "registered_suites",
    "relative_error",
]
