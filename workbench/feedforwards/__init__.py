"""Feed-forwards, one file a variant. Copy the nearest file to add one; nothing else needs to be touched."""

from workbench.contract import Capabilities, Cost, FeedForward, Range, Side, VariantConfig, feedforwards

__all__ = ["Capabilities", "Cost", "FeedForward", "Range", "Side", "VariantConfig", "feedforwards"]
