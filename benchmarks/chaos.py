"""A repeatedly killed ablation must end like an undisturbed one: the same verdict, metrics, documents and weights.

    python benchmarks/chaos.py

Twelve arms on a CPU, on two cores at most, are run undisturbed, and then three times more:

kills        Two workers on SQLite, launched from a notebook kernel that is then killed. Trials, workers, launches and
             everything at once are killed (SIGKILL) at points drawn beforehand, uniformly over the first nine tenths of
             the work. Besides, every process is killed at some of its own file operations, by a hook that Python runs
             before each of them (``sitecustomize`` on the path; the workbench knows nothing of it). In between, newest
             checkpoints of trials (which are then killed) and metrics are truncated, and the ablation is stopped.
sqlite       Eight workers on SQLite; trials and workers are killed.
postgresql   Eight workers on PostgreSQL, whose server is killed and started again three times; trials and workers are
             killed as well.

Whenever a worker is missing, the same `workbench run` is started from a shell, twice at once; also at the end, if a
trial was killed too often. `workbench watch` must report the end. Then every run is compared with the undisturbed one:
each line of metrics (without what the clock decides), each evaluation, each diagnostic, the measured documents byte for
byte, and the last checkpoint bit for bit; and the verdict word for word.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
from workbench.results import RunFolder
from workbench.training.checkpoint import checkpoints_in, load_checkpoint, step_of

ROOT = Path(__file__).parents[1]
WORKERS = 2
CLOCK = ("seconds", "tokens_per_second", "flops_per_second", "memory_bytes")
"""Fields of metrics and results that the clock decides."""
HOOK = """
import os, random, signal, sys
folder, budget, chance = os.environ["CHAOS_FOLDER"], os.environ["CHAOS_BUDGET"], float(os.environ["CHAOS_CHANCE"])
generator = random.Random()
os.register_at_fork(after_in_child=generator.seed)
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

def hook(event, arguments):
    if event == "open":
        if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
    elif event not in CHANGES:
        return
    path = arguments[0]
    path = path.__fspath__() if hasattr(path, "__fspath__") else path
    if isinstance(path, str) and path.startswith(folder) and generator.random() < chance:
        for token in sorted(os.listdir(budget)):
            try:
                os.rename(f"{budget}/{token}", f"{budget}-used/{token}-{event}")
            except OSError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""
"""A ``sitecustomize`` module that kills its process before a file operation, while there are tokens in a folder."""


