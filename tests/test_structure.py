"""The layers of the code base: who may import whom, no import cycles, and what stays unimported until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import workbench

ROOT = Path(workbench.__file__).parent
LAYERS = [
    [
        "compat",
        "config",
        "distribution",
        "environment",
        "files",
        "formatting",
        "latency",
        "lazy",
        "metric",
        "notebook",
        "notifiers",
        "paper",
        "pooled",
        "ranges",
        "registry",
        "seeding",
        "simulation",
        "status",
    ],
    ["contract"],
    ["parametrisations"],
    ["layers", "ops"],
    ["mixers", "feedforwards", "embeddings", "residuals"],
    ["model", "accounting"],
    ["optimisers", "guards"],
    ["data"],
    ["testing"],
    ["results"],
    ["decoding", "evaluation", "pretrained", "transforms"],
    ["training"],
    ["ablation"],
    ["dashboards"],
    ["api"],
    ["cli"],
    ["__main__"],
]
"""From low to high. A package imports packages of its layer and of lower ones; some are restricted further below."""
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODEL_FREE = {
    "accounting",
    "contract",
    "embeddings",
    "feedforwards",
    "guards",
    "layers",
    "mixers",
    "model",
    "ops",
    "optimisers",
    "parametrisations",
    "residuals",
}
RESTRICTED = {"data": MODEL_FREE, "results": MODEL_FREE}
"""Packages that know nothing of models, although these are lower."""

ABLATION_LAYERS = [
    ["spec"],
    ["matching", "search"],
    ["arms", "estimate"],
    ["cost", "folder", "looks"],
    ["design"],
    ["verdict"],
    ["execution"],
    ["run"],
    ["analysis"],
    ["ablation"],
]
"""The same order inside ``workbench/ablation``."""


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    result = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return result


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the workbench that ``module`` imports anywhere, inside functions and for type checking too."""
    known = modules()

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in known else str(node.module)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)

    return frozenset(name for name in names() if name in known and name not in (module, "workbench"))


def upward(package: str, layers: list[list[str]], restricted: dict[str, set[str]] | None = None) -> list[str]:
    """Imports inside ``package`` that point to a higher layer or to a restricted one."""
    height = {name: level for level, names in enumerate(layers) for name in names}
    depth = package.count(".") + 1
    wrong = []
    for module in modules():
        if not module.startswith(f"{package}."):
            continue
        part = module.split(".")[depth]
        assert part in height, f"{package}.{part} has no layer; give it one in {__name__}"
        for target in imports(module):
            if target.startswith(f"{package}."):
                other = target.split(".")[depth]
                if height[other] > height[part] or other in (restricted or {}).get(part, ()):
                    wrong.append(f"{module} imports {target}")
    return wrong


def test_no_package_imports_a_higher_one() -> None:
    assert upward("workbench", LAYERS, RESTRICTED) == []


def test_no_part_of_ablation_imports_a_higher_one() -> None:
    assert upward("workbench.ablation", ABLATION_LAYERS) == []


def test_there_is_no_import_cycle() -> None:
    """Between files, imports inside functions included. A package's ``__init__`` is a file like any other."""
    state: dict[str, int] = {}
    cycles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(imports(module)):
            if state.get(target) == 1:
                cycles.append(" -> ".join([*path[path.index(target) :], target]))
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in modules():
        if module not in state and module != "workbench":
            visit(module, [module])
    assert cycles == []


def test_private_parts_of_libraries_are_imported_by_compat_only() -> None:
    wrong = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("workbench", "__future__")):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                if any(name.startswith("_") for name in names) and module != "workbench.compat":
                    wrong.append(f"{module}: from {node.module} import {', '.join(alias.name for alias in node.names)}")
    assert wrong == []


LIGHT = ["workbench", "workbench.cli", "workbench.api.ablations", "workbench.ablation.run", "workbench.dashboards"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'lightning', 'optuna') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
