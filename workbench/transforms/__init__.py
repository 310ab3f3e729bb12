"""Weight transforms: from the weights of one model to those of another, or of the same one.

    start: {folder: exports/small, transforms: [{kind: start_from, allowed_differences: [rotary_theta]}]}
    growth: {model: {depth: 2}, at: 0.2, transforms: [{kind: stack}]}
    training: {transforms: [{kind: wisca, every: 250}]}

At the start of a run, a sequence of transforms leads from the model in ``folder`` to the run's model. They may differ
in kinds of layers, depth or width, as far as the transforms allow. With ``growth`` the run trains a smaller model first
and grows between two steps. During training a transform maps the run's model to itself.
"""

from workbench.transforms.base import (
    OptimiserState,
    Transform,
    TransformConfig,
    TransformSetting,
    Weights,
    apply_transforms,
    build_transforms,
    check_transforms,
    state_shapes,
    transforms,
)
from workbench.transforms.growth import GrowthConfig
from workbench.transforms.start import StartConfig, initialise_from

__all__ = [
    "GrowthConfig",
    "OptimiserState",
    "StartConfig",
    "Transform",
    "TransformConfig",
    "TransformSetting",
    "Weights",
    "apply_transforms",
    "build_transforms",
    "check_transforms",
    "initialise_from",
    "state_shapes",
    "transforms",
]
