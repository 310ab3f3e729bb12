"""The record of a run is read from folders of any age."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from workbench.config import ConfigError
from workbench.metric import ANSWER_ERRORS, BITS_PER_BYTE
from workbench.results import RunFolder, RunRecord
from workbench.status import Stage

ARCHIVED = Path(__file__).parents[2] / "results" / "benchmarks" / "training_340m" / "full_340m"


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    record = RunRecord(arm="kda", stage=Stage.TUNING, seed=3, metric=ANSWER_ERRORS, config={"seed": 3}, slot=7)
    assert RunFolder.create(tmp_path / "run", record).record() == record


@pytest.mark.skipif(not ARCHIVED.exists(), reason="the repository's results are not here")
def test_an_archived_record_is_read() -> None:
    record = RunFolder(ARCHIVED).record()
    assert (record.arm, record.metric, record.steps) == ("full_340m", BITS_PER_BYTE, 793)


def test_unknown_fields_of_a_file_are_ignored() -> None:
    assert RunRecord.read({"metric": ANSWER_ERRORS.plain(), "from_a_later_version": 1}) == RunRecord(
        metric=ANSWER_ERRORS
    )


def test_an_unknown_field_is_not_written() -> None:
    with pytest.raises(ValidationError, match="sede"):
        RunRecord(sede=1)  # type: ignore[call-arg]


def test_a_folder_without_a_record_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        RunFolder(tmp_path).record()
