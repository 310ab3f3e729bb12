"""The C library's memory, which a training on a CPU takes and frees by the gigabyte every step."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Settings of glibc's mallopt(3)."""


def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None  # not glibc


def keep_freed_memory() -> bool:
    """Let this process keep large blocks that it frees, for the next step; whether it could be arranged (glibc only).

    glibc gives them back to the system, which hands them out again page by page, filled with zeros. How often depends on what else
    lies in memory, so that a model of few layers lost more than one of many: tiny `nsa` models trained a quarter slower a layer
    in the shrunken runs of the cost card than whole, and whole ones 6 % slower than they do now (one CPU core, glibc 2.36).
    """
    library = _library()
    return library is not None and bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Give to the system what is free now."""
    if (library := _library()) is not None:
        library.malloc_trim(0)
