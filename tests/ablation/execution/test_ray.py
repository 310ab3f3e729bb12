"""Workers on a Ray cluster of two nodes of this machine, one of which is lost while its trial runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields, write_corpus

pytest.importorskip("ray.job_submission", reason="ray is not installed: pip install -e '.[ray]'")

import psutil
from ablation.execution.test_storage import postgresql

from workbench.ablation.ablation import Ablation
from workbench.files import read_json

pytestmark = pytest.mark.slow

PATIENCE = 300


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def lose(node: subprocess.Popen[bytes]) -> None:
    """End a node and everything that runs on it at once, as a power cut would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    node.wait(60)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Address of the jobs' server, and the two nodes; each says that it has one GPU."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--num-gpus=1"]
    port, jobs = free_port(), free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
    place = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets must be short
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> None:
        with open(f"{place}/log-{len(nodes)}", "w") as log:
            nodes.append(subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log))

    try:
        start(
            "--head",
            f"--port={port}",
            f"--dashboard-port={jobs}",
            "--include-dashboard=true",
            f"--temp-dir={place}/one",
        )
        from ray.job_submission import JobSubmissionClient

        def answers() -> bool:
            with contextlib.suppress(Exception):
                return JobSubmissionClient(f"http://127.0.0.1:{jobs}").list_jobs() == []
            return False

        until(answers)
        start(f"--address=127.0.0.1:{port}")
        yield f"http://127.0.0.1:{jobs}", nodes
    finally:
        for node in reversed(nodes):
            lose(node)
        shutil.rmtree(place, ignore_errors=True)


def test_a_lost_node_costs_no_finished_trial(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    with postgresql() as storage, two_nodes() as (address, nodes):
        run = Ablation.parse(
            ablation_fields(
                corpus,
                base={"training": {"tokens": 300 * 64, "checkpoint_every": 25, "log_every": 5}},
                confirmation={"seeds": [0, 1]},
                tuning={"trials": 1, "sampler": "random"},
                launch={
                    "workers": 2,
                    "heartbeat": 1,
                    "storage": storage,
                    "launcher": {
                        "kind": "ray",
                        "address": address,
                        "parameters": {"entrypoint_num_gpus": 0.6},  # a node has no room for two
                    },
                },
            ),
            tmp_path / "results",
        ).create()
        run.start_workers()
        assert len(run.waiting_workers()) == 2 and not run.wait(timeout=0.1)
        # a worker and a trial on either node
        until(lambda: len(run.workers()) == 2 and (run.runs()["status"] == "running").sum() == 2)
        second = psutil.Process(nodes[1].pid)
        assert len({child.pid for child in second.children(recursive=True)} & set(run.workers())) == 1, "not one a node"

        def well_under_way() -> bool:
            """Whether a trial is done, and the second node's has a checkpoint."""
            there = {child.pid for child in second.children(recursive=True)}
            own = [path.parent for path in run.folder.glob("runs/*/status.json") if read_json(path).get("pid") in there]
            return "done" in set(run.runs()["status"]) and any(list(path.glob("checkpoint/step-*")) for path in own)

        until(well_under_way)
        lose(nodes[1])
        until(lambda: len(run.workers()) == 1)
        assert run.wait(PATIENCE) and set(run.runs()["status"]) == {"done"} and run.runs().height == run.total
        events = [path.read_text() for path in sorted(run.folder.glob("runs/*/events.jsonl"))]
        assert (
            [text.count('"done"') for text in events] == [1] * run.total == [text.count('"started"') for text in events]
        )
        assert sum(text.count('"resumed"') for text in events) == 1, (
            "the lost node's trial went on elsewhere, and no other"
        )
        assert run.verdict() is not None
