"""Commands about parametrisations and transfer."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.cli import output
from workbench.cli.transfer import coordinates, parametrisation, transfer

ROOT = Path(__file__).parents[2]


def test_the_table_of_a_parametrisation_has_whole_names_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.console, "_width", 80)
    parametrisation(ROOT / "sweeps/runs/mup_tiny.yaml", ["model.width=256"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    row = next(line.split() for line in lines if "feedforward.down.weight" in line)
    assert row[0] == "blocks.*.feedforward.down.weight"
    assert row[-4:] == ["1", "0.00075", "0.1", "1e-08"]  # 3e-3 · 64 / 256


def test_activations_that_grow_with_the_width_are_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.pattern=full", "model.depth=2", "model.tied=false", "model.parametrisation={kind: standard}"]
    answer = coordinates(ROOT / "sweeps/runs/mup_tiny.yaml", overrides, widths="32,64,128", steps=3, seeds=1)
    assert answer.exit_code == 1 and "not flat" in capsys.readouterr().out


def test_transfer_reports_an_archive(capsys: pytest.CaptureFixture[str]) -> None:
    transfer(ROOT / "results/ablations/transfer")
    assert "standard, width 256 (standard-256): optimum 0.00147; drift -4.35 factors" in capsys.readouterr().out
