"""Exact resume: train 2N equals train N, stop, train N, bit for bit on the CPU; and resume after any kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_run, run_fields, write_corpus

from workbench.contract import feedforwards, mixers
from workbench.results import RunFolder
from workbench.training.checkpoint import latest, load_checkpoint
from workbench.training.trial import run_in_process, train

VARIANTS = {
    **{name: {"model": {"pattern": name, "depth": 1}, "training": {"tokens": 8 * 2 * 32}} for name in mixers},
    **{name: {"model": {"feedforward": name, "depth": 1}, "training": {"tokens": 8 * 2 * 32}} for name in feedforwards},
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
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def state(folder: RunFolder) -> dict[str, Any]:
    """Everything in the newest checkpoint but the clock."""
    path, damaged = latest(folder.path / "checkpoint")
    assert path is not None and not damaged
    checkpoint = load_checkpoint(path)
    checkpoint.pop("seconds")
    return checkpoint


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


def stop_after(step: int) -> Any:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) == step


def test_deterministic_runs_are_equal_bit_for_bit_interrupted_or_not(corpus: Path, tmp_path: Path) -> None:
    """Fifty steps of everything that LongCat adds to a model."""
    training = {"deterministic": True, "tokens": 50 * 2 * 32, "checkpoint_every": 25}
    fields = run_fields(corpus, **{**VARIANTS["longcat"], "training": training})
    one, two, parts = (make_run(tmp_path / name, tmp_path / "cache", fields) for name in ("one", "two", "parts"))
    assert [train(folder.path, tmp_path / "cache")["status"] for folder in (one, two)] == ["done"] * 2
    assert train(parts.path, tmp_path / "cache", stop_after(20))["status"] == "interrupted"
    train(parts.path, tmp_path / "cache")
    for other in (two, parts):
        assert curve(other) == curve(one) and len(curve(one)) == 50
        assert_same_bits(state(other), state(one))


@pytest.mark.parametrize("name", VARIANTS)
def test_2n_steps_equal_n_plus_n_bit_for_bit(name: str, corpus: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus, **VARIANTS[name])
    whole, parts = (make_run(tmp_path / part, tmp_path / "cache", fields) for part in ("whole", "parts"))
    result = train(whole.path, tmp_path / "cache")
    steps = result["step"]
    assert train(parts.path, tmp_path / "cache", stop_after(steps // 2))["status"] == "interrupted"
    # a resumed process starts with other generators than the one that stopped
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = train(parts.path, tmp_path / "cache")
    assert_same_bits(state(parts), state(whole))
    assert curve(parts) == curve(whole) and parts.diagnostics() == whole.diagnostics()
    assert resumed["report_value"] == result["report_value"]
    assert (parts.path / "report.parquet").read_bytes() == (whole.path / "report.parquet").read_bytes()


def test_random_state_of_python_numpy_and_torch_is_part_of_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus))
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    train(folder.path, tmp_path / "cache", stop_after(3))
    expected = random.random(), np.random.rand(), torch.rand(1)
    seen: list[Any] = []

    def look() -> bool:
        if not seen:
            seen.append((random.random(), np.random.rand(), torch.rand(1)))
        return False

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    train(folder.path, tmp_path / "cache", look)
    assert seen[0] == expected


def test_finished_run_is_read_not_repeated(corpus: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus))
    first = train(folder.path, tmp_path / "cache")
    files = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != "lock"}
    assert train(folder.path, tmp_path / "cache") == first
    assert files == {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != "lock"}


def test_killed_at_random_moments_it_resumes_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus, training={"tokens": 60 * 64, "checkpoint_every": 3})
    whole, killed = (make_run(tmp_path / part, tmp_path / "cache", fields) for part in ("whole", "killed"))
    train(whole.path, tmp_path / "cache")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.training.trial"])
    kills = 0
    for _ in range(40):
        process = context.Process(target=run_in_process, args=(str(killed.path), str(tmp_path / "cache"), 1))
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


def test_a_request_to_stop_that_comes_between_steps_is_met_with_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus, training={"accumulate": 2}))
    calls, asked = iter(range(1, 100)), []

    def should_stop() -> bool:
        already = bool(asked)
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # as if it came just after the question
        return already

    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        assert train(folder.path, tmp_path / "cache", should_stop)["status"] == "interrupted"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert latest(folder.path / "checkpoint")[0] == folder.path / "checkpoint" / "step-4"


def test_damaged_checkpoint_falls_back_to_the_one_before(corpus: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus)
    whole, hurt = (make_run(tmp_path / part, tmp_path / "cache", fields) for part in ("whole", "hurt"))
    train(whole.path, tmp_path / "cache")
    train(hurt.path, tmp_path / "cache", stop_after(12))
    newest = hurt.path / "checkpoint" / "step-12" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    train(hurt.path, tmp_path / "cache")
    events = [json.loads(line) for line in (hurt.path / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "damaged_checkpoint" and "step-12" in event["reason"] for event in events)
    assert [event["step"] for event in events if event["event"] == "resumed"] == [10]
    assert_same_bits(state(hurt), state(whole))


def test_half_written_checkpoint_is_not_seen(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus))
    train(folder.path, tmp_path / "cache", stop_after(7))
    (folder.path / "checkpoint" / ".step-9.tmp").mkdir()
    (folder.path / "checkpoint" / ".step-9.tmp" / "model.safetensors").write_bytes(b"half")
    path, damaged = latest(folder.path / "checkpoint")
    assert path is not None and path.name == "step-7" and not damaged


def test_full_disk_leaves_the_last_checkpoint_and_goes_on_later(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workbench.training.checkpoint as module

    fields = run_fields(corpus)
    whole, full = (make_run(tmp_path / part, tmp_path / "cache", fields) for part in ("whole", "full"))
    train(whole.path, tmp_path / "cache")
    save = module.save_file

    def no_space(tensors: Any, path: Path) -> None:
        if "step-10" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(module, "save_file", no_space)
    result = train(full.path, tmp_path / "cache")
    assert result["status"] == "interrupted" and "disk is full" in result["reason"]
    assert not full.result()
    assert latest(full.path / "checkpoint")[0] == full.path / "checkpoint" / "step-5"
    monkeypatch.undo()
    assert train(full.path, tmp_path / "cache")["status"] == "done"
    assert_same_bits(state(full), state(whole))


def test_second_process_on_the_same_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus))
    with folder.hold() as mine:
        assert mine
        assert train(folder.path, tmp_path / "cache")["status"] == "busy"
