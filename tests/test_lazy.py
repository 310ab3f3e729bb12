"""Names are imported when they are first used, and listed once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import workbench
from workbench import dashboards
from workbench.registry import PLUGIN_FILES


@pytest.mark.parametrize("package", [workbench, dashboards], ids=lambda package: package.__name__)
def test_every_name_can_be_imported(package: object) -> None:
    assert all(getattr(package, name) is not None for name in package.__all__)  # type: ignore[attr-defined]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        workbench.nothing  # noqa: B018


def test_drawing_imports_nothing_heavy() -> None:
    heavy = ("torch", "lightning", "optuna", "ipywidgets")
    code = (
        "import sys; from workbench.dashboards import write_report, figure, table;"
        f"sys.exit(','.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_plugins())
    assert done.returncode == 0, done.stderr


def without_plugins() -> dict[str, str]:
    """The environment without the plug-in files that other tests have loaded, which may import anything."""
    return {name: value for name, value in os.environ.items() if name != PLUGIN_FILES}


READING = ("table scmoe", "show tuning-scmoe-6c", "status {}/scmoe", "verdict {}/scmoe", "sql 'select arm from runs'")
"""Commands that only read results."""


def test_commands_that_read_results_import_no_torch() -> None:
    archives = Path(__file__).parents[1] / "results/ablations"
    code = "import shlex, sys; from workbench.cli import app\n"
    for command in READING:
        of_all = "" if "{}" in command else f" --results {archives}"
        code += f"app(shlex.split({command.format(archives) + of_all!r}), standalone_mode=False)\n"
    code += "sys.exit(','.join(m for m in ('torch', 'lightning', 'optuna') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_plugins())
    assert done.returncode == 0, done.stderr
