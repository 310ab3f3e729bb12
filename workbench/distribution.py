"""The distribution that installs this package: its name, the command for its extras, the files that it ships."""

from __future__ import annotations

from pathlib import Path

__all__ = ["NAME", "PACKAGE", "ROOT", "install_extra", "is_checkout", "shipped"]

NAME = "ablation-workbench"
"""Name of the distribution; the import package and the command are called ``workbench``."""
PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
"""Folder of the source checkout; of an installed package, the folder it is installed in."""
SHIPPED = "sweeps"
"""Folder of a checkout that a wheel installs inside the package (``setup.py``)."""


def is_checkout() -> bool:
    """Whether the package is imported from a source checkout, editable installations included."""
    project = ROOT / "pyproject.toml"
    return project.is_file() and f'name = "{NAME}"' in project.read_text(encoding="utf-8")


def install_extra(extra: str) -> str:
    """The command that installs an extra, for a message: ``pip install -e '.[hub]'`` in a source checkout."""
    if not is_checkout():
        return f"pip install '{NAME}[{extra}]'"
    folder = "." if Path.cwd() == ROOT else str(ROOT)
    return f"pip install -e '{folder}[{extra}]'"


def shipped(path: str | Path) -> Path:
    """``path``, or the shipped file or folder of that name if there is nothing at ``path``.

    ``sweeps/quickstart.yaml`` can be named from any folder: a file of the working folder goes first, then the checkout,
    or the copy that a wheel brings.
    """
    path = Path(path)
    if path.parts[:1] != (SHIPPED,) or ".." in path.parts or path.exists():
        return path
    found = (ROOT if is_checkout() else PACKAGE) / path
    return found if found.exists() else path
