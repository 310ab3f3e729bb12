"""Decoding policies, one a file."""
