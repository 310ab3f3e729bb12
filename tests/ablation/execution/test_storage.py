"""Studies in a database that many workers reach: SQLite in the folder, a PostgreSQL server by its address."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import ablation_fields
from optuna.trial import TrialState

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.storage import open_storage, quarantine_corrupt_storage
from workbench.ablation.run import AblationRun
from workbench.config import ConfigError

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]


def binary(name: str) -> str | None:
    """A program of PostgreSQL; Debian keeps them out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A separate PostgreSQL server on this machine, and the address of its database."""
    pytest.importorskip("psycopg")
    initdb, server = binary("initdb"), binary("postgres")
    if not initdb or not server:
        pytest.skip("no PostgreSQL server is installed")
    user: dict[str, Any] = (
        {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    )  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        if user:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        subprocess.run(
            [initdb, "-D", data, "-A", "trust", "-U", "workbench", "--no-sync"],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            **user,
        )
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(
                [server, "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F"],
                stdout=log,
                stderr=log,
                cwd=folder,
                **user,
            )
        try:
            import time

            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"postgresql://workbench@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # it does not wait for its clients
            process.wait(60)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as url:
        yield url


HAMMER = """
import sys, optuna
from pathlib import Path
from workbench.ablation.execution.storage import open_storage
folder, url, trials = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3])
study = optuna.create_study(storage=open_storage(folder, 5, url), study_name="hammer", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_many_workers_share_one_database(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("server") if kind == "postgresql" else ""
    open_storage(tmp_path, 5, url or None)
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HAMMER, str(tmp_path), url, "10"], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=300)
        assert worker.returncode == 0, error
    import optuna

    trials = optuna.load_study(study_name="hammer", storage=open_storage(tmp_path, 5, url or None)).trials
    assert len(trials) == 30 and {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert sorted(trial.number for trial in trials) == list(range(30))


def studies(run: AblationRun) -> list[str]:
    names = [study.study_name for study in Plan(run.files).storage.get_all_studies()]
    return sorted(name for name in names if name != "hammer")


def test_an_ablation_on_postgresql_ends_like_one_on_sqlite(corpus: Path, tmp_path: Path, server: str) -> None:
    verdicts = []
    for storage in (None, server):
        fields = ablation_fields(
            corpus,
            "test",
            arms={"full": {}},
            confirmation={"seeds": [0]},
            tuning={"trials": 1, "sampler": "random"},
            launch={"workers": 1, "heartbeat": 1, "storage": storage},
        )
        run = Ablation.parse(fields, tmp_path / str(bool(storage))).launch()
        assert run.wait(500), (run.folder / "workers" / "log.txt").read_text()
        assert set(run.runs()["status"]) == {"done"} and run.runs().height == run.total
        assert (run.folder / "study.db").exists() == (storage is None)
        verdict = run.verdict()
        assert verdict is not None
        verdicts.append(verdict.rows)
        assert studies(run) == (
            ["full/confirmation", "full/tuning"]
            if storage is None
            else [f"test/{run.record.storage_key}/full/{stage}" for stage in ("confirmation", "tuning")]
        )
    assert verdicts[0] == verdicts[1]
    # the same folder made anew has studies of its own in the same database
    shutil.rmtree(run.folder)
    names = studies(Ablation.parse(fields, tmp_path / "True").create())
    assert len({name.split("/")[1] for name in names}) == 2


@pytest.mark.parametrize("name", ["50%25 done", "exp[1]", "a?b=c#d", "ü @:/"])
def test_a_path_is_no_address(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    optuna.create_study(storage=open_storage(folder, 1), study_name="s")
    assert optuna.get_all_study_names(open_storage(folder, 1)) == ["s"]


def test_a_database_that_does_not_answer_is_reported_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match=r"launch.storage: got .*expected a database that answers"):
        open_storage(tmp_path, 5, "postgresql://nobody@127.0.0.1:9/none")


def test_others_may_write_what_the_umask_gives_them(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        open_storage(tmp_path, 60)
    finally:
        os.umask(before)
    assert (tmp_path / "study.db").stat().st_mode & 0o777 == 0o664


def test_a_database_that_cannot_be_read_is_not_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    open_storage(tmp_path, 60)
    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(ConfigError, match="unable to open database file"):
        quarantine_corrupt_storage(tmp_path)
    assert (tmp_path / "study.db").exists()


def test_a_corrupt_database_is_renamed(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"no database" * 1000)
    quarantine_corrupt_storage(tmp_path)
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["damaged-"]
