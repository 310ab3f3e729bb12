"""What `variants` and `doctor` say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workbench import cli
from workbench.api import machine
from workbench.api.results import doctor, variants
from workbench.config import ConfigError


def test_variants_prints_a_line_each_with_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.cli.installed.console.width", 300)
    lines = CliRunner().invoke(cli.app, ["variants"]).output.splitlines()
    (kda,) = (line for line in lines if line.strip().startswith("kda "))
    assert "Kimi Delta Attention" in kda and "2510.26692" in kda
    (choice,) = (line for line in lines if line.strip().startswith("moe_expert_choice "))
    assert "not causal" in choice
    found = variants().variants
    assert len(lines) == 2 + len(found) + len({variant.kind for variant in found})


def test_variants_of_a_name_prints_settings_defaults_and_source() -> None:
    page = CliRunner().invoke(cli.app, ["variants", "kda"]).output
    assert "S_t = (I - β k kᵀ)" in page and "workbench/mixers/kda.py" in page
    assert "\n  chunk" in page and "32\n    Edits per chunk" in page


def test_a_name_may_be_registered_twice() -> None:
    assert {variant.kind for variant in variants("ruler").variants} == {"data source", "evaluation suite"}


def test_an_unknown_variant_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Nearest valid name: 'kda'"):
        variants("kdda")


def test_doctor_says_what_is_missing_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 10**9)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for variable in ("CC", "BROWSER_PATH"):
        monkeypatch.delenv(variable, raising=False)
    found = {check.name: check for check in machine.checks({"mine": "SyntaxError: line 3"})}
    assert found["memory"].state == "missing" and "launch.workers=1" in found["memory"].fix
    assert found["plug-in"].state == "missing" and "line 3" in found["plug-in"].found
    assert found["browser"].state == "optional" and "chromium" in found["browser"].fix
    assert "gcc" in found["C compiler"].fix
    monkeypatch.setattr("workbench.api.machine._installed", lambda name: False)
    extras = {check.name: check for check in machine.checks({}) if check.name.startswith("extra ")}
    assert not extras or "pip install" in extras["extra postgresql"].fix
    assert doctor().exit_code == 1


def test_doctor_marks_every_check() -> None:
    lines = CliRunner().invoke(cli.app, ["doctor"]).output.splitlines()
    assert any(line.startswith("✓ disk") for line in lines)
    assert lines[-1].startswith(("Ready", "1 problem", "2 problem"))
