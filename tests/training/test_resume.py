"""Exact resume: train 2N equals train N, stop, train N, bit for bit on the CPU; and resume after any kill."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_run, run_fields

from workbench.config import ConfigError
from workbench.contract import feedforwards, mixers
from workbench.results import RunFolder
from workbench.training import checkpoint
from workbench.training.checkpoint import checkpoints_in, latest, load_checkpoint
from workbench.training.trial import run_in_process, train

pytestmark = pytest.mark.process

VARIANTS: dict[str, Any] = {
    **{name: {"model": {"pattern": name, "depth": 1}, "training": {"tokens": 8 * 2 * 32}} for name in mixers},
    "differential": {
        "model": {"pattern": "differential", "depth": 1, "mixers": {"differential": {"heads": 2}}},
        "training": {"tokens": 8 * 2 * 32},
    },
    **{
        name: {
            "model": {"feedforward": name, "depth": 1},
            "training": {"tokens": 8 * 2 * 32},
            "allow_document_leaks": not feedforwards[name].capabilities.segments,
        }
        for name in feedforwards
    },
    "longcat": {
        "model": {"shortcut": "moe", "mtp": {"start": 0.6}, "hidden_z": 1e-4, "embedding": {"kind": "ngram", "size": 2}}
    },
    "accumulated hybrid": {
        "model": {
            "pattern": "gdn full",
            "feedforward": "swiglu moe",
            "feedforwards": {
                "moe": {"experts": 4, "zero_experts": 2, "top_k": 3, "bias": "proportional", "renormalise": False}
            },
        },
        "training": {"accumulate": 2, "schedule": "cosine"},
    },
    "averaged and clipped": {"training": {"ema": {"decay": 0.9, "evaluate": "beside"}, "qk_clip": {"threshold": 0.1}}},
}


MakeRun = Callable[..., RunFolder]
Events = Callable[[RunFolder, str], list[dict[str, Any]]]


def state(folder: RunFolder) -> dict[str, Any]:
    """Everything in the newest checkpoint but the clock."""
    path, damaged = latest(folder.path / "checkpoint")
    assert path is not None and not damaged
    saved = load_checkpoint(path)
    saved.pop("seconds")
    return saved


def assert_same_bits(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same_bits(x, y, f"{path}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def curve(folder: RunFolder) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["gradient_norm"], row.get("selection_value")) for row in folder.metrics()]


def stop_after(step: int) -> Callable[[], bool]:
    calls = iter(range(1, 10_000))
    return lambda: next(calls) == step


class TestDeterministic:
    """Fifty steps of everything that LongCat adds to a model, with ``training.deterministic``."""

    @pytest.fixture(scope="class")
    def folders(self, corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
        """The same run twice, and once interrupted and resumed."""
        training = {"deterministic": True, "tokens": 50 * 2 * 32, "checkpoint_every": 25}
        fields = run_fields(corpus, **{**VARIANTS["longcat"], "training": training})
        path = tmp_path_factory.mktemp("deterministic")
        folders = {name: make_run(path / name, cache, fields) for name in ("once", "again", "interrupted")}
        train(folders["once"].path, cache)
        train(folders["again"].path, cache)
        assert train(folders["interrupted"].path, cache, stop_after(20))["status"] == "interrupted"
        train(folders["interrupted"].path, cache)
        return folders

    @pytest.mark.parametrize("name", ["again", "interrupted"])
    def test_the_curve_repeats(self, name: str, folders: dict[str, RunFolder]) -> None:
        assert curve(folders[name]) == curve(folders["once"])

    @pytest.mark.parametrize("name", ["again", "interrupted"])
    def test_the_final_state_repeats(self, name: str, folders: dict[str, RunFolder]) -> None:
        assert_same_bits(state(folders[name]), state(folders["once"]))


@pytest.mark.parametrize("name", VARIANTS)
def test_2n_steps_equal_n_plus_n_bit_for_bit(name: str, corpus: Path, cache: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus, **VARIANTS[name])
    whole, parts = (make_run(tmp_path / part, cache, fields) for part in ("whole", "parts"))
    steps = train(whole.path, cache)["step"]
    assert train(parts.path, cache, stop_after(steps // 2))["status"] == "interrupted"
    # a resumed process starts with other generators than the one that stopped
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    train(parts.path, cache)
    assert_same_bits(state(parts), state(whole))
    assert curve(parts) == curve(whole)
    assert parts.diagnostics() == whole.diagnostics()
    assert (parts.path / "report.parquet").read_bytes() == (whole.path / "report.parquet").read_bytes()


def test_a_resumed_run_has_the_random_state_of_its_checkpoint(new: MakeRun, cache: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    folder = new()
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    train(folder.path, cache, stop_after(3))
    expected = draw()
    drawn: list[Any] = []

    def should_stop() -> bool:
        if not drawn:
            drawn.append(draw())
        return False

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    train(folder.path, cache, should_stop)
    assert drawn[0] == expected


def test_killed_at_random_moments_it_resumes_to_the_same_bits(new: MakeRun, cache: Path) -> None:
    training = {"tokens": 60 * 64, "checkpoint_every": 3}
    whole, killed = (new(name, training=training) for name in ("whole", "killed"))
    train(whole.path, cache)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.training.trial"])
    kills = 0
    for _ in range(40):
        process = context.Process(target=run_in_process, args=(str(killed.path), str(cache), 1))
        process.start()
        before = len(killed.metrics())
        until = time.monotonic() + 60
        while process.is_alive() and len(killed.metrics()) <= before and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(random.random() * 0.1)
        if process.is_alive() and kills < 4:
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
            process.join()
            assert killed.status()["status"] == "killed" or killed.result()
        process.join()
        if killed.result():
            break
    assert kills >= 2
    assert_same_bits(state(killed), state(whole))
    assert curve(killed) == curve(whole)


def test_a_stop_requested_between_steps_is_answered_by_a_checkpoint(new: MakeRun, cache: Path) -> None:
    folder = new(training={"accumulate": 2})
    calls = iter(range(1, 100))
    signals: list[int] = []

    def should_stop() -> bool:
        requested = bool(signals)
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # as if it came just after the question
        return requested

    before = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    try:
        assert train(folder.path, cache, should_stop)["status"] == "interrupted"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert latest(folder.path / "checkpoint")[0] == folder.path / "checkpoint" / "step-4"


def test_two_checkpoints_are_retained(new: MakeRun, cache: Path) -> None:
    folder = new()
    train(folder.path, cache)
    assert [path.name for path in checkpoints_in(folder.path / "checkpoint")] == ["step-15", "step-20"]


class TestDamaged:
    """A run resumed after its newest checkpoint was damaged."""

    @pytest.fixture
    def damaged(self, new: MakeRun, cache: Path) -> RunFolder:
        folder = new("damaged")
        train(folder.path, cache, stop_after(12))
        newest = folder.path / "checkpoint" / "step-12" / "state.safetensors"
        newest.write_bytes(newest.read_bytes()[:-100])
        train(folder.path, cache)
        return folder

    def test_the_damage_is_an_event(self, damaged: RunFolder, events: Callable[..., list[Any]]) -> None:
        (event,) = events(damaged, "damaged_checkpoint")
        assert "step-12" in event["reason"]

    def test_it_resumes_from_the_one_before(self, damaged: RunFolder, events: Callable[..., list[Any]]) -> None:
        assert [event["step"] for event in events(damaged, "resumed")] == [10]

    def test_it_ends_with_the_same_bits(self, damaged: RunFolder, new: MakeRun, cache: Path) -> None:
        whole = new("whole")
        train(whole.path, cache)
        assert_same_bits(state(damaged), state(whole))


class TestFullDisk:
    """A run whose disk is full at the checkpoint of step 10."""

    @pytest.fixture
    def full(self, new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
        def no_space(tensors: Any, path: Path) -> None:
            if "step-10" in str(path):
                raise OSError(28, "No space left on device")
            save(tensors, path)

        save = checkpoint.save_file
        folder = new("full")
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", no_space)
            self.result = train(folder.path, cache)
        return folder

    def test_it_is_interrupted_with_a_reason(self, full: RunFolder) -> None:
        assert self.result["status"] == "interrupted"
        assert "disk is full" in self.result["reason"]

    def test_the_checkpoint_before_is_left(self, full: RunFolder) -> None:
        assert latest(full.path / "checkpoint")[0] == full.path / "checkpoint" / "step-5"

    def test_it_resumes_to_the_same_bits(self, full: RunFolder, new: MakeRun, cache: Path) -> None:
        whole = new("whole")
        train(whole.path, cache)
        assert train(full.path, cache)["status"] == "done"
        assert_same_bits(state(full), state(whole))


def test_a_second_process_on_the_same_run_is_refused(new: MakeRun, cache: Path) -> None:
    folder = new()
    with folder.lock() as acquired:
        assert acquired
        assert train(folder.path, cache)["status"] == "busy"


def test_a_stop_between_two_lines_adds_none(new: MakeRun, cache: Path) -> None:
    training = {"log_every": 5, "checkpoint_every": 10, "evaluations": 1}
    whole, parts = (new(name, training=training) for name in ("whole", "parts"))
    train(whole.path, cache)
    for steps in (3, 4, 6):  # to steps 3, 7 and 13
        assert train(parts.path, cache, stop_after(steps))["status"] == "interrupted"
    train(parts.path, cache)
    assert [row["step"] for row in parts.metrics()] == [5, 10, 15, 20]
    assert curve(parts) == curve(whole)
    assert parts.diagnostics() == whole.diagnostics()
    assert_same_bits(state(parts), state(whole))


@pytest.mark.parametrize("message", ["[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"])
def test_a_cpu_without_memory_is_out_of_memory(
    message: str, new: MakeRun, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("workbench.training.trial.fit", fail)
    assert train(new().path, cache)["status"] == "out_of_memory"


@pytest.mark.parametrize("module", ["workbench.training.checkpoint", "workbench.data.sources"])
def test_files_that_cannot_be_read_for_a_moment_are_no_result(
    module: str, new: MakeRun, cache: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    folder = new()
    train(folder.path, cache, stop_after(7))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], "checksum", refuse)  # the package has a registry of that name
        assert train(folder.path, cache)["status"] == "interrupted"
    assert not folder.result()
    assert train(folder.path, cache)["status"] == "done"
    assert [event["step"] for event in events(folder, "resumed")] == [7]


def test_a_run_is_no_folder_of_prepared_data(corpus: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="prepared data"):
        make_run(cache, cache, run_fields(corpus))
