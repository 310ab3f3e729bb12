"""Which GPU a worker's trials use."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from workbench.ablation.execution.placement import claim_gpu, gpu_groups, visible_gpus
from workbench.ablation.folder import AblationFolder

GPUS = ["3", "GPU-5f/2"]


def test_gpus_are_those_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))
    assert visible_gpus() == GPUS


@pytest.mark.parametrize(
    ("devices", "groups"), [(1, ["0", "1", "2", "3", "4"]), (2, ["0,1", "2,3"]), (5, ["0,1,2,3,4"]), (6, [])]
)
def test_groups_have_as_many_gpus_as_a_run_has_devices(
    devices: int, groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert gpu_groups(devices) == groups


def test_workers_spread_over_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with ExitStack() as stack:
        groups = gpu_groups(2)
        claimed = [stack.enter_context(claim_gpu(AblationFolder(tmp_path), groups)) for _ in range(3)]
    assert claimed == ["0,1", "2,3", "0,1"]


def test_workers_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with ExitStack() as stack:
        claimed = [stack.enter_context(claim_gpu(AblationFolder(tmp_path), GPUS)) for _ in range(5)]
    assert claimed == ["3", "GPU-5f/2", "3", "GPU-5f/2", "3"]


def test_a_trial_finds_its_gpu_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with claim_gpu(AblationFolder(tmp_path), GPUS):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_gpu_is_free_again_when_its_worker_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for _ in range(2):
        with claim_gpu(AblationFolder(tmp_path), GPUS) as claimed:
            assert claimed == "3"


def test_machines_that_share_a_folder_number_their_gpus_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with claim_gpu(AblationFolder(tmp_path), ["0", "1"]):
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        with claim_gpu(AblationFolder(tmp_path), ["0", "1"]) as claimed:
            assert claimed == "0"


def test_without_gpus_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with claim_gpu(AblationFolder(tmp_path), []) as claimed:
        assert claimed is None
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
