"""Code of other projects as references: the extra ``references`` of pyproject.toml pins the versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def pins() -> dict[str, str]:
    """Package -> version."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    return dict(requirement.split("==") for requirement in extras["references"])


def outside(module: str, package: str) -> ModuleType:
    """A module of another project; skips the test where its pinned version is not installed."""
    pinned = pins()[package]
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed != pinned:
        found = f"version {installed} is" if installed else "it is not"
        pytest.skip(f"needs {package}=={pinned} (the extra `references`); {found} installed")
    return importlib.import_module(module)
