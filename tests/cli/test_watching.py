"""What a shell shows of an ablation and of a run: bars on a terminal, lines with the time of day elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from dashboards.fake import FakeRun
from rich.console import Console

from workbench.cli import watching

CLOCK = r"\d\d:\d\d:\d\d "


class Launched(FakeRun):
    """A launched ablation that ends after two looks."""

    looks_left = 2

    def waiting_workers(self) -> list[str]:
        return []

    def wait(self, timeout: float) -> bool:
        self.looks_left -= 1
        if not self.looks_left:
            self.progress, self.confirmed = 1.0, True
        return not self.looks_left


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    terminal = {"force_terminal": True, "color_system": None} if request.param else {}
    monkeypatch.setattr(watching, "console", Console(file=stream, width=160, markup=False, **terminal))
    monkeypatch.setattr(watching, "OVERALL_SECONDS", 0.0)
    return stream


def test_an_ablation_has_one_line_or_bar_for_all_runs(output: io.StringIO, tmp_path: Path) -> None:
    watching.follow(Launched(tmp_path, progress=0.5, confirmed=False))  # type: ignore[arg-type]
    text = output.getvalue()
    is_terminal = watching.console.is_terminal
    assert "0 of 12 runs" in text and "12 of 12 runs" in text and "left" in text
    assert ("━" in text) == is_terminal
    lines = text.splitlines()
    if not is_terminal:
        assert all(line[2] == line[5] == ":" for line in lines)
        assert "running, 0 of 12 runs" in lines[0] and "finished, 12 of 12 runs" in lines[-1]


def test_a_run_shows_loss_rate_and_times(output: io.StringIO) -> None:
    row: dict[str, Any] = {"seconds": 2.0, "tokens_per_second": 5e4, "flops_per_second": 1e9}
    with watching.training_bar("tiny", 40, "bits per byte") as show:
        show({**row, "step": 10, "loss": 3.0})
        show({**row, "step": 40, "loss": 2.5, "selection_value": 1.25})
    text = output.getvalue()
    parts = ("step 40/40", "loss 2.5000", "50 k tokens/s", "elapsed", "0.0 s left", "1.2500 bits per byte (selection)")
    assert all(part in text for part in parts)
    assert ("━" in text) == watching.console.is_terminal


def test_the_first_line_of_a_run_estimates_by_its_training_time(output: io.StringIO) -> None:
    with watching.training_bar("tiny", 40, "bits per byte") as show:
        show({"step": 10, "loss": 3.0, "seconds": 2.0})
    assert "6.0 s left" in output.getvalue()
