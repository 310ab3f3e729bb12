"""A file or a folder of the wrong kind gives one line that names the right command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.analysis.archive import archive
from workbench.ablation.folder import AblationFolder
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError, read_yaml
from workbench.pretrained import load
from workbench.training.config import RunConfig

ROOT = Path(__file__).parents[2]
NEEDLE = ROOT / "results/ablations/needle"


def test_a_run_is_no_ablation_and_the_other_way_round() -> None:
    with pytest.raises(ConfigError, match=r"got 'an ablation.*workbench run sweeps/quickstart.yaml") as refused:
        RunConfig.load("sweeps/quickstart.yaml")
    assert len(refused.value.problems) == 1
    with pytest.raises(ConfigError, match=r"got 'a single training run.*workbench train sweeps/runs/tiny.yaml"):
        AblationConfig.load("sweeps/runs/tiny.yaml")


def test_a_missing_file_is_like_no_file_that_only_ends_like_it(tmp_path: Path) -> None:
    (tmp_path / "scmoe.yaml").touch()
    with pytest.raises(ConfigError) as refused:
        read_yaml(tmp_path / "nosuch.yaml")
    assert "scmoe" not in str(refused.value)


def test_an_ablation_or_a_run_is_no_model(tmp_path: Path) -> None:
    for file, said in (("ablation.json", "got 'an ablation'.*--best"), ("run.json", "got 'a training run'")):
        folder = tmp_path / file.removesuffix(".json")
        folder.mkdir()
        (folder / file).write_text("{}")
        with pytest.raises(ConfigError, match=f"{said}.*" if "best" in said else f"{said}.*workbench export"):
            load(folder)


def test_a_missing_ablation_may_be_an_archive(tmp_path: Path) -> None:
    shutil.copytree(NEEDLE, tmp_path / "ablations" / "needle")
    with pytest.raises(ConfigError, match=r"There is an archive: .*ablations/needle"):
        AblationRun(tmp_path / "needle")
    with pytest.raises(ConfigError, match=r"Nearest valid name: 'ablations/needle'"):
        AblationRun(tmp_path / "ablations_needle")
    with pytest.raises(ConfigError, match=r"It has ablations in it: needle"):
        AblationRun(tmp_path / "ablations")
    listed = CliRunner().invoke(cli.app, ["table", "--results", str(tmp_path)]).output
    assert f"workbench table {tmp_path / 'ablations'}" in listed


def test_a_sweep_is_no_ablation_yet() -> None:
    with pytest.raises(ConfigError, match="Run the file first: workbench run"):
        AblationFolder(ROOT / "sweeps/quickstart.yaml").record()


def test_the_report_of_an_archive_is_written_outside_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(NEEDLE, tmp_path / "needle")
    answer = CliRunner().invoke(cli.app, ["report", "needle"])
    assert answer.output.strip() == "results/reports/needle.html" and Path("results/reports/needle.html").exists()
    assert not (tmp_path / "needle" / "report.html").exists()


def test_an_ablation_is_not_archived_into_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(NEEDLE, tmp_path / "needle")
    run = AblationRun(tmp_path / "needle")
    monkeypatch.setattr(AblationRun, "archived", False)
    for into in (run.folder, run.folder / "archive"):
        with pytest.raises(ConfigError, match="the ablation itself"):
            archive(run, into)
    assert not (run.folder / "archive").exists()


def test_archives_of_earlier_versions_say_that_their_code_was_not_recorded() -> None:
    assert AblationRun(NEEDLE).provenance()["code"] == "version not recorded"
