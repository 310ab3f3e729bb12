"""Mutated ablation files are clear errors or complete plans. benchmarks/fuzz_configurations.py tries a thousand."""

from __future__ import annotations

from pathlib import Path

import fuzz_configurations as fuzz
import pytest


@pytest.mark.parametrize("seed", range(8))
def test_a_mutated_file_is_a_plan_or_one_clear_error(seed: int, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(1000 + seed)
    for _ in range(5):
        text, overrides = fuzzer.file()
        kind, why = fuzz.outcome(text, overrides, tmp_path)
        assert kind in ("plan", "error"), (why, overrides, text)


def test_the_same_seed_gives_the_same_files() -> None:
    assert fuzz.Fuzzer(3).file() == fuzz.Fuzzer(3).file()


def test_a_file_that_takes_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: object) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.1)
    monkeypatch.setattr(fuzz.Ablation, "load", hang)
    assert fuzz.outcome("a: 1", [], tmp_path)[0] == "too long"
