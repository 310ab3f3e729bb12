"""Numbers as people read them. None, a number that is not known, is an en dash."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["count", "distinct_ends", "duration", "flops", "metric", "setting", "share", "size", "spread", "wrapped"]

UNKNOWN = "–"
MINUS = "−"


def _scaled(value: float, prefixes: str, unit: str = "") -> str:
    magnitude, scale = abs(value), 0
    while magnitude >= 999.5 and scale < len(prefixes) - 1:
        magnitude, scale = magnitude / 1000, scale + 1
    whole = magnitude >= 99.5 or magnitude == int(magnitude)
    digits = f"{magnitude:.0f}" if whole else f"{magnitude:.2g}" if magnitude < 9.95 else f"{magnitude:.1f}"
    return f"{MINUS if value < 0 else ''}{digits} {prefixes[scale].strip()}{unit}".strip()


def count(value: float | None) -> str:
    """A count of things.

    >>> count(1_234_567), count(17), count(None)
    ('1.2 M', '17', '–')
    """
    return UNKNOWN if value is None else _scaled(value, " kMBT")


def flops(value: float | None) -> str:
    """Floating-point operations.

    >>> flops(4.1e9)
    '4.1 GFLOPs'
    """
    return UNKNOWN if value is None else _scaled(value, " kMGTPEZY", "FLOPs")


def size(value: float | None) -> str:
    """Bytes, in powers of 1,000.

    >>> size(3_400_000_000)
    '3.4 GB'
    """
    return UNKNOWN if value is None else _scaled(value, " kMGTP", "B")


def duration(seconds: float | None) -> str:
    """A time span.

    >>> duration(0.61), duration(120), duration(5400), duration(300_000)
    ('0.6 s', '2 min', '1 h 30 min', '3 d 11 h')
    """
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def metric(value: float | None, *, signed: bool = False) -> str:
    """A value of the metric (bits, errors), or a difference of two, with four decimals.

    >>> metric(0.00406, signed=True)
    '+0.0041'
    """
    return UNKNOWN if value is None else f"{value:{'+' if signed else ''}z.4f}".replace("-", MINUS)


def spread(mean: float | None, sd: float | None) -> str:
    """A mean of the metric with the standard deviation over seeds, where there is one.

    >>> spread(2.4011, 0.0123), spread(2.4011, None)
    ('2.4011 ± 0.0123', '2.4011')
    """
    return metric(mean) if mean is None or sd is None else f"{metric(mean)} ± {metric(sd)}"


def setting(values: Mapping[str, Any]) -> str:
    """Values of dotted fields, each by the end of its name; three digits.

    >>> setting({"training.learning_rate": 0.00312, "training.batch_size": 8})
    'learning_rate 0.00312, batch_size 8'
    """
    names = distinct_ends([name.split(".") for name in values], ".")
    shown = (f"{value:.3g}" if isinstance(value, float) else value for value in values.values())
    return ", ".join(f"{name} {value}" for name, value in zip(names, shown))


def share(value: float | None) -> str:
    """A relative difference.

    >>> share(-0.093)
    '−9.3 %'
    """
    return UNKNOWN if value is None else f"{100 * value:+z.1f} %".replace("-", MINUS)


def wrapped(text: str, width: int) -> str:
    """Lines wrapped at words. Lines with two spaces in a row stay: rows of aligned tables, and indented commands."""
    lines = (
        [line] if "  " in line else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
        for line in text.splitlines()
    )
    return "\n".join(line for part in lines for line in part)


def distinct_ends(paths: Sequence[Sequence[str]], separator: str) -> list[str]:
    """The shortest ends of paths, of one length, that differ from each other; the whole paths if none do.

    >>> distinct_ends([("model", "moe", "heads"), ("model", "gqa", "heads")], ".")
    ['moe.heads', 'gqa.heads']
    """
    ends: list[str] = []
    for length in range(1, max(map(len, paths), default=0) + 1):
        ends = [separator.join(path[-length:]) for path in paths]
        if len(set(ends)) == len(ends):
            break
    return ends
