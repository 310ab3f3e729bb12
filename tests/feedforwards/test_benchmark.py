"""The benchmark of the mixture of experts runs, and its layer agrees with single experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_on_tiny_shapes(tmp_path: Path) -> None:
    output = tmp_path / "moe.json"
    call = [sys.executable, str(ROOT / "benchmarks" / "moe.py"), "--smoke", "--output", str(output)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["implementation"]: row for row in json.loads(output.read_text())["results"]}
    parts = {f"part: {name}" for name in ("router", "dispatch", "swiglu", "combine", "casts")}
    wanted = {"products", "moe", "kernels", "moe top 6", "zero", "dense", "deterministic"} | parts
    assert rows.keys() == wanted and not any("error" in row for row in rows.values())
    assert rows["deterministic"]["same_bits"] and rows["part: swiglu"]["bytes_least"] == 16 * 256 * 4 * 32
    assert abs(rows["zero"]["ffn_experts"] - 4) < 0.1
