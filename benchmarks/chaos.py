"""A repeatedly killed ablation must reach the verdict of an undisturbed one, with nothing lost or repeated.

    python benchmarks/chaos.py --kills 30

Twelve arms on a CPU are launched from a notebook kernel, which is then killed. Workers and trials are killed (SIGKILL)
at points drawn beforehand, uniformly over the first nine tenths of the work, so that all of them are reached; in
between, the newest checkpoints of trials (which are then killed) and metrics are truncated, and the ablation is
stopped. Whenever a worker is missing, the same `workbench run` is started from a shell, twice at once; also at the end,
if a trial was killed too often. `workbench watch` must report the end. The verdict must equal that of the undisturbed
ablation, word for word.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jupyter_client.manager import start_new_kernel

from workbench.ablation.ablation import Ablation
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.launch import Launch
from workbench.ablation.spec.tuning import Tuning
from workbench.environment import environment
from workbench.files import read_json, read_jsonl, write_json


def fields(corpus: str, arms: int, seeds: int, steps: int) -> dict[str, Any]:
    return {
        "name": "chaos",
        "base": {
            "model": {"width": 32, "depth": 2, "vocabulary": 300},
            "data": {"corpus": {"kind": "files", "path": corpus}, "evaluation_documents": 3, "evaluation_bytes": 200},
            "training": {
                "tokens": steps * 64,
                "batch_size": 2,
                "context": 32,
                "evaluations": 2,
                "log_every": 5,
                "checkpoint_every": 25,
            },
        },
        "arms": {
            "full": {},
            **{f"w{w}": {"model.pattern": "sliding", "model.mixers.sliding.window": w} for w in range(2, arms + 1)},
        },
        "tuning": {
            "trials": 1,
            "sampler": "qmc",
            "space": {"training.learning_rate": {"low": 2e-3, "high": 8e-3, "log": True}},
        },
        "confirmation": {"seeds": list(range(seeds))},
        "launch": {"workers": 2, "heartbeat": 1},
    }


def write_corpus(folder: Path) -> Path:
    generator = random.Random(0)
    folder.mkdir()
    words = (
        sorted(Launch.model_fields)
        + sorted(Tuning.model_fields)
        + ["attention", "state", "window", "gate", "head", "token"]
    )
    for number in range(40):
        lines = [" ".join(generator.choices(words, k=12)) + f" {generator.random():.6f}" for _ in range(40)]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines))
    return folder


def launch_from_killed_notebook(file: Path, results: Path) -> None:
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=300)
    code = f"""import workbench as wb
