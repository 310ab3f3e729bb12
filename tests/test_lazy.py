"""Names are imported when they are first used, and listed once."""

from __future__ import annotations

import subprocess
import sys

import pytest

import workbench
from workbench import dashboards


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
