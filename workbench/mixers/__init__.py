"""Sequence mixers, one file a variant. Copy the nearest file to add one; nothing else needs to be touched."""

from workbench.contract import Cache, Capabilities, Cost, Mixer, Range, Side, VariantConfig, mixers

__all__ = ["Cache", "Capabilities", "Cost", "Mixer", "Range", "Side", "VariantConfig", "mixers"]
