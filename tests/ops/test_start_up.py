"""What bounds the time to the first step: one launch setting per kernel, and nothing that is tuned at run time."""

from __future__ import annotations

import ast
from pathlib import Path

import workbench

SOURCES = sorted(Path(workbench.__file__).parent.rglob("*.py"))
TUNING = {"autotune", "heuristics", "max_autotune", "max-autotune", "coordinate_descent_tuning", "do_bench"}


def names(tree: ast.AST) -> set[str]:
    """Identifiers, attributes, arguments and strings of a file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword):
            found.add(str(node.arg))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_nothing_is_tuned_at_run_time() -> None:
    wrong = {str(path): used for path in SOURCES if (used := names(ast.parse(path.read_text("utf-8"))) & TUNING)}
    assert not wrong


def test_kernels_are_compiled_where_they_are_kept_on_disk() -> None:
    """No file moves or disables the caches of Triton and TorchInductor."""
    switches = ("TRITON_CACHE", "TRITON_ALWAYS_COMPILE", "TORCHINDUCTOR_", "fx_graph_cache", "force_disable_caches")
    wrong = [str(path) for path in SOURCES if any(switch in path.read_text("utf-8") for switch in switches)]
    assert not wrong


def test_compiled_code_has_one_shape_per_graph() -> None:
    """``dynamic=False`` everywhere: a first step is not compiled a second time for dynamic sizes."""
    calls = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.compile"
    ]
    assert len(calls) >= 4
    for path, node in calls:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert options.get("dynamic") == "False", f"{path}:{node.lineno}"
        assert "mode" not in options, f"{path}:{node.lineno}"
