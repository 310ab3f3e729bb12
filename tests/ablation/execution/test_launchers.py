"""Launchers: local processes, submitit's stand-in for Slurm for real, a made-up Ray cluster, a plug-in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.launchers.base import JobState
from workbench.ablation.execution.launchers.local import Local
from workbench.ablation.execution.launchers.ray import Ray
from workbench.ablation.execution.launchers.slurm import Slurm
from workbench.ablation.execution.roster import JOB
from workbench.ablation.folder import AblationFolder
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.launch import launchers
from workbench.config import ConfigError
from workbench.distribution import install_extra
from workbench.registry import plug_in

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]

WAIT = 500
FEW: dict[str, Any] = {
    "arms": {"full": {}},
    "tuning": {"trials": 1, "sampler": "random"},
    "confirmation": {"seeds": [0]},
}


@pytest.fixture
def create(ablation: Callable[..., Ablation]) -> Callable[..., AblationRun]:
    def make(**launch: Any) -> AblationRun:
        return ablation(**FEW, launch={"workers": 2, **launch}).create()

    return make


# -- local processes ---------------------------------------------------------------------------------------------------


def local_job(pid: int) -> str:
    return f"{os.uname().nodename}-{pid}"


def test_a_local_job_runs_until_its_process_ends(tmp_path: Path) -> None:
    local, folder = Local(Local.Config()), AblationFolder(tmp_path)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "input()"], os.environ)
    assert local.state(folder, local_job(pid)) == JobState.RUNNING
    local.cancel(folder, [local_job(pid)])
    while local.state(folder, local_job(pid)) == JobState.RUNNING:
        pass
    assert local.state(folder, local_job(pid)) == JobState.ENDED


def test_a_process_of_another_program_is_not_taken_for_a_worker(tmp_path: Path) -> None:
    assert Local(Local.Config()).state(AblationFolder(tmp_path), local_job(os.getppid())) == JobState.UNKNOWN


def test_a_process_of_another_machine_is_unknown(tmp_path: Path) -> None:
    assert Local(Local.Config()).state(AblationFolder(tmp_path), "elsewhere-1") == JobState.UNKNOWN


# -- Slurm -------------------------------------------------------------------------------------------------------------


def test_workers_run_as_jobs_of_submitit(create: Callable[..., AblationRun]) -> None:
    pytest.importorskip("submitit")
    run = create(launcher={"kind": "slurm", "cluster": "local", "parameters": {"timeout_min": 10}})
    assert len(run.start_workers(1)) == 1
    assert run.waiting_workers() or run.workers() or run.finished  # from the moment at which the job is submitted
    assert run.wait(WAIT)
    assert run.runs()["status"].to_list() == ["done", "done"]


def test_parameters_that_submitit_rejects_are_named(create: Callable[..., AblationRun]) -> None:
    pytest.importorskip("submitit")
    run = create(launcher={"kind": "slurm", "cluster": "local", "parameters": {"nonsense": 1}})
    with pytest.raises(ConfigError, match=r"launch.launcher: got .*nonsense"):
        run.start_workers(1)


def test_a_path_that_slurm_would_change_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=r"launch.launcher: got .*50%25"):
        Slurm(Slurm.Config(cluster="local")).submit(AblationFolder(tmp_path / "50%25"), ["name"])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=re.escape(install_extra("slurm"))):
        Slurm(Slurm.Config())


# -- Ray ---------------------------------------------------------------------------------------------------------------


class Client:
    """What the Ray launcher uses of ``ray.job_submission.JobSubmissionClient``."""

    submitted: list[dict[str, Any]]
    status = "PENDING"

    def __init__(self, address: str):
        self.submitted = []
        if address != "http://head:8265":
            raise ConnectionError(f"Failed to connect to Ray at address: {address}.")

    def submit_job(self, *, entrypoint: str, entrypoint_num_gpus: float = 0) -> str:
        self.submitted.append({"entrypoint": entrypoint, "gpus": entrypoint_num_gpus})
        return f"job{len(self.submitted)}"

    def get_job_status(self, job: str) -> Any:
        return types.SimpleNamespace(value=self.status)

    def stop_job(self, job: str) -> bool:
        raise RuntimeError("it has ended")


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("ray.job_submission")
    module.JobSubmissionClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)


def ray_cluster(**parameters: Any) -> Ray:
    return Ray(Ray.Config(address="http://head:8265", parameters={"entrypoint_num_gpus": 0.5, **parameters}))


def test_ray_runs_the_worker_command_on_a_share_of_a_gpu(fake_ray: None, tmp_path: Path) -> None:
    ray = ray_cluster()
    assert ray.submit(AblationFolder(tmp_path / "a b"), ["one", "two"]) == ["job1", "job2"]
    job = ray.client.submitted[0]
    assert job["gpus"] == 0.5
    assert job["entrypoint"].startswith(f"{JOB}=one ")
    assert job["entrypoint"].endswith(f"worker '{tmp_path}/a b'")


@pytest.mark.parametrize(
    ("status", "state"),
    [("PENDING", "queued"), ("RUNNING", "running"), ("SUCCEEDED", "ended"), ("FAILED", "ended"), ("STOPPED", "ended")],
)
def test_states_of_ray_jobs(fake_ray: None, tmp_path: Path, status: str, state: str) -> None:
    ray = ray_cluster()
    ray.client.status = status
    assert ray.state(AblationFolder(tmp_path), "job1") == state


def test_cancelling_a_ray_job_that_has_ended_is_no_error(fake_ray: None, tmp_path: Path) -> None:
    ray_cluster().cancel(AblationFolder(tmp_path), ["job1"])


def test_a_ray_cluster_that_does_not_answer_is_reported(fake_ray: None) -> None:
    with pytest.raises(ConfigError, match=r"launch.launcher: got 'Failed to connect"):
        Ray(Ray.Config())


def test_parameters_that_ray_rejects_are_named(fake_ray: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch.launcher: got .*entrypoint_memory"):
        ray_cluster(entrypoint_memory=1).submit(AblationFolder(tmp_path), ["one"])


# -- a plug-in ---------------------------------------------------------------------------------------------------------

PLUGIN = '''
"""Workers as threads of this process's shell: a launcher in one file."""
import subprocess, sys
from typing import Literal
from workbench.ablation.execution.launchers.base import JobState, Launcher
from workbench.ablation.execution.roster import JOB
from workbench.ablation.spec.launch import LauncherConfig, launchers


