"""Shared by the benchmark scripts: a job in a separate process, a results file that keeps earlier entries, a report,
waiting for the GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_in_process(script: str, job: str, limit: float | None = None) -> dict[str, Any]:
    """Run ``script`` with this process's arguments and ``--one job``; return the JSON that it prints after "RESULT".

    Args:
        limit: seconds after which the process, and those that it has started, are killed.

    Returns:
        the result, or ``{"error": …}`` with the end of the output where there is none.
    """
    call = [sys.executable, script, "--one", job, *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(call, env=environment, start_new_session=limit is not None, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            errors += f"\nended after {limit:g} s"
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else {"error": (errors or output)[-1500:]}


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def merge_results(
    path: Path, results: list[dict[str, Any]], key: Callable[[dict[str, Any]], Hashable], **more: Any
) -> None:
    """Write ``results`` with environment and date to a JSON file. Earlier entries stay, unless a new one has the same
    key and device. Several processes may write to one file.

    Args:
        path: the file.
        results: new entries.
        key: identifies the case of an entry.
        more: further fields of the environment.
    """
    from workbench.files import locked

    where = provenance(**more)
    new = [{**result, "environment": where} for result in results]

    def key_and_device(result: dict[str, Any]) -> Hashable:
        return key(result), result["environment"]["device"]

    replaced = {key_and_device(result) for result in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):  # which creates it
        text = path.read_text()
        earlier = json.loads(text)["results"] if text else []
        unchanged = [result for result in earlier if key_and_device(result) not in replaced]
        path.write_text(json.dumps({"results": unchanged + new}, indent=1) + "\n")


def provenance(**more: Any) -> dict[str, Any]:
    """Environment and date of a measurement, and further fields."""
    from workbench.environment import environment

    return {**environment(), **more, "date": time.strftime("%Y-%m-%d")}


def exact_rate(count: int, of: int) -> dict[str, Any]:
    """A count among ``of`` and its share, with the exact (Clopper–Pearson) 95 % interval of that."""
    from scipy import stats

    low, high = stats.binomtest(int(count), of).proportion_ci(0.95, method="exact")
    return {"count": int(count), "of": of, "rate": int(count) / of, "low": float(low), "high": float(high)}


def write_report(path: Path, report: dict[str, Any], started: float) -> None:
    """Write ``report`` with its provenance, and the seconds since ``started`` (``time.perf_counter``), as JSON."""
    from workbench.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**report, "environment": provenance(seconds=round(time.perf_counter() - started, 1))})
