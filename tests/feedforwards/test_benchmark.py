"""benchmarks/moe.py runs on a CPU, and its layer agrees with single experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


PARTS = {f"part: {name}" for name in ("router", "dispatch", "swiglu", "combine", "casts")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Implementation -> its entry on tiny shapes."""
    output = tmp_path_factory.mktemp("benchmark") / "moe.json"
    call = [sys.executable, str(ROOT / "benchmarks" / "moe.py"), "--smoke", "--output", str(output)]
    process = subprocess.run(call, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return {row["implementation"]: row for row in json.loads(output.read_text())["results"]}


def test_every_implementation_is_measured(rows: dict[str, dict[str, Any]]) -> None:
    assert rows.keys() == {"products", "moe", "kernels", "moe top 6", "zero", "dense", "deterministic"} | PARTS


def test_no_implementation_fails(rows: dict[str, dict[str, Any]]) -> None:
    assert not {name: row["error"] for name, row in rows.items() if "error" in row}


def test_deterministic_passes_give_the_same_bits(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["deterministic"]["same_bits"]


def test_least_bytes_of_the_activation(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["part: swiglu"]["bytes_least"] == 16 * 256 * 4 * 32


def test_balanced_router_chooses_the_expected_number_of_experts(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["zero"]["ffn_experts"] == pytest.approx(4, abs=0.1)