def fields(corpus: str, options: argparse.Namespace, **launch: Any) -> dict[str, Any]:
    """The ablation; ``launch`` changes how the work is carried out, and no result."""
    return {
        "name": "chaos",
        "base": {
            "model": {"width": 32, "depth": 2, "vocabulary": 300},
            "data": {"corpus": {"kind": "files", "path": corpus}, "evaluation_documents": 3, "evaluation_bytes": 200},
            "training": {
                "tokens": options.steps * 64,
                "batch_size": 2,
                "context": 32,
                "evaluations": 2,
                "log_every": 5,
                "checkpoint_every": 25,
            },
        },
        "arms": {
            "full": {},
            **{
                f"w{w}": {"model.pattern": "sliding", "model.mixers.sliding.window": w}
                for w in range(2, options.arms + 1)
            },
        },
        "tuning": {
            "trials": 1,
            "sampler": "qmc",
            "space": {"training.learning_rate": {"low": 2e-3, "high": 8e-3, "log": True}},
        },
        "confirmation": {"seeds": list(range(options.seeds))},
        "launch": {"workers": WORKERS, "heartbeat": 1, "measure": False, **launch},
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
    """Process numbers of the trials at work."""
    states = [read_json(path) for path in run.folder.glob("runs/*/status.json")]
    return [state["pid"] for state in states if state.get("status") == "running" and "pid" in state]


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
    """Kill a running trial whose last line is newer than its checkpoints, and tear that line as a kill may."""
    for path in run.folder.glob("runs/*/metrics.jsonl"):
        state, lines = read_json(path.with_name("status.json")), read_jsonl(path)
        saved = [step_of(checkpoint) for checkpoint in checkpoints_in(path.with_name("checkpoint"))]
        if state.get("status") != "running" or not lines or lines[-1]["step"] <= max(saved, default=0):
            continue
        with contextlib.suppress(OSError):
            os.kill(state["pid"], signal.SIGKILL)
            lines, size = read_jsonl(path), path.stat().st_size
            saved = [step_of(checkpoint) for checkpoint in checkpoints_in(path.with_name("checkpoint"))]
            if lines[-1]["step"] > max(saved, default=0):
                os.truncate(path, size - 7)
                return True
    return False


class Postgres:
    """A PostgreSQL server of this machine, in a folder of its own."""

    def __init__(self, folder: Path):
        self.data, self.log = folder / "data", folder / "log"
        self.as_user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if self.as_user:  # it refuses to run as root
            shutil.chown(folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        call = [_binary("initdb"), "-D", str(self.data), "-A", "trust", "-U", "workbench"]
        subprocess.run(call, check=True, cwd=folder, stdout=subprocess.DEVNULL, **self.as_user)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://workbench@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, also after it was killed, and wait until it answers."""
        deadline = time.monotonic() + 120
        self._spawn()
        while time.monotonic() < deadline:
            if self.process.poll() is not None:  # processes of the one that was killed are still there
                self._spawn()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def _spawn(self) -> None:
        call = [_binary("postgres"), "-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1"]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*call, "-k", str(self.data.parent)], stdout=log, stderr=log, cwd=self.data.parent, **self.as_user
            )

    def kill_and_restart(self) -> bool:
        """Kill it with all its connections, leave it dead for two seconds, start it again."""
        self.process.kill()
        self.process.wait()
        time.sleep(2)
        self.start()
        return True

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # it does not wait for its clients
        self.process.wait(60)


