"""The building's floors: what may import what, and what stays unimported until it is needed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import workbench

ROOT = Path(workbench.__file__).parent
FLOORS = [
    [
        "files",
        "lazy",
        "compat",
        "config",
        "registry",
        "environment",
        "metric",
        "seeding",
        "formatting",
        "status",
        "ranges",
    ],
    ["contract"],
    ["layers", "ops"],
    ["mixers", "feedforwards", "embeddings"],
    ["model", "accounting"],
    ["optimisers"],
    ["data"],
    ["testing"],
    ["results"],
    ["evaluation", "pretrained", "decoding", "transforms"],
    ["training"],
    ["ablation"],
    ["dashboards"],
    ["cli"],
    ["__main__"],
]
"""From the ground up. A module may import its own floor and those below; data, moreover, knows nothing of models."""
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
FORBIDDEN = {"data": {"model", "accounting", "mixers", "feedforwards", "embeddings", "layers", "ops", "contract"}}


def imported(path: Path) -> set[str]:
    """Parts of the workbench that a file imports anywhere, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "workbench" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("workbench.")}
    return found


def test_no_floor_imports_a_higher_one() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        if path == ROOT / "__init__.py":
            continue
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert part in HEIGHT, f"{part} stands on no floor; give it one in FLOORS"
        for other in imported(path):
            assert other in HEIGHT, f"{path} imports workbench.{other}, which stands on no floor"
            if HEIGHT[other] > HEIGHT[part] or other in FORBIDDEN.get(part, ()):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong, wrong


@pytest.mark.parametrize("module", ["workbench", "workbench.cli", "workbench.ablation.run", "workbench.dashboards"])
def test_light_modules_import_no_heavy_library(module: str) -> None:
    if module != "workbench" and importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    code = f"import {module}, sys; print([m for m in ('torch', 'lightning', 'optuna') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
