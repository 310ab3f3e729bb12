"""Lazy package attributes: a name is imported when it is first used."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["attach"]


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported only when they are first used.

    The names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING:``, so that type checkers and readers
    see ordinary imports, and nothing is listed twice::

        if TYPE_CHECKING:
            from package.module import name
        __getattr__, __dir__, __all__ = attach(__name__, __file__)
    """
    sources: dict[str, tuple[str, str]] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom) and statement.module, f"{file}: only `from x import y`"
                for alias in statement.names:
                    sources[alias.asname or alias.name] = statement.module, alias.name
    names = sorted(sources)

    def get(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = sources[name]
        return getattr(importlib.import_module(module), attribute)

    return get, lambda: names, names
