"""Saved views: a named selection of arms of several ablations with its axes, in the folder of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from workbench.config import Config, ConfigError, nearest
from workbench.files import locked, write_json

__all__ = ["FILE", "ComparedX", "ComparedY", "View", "delete_view", "read_view", "read_views", "save_view"]

FILE = "views.json"
"""In the folder of results."""
LOCK = "views.lock"

ComparedX: TypeAlias = Literal["tokens", "flops", "seconds", "cache_bytes"]
ComparedY: TypeAlias = Literal["loss", "selection_value", "report_value"]


class View(Config):
    """A view."""

    name: str = Field(min_length=1, max_length=80)
    arms: tuple[str, ...] = Field(min_length=1)
    """What is drawn, each as folder/arm: quickstart/sliding."""
    x: ComparedX = "tokens"
    y: ComparedY = "loss"


def read_views(results: str | Path) -> dict[str, View]:
    """Name -> view, of a folder of results.

    Raises:
        ConfigError: if the file is damaged.
    """
    path = Path(results) / FILE
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["views"]
        views = [View.parse(view) for view in [*saved]]
    except ConfigError as error:
        raise error.under(str(path)) from None
    except (ValueError, KeyError, TypeError):
        do = "Restore it, or remove it."
        raise ConfigError.at(str(path), got="a damaged file", expected="saved views", do=do) from None
    return {view.name: view for view in views}


def read_view(results: str | Path, name: str) -> View:
    """The view ``name``.

    Raises:
        ConfigError: if there is none.
    """
    views = read_views(results)
    if name not in views:
        raise ConfigError.at("view", got=name, expected=f"a view saved in {results}", do=nearest(name, views))
    return views[name]


def save_view(results: str | Path, view: View) -> None:
    """Save a view, in place of one of its name."""
    with locked(Path(results) / LOCK):
        _write(results, {**read_views(results), view.name: view})


def delete_view(results: str | Path, name: str) -> None:
    """Remove a view.

    Raises:
        ConfigError: if there is none of this name.
    """
    with locked(Path(results) / LOCK):
        read_view(results, name)
        _write(results, {key: view for key, view in read_views(results).items() if key != name})


def _write(results: str | Path, views: dict[str, View]) -> None:
    write_json(Path(results) / FILE, {"views": [view.plain() for view in views.values()]})
