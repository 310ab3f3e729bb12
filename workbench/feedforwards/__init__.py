"""Feed-forwards, one file a variant. Copy the nearest file to add one; nothing else needs to be touched."""

from workbench.contract import AuxOutputs, Capabilities, Cost, FeedForward, Range, VariantConfig, feedforwards

__all__ = ["AuxOutputs", "Capabilities", "Cost", "FeedForward", "Range", "VariantConfig", "feedforwards"]
