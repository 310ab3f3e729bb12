"""Which workers are alive."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from workbench.ablation.execution.roster import JOB, Roster
from workbench.ablation.folder import AblationFolder

pytestmark = pytest.mark.process


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    return Roster(AblationFolder(tmp_path))


def test_a_worker_is_alive_while_it_is_registered(roster: Roster) -> None:
    with roster.registered():
        assert roster.process_ids() == [os.getpid()]
    assert roster.process_ids() == []


def test_workers_with_the_same_process_number_in_two_containers_are_two(
    roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        for host in ("here", "there.cluster"):
            monkeypatch.setattr("socket.gethostname", lambda host=host: host)
            stack.enter_context(roster.registered())
        assert roster.process_ids() == [os.getpid(), os.getpid()]


def test_a_worker_sees_that_it_shall_stop(roster: Roster) -> None:
    with roster.registered():
        assert not roster.is_stop_requested()
        roster.request_stop()
        assert roster.is_stop_requested()


def test_a_stop_request_for_an_earlier_process_is_ignored(roster: Roster) -> None:
    with roster.registered():
        roster.request_stop()
    with roster.registered():
        assert not roster.is_stop_requested()


def test_a_job_has_started_once_its_worker_registered(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, "job")
    assert not roster.has_started("job")
    with roster.registered():
        pass
    assert roster.has_started("job")
    roster.mark_requeued("job")
    assert not roster.has_started("job")
