"""Archives: what they hold, and that those of earlier versions open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

import workbench as wb
from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.archive import archive
from workbench.ablation.analysis.savings import savings
from workbench.ablation.run import AblationRun
from workbench.ablation.verdict.verdict import Verdict
from workbench.config import ConfigError
from workbench.files import read_json

pytestmark = pytest.mark.process

ARCHIVES = sorted((Path(__file__).parents[3] / "results" / "ablations").glob("*/ablation.json"))


@pytest.fixture(scope="module")
def archived(finished: AblationRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(finished, tmp_path_factory.mktemp("archive") / "test")


def test_every_run_is_a_row(archived: Path, finished: AblationRun) -> None:
    values = pl.read_csv(archived / "runs.csv")["report_value"].to_list()
    assert values == pytest.approx(finished.runs()["report_value"].to_list(), abs=1e-6)


def test_the_measurements_give_the_values_of_the_runs(archived: Path, finished: AblationRun) -> None:
    metric = finished.metric
    report = pl.read_parquet(archived / "report.parquet")
    confirmed = finished.runs().filter(pl.col("stage") == "confirmation")
    assert len(confirmed) == 6
    for row in confirmed.iter_rows(named=True):
        part = report.filter((pl.col("arm") == row["arm"]) & (pl.col("seed") == row["seed"]))
        assert metric.of(part) == pytest.approx(row["report_value"], abs=1e-6)


def test_the_verdict_is_stored(archived: Path, finished: AblationRun) -> None:
    assert Verdict.from_plain(read_json(archived / "verdict.json")) == finished.verdict()


def test_the_verdict_reads_the_same_from_the_archive(archived: Path, finished: AblationRun) -> None:
    assert str(AblationRun(archived).verdict()) == str(finished.verdict())


def test_the_text_names_where_it_was_trained(archived: Path, finished: AblationRun) -> None:
    text = (archived / "verdict.md").read_text(encoding="utf-8")
    assert str(finished.verdict()) in text
    assert "torch" in text
    assert str(finished.folder.parent) not in text


def test_no_weights_are_archived(archived: Path) -> None:
    assert not list(archived.glob("**/*.safetensors"))


def test_an_archive_is_not_archived_again(archived: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an archive"):
        archive(AblationRun(archived), tmp_path / "again")


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_an_unfinished_ablation_is_not_archived(ablation: Callable[..., Ablation], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not finished"):
        archive(ablation().create(), tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.parent.name)
def test_a_shipped_archive_opens_with_its_verdict(path: Path) -> None:
    opened = wb.open(path.parent)
    verdict = opened.verdict()
    assert verdict is not None
    assert [row.arm for row in verdict.rows] == opened.arms
    assert len(opened.runs()) > len(opened.arms)


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.parent.name)
def test_a_shipped_archive_is_exploratory_if_declared_not_registered_or_without_ledger(path: Path) -> None:
    opened = wb.open(path.parent)
    verdict, config = opened.verdict(), opened.record.config
    assert verdict is not None
    if opened.record.registration is None:
        assert verdict.exploratory == "deviation: not registered"
        assert str(verdict).startswith("Not registered")
    else:
        declared = [reason for reason in (config.exploratory, config.budget.allow_mismatch) if reason]
        faults = [f"the ledger: {fault}" for fault in read_json(path.parent / "openings.json").get("faults", [])]
        assert verdict.exploratory == ("; ".join([*declared, *faults]) or None)


def test_there_are_shipped_archives() -> None:
    assert ARCHIVES


def test_the_evaluations_of_confirmation_runs_are_archived(archived: Path, finished: AblationRun) -> None:
    assert savings(AblationRun(archived)).equals(savings(finished))
    assert len(savings(finished)) > 0


# -- where to --------------------------------------------------------------------------------------------------------


def test_an_archive_of_the_same_ablation_is_replaced(finished: AblationRun, tmp_path: Path) -> None:
    folder = archive(finished, tmp_path / "test")
    (folder / "verdict.md").write_text("old")
    archive(finished, folder)
    assert (folder / "verdict.md").read_text() != "old"


@pytest.mark.parametrize("name", ["ablation.json", "notes.txt"])
def test_a_folder_with_anything_else_is_refused(name: str, finished: AblationRun, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"folder: got .*nothing was written"):
        archive(finished, tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_the_folder_of_a_run_is_refused(finished: AblationRun) -> None:
    with pytest.raises(ConfigError, match="is the ablation itself"):
        archive(finished, finished.folder)


def test_a_link_in_an_earlier_archive_is_replaced_not_followed(finished: AblationRun, tmp_path: Path) -> None:
    folder = archive(finished, tmp_path / "test")
    (tmp_path / "mine").write_text("mine")
    (folder / "verdict.md").unlink()
    (folder / "verdict.md").symlink_to(tmp_path / "mine")
    archive(finished, folder)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"rows": 3, "noise_floor": null}', '{"rows": [{}], "noise_floor": 1}']
)
def test_a_damaged_verdict_is_named(content: str, archived: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    shutil.copytree(archived, folder)
    (folder / "verdict.json").write_text(content)
    with pytest.raises(ConfigError, match=r"verdict.json: got .*a damaged file"):
        AblationRun(folder).verdict()