def _binary(name: str) -> str:
    """A program of PostgreSQL; Debian keeps them out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    path = str(found[-1]) if found else shutil.which(name)
    assert path, f"{name} is not installed"
    return path


class Attack:
    """Disturbs one ablation until every run is done.

    Args:
        run: the ablation.
        file: its configuration.
        plan: disturbance -> how often.
        steps: of a run.
        generator: draws when each happens, and to whom.
        variables: environment of the launches.
        server: the database, if it is to be killed.
    """

    def __init__(
        self,
        run: AblationRun,
        file: Path,
        plan: dict[str, int],
        steps: int,
        generator: random.Random,
        variables: dict[str, str] | None = None,
        server: Postgres | None = None,
    ):
        self.run, self.steps, self.generator, self.server = run, steps, generator, server
        self.command = [sys.executable, "-m", "workbench", "run", str(file), "--results", str(run.folder.parent)]
        self.environment = {**os.environ, **(variables or {})}
        self.launching: list[subprocess.Popen[bytes]] = []
        self.counts = dict.fromkeys(plan, 0) | {"launches": 1}
        actions = [name for name, number in plan.items() for _ in range(number)]
        generator.shuffle(actions)
        self.plan = list(zip(sorted(generator.uniform(0, 0.9) for _ in actions), actions))
        self.deeds: dict[str, Callable[[], bool]] = {
            "trials killed": lambda: kill(running_trials(run), generator),
            "workers killed": lambda: kill(run.workers(), generator),
            "launches killed": self._kill_a_launch,
            "everything killed": self._kill_everything,
            "checkpoints truncated": lambda: truncate_checkpoint(run, generator),
            "metrics truncated": lambda: truncate_metrics(run),
            "stops": lambda: run.stop(120) == [],
            "servers killed": lambda: server is not None and server.kill_and_restart(),
        }

    def until_done(self) -> dict[str, int]:
        """How often each disturbance happened."""
        while True:
            time.sleep(0.2)
            if self.run.finished and not self._is_launching():
                if set(self.run.runs()["status"]) == {"done"}:
                    break
                self._launch().wait()  # a trial was killed too often
            if self.plan and share_done(self.run, self.steps) >= self.plan[0][0] and self.deeds[self.plan[0][1]]():
                self.counts[self.plan.pop(0)[1]] += 1
            if not self.run.finished and len(self.run.workers()) < 2 and not self._is_launching():
                self._launch(), self._launch()
        return self.counts

    def _launch(self) -> subprocess.Popen[bytes]:
        with open(self.run.folder.parent / "launches.log", "a") as log:
            process = subprocess.Popen([*self.command, "--detach"], stdout=log, stderr=log, env=self.environment)
        self.launching.append(process)
        self.counts["launches"] += 1
        return process

    def _is_launching(self) -> bool:
        return any(process.poll() is None for process in self.launching)

    def _kill_a_launch(self) -> bool:
        process = self._launch()
        time.sleep(self.generator.uniform(0.2, 8))
        process.kill()
        process.wait()
        return True

    def _kill_everything(self) -> bool:
        for pid in [*self.run.workers(), *running_trials(self.run)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.launching:
            process.kill()
        return True


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors bit for bit, NaN equal to itself."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "numpy"):
        return bool(one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes())
    return bool(one == other or (one != one and other != other))


def content(folder: Path) -> dict[str, Any]:
    """What a run leaves, but the clock and its events."""
    run = RunFolder(folder)
    checkpoints = checkpoints_in(folder / "checkpoint")
    state = load_checkpoint(checkpoints[-1])
    report = folder / "report.parquet"
    return {
        "status": run.status()["status"],
        "result": {name: value for name, value in run.result().items() if name not in CLOCK},
        "metrics": [{name: value for name, value in row.items() if name not in CLOCK} for row in run.metrics()],
        "evaluations": run.evaluations(),
        "diagnostics": run.diagnostics(),
        "report": report.read_bytes() if report.exists() else b"",
        "last checkpoint": checkpoints[-1].name,  # a stop leaves one in between, in the place of an older one
        "state": {name: value for name, value in state.items() if name != "seconds"},
    }


def differences(run: AblationRun, control: AblationRun) -> list[str]:
    """What differs between two ablations: runs and the part of them, the verdict."""
    names, expected = ({path.name for path in (each.folder / "runs").iterdir()} for each in (run, control))
    found = [f"run {name} is in one of them only" for name in sorted(names ^ expected)]
    for name in sorted(names & expected):
        one, other = (content(each.folder / "runs" / name) for each in (run, control))
        found += [f"{name}: {part}" for part in one if not same(one[part], other[part])]
    if verdict_text(run) != verdict_text(control):
        found.append("the verdict")
    return found


def verdict_text(run: AblationRun) -> str:
    """The verdict, without the time of its declaration."""
    verdict = run.verdict()
    assert verdict is not None
    return str(replace(verdict, declared=()))


@contextlib.contextmanager
def killing_hook(folder: Path, results: Path, kills: int, chance: float) -> Iterator[dict[str, str]]:
    """Environment variables that kill processes at their own file operations below ``results``, ``kills`` in all."""
    for name in ("site", "budget", "budget-used"):
        (folder / name).mkdir()
    (folder / "site" / "sitecustomize.py").write_text(HOOK)
    for number in range(kills):
        (folder / "budget" / f"{number:03d}").touch()
    yield {
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)]),
        "CHAOS_FOLDER": str(results),
        "CHAOS_BUDGET": str(folder / "budget"),
        "CHAOS_CHANCE": str(chance),
    }


def disturbed(
    part: str, scratch: Path, corpus: Path, options: argparse.Namespace, control: AblationRun
) -> dict[str, Any]:
    """Run one part; what happened and what differs."""
    start, generator = time.monotonic(), random.Random(f"{options.seed}/{part}")
    folder = scratch / part
    folder.mkdir()
    results, file, kills = folder / "results", folder / "chaos.yaml", options.kills
    results.mkdir()
    with contextlib.ExitStack() as stack:
        server, variables = None, {"PYTHONPATH": str(ROOT)}
        launch: dict[str, Any] = {}
        if part == "kills":
            plan = {
                "trials killed": kills * 2 // 5,
                "workers killed": kills * 2 // 5,
                "launches killed": kills // 10,
                "everything killed": kills - 2 * (kills * 2 // 5) - kills // 10,
                "checkpoints truncated": 3,
                "metrics truncated": 3,
                "stops": 2,
            }
            chance = 2 * options.operation_kills / (options.arms * (1 + options.seeds) * options.steps)
            variables = stack.enter_context(killing_hook(folder, results, options.operation_kills, chance))
        else:
            plan = {"trials killed": kills // 4, "workers killed": kills // 4}
            if part == "postgresql":
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pg", dir="/tmp")))
                server = Postgres(place)
                stack.callback(server.stop)
                plan["servers killed"], launch["storage"] = 3, server.url
        write_json(file, fields(str(corpus), options, **launch))  # JSON is YAML
        if part == "kills":
            launch_from_killed_notebook(file, results)
            run = AblationRun(results / "chaos")
            assert run.workers(), "the workers died with the notebook"
        else:
            run = Ablation.load(file, results=results).create()
            run.start_workers(8)
        counts = Attack(run, file, plan, options.steps, generator, variables, server).until_done()
        watch = [sys.executable, "-m", "workbench", "watch", str(run.folder)]
        watched = subprocess.run(watch, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        logs = [run.folder / "workers" / "log.txt", results / "launches.log", *run.folder.glob("runs/*/log.txt")]
        events = [row["event"] for path in run.folder.glob("runs/*/events.jsonl") for row in read_jsonl(path)]
        if (folder / "budget-used").exists():
            counts["killed at a file operation"] = len(list((folder / "budget-used").iterdir()))
        return {
            **counts,
            "kills": sum(number for name, number in counts.items() if "killed" in name or "truncated" in name),
            "runs": run.runs().height,
            "resumed from a checkpoint": events.count("resumed"),
            "finished more than once": max(0, events.count("done") - run.runs().height),
            "damaged checkpoints detected": events.count("damaged_checkpoint"),
            "tracebacks in logs": sum(path.read_text().count("Traceback (most") for path in logs if path.exists()),
            "watch reported the end": watched.returncode == 0,
            "differences": differences(run, control),
            "seconds": round(time.monotonic() - start),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--kills", type=int, default=48, help="of processes, in the first part; half of it in the others"
    )
    parser.add_argument("--operation-kills", type=int, default=20, help="of processes at their own file operations")
    parser.add_argument("--arms", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", default=["kills", "sqlite", "postgresql"])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "chaos.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # a trial has one thread, however many workers
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        corpus = write_corpus(scratch / "corpus")
        write_json(scratch / "chaos.yaml", fields(str(corpus), options))
        start = time.monotonic()
        control = Ablation.load(scratch / "chaos.yaml", results=scratch / "control").launch()
        assert control.wait()
        result: dict[str, Any] = {
            "environment": environment(),
            "date": time.strftime("%Y-%m-%d"),
            "arms": options.arms,
            "runs": control.runs().height,
            "seconds undisturbed": round(time.monotonic() - start),
            "parts": {},
        }
        for part in options.parts:
            result["parts"][part] = disturbed(part, scratch, corpus, options, control)
            print(json.dumps({part: result["parts"][part]}, indent=1), flush=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(control.verdict())
    found = [difference for part in result["parts"].values() for difference in part["differences"]]
    sys.exit(f"{len(found)} differences" if found else 0)


if __name__ == "__main__":
    main()
