"""Layer patterns: names that are tiled over the depth, "gdn gdn gdn full"."""

from __future__ import annotations

from collections.abc import Iterable

from workbench.config import ConfigError, nearest, require


def tile(pattern: str, depth: int, *, layers_per_name: int = 1, hint: str = "") -> list[str]:
    """The name of every layer, or of every group of ``layers_per_name`` layers: ``tile("a b", 4)`` is ``a b a b``.

    Args:
        hint: what else to do where the pattern does not divide the depth, for the message.

    Raises:
        ConfigError: when the pattern is empty or does not divide the depth.
    """
    names, count = pattern.split(), depth // layers_per_name
    require(names, "", got="nothing", expected="at least one name")
    require(
        count % len(names) == 0,
        "",
        got=f"{len(names)} names for depth={depth}",
        expected="a tile that divides the depth" + (" in pairs" if layers_per_name == 2 else ""),
        do=f"Make depth a multiple of {len(names) * layers_per_name}{hint}.",
    )
    return names * (count // len(names))


def check_names(names: Iterable[str], known: Iterable[str], noun: str) -> None:
    """Check that every name is known.

    Raises:
        ConfigError: for the first name that is not, with the nearest known one.
    """
    known = set(known)
    for name in names:
        if name not in known:
            raise ConfigError.at("", got=name, expected=f"a registered {noun}", do=nearest(name, known))
