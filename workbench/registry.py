"""Registries: names for variants and corpora, found by a package scan and by entry points.

Adding a plug-in inside the repository is one file in the registry's package; outside it, one entry point in the
group ``workbench.plugins`` whose value is a module to import. Nothing else lists names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from workbench.config import Config, ConfigError, nearest

__all__ = ["ENTRY_POINT_GROUP", "PLUGIN_FILES", "Registry", "broken_plugins", "plug_in"]

ENTRY_POINT_GROUP = "workbench.plugins"

PLUGIN_FILES = "WORKBENCH_PLUGINS"
"""Environment variable with files of variants that belong to no package, separated as in PATH."""

T = TypeVar("T", bound=type)

broken_plugins: dict[str, str] = {}
"""Entry points that failed to import -> why. Shown by ``workbench doctor``; they never break the rest."""


class Registry(Generic[T]):
    """Classes of one sort by name, each with a nested ``Config`` whose ``kind`` is that name.

    Args:
        noun: what is registered, for messages ("mixer").
        package: dotted name of the package whose modules are scanned.
    """

    def __init__(self, noun: str, package: str):
        self.noun, self.package = noun, package
        self._classes: dict[str, T] = {}
        self._scanned = False

    def register(self, cls: T) -> T:
        """Decorator: enter ``cls`` under ``cls.Config``'s default ``kind``.

        Raises:
            TypeError: when there is no such Config, or another file holds the name (both files are named).
        """
        config = getattr(cls, "Config", None)
        if not (inspect.isclass(config) and issubclass(config, Config) and "kind" in config.model_fields):
            raise TypeError(f"{cls.__name__} needs a nested Config with a field `kind: Literal['name'] = 'name'`")
        name = config.model_fields["kind"].default
        held = self._classes.get(name)
        if held is not None and _origin(held) != _origin(cls):
            raise TypeError(f"the {self.noun} name {name!r} is registered by {_origin(held)} and by {_origin(cls)}")
        self._classes[name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Forget ``name`` (for tests and for redefining a variant live in a notebook)."""
        self._classes.pop(name, None)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._scan()
        return sorted(self._classes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._scan()
        return isinstance(name, str) and name in self._classes

    def __getitem__(self, name: str) -> T:
        self._scan()
        if not isinstance(name, str) or name not in self._classes:
            raise ConfigError.at(
                "kind", got=name, expected=f"a registered {self.noun}", do=nearest(name, self._classes)
            )
        return self._classes[name]

    def parse(self, data: object, default_kind: str | None = None) -> Any:
        """The configuration of the class that ``data["kind"]`` names.

        Raises:
            ConfigError: for an unknown kind or a mistake in its fields.
        """
        if isinstance(data, Config):
            return data
        if isinstance(data, str):
            data = {"kind": data}
        if not isinstance(data, dict):
            raise ConfigError.at("", got=data, expected=f"a {self.noun}'s name, or a mapping with its `kind`")
        kind = data.get("kind", default_kind)
        if kind is None:
            raise ConfigError.at("kind", got="nothing", expected=f"a registered {self.noun}", do=nearest("", self))
        cls: Any = self[kind]
        return cls.Config.parse({**data, "kind": kind})

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True  # before the imports: a plug-in may ask the registry while it is being imported
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        _load_entry_points()
        _load_plugin_files()


def _origin(cls: type) -> str:
    try:
        return f"{inspect.getsourcefile(cls)} ({cls.__qualname__})"
    except (TypeError, OSError):
        return f"{cls.__module__} ({cls.__qualname__})"


def plug_in(path: str | Path) -> None:
    """Use the variants in the Python file ``path``, here and in every process started from here. Called again after an edit
    it takes the new version.

    Raises:
        ConfigError: when there is no such file. What the file raises is passed on.
    """
    path = Path(path).resolve()
    if not path.is_file():
        there = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError.at(str(path), got="no such file", expected="a Python file", do=nearest(path.name, there))
    _import_file(path)
    held = [name for name in os.environ.get(PLUGIN_FILES, "").split(os.pathsep) if name]
    os.environ[PLUGIN_FILES] = os.pathsep.join(dict.fromkeys([*held, str(path)]))


def _import_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


def _load_plugin_files(loaded: set[str] = set()) -> None:  # noqa: B006 (remembers across registries on purpose)
    for name in os.environ.get(PLUGIN_FILES, "").split(os.pathsep):
        if name and name not in loaded:
            loaded.add(name)
            try:
                if not any(getattr(module, "__file__", None) == name for module in list(sys.modules.values())):
                    _import_file(Path(name))
            except Exception as error:
                broken_plugins[name] = f"{type(error).__name__}: {error}"


def _load_entry_points(loaded: set[str] = set()) -> None:  # noqa: B006 (remembers across registries on purpose)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.value in loaded:
            continue
        loaded.add(point.value)
        try:
            load: Callable[[], Any] = point.load
            load()
        except Exception as error:  # a broken plug-in of somebody else must not stop this ablation
            broken_plugins[point.name] = f"{type(error).__name__}: {error}"
