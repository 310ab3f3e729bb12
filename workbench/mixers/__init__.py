"""Sequence mixers, one file per variant. To add one, copy the nearest file; nothing else changes."""

from workbench.contract import AuxOutputs, Cache, Capabilities, Cost, Mixer, Range, VariantConfig, mixers

__all__ = ["AuxOutputs", "Cache", "Capabilities", "Cost", "Mixer", "Range", "VariantConfig", "mixers"]
