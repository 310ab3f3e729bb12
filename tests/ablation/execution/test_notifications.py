"""What the workers of an ablation notify of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.notifications import Notifications
from workbench.ablation.execution.roster import Roster
from workbench.notifiers import VARIABLE
from workbench.status import Status

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]


@pytest.fixture
def run(ablation: Callable[..., Ablation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A launched ablation without workers, whose notifications are lines of a file."""
    monkeypatch.setenv(VARIABLE, json.dumps([f"command:cat >> {tmp_path}/lines; echo >> {tmp_path}/lines"]))
    return ablation(arms={"full": {}}, tuning={"trials": 0}, launch={"measure": False}).create()


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "lines"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_each_event_is_sent_once_whoever_sees_it(run: Any, tmp_path: Path) -> None:
    warnings: list[str] = []
    for _ in range(2):  # two workers
        sender = Notifications(run.files, warnings.append)
        sender.run_ended("a", Status.DIVERGED, "loss is not finite")
        sender.run_ended("b", Status.CRASHED, None)
        sender.run_ended("c", Status.DONE, None)
        sender.run_ended("d", Status.KILLED, "gone")
        sender.finished()
    sent = lines(tmp_path)
    assert [line["event"] for line in sent] == ["diverged", "failed", "finished"]
    assert "a is diverged: loss is not finite" in sent[0]["text"]
    assert all(line["name"] == run.name and line["planned"] == run.total for line in sent)
    assert warnings == []
    Roster(run.files).forget_notifications()
    Notifications(run.files, warnings.append).finished()
    assert len(lines(tmp_path)) == 4


def test_no_notification_has_a_path(run: Any, tmp_path: Path) -> None:
    Notifications(run.files, lambda line: None).finished()
    Notifications(run.files, lambda line: None).run_ended("a", Status.CRASHED, f"FileNotFoundError: {tmp_path}")
    assert len(lines(tmp_path)) == 2 and str(tmp_path) not in json.dumps(lines(tmp_path))


def test_a_failure_is_one_warning(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '["command:exit 3", "nonsense"')
    warnings: list[str] = []
    Notifications(run.files, warnings.append).finished()
    (warning,) = warnings
    assert VARIABLE in warning
