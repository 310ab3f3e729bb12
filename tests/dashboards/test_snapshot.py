"""A snapshot reads a run once, and shares what has not changed with the next one."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path

import pytest
from dashboards.fake import FakeRun

from workbench.ablation.run import AblationRun
from workbench.dashboards.snapshot import Neighbours, Snapshot

ARCHIVE = Path(__file__).parents[2] / "results" / "ablations" / "needle"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ARCHIVE, tmp_path / "results" / "needle"))


def test_a_finished_ablation_is_read_once(archive: Path) -> None:
    neighbours = Neighbours(archive.parent)
    assert neighbours.snapshot(archive) is neighbours.snapshot(archive)


def test_a_changed_file_is_read_again(archive: Path) -> None:
    neighbours = Neighbours(archive.parent)
    first = neighbours.snapshot(archive)
    os.utime(archive / "ablation.json", (1, 1))
    assert neighbours.snapshot(archive) is not first


def test_the_verdict_is_computed_once_while_nothing_changes(archive: Path) -> None:
    neighbours = Neighbours(archive.parent)
    verdict = neighbours.snapshot(archive).verdict()
    os.utime(archive / "ablation.json", (1, 1))
    assert neighbours.snapshot(archive).verdict() is verdict


def test_new_scores_are_judged(archive: Path) -> None:
    neighbours = Neighbours(archive.parent)
    verdict = neighbours.snapshot(archive).verdict()
    (archive / "scores.parquet").write_bytes(b"")
    os.utime(archive / "ablation.json", (1, 1))
    assert neighbours.snapshot(archive).verdict() is not verdict


def test_the_verdict_is_handed_on_even_by_a_snapshot_that_was_not_asked(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    first = Snapshot(run)
    verdict = first.verdict()
    assert Snapshot(run, Snapshot(run, first)).verdict() is verdict


def test_no_snapshot_keeps_an_earlier_one_alive(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    first = Snapshot(run)
    first.verdict()
    reference = weakref.ref(first)
    second = Snapshot(run, first)
    del first
    gc.collect()
    assert reference() is None and second.verdict() is not None


def test_hidden_arms_are_not_in_its_tables(tmp_path: Path) -> None:
    part = Snapshot(FakeRun(tmp_path)).filtered(["gdn"])
    assert set(part.runs()["arm"]) == {"gdn"} and part.unfiltered.arms == ["full", "gdn"]


def test_new_display_names_are_read(archive: Path) -> None:
    neighbours = Neighbours(archive.parent)
    neighbours.snapshot(archive)
    AblationRun(archive).rename({"full": "softmax attention"})
    assert neighbours.snapshot(archive).names["full"] == "softmax attention"
