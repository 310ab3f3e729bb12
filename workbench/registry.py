"""Registries of plug-ins by name, filled by scanning a package and by entry points.

A plug-in inside the repository is one file in the registry's package. Outside of it, it is one entry point in the group
``workbench.plugins`` whose value is the module to import, or a file that belongs to no package: :func:`plug_in` loads
it in a notebook or script, the environment variable ``WORKBENCH_PLUGINS`` in every command::

    WORKBENCH_PLUGINS=my_mixer.py:tasks/my_task.py workbench run sweep.yaml

Such a file may have any name, also that of an installed module. No other list of names exists.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import site
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from workbench.config import Config, ConfigError, nearest

__all__ = ["ENTRY_POINT_GROUP", "PLUGIN_FILES", "Registry", "broken_plugins", "import_variables", "plug_in"]

ENTRY_POINT_GROUP = "workbench.plugins"

PLUGIN_FILES = "WORKBENCH_PLUGINS"
"""Environment variable with the plug-in files that belong to no package, separated as in PATH (":", on Windows ";").
Relative paths count from the working directory."""

T = TypeVar("T", bound=type)

broken_plugins: dict[str, str] = {}
"""Entry points and plug-in files that failed to import -> reason. Shown by ``workbench doctor``; nothing else fails."""

_loaded: set[str] = set()
"""Entry points and plug-in files imported so far, for all registries."""


class Registry(Generic[T]):
    """Classes of one sort by name. Each class has a nested ``Config`` whose field ``kind`` defaults to that name.

    Args:
        noun: what is registered, for error messages ("mixer").
        package: dotted name of the package whose modules are scanned.
    """

    def __init__(self, noun: str, package: str):
        self.noun, self.package = noun, package
        self._classes: dict[str, T] = {}
        self._scanned = False

    def register(self, cls: T) -> T:
        """Decorator: register ``cls`` under the default ``kind`` of ``cls.Config``.

        Raises:
            TypeError: when ``cls`` has no such Config, or another file has registered the name (both files are named).
        """
        config = getattr(cls, "Config", None)
        if not (inspect.isclass(config) and issubclass(config, Config) and "kind" in config.model_fields):
            raise TypeError(f"{cls.__name__} needs a nested Config with a field `kind: Literal['name'] = 'name'`")
        name = config.model_fields["kind"].default
        registered = self._classes.get(name)
        if registered is not None and _origin(registered) != _origin(cls):
            raise TypeError(
                f"the {self.noun} name {name!r} is registered by {_origin(registered)} and by {_origin(cls)}"
            )
        self._classes[name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Remove ``name`` (for tests, and for redefining a variant in a notebook)."""
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
        """Validate ``data`` as the configuration of the class named by ``data["kind"]``.

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
        self._scanned = True  # set before importing: a plug-in may query the registry while it is imported
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
    """Import the plug-ins in the Python file ``path``, in this process and in processes it starts (through the
    environment variable :data:`PLUGIN_FILES`). Call again after an edit. The file runs as code of this user.

    Raises:
        ConfigError: when the file does not exist, or its path cannot be passed on. Exceptions raised by the file
            propagate.
    """
    path = Path(path).resolve()
    if not path.is_file():
        siblings = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigError.at(str(path), got="no such file", expected="a Python file", do=nearest(path.name, siblings))
    if os.pathsep in str(path):
        raise ConfigError.at(
            str(path),
            got=f"a path with {os.pathsep!r}",
            expected="one without, because processes get a list of paths",
            do="Move the file.",
        )
    _import_file(path)
    listed = [name for name in os.environ.get(PLUGIN_FILES, "").split(os.pathsep) if name]
    os.environ[PLUGIN_FILES] = os.pathsep.join(dict.fromkeys([*listed, str(path)]))


def _import_file(path: Path) -> None:
    # a name of its own: under the file's name, a plug-in queue.py would take the place of the standard library's queue
    name = f"_workbench_plugin_{zlib.crc32(str(path).encode()):08x}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise


def _load_plugin_files() -> None:
    for name in os.environ.get(PLUGIN_FILES, "").split(os.pathsep):
        if name and name not in _loaded:
            _loaded.add(name)
            path = Path(name).expanduser().resolve()
            try:
                if not any(getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values())):
                    _import_file(path)
            except Exception as error:
                broken_plugins[name] = f"{type(error).__name__}: {error}"


def _load_entry_points() -> None:
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.value in _loaded:
            continue
        _loaded.add(point.value)
        try:
            load: Callable[[], Any] = point.load
            load()
        except Exception as error:  # somebody else's broken plug-in must not stop this process
            broken_plugins[point.name] = f"{type(error).__name__}: {error}"


def import_variables() -> dict[str, str]:
    """Environment variables for a process that has to import the code that starts it, and nothing from the folder that
    it happens to start in."""
    package = str(Path(__file__).parents[1])
    variables = {"PYTHONSAFEPATH": "1"}
    if package not in (*site.getsitepackages(), site.getusersitepackages()):  # a checkout
        paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return variables
