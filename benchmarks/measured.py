"""What benchmark scripts share: a job in a process of its own, and a file of results that keeps earlier entries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def in_process(script: str, job: str) -> dict[str, Any]:
    """What ``script`` prints behind RESULT when it is called with this process's arguments and ``--one job``; else its error."""
    call = [sys.executable, script, "--one", job, *sys.argv[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else {"error": (done.stderr or done.stdout)[-1500:]}


def keep(path: Path, results: list[dict[str, Any]], key: Callable[[dict[str, Any]], Hashable], **where: Any) -> None:
    """Write results with where and when they were measured; earlier entries stay unless a new one of that device has their key."""
    from workbench.environment import environment

    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["results"] if path.exists() else []
    where = {**environment(), **where, "date": time.strftime("%Y-%m-%d")}
    new = [{**result, "environment": where} for result in results]

    def full(result: dict[str, Any]) -> Hashable:
        return key(result), result["environment"]["device"]

    keys = {full(result) for result in new}
    kept = [result for result in old if full(result) not in keys]
    path.write_text(json.dumps({"results": kept + new}, indent=1) + "\n")
