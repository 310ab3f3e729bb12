"""Checkpoints on disk: every value returns with its bits and type, and damage is found."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from workbench.config import ConfigError
from workbench.training.checkpoint import (
    checkpoints_in,
    latest,
    load_checkpoint,
    load_weights,
    random_state,
    save_checkpoint,
    set_random_state,
)

STATE: dict[str, Any] = {
    "model": {"weight": torch.tensor([[1.0, float("nan")], [2.0, 3.0]])},
    "optimiser": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0], "betas": (0.9, 0.95)}]},
    "plain": [None, True, 3, 0.1, "text", (1, [2])],
}


def save(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    save_checkpoint(STATE, path)
    return path


@pytest.mark.parametrize("key", ["optimiser", "plain"])
def test_plain_data_returns_with_its_types(key: str, tmp_path: Path) -> None:
    assert load_checkpoint(save(tmp_path, 1))[key] == STATE[key]


def test_tensors_return_bit_for_bit(tmp_path: Path) -> None:
    weight = load_checkpoint(save(tmp_path, 1))["model"]["weight"]
    assert torch.equal(weight.view(torch.int32), STATE["model"]["weight"].view(torch.int32))


def test_weights_load_by_themselves(tmp_path: Path) -> None:
    assert list(load_weights(save(tmp_path, 1))) == ["weight"]


def test_other_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"tensors and plain data; got .*Path"):
        save_checkpoint({"model": {}, "folder": tmp_path}, tmp_path / "step-1")


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint({"model": {}, "folder": tmp_path}, tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (5, 100, 20)]
    assert checkpoints_in(tmp_path) == [paths[0], paths[2], paths[1]]


def test_the_latest_is_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 20)
    assert latest(tmp_path) == (newest, [])


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path / "checkpoint") == (None, [])


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(file: str, tmp_path: Path) -> None:
    older, newest = save(tmp_path, 5), save(tmp_path, 20)
    (newest / file).write_bytes((newest / file).read_bytes()[:-5])
    path, damaged = latest(tmp_path)
    assert path == older
    assert len(damaged) == 1 and damaged[0].startswith("step-20 is damaged")


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
def test_one_flipped_bit_is_damage(file: str, tmp_path: Path) -> None:
    older, newest = save(tmp_path, 5), save(tmp_path, 20)
    content = bytearray((newest / file).read_bytes())
    content[-3] ^= 1
    (newest / file).write_bytes(content)
    path, damaged = latest(tmp_path)
    assert path == older
    assert damaged == [f"step-20 is damaged (the checksum of {file} differs)"]


@pytest.mark.parametrize("content", ["[1]", "{}", "null", "{", '{"state.json": 3}'])
def test_a_manifest_of_another_form_is_damage(content: str, tmp_path: Path) -> None:
    older, newest = save(tmp_path, 5), save(tmp_path, 20)
    (newest / "checksums.json").write_text(content)
    assert latest(tmp_path)[0] == older


def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 20)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("workbench.training.checkpoint.checksum", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read .Permission denied"):
        latest(tmp_path)


def test_another_folder_is_no_checkpoint(tmp_path: Path) -> None:
    newest = save(tmp_path, 5)
    (tmp_path / "step-x").mkdir()
    assert latest(tmp_path) == (newest, [])


def test_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    newest = save(tmp_path, 5)
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode & 0o777 for path in newest.iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


def test_random_states_of_devices_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.default_generators", (None,))
    monkeypatch.setattr("torch.cuda.set_rng_state_all", lambda states: restored.append(len(states)))
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: [])
    set_random_state({**random_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 8})
    assert restored == [1]


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    newest = save(tmp_path, 7)
    (tmp_path / ".step-9.tmp").mkdir()
    (tmp_path / ".step-9.tmp" / "model.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == (newest, [])


def test_the_random_state_of_python_numpy_and_torch_returns() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    state = random_state()
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_random_state(state)
    assert draw() == expected
