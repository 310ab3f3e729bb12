"""The benchmark of the first step: caches that only its two processes share, and a valid case for every mixer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import start_up

from workbench.contract import mixers
from workbench.ops import dispatch


def case(**fields: Any) -> argparse.Namespace:
    plain = {"scale": "tiny", "batch": 2, "context": 64, "vocabulary": 300, "eager": True}
    return argparse.Namespace(**{**plain, **fields})


def test_both_runs_share_caches_that_are_empty_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    found = []

    def run() -> dict[str, Any]:
        folders = [Path(os.environ[name]) for name in start_up.CACHES]
        found.append([folder.exists() for folder in folders])
        for folder in folders:
            folder.mkdir(exist_ok=True)
        return {"seconds": 10.0 / len(found)}

    assert start_up.cold_and_warm(run) == {"cold_seconds": 10.0, "warm_seconds": 5.0}
    assert found == [[False] * 3, [True] * 3]
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert "XDG_CACHE_HOME" not in os.environ


def test_a_failure_is_the_result() -> None:
    assert start_up.cold_and_warm(lambda: {"error": "no kernel"}) == {"error": "no kernel"}


@pytest.mark.parametrize("variant", mixers.names())
def test_every_mixer_has_a_case_at_340m(variant: str) -> None:
    assert start_up.run_config(variant, case(scale="340m", batch=8, context=4096, vocabulary=32_000)).model.layers


def test_a_step_is_timed() -> None:
    dispatch.reset()  # of earlier tests of this process
    result = start_up.first_step("gdn", case())
    assert result["seconds"] > 0
    assert result["paths"]["delta_rule"] == ["torch"]
