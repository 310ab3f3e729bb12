"""From a run to an exported folder: its weights, where they come from, runs that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields, write_corpus
from safetensors.torch import load_file

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.pretrained import load
from workbench.results import RunFolder
from workbench.training.export import export
from workbench.training.trial import train

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a hybrid, laid out as `workbench run` does: results/cache, results/<ablation>/runs/<run>."""
    results = tmp_path_factory.mktemp("results")
    fields = run_fields(write_corpus(results / "texts"), model={"pattern": "full sliding", "feedforward": "swiglu moe"})
    folder = make_run(results / "ablation" / "runs" / "one", results / "cache", fields)
    assert train(folder.path, results / "cache")["status"] == "done"
    return folder


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run.path, tmp_path_factory.mktemp("exports") / "mine")


@pytest.fixture
def copied(run: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run, to be damaged."""
    return RunFolder(shutil.copytree(run.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def cache(run: RunFolder) -> Path:
    return run.path.parents[2] / "cache"


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["workbench"]["provenance"]


def test_an_export_has_the_weights_of_the_last_step(run: RunFolder, exported: Path) -> None:
    checkpoint = load_file(run.path / "checkpoint/step-20/model.safetensors")
    weights = load(exported)[0].state_dict()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in weights.items())


def test_an_export_names_its_run(run: RunFolder, exported: Path) -> None:
    assert provenance(exported)["run"] == run.record().identity


def test_an_export_names_the_code_of_its_run(exported: Path) -> None:
    assert provenance(exported)["code"]


def test_an_export_has_the_length_of_its_training(exported: Path) -> None:
    fields = ("step", "tokens", "context")
    assert [provenance(exported)[name] for name in fields] == [20, 20 * 64, 32]


def test_an_export_generates_text(exported: Path) -> None:
    (text,) = Engine(*load(exported)).generate(["attention"], Sampling(max_tokens=8, seed=1)).texts
    assert isinstance(text, str)


def test_a_checkpoint_replaces_an_earlier_export(run: RunFolder, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "exports" / "mine"))
    export(run.path / "checkpoint/step-15", folder)
    assert provenance(folder)["tokens"] == 15 * 64
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_run_whose_data_is_missing_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prepared data"):
        export(run.path, tmp_path / "out", cache=tmp_path)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(
    copied: RunFolder, cache: Path, tmp_path: Path
) -> None:
    (copied.path / "checkpoint/step-20/model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"step-20 is damaged.*checkpoint/step-15"):
        export(copied.path, tmp_path / "out", cache=cache)


def test_an_interrupted_run_is_refused_and_its_checkpoint_named(copied: RunFolder, cache: Path, tmp_path: Path) -> None:
    (copied.path / "result.json").unlink()
    copied.set_status("interrupted")
    with pytest.raises(ConfigError, match=r"interrupted.*expected a finished run.*checkpoint/step-20"):
        export(copied.path, tmp_path / "out", cache=cache)


def test_a_run_without_a_checkpoint_is_refused(copied: RunFolder, cache: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied.path / "checkpoint")
    with pytest.raises(ConfigError, match="without a readable checkpoint"):
        export(copied.path, tmp_path / "out", cache=cache)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        export(tmp_path, tmp_path / "out")


def test_a_refused_export_writes_nothing(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        export(run.path, tmp_path / "out", cache=tmp_path)
    assert not (tmp_path / "out").exists()
