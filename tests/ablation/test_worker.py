"""A worker's part that needs no trial: the GPU it gives to its trials."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import ablation_fields, write_corpus

from workbench.ablation.ablation import Ablation, visible_gpus
from workbench.ablation.worker import Worker


def test_every_worker_has_a_gpu_of_its_own_while_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f/2")
    assert visible_gpus() == ["3", "GPU-5f/2"]
    run = Ablation.parse(ablation_fields(write_corpus(tmp_path / "corpus")), tmp_path / "results").create()
    assert run.about["gpus"] == ["3", "GPU-5f/2"]
    workers = [Worker(run) for _ in range(3)]
    with ExitStack() as stack:
        seen = []
        for worker in workers:
            stack.enter_context(worker._gpu())
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert seen == ["3", "GPU-5f/2", "GPU-5f/2"]
    with workers[0]._gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_without_gpus_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = Ablation.parse(ablation_fields(write_corpus(tmp_path / "corpus")), tmp_path / "results").create()
    run.about["gpus"] = []
    with Worker(run)._gpu():
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
