"""benchmarks/devices.py: its arithmetic, and a run on two CPU processes."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest
from ranks import on_ranks

from workbench.config import ConfigError
from workbench.data import prepare


def kernel(name: str, first: float, last: float, category: str = "kernel") -> dict[str, Any]:
    """An event of a trace, in microseconds."""
    return {"cat": category, "name": name, "ts": first * 1e6, "dur": (last - first) * 1e6}


def test_exposed_communication_is_what_no_other_kernel_covers() -> None:
    """Communication from 0 to 4 and from 6 to 8, on two streams; products from 1 to 3, 2 to 5 and 7 to 7.5."""
    events = [
        kernel("ncclDevKernel_AllGather_RING_LL", 0, 3),
        kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 2, 4),
        kernel("gemm", 1, 3),
        kernel("triton_fused", 2, 5),
        kernel("ncclDevKernel_AllGather_RING_LL", 6, 8),
        kernel("gemm", 7, 7.5),
        kernel("ncclAllGather", 0, 100, "cpu_op"),
        {"name": "without a category", "ts": 0},
    ]
    communication, exposed = devices.communication_of(events)
    assert communication == pytest.approx(4 + 2)
    assert exposed == pytest.approx(1 + 1 + 0.5)


def test_without_kernels_nothing_is_communicated() -> None:
    assert devices.communication_of([]) == (0, 0)


@pytest.mark.parametrize(
    ("spans", "expected"), [([], 0), ([(0, 1), (1, 2)], 2), ([(0, 5), (1, 2)], 5), ([(3, 4), (0, 1)], 2)]
)
def test_length_of_a_union_of_intervals(spans: list[tuple[float, float]], expected: float) -> None:
    assert devices.covered(np.array(spans, dtype=float).reshape(-1, 2)) == expected


def arguments(**changes: Any) -> Namespace:
    return Namespace(**{"steps": 40, "corpus_bytes": 1000, "extra": "{}", **changes})


@pytest.mark.parametrize(("division", "rows"), [("per device", 64), ("total", 16)])
def test_rows_are_those_of_one_device_or_of_all(division: str, rows: int) -> None:
    config = devices.config_of("full:340m:16", 4, division, arguments())
    assert config.training.batch_size == rows
    assert config.training.steps == 40 + 1 + devices.PROFILED


def test_a_mixture_is_named_in_the_case() -> None:
    config = devices.config_of("full/moe64-exchanged:340m:8", 2, "total", arguments())
    assert config.training.expert_parallel
    assert {layer.feedforward.experts for layer in config.model.layers} == {64}


@pytest.mark.parametrize(
    ("case", "message"),
    [("full/moe7:340m:8", "got 'moe7'; expected one of moe64"), ("full:340m:6", "multiple of the 4")],
)
def test_a_case_that_cannot_be_run_is_refused(case: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devices.config_of(case, 4, "total", arguments())


def test_efficiency_is_speed_by_device() -> None:
    one = {"rows": "total", "devices": 1, "tokens_per_second": 100.0, "losses": [7.0, 6.5]}
    two = {"rows": "total", "devices": 2, "tokens_per_second": 180.0, "losses": [7.0, 6.4]}
    found = devices.compared(two, one)
    assert found["efficiency"] == pytest.approx(0.9) and found["speed_over_one"] == pytest.approx(1.8)
    assert found["largest_difference_of_loss"] == pytest.approx(0.1)
    assert "largest_difference_of_loss" not in devices.compared({**two, "rows": "per device"}, one)
    assert devices.compared({**two, "error": "out of memory"}, one)["error"]


@pytest.mark.process
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    extra = {"model": {"width": 32, "depth": 1, "vocabulary": 300}, "training": {"precision": "fp32"}}
    of_all = arguments(steps=10, corpus_bytes=300_000, extra=json.dumps(extra), cache=str(tmp_path), threads=1)
    config = devices.config_of("full/moe4-exchanged:tiny:2:32", 2, "total", of_all)
    data = prepare(config.data, 300, tmp_path).fingerprint
    (one,) = on_ranks(1, devices.train, config, 1, data, of_all)
    two, other = on_ranks(2, devices.train, config, 2, data, of_all)
    assert len(two["losses"]) == 10 and two["losses"] == other["losses"]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert len(two["windows"]) == 2 and two["tokens_per_second"] > 0
    assert two["peak_bytes"] == other["peak_bytes"] > 0
    entries = [
        devices.compared({"case": "a", "devices": n, "rows": "total", **r}, None) for n, r in ((1, one), (2, two))
    ]
    assert "| a | 2 | 1 |" in devices.table(entries)
