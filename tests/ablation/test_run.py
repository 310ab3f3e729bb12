"""A launched ablation as an object."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from workbench.ablation.run import AblationRun

NEEDLE = Path(__file__).parents[2] / "results/ablations/needle"


def test_awaiting_a_run_leaves_the_event_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(AblationRun, "finished", property(lambda run: bool(ended)))
    monkeypatch.setattr(AblationRun, "workers", lambda run: [1])

    async def click() -> None:
        ended.append(True)

    async def cell() -> AblationRun:
        run = AblationRun(NEEDLE)
        waiting = asyncio.ensure_future(_result(run))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await click()  # what a button does meanwhile
        return await waiting

    assert asyncio.run(asyncio.wait_for(cell(), 10)).name == "needle"


def test_awaiting_ends_when_no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AblationRun, "finished", False)
    run = AblationRun(NEEDLE)
    monkeypatch.setattr(AblationRun, "workers", lambda run: [])
    monkeypatch.setattr(AblationRun, "waiting_workers", lambda run: [])
    assert asyncio.run(_result(run)) is run


async def _result(run: AblationRun) -> AblationRun:
    return await run
