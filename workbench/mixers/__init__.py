"""Sequence mixers, one file a variant. Copy the nearest file to add one; nothing else needs to be touched."""

from workbench.contract import AuxOutputs, Cache, Capabilities, Cost, Mixer, Range, VariantConfig, mixers

__all__ = ["AuxOutputs", "Cache", "Capabilities", "Cost", "Mixer", "Range", "VariantConfig", "mixers"]
