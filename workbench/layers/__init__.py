"""Layers that variants are made of: projections, norms, activations, rotary positions, short convolution, pooling,
decode caches."""

from workbench.layers.activations import softplus
from workbench.layers.caches import RowCache
from workbench.layers.convolution import ShortConvolution
from workbench.layers.initial_values import INIT_SCALE
from workbench.layers.norms import LayerNorm, RMSNorm
from workbench.layers.pooling import Pooling
from workbench.layers.projections import Linear, linear_flops
from workbench.layers.rotary import Rotary, RotaryScaling, rotary_table, turned
from workbench.layers.scores import ScaledScores

__all__ = [
    "INIT_SCALE",
    "LayerNorm",
    "Linear",
    "Pooling",
    "RMSNorm",
    "Rotary",
    "RotaryScaling",
    "RowCache",
    "ScaledScores",
    "ShortConvolution",
    "linear_flops",
    "rotary_table",
    "softplus",
    "turned",
]