@launchers.register
class Shell(Launcher):
    """Workers started by a shell."""

    class Config(LauncherConfig):
        kind: Literal["shell"] = "shell"
        nice: int = 0
        """Priority."""

        @property
        def one_machine(self):
            return True

    def submit(self, folder, names):
        command = f"nice -n {self.config.nice} {sys.executable} -m workbench worker {folder.path}"
        self.processes = [subprocess.Popen(f"{JOB}={name} exec {command}", shell=True) for name in names]
        return [str(process.pid) for process in self.processes]

    def state(self, folder, job):
        running = [p for p in self.processes if str(p.pid) == job and p.poll() is None]
        return JobState.RUNNING if running else JobState.ENDED

    def cancel(self, folder, jobs):
        for process in self.processes:
            process.terminate()
'''


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = tmp_path / "shell_launcher.py"
    path.write_text(PLUGIN)
    monkeypatch.setenv("WORKBENCH_PLUGINS", "")
    plug_in(path)
    yield "shell"
    launchers.unregister("shell")


def test_a_launcher_is_one_file(shell: str, create: Callable[..., AblationRun]) -> None:
    run = create(launcher={"kind": shell, "nice": 1})
    run.start_workers(1)
    assert run.wait(WAIT)
    assert run.runs()["status"].to_list() == ["done", "done"]


def test_how_the_work_is_carried_out_may_change_between_launches(create: Callable[..., AblationRun]) -> None:
    first, second = create(), create(workers=5, heartbeat=3)
    assert second.record.workers == 5
    assert second.record.config.launch.heartbeat == 3
    assert second.identity == first.identity


def test_the_command_line_lists_launchers() -> None:
    call = [sys.executable, "-m", "workbench", "variants"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert "slurm" in done.stdout
