"""Which implementation computed an operation in this process, so that results can say so."""

from __future__ import annotations

import torch

_taken: dict[str, list[str]] = {}


@torch.compiler.assume_constant_result  # noted while code is compiled, not every time it runs
def note(operation: str, path: str) -> str:
    """Remember that ``operation`` takes ``path``; returns ``path``."""
    paths = _taken.setdefault(operation, [])
    if path not in paths:
        paths.append(path)
    return path


def taken() -> dict[str, list[str]]:
    """Operation -> the paths it has taken since :func:`forget`, the first one first."""
    return {operation: list(paths) for operation, paths in sorted(_taken.items())}


def forget() -> None:
    """Begin anew."""
    _taken.clear()
