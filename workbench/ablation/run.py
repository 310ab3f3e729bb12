"""A launched ablation, seen from outside: reads its folder, from any process, at any time. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from workbench.ablation.spec.registration import quote, standing
from workbench.config import ConfigError, nearest
from workbench.files import locked, read_json, write_json
from workbench.metric import Metric
from workbench.results.tables import RUN_SCHEMA, Line, curves, diagnostics, lines, runs
from workbench.status import ENDED, Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.execution.launchers import Launcher
    from workbench.ablation.verdict.judge import Verdict


JOB = "WORKBENCH_JOB"
"""Environment variable with the name of the job that a worker on Slurm or Ray is."""
ANSWERED = 180.0
"""Seconds after which an engine knows of every job that it was given."""


class AblationRun:
    """The folder of a launched ablation: tables, verdict, workers.

    Args:
        folder: ``results/<name>``.

    Raises:
        ConfigError: when there is no ablation in that folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        if not (self.folder / "ablation.json").is_file():
            near = [path.parent.name for path in self.folder.parent.glob("*/ablation.json")]
            raise ConfigError.at(
                str(folder),
                got="no ablation",
                expected="a folder that `workbench run` made",
                do=nearest(self.folder.name, near),
            )
        self.about = read_json(self.folder / "ablation.json")
        if not self.about:
            raise ConfigError.at(
                str(self.folder / "ablation.json"),
                got="a damaged file",
                expected="what a launch wrote",
                do="`workbench run` with the ablation's file writes it anew; no run is lost.",
            )
        self._starting: list[subprocess.Popen[bytes]] = []

    def __repr__(self) -> str:
        counts = dict(self.runs()["status"].value_counts().iter_rows())
        state = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing started"
        return f"AblationRun({self.name!r}: {state}; {self.total} runs planned)"

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def question(self) -> str:
        return self.about["config"]["question"]

    @property
    def arms(self) -> list[str]:
        """Arm names, the baseline first."""
        return self.about["order"]

    @property
    def baseline(self) -> str:
        return self.arms[0]

    @property
    def metric(self) -> Metric:
        """What arms are judged by."""
        return Metric(**self.about["metric"])

    @property
    def seeds(self) -> list[int]:
        return self.about["config"]["confirmation"]["seeds"]

    @property
    def results(self) -> Path:
        """The folder of results that holds this ablation and others."""
        return self.folder.parent

    launched = True
    """Its folder exists only since it was launched."""

    @property
    def identity(self) -> str:
        """Hash of the ablation's configuration."""
        return self.about.get("identity", "")

    @property
    def tuning_trials(self) -> int:
        """Tuning trials planned for each arm."""
        return self.about["config"]["tuning"]["trials"]

    @property
    def total(self) -> int:
        """Training runs planned, tuning and confirmation."""
        return len(self.arms) * (self.tuning_trials + len(self.seeds))

    @property
    def alpha(self) -> float:
        """Significance level of the verdict."""
        return self.about["config"]["alpha"]

    @property
    def allow_mismatch(self) -> str | None:
        """Why arms may differ in what the budget matches, None where they may not."""
        return self.about["config"]["budget"].get("allow_mismatch")

    @property
    def views(self) -> dict[str, list[str]]:
        """Dashboard panels that the data source asks for -> columns of report.parquet that they draw."""
        return self.about.get("views", {})

    @property
    def data_cards(self) -> dict[str, Any]:
        """Arm -> what its data splits hold."""
        return self.about.get("data_cards", {})

    def study_name(self, arm: str, stage: str) -> str:
        """Name of an arm's study: ``arm/stage``, in a shared database behind the ablation's name and a key of its launch."""
        key = self.about.get("storage_key")
        return "/".join((*((self.name, key) if key else ()), arm, stage))

    # -- what has happened ---------------------------------------------------------------------------------------

    def runs(self) -> pl.DataFrame:
        """One row a training run (columns: workbench.results.tables.RUN_SCHEMA)."""
        if self.archived:
            kept = pl.read_csv(self.folder / "runs.csv", schema_overrides=RUN_SCHEMA)
            missing = [pl.lit(None, kind).alias(name) for name, kind in RUN_SCHEMA.items() if name not in kept.columns]
            chosen = [entry.get("run") for entry in self.selection().values()]
            frame = kept.with_columns(missing).with_columns(
                selected=pl.col("run").is_in(chosen), folder=pl.lit(str(self.folder))
            )
            return frame.select(list(RUN_SCHEMA))
        return runs(self.folder)

    def curves(self) -> pl.DataFrame:
        """Every recorded point (columns: workbench.results.tables.CURVE_SCHEMA)."""
        return curves(self.folder)

    def lines(self) -> list[Line]:
        """Every run with its recorded points, without the copying of :meth:`curves`."""
        return lines(self.folder)

    def diagnostics(self) -> pl.DataFrame:
        """What layers said about themselves (columns: workbench.results.tables.DIAGNOSTICS_SCHEMA)."""
        return diagnostics(self.folder)

    def reports(self) -> Iterator[tuple[str, int, pl.DataFrame]]:
        """Arm, seed and what was measured on every report document, of each confirmation run that is done."""
        if self.archived:
            for (arm, seed), frame in (
                pl.read_parquet(self.folder / "report.parquet")
                .partition_by("arm", "seed", as_dict=True, include_key=False, maintain_order=True)
                .items()
            ):
                yield arm, seed, frame
            return
        done = self.runs().filter((pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE))
        for row in done.iter_rows(named=True):
            path = Path(row["folder"]) / "report.parquet"
            if path.exists():
                yield row["arm"], row["seed"], pl.read_parquet(path)

    def cost(self) -> pl.DataFrame:
        """The cost card as it was before launch, one row an arm."""
        return pl.DataFrame(self.about["cost"], infer_schema_length=None)

    def selection(self) -> dict[str, Any]:
        """Arm -> its chosen tuning run."""
        return read_json(self.folder / "selection.json")

    def provenance(self) -> dict[str, str]:
        """Where the numbers come from."""
        return dict(self.about["provenance"])

    def deviations(self) -> list[dict[str, Any]]:
        """What was changed after launch in how the runs are read: ``what``, ``when``, ``why``."""
        if self.archived and "protocol" not in self.about["config"]:  # kept from before there was a registration
            return []
        return standing(self.about)

    @property
    def exists(self) -> bool:
        """Whether its folder is still there."""
        return (self.folder / "ablation.json").exists()

    @property
    def archived(self) -> bool:
        """Whether the folder is what `workbench archive` keeps of an ablation: tables and the verdict, no runs."""
        return (self.folder / "verdict.json").exists() and not (self.folder / "runs").exists()

    @property
    def finished(self) -> bool:
        """Whether every planned run has ended (done or failed)."""
        return self.archived or (self.folder / "finished.json").exists()

    def failures(self) -> dict[str, str]:
        """Arms that could not be confirmed because every tuning trial failed -> why."""
        return {arm: chosen["failed"] for arm, chosen in self.selection().items() if "failed" in chosen}

    def verdict(self) -> Verdict | None:
        """The verdict, or None while confirmation runs are missing. Every arm on the same seeds, failures included."""
        from workbench.ablation.verdict.judge import ArmMeasurements, Verdict, judge

        if self.archived:
            held = Verdict.from_plain(read_json(self.folder / "verdict.json"))
            return replace(held, exploratory=self._exploratory(), declared=quote(self.about))
        finished = self.finished  # asked before the runs are read: one that ends in between is not missing
        confirmations = self.runs().filter(pl.col("stage") == Stage.CONFIRMATION)
        unconfirmed = self.failures()
        metric = self.metric
        sizes: dict[str, Any] = {}
        pending: dict[str, tuple[dict[int, Any], dict[int, str]]] = {}
        for arm in self.arms:
            amounts: dict[int, Any] = {}
            failed = {seed: unconfirmed[arm] for seed in self.seeds} if arm in unconfirmed else {}
            for row in confirmations.filter(pl.col("arm") == arm).iter_rows(named=True):
                if row["status"] == Status.DONE:
                    frame = pl.read_parquet(Path(row["folder"]) / "report.parquet")
                    amounts[row["seed"]] = metric.scale * frame[metric.numerator].to_numpy()
                    sizes[arm] = frame[metric.denominator].to_numpy()
                elif row["status"] in ENDED or finished:
                    failed[row["seed"]] = row["reason"] or row["status"]
            if not finished and len(amounts) + len(failed) < len(self.seeds):
                return None  # a finished ablation has no result for a seed whose run never began
            pending[arm] = amounts, failed
        import numpy as np

        some = next(iter(sizes.values()), np.ones(1))  # of an arm without a run that was done they do not matter
        measured = {
            arm: ArmMeasurements(arm, amounts, sizes.get(arm, some), failed)
            for arm, (amounts, failed) in pending.items()
        }
        config = self.about["config"]
        return judge(
            measured[self.baseline],
            [measured[arm] for arm in self.arms[1:]],
            alpha=config["alpha"],
            margin=config["margin"],
            seeds=self.seeds,
            exploratory=self._exploratory(),
            unit=metric.unit,
            effect=config.get("protocol", {}).get("effect"),
            declared=quote(self.about),
        )

    def _exploratory(self) -> str | None:
        """Why the verdict is no confirmation, where it is none."""
        config = self.about["config"]
        reasons = [config["exploratory"], config["budget"]["allow_mismatch"]]
        if config["confirmation"].get("split", "report") != "report":
            reasons.append("measured on the selection split")
        reasons += [f"deviation: {deviation['why']}" for deviation in self.deviations()]
        return "; ".join(reason for reason in reasons if reason) or None

    # -- what is happening ---------------------------------------------------------------------------------------

    def workers(self) -> list[int]:
        """Process numbers of the workers that are alive, those that this process is just starting included. Workers on two
        machines may have the same number, which is then told twice."""
        starting = {_worker(process.pid) for process in self._starting if process.poll() is None}
        return sorted(int(name.rpartition("-")[2]) for name in self._enlisted() | starting)

    def waiting_workers(self) -> list[str]:
        """Jobs of workers on Slurm or Ray that are on their way: queued, or begun without being at work yet."""
        jobs = self._jobs()
        begun = {name for name in jobs if self._begun(name).exists()}
        return [job["id"] for name, job in jobs.items() if job["state"] == "queued" or name not in begun]

    def _jobs(self) -> dict[str, dict[str, Any]]:
        """Name -> ``id``, ``at`` (when it was asked for) and ``state`` of jobs that may still run."""
        held = read_json(self.folder / "workers" / "jobs.json").get("asked", {})
        engine = self._launcher() if held else None
        if not engine:
            return {}
        told = {name: {**job, "state": engine.state(self.folder, job["id"])} for name, job in held.items()}
        return {
            name: job
            for name, job in told.items()
            if job["state"] in ("queued", "running")
            or (job["state"] == "unknown" and abs(time.time() - job["at"]) < ANSWERED)
        }

    def forget_begun(self, job: str) -> None:
        """Say of a job that it goes back into its engine's queue: its worker is on its way again."""
        self._begun(job).unlink(missing_ok=True)

    def _begun(self, job: str) -> Path:
        """The mark that the worker of a job leaves when it is at work."""
        return self.folder / "workers" / f"{job}.begun"

    def _launcher(self) -> Launcher | None:
        from workbench.ablation.execution.launchers import launcher

        return launcher(self.about["config"].get("launch", {}))

    def _enlisted(self) -> set[str]:
        alive = set()
        for path in self.folder.glob("workers/*.json"):
            if not path.with_suffix(".lock").exists():
                continue
            with locked(path.with_suffix(".lock"), patience=0) as free:
                if not free:
                    alive.add(path.stem)
        return alive

    @contextlib.contextmanager
    def enlisted(self) -> Iterator[None]:
        """Count among :meth:`workers` while inside; a process that dies counts no longer, however it dies."""
        me = self._me()
        me.parent.mkdir(exist_ok=True)
        with locked(me.with_suffix(".lock")):
            me.with_suffix(".stop").unlink(missing_ok=True)  # of an earlier process with this number
            write_json(me, {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()})
            if job := os.environ.get(JOB):
                self._begun(job).touch()
            try:
                yield
            finally:
                for suffix in (".json", ".stop", ".lock"):
                    me.with_suffix(suffix).unlink(missing_ok=True)

    def _me(self) -> Path:
        return self.folder / "workers" / f"{_worker(os.getpid())}.json"

    def is_stopping(self) -> bool:
        """Whether :meth:`stop` has asked the worker in this process to end."""
        return self._me().with_suffix(".stop").exists()

    def work(self) -> None:
        """Be a worker: take trials until none is left."""
        with self.enlisted():  # at once: the import takes seconds
            from workbench.ablation.execution.worker import Worker

            Worker(self).work()

    def start_workers(self, count: int | None = None) -> list[int]:
        """Start worker processes that live on when this process ends. Returns their process numbers.

        Whoever calls this at the same time waits, so that together no more are started than one call would. Workers on Slurm or
        Ray are asked for, and begin when the engine places them.

        Args:
            count: how many; default as the ablation's ``launch.workers`` says. Workers already there count.
        """
        wanted = self.about["workers"] if count is None else count
        place = self.folder / "workers"
        place.mkdir(exist_ok=True)
        with locked(place / "start.lock"):
            engine = self._launcher()
            if engine:
                jobs = self._jobs()
                missing = max(0, wanted - len(self.workers()) - len(self.waiting_workers()))
                names = [secrets.token_hex(4) for _ in range(missing)]
                given = zip(names, engine.submit(self.folder, names))
                jobs |= {name: {"id": job, "at": time.time()} for name, job in given}
                write_json(place / "jobs.json", {"asked": jobs})
                return []
            for _ in range(max(0, wanted - len(self.workers()))):
                with open(place / "log.txt", "a") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "workbench", "worker", str(self.folder)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                self._starting.append(process)
                _children.append(process)
            while any(
                process.poll() is None and _worker(process.pid) not in self._enlisted() for process in self._starting
            ):
                time.sleep(0.05)
        started, self._starting = self._starting, []
        return [process.pid for process in started]

    def stop(self, wait: float = 60.0) -> list[int]:
        """Ask every worker to stop, wherever it runs: running trials write a checkpoint and can go on later. One that does
        not end within ten minutes is killed, and goes on from its last checkpoint.

        Args:
            wait: seconds to wait for them.

        Returns:
            process numbers of the workers that have not ended yet.
        """
        if waiting := self.waiting_workers():
            engine = self._launcher()
            assert engine
            engine.cancel(self.folder, waiting)
        for name in self._enlisted():
            (self.folder / "workers" / f"{name}.stop").touch()
        until = time.monotonic() + wait
        while (left := self.workers()) and time.monotonic() < until:
            time.sleep(0.1)
        return left

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything has ended or no worker is left. Returns whether the ablation is finished."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self.finished and (self.workers() or self.waiting_workers()) and time.monotonic() < until:
            _reap()
            time.sleep(0.2)
        return self.finished


def _worker(pid: int) -> str:
    """What a worker on this machine is known by: containers have the same process numbers."""
    return f"{socket.gethostname().replace('.', '_')}-{pid}"


_children: list[subprocess.Popen[bytes]] = []


def _reap() -> None:
    """Collect ended workers that this process started, so that none stays a zombie."""
    _children[:] = [process for process in _children if process.poll() is None]
