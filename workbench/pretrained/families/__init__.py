"""Families of checkpoints in the layout of transformers, one file each: what their fields mean, where weights go.

    Family.Config     the fields of config.json that determine the function; others are ignored
    Family.model()    the same architecture as settings of a ModelConfig
    Family.stored()   of which tensors each of our parameters is made

A family is found by the ``model_type`` of config.json, which is its registered name.
"""

from workbench.pretrained.families.base import Family, families, read_checkpoint
from workbench.pretrained.families.rope import RopeParameters

__all__ = ["Family", "RopeParameters", "families", "read_checkpoint"]
