"""What sibling variants share: configurations, layers and caches of one family each. Nothing here is registered."""
