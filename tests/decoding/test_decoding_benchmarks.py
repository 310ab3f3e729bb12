"""benchmarks/decoding.py, decode_quality.py, decode_throughput.py and offload.py: ratios, differences, toy runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decode_quality
import decode_throughput
import decoding
import offload
import pytest
import torch
from common import merge_results

from workbench.ops.sparse_decoding import Forced

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the toy runs are of a CPU")


@needs_cpu
def test_every_two_level_operator_is_compared_with_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BLOCK": 16, "CANDIDATES": 128, "KEPT": 48, "FORCED": Forced(4, 16)}
    for name, value in sizes.items():
        monkeypatch.setattr(decoding, name, value)
    monkeypatch.setattr(decoding, "FORMS", {"gqa": decoding.Form(4, 2, 32, 0, 8)})
    rows = {row["operator"]: row for row in decoding.cases("gqa", 1, 512, False)}
    for operator in decoding.LEVELS:
        assert rows[operator].get("failure") is None
        assert set(rows[operator]["times"]) == {"dense", *decoding.PEERS}
    dense = min(row["ms"] for name, row in rows.items() if name in decoding.DENSE and "ms" in row)
    assert rows["two_level"]["times"]["dense"] == pytest.approx(dense / rows["two_level"]["ms"])


def quality_row(seed: int, policy: str, errors: float) -> dict[str, Any]:
    kept = 0 if policy == "dense" else 512
    values = dict.fromkeys(decode_quality.ERRORS, errors)
    return {"seed": seed, "length": 4096, "tokens_kept": kept, "policy": policy, **values}


def test_the_cost_of_the_lag_is_a_difference_of_equal_seeds() -> None:
    errors = {"dense": (0.1, 0.3), "two_level, mean, synchronous": (0.2, 0.4), "two_level, mean, lagged": (0.25, 0.45)}
    rows = [quality_row(seed, policy, found[seed]) for policy, found in errors.items() for seed in (0, 1)]
    summary = {row["policy"]: row for row in decode_quality.summary(rows)}
    lagged = summary["two_level, mean, lagged"]
    assert lagged["lag_cost_abrupt"] == pytest.approx(0.05)
    assert lagged["lag_cost_interval"] == pytest.approx([0.05, 0.05])
    assert lagged["over_dense"] == pytest.approx(0.15)
    assert "over_dense" not in summary["dense"] and "lag_cost" not in summary["two_level, mean, synchronous"]


def test_results_of_several_processes_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    for value in (1, 2, 3):
        merge_results(path, [{"case": value % 2, "value": value}], lambda result: result["case"])
    found = json.loads(path.read_text())["results"]
    assert [(row["case"], row["value"]) for row in found] == [(0, 2), (1, 3)]


@needs_cpu
def test_steps_are_measured_and_prefills_related_to_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "found.json"
    arguments = "--scale tiny --settings 1x32 --modes eager --steps 2 --cases full"
    monkeypatch.setattr("sys.argv", ["decode_throughput.py", *arguments.split(), "--output", str(output)])
    decode_throughput.main()
    found = {row["what"]: row for row in json.loads(output.read_text())["results"]}
    assert found["step"]["ms"] > 0 and found["logit_error"]["errors"]["eager"] < 0.5
    assert found["prefill"]["of_forward_1"] == pytest.approx(
        found["prefill"]["prefill_1"] / found["prefill"]["forward"]
    )


@needs_cpu
def test_policies_are_related_to_dense_at_their_largest_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"width": 32, "depth": 2, "vocabulary": 40, "mixers": {"full": {"heads": 2, "kv_heads": 1}}}
    levels = {"kind": "two_level", "tokens": 64, "candidates": 128, "block": 16, "channels": 8, "sink": 1, "local": 4}
    policies = {"dense": {"kind": "dense"}, "B6 lagged, incremental": {**levels, "offload": {}}}
    monkeypatch.setattr(offload, "MODELS", {"340m": model})
    monkeypatch.setattr(offload, "POLICIES", policies)
    monkeypatch.setattr(offload, "LEVELS", levels)
    output = tmp_path / "found.json"
    arguments = "--sections largest --tokens 4096 --steps 2 --memory 0.003"
    monkeypatch.setattr("sys.argv", ["offload.py", *arguments.split(), "--output", str(output)])
    offload.main()
    rows = {(row["policy"], row["queries"]): row for row in json.loads(output.read_text())["results"]}
    dense, offloaded = (rows[policy, "random"] for policy in policies)
    assert dense["limit"] == "device" and dense["cache_gib"] < 0.003
    assert offloaded["times_dense"] == pytest.approx(offloaded["tokens_per_second"] / dense["tokens_per_second"])
    assert 0 < offloaded["index_gib"] < offloaded["cache_gib"] and offloaded["host_gib"] > 0


def test_pinned_memory_is_counted_in_powers_of_two() -> None:
    model: Any = type("Model", (), {"blocks": [None] * 4})
    assert offload.pinned_bytes(model, 4 * 100.0, 3) == 4 * 512
    assert offload.pinned_bytes(model, 0.0, 3) == 0
