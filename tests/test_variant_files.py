"""Every variant is one file whose code fits on a few screens. As a program, this prints the table of docs/menu.md."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from pathlib import Path
from typing import Any

import workbench
from workbench.contract import embeddings, feedforwards, mixers, residuals
from workbench.registry import Registry

ROOT = Path(workbench.__file__).parent
REGISTRIES: dict[str, Registry[Any]] = {
    "mixers": mixers,
    "feedforwards": feedforwards,
    "embeddings": embeddings,
    "residuals": residuals,
}
MOST = 150
"""Lines of code of a variant's file, without docstrings, comments and empty lines."""
LARGER = {
    "nsa": "three branches with their kernels' operands",
    "asa_global": "latent attention beside the branches of NSA",
    "moe": "routing, balancing and counts of experts",
    "ngram": "tables of n-grams and what they collide on",
}
"""Variants beyond that, with what their file holds."""


def files() -> dict[str, Path]:
    """Variant -> its file, without those of plug-ins."""
    found = {
        f"{folder}/{name}": Path(inspect.getfile(registry[name]))
        for folder, registry in REGISTRIES.items()
        for name in registry
    }
    return {name: path for name, path in found.items() if path.is_relative_to(ROOT)}


def code_lines(path: Path) -> int:
    """Lines that hold code: no docstrings, comments or empty lines."""
    text = path.read_text(encoding="utf-8")
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):  # strings that stand alone
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines) - 1  # the end of the file


def families(path: Path) -> list[str]:
    """Files of ``mixers/families`` that a variant imports."""
    prefix = "workbench.mixers.families."
    modules = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return sorted(module.removeprefix(prefix) for module in modules if module.startswith(prefix))


def table() -> str:
    """Markdown: variant, lines of its file, of these code, shared files that it imports."""
    rows = ["| file | lines | code | shares |", "|---|---|---|---|"]
    for name, path in sorted(files().items()):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        rows.append(f"| `{name}` | {lines} | {code_lines(path)} | {', '.join(families(path)) or '–'} |")
    return "\n".join(rows)


def test_a_variant_is_one_file_of_its_name() -> None:
    paths = files()
    assert len(set(paths.values())) == len(paths)
    assert {f"{path.parent.name}/{path.stem}" for path in paths.values()} == set(paths)


def test_its_code_fits_on_a_few_screens() -> None:
    sizes = {name.split("/")[1]: code_lines(path) for name, path in files().items()}
    too_large = {name: size for name, size in sizes.items() if size > MOST and name not in LARGER}
    assert not too_large, f"more than {MOST} lines of code; move what others can share into a family: {too_large}"


def test_docs_list_every_variant() -> None:
    """Sizes there are those of the last time that the table was printed."""
    text = (ROOT.parent / "docs" / "menu.md").read_text(encoding="utf-8")
    assert [name for name in files() if f"| `{name}` |" not in text] == []


if __name__ == "__main__":
    print(table())
