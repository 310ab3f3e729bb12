"""Decoding policies, one file per policy."""