run = wb.Ablation.load({str(file)!r}, results={str(results)!r}).launch()
run.workers()"""
    reply = client.execute_interactive(code, timeout=600, output_hook=lambda message: None)
    assert reply["content"]["status"] == "ok", reply["content"]
    provisioner: Any = manager.provisioner
    os.kill(provisioner.process.pid, signal.SIGKILL)
    client.stop_channels()
    manager.cleanup_resources()


def running_trials(run: AblationRun) -> list[int]:
    pids = []
    for path in run.folder.glob("runs/*/status.json"):
        with contextlib.suppress(ValueError, OSError):
            state = json.loads(path.read_text())
            if state["status"] == "running":
                pids.append(state["pid"])
    return pids


def share_done(run: AblationRun, steps: int) -> float:
    """Fraction of all training steps that the logs of the runs contain."""
    return float(run.runs()["step"].sum()) / (run.total * steps)


def kill(pids: list[int], generator: random.Random) -> bool:
    """Kill a random one of these processes. Returns whether one was killed."""
    with contextlib.suppress(ProcessLookupError):
        if pids:
            os.kill(generator.choice(pids), signal.SIGKILL)
            return True
    return False


def truncate_checkpoint(run: AblationRun, generator: random.Random) -> bool:
    """Kill a running trial and damage its newest checkpoint, which must be detected when the trial resumes."""
    newest = {}
    for path in run.folder.glob("runs/*/status.json"):
        state = read_json(path)
        checkpoints = sorted(
            path.parent.glob("checkpoint/step-*/model.safetensors"), key=lambda p: int(p.parent.name[5:])
        )
        if state.get("status") == "running" and checkpoints:
            newest[state["pid"]] = checkpoints[-1]
    if not newest:
        return False
    pid = generator.choice(sorted(newest))
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        os.truncate(newest[pid], 100)
        return True
    return False


def truncate_metrics(run: AblationRun) -> bool:
    """Truncate the last line of the metrics of a run that has not ended."""
    for path in run.folder.glob("runs/*/metrics.jsonl"):
        if not (path.parent / "result.json").exists() and path.stat().st_size > 20:
            os.truncate(path, path.stat().st_size - 7)
            return True
    return False


def attack(run: AblationRun, relaunch: list[str], kills: int, steps: int, generator: random.Random) -> dict[str, int]:
    """Disturb the ablation until every run is done. Returns how often each disturbance happened."""
    actions = ["workers killed"] * (kills * 2 // 5) + ["trials killed"] * (kills - kills * 2 // 5)
    actions += ["checkpoints truncated"] * 3 + ["metrics truncated"] * 3 + ["stops"] * 2
    generator.shuffle(actions)
    plan = list(zip(sorted(generator.uniform(0, 0.9) for _ in actions), actions))
    counts = dict.fromkeys(sorted(set(actions)), 0) | {"launches": 1}
    launching: list[subprocess.Popen[bytes]] = []
    while True:
        time.sleep(0.2)
        if run.finished and not any(process.poll() is None for process in launching):
            if set(run.runs()["status"]) == {"done"}:
                break
            launching.append(subprocess.Popen(relaunch, stdout=subprocess.DEVNULL))  # a trial was killed too often
            counts["launches"] += 1
            launching[-1].wait()
        if plan and share_done(run, steps) >= plan[0][0]:
            action = plan[0][1]
            if action == "workers killed":
                happened = kill(run.workers(), generator)
            elif action == "trials killed":
                happened = kill(running_trials(run), generator)
            elif action == "checkpoints truncated":
                happened = truncate_checkpoint(run, generator)
            elif action == "metrics truncated":
                happened = truncate_metrics(run)
            else:
                run.stop(120)
                happened = True
            if happened:
                plan.pop(0)
                counts[action] += 1
        if not run.finished and len(run.workers()) < 2 and not any(process.poll() is None for process in launching):
            launching += [subprocess.Popen(relaunch, stdout=subprocess.DEVNULL) for _ in range(2)]
            counts["launches"] += 2
    assert not any(process.wait() for process in launching), "a launch failed"
    return counts


def verdict_text(run: AblationRun) -> str:
    """The verdict, without the time of its declaration."""
    verdict = run.verdict()
    assert verdict is not None
    return str(replace(verdict, declared=()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--arms", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/chaos.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = write_corpus(Path(scratch) / "corpus")
        file = Path(scratch) / "chaos.yaml"
        write_json(file, fields(str(corpus), options.arms, options.seeds, options.steps))  # JSON is YAML
        start = time.monotonic()
        undisturbed = Ablation.load(file, results=Path(scratch) / "undisturbed").launch()
        assert undisturbed.wait()
        undisturbed_seconds, start = time.monotonic() - start, time.monotonic()

        results = Path(scratch) / "disturbed"
        launch_from_killed_notebook(file, results)
        run = AblationRun(results / "chaos")
        assert run.workers(), "the workers died with the notebook"
        relaunch = [sys.executable, "-m", "workbench", "run", str(file), "--results", str(results), "--detach"]
        counts = attack(run, relaunch, options.kills, options.steps, random.Random(options.seed))
        watch = subprocess.run(
            [sys.executable, "-m", "workbench", "watch", str(run.folder)], capture_output=True, text=True
        )
        frame = run.runs()
        events = [row["event"] for path in run.folder.glob("runs/*/events.jsonl") for row in read_jsonl(path)]
        result = {
            "environment": environment(),
            "arms": options.arms,
            "runs planned": run.total,
            "runs": frame.height,
            "statuses": dict(frame["status"].value_counts().iter_rows()),
            **counts,
            "kills": sum(counts[name] for name in ("workers killed", "trials killed", "checkpoints truncated")),
            "resumed from a checkpoint": events.count("resumed"),
            "finished more than once": events.count("done") - frame.height,
            "damaged checkpoints detected": events.count("damaged_checkpoint"),
            "watch reported the end": watch.returncode == 0,
            "same verdict, word for word": verdict_text(run) == verdict_text(undisturbed),
            "seconds undisturbed": round(undisturbed_seconds),
            "seconds disturbed": round(time.monotonic() - start),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=1))
        print(run.verdict())


if __name__ == "__main__":
    main()
