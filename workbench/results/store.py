"""The folder of one training run. Nothing else reads or writes these files.

    run.json            what is trained (:class:`RunRecord`): arm, stage, seed, tuned values, configuration, identity
    environment.json    where it ran: versions, device, threads, code, and the backend each operation used
    status.json         status, reason, process
    metrics.jsonl       one line per log step
    evaluations.jsonl   the long table of evaluations, one line per step, split, suite, task and metric
    diagnostics.jsonl   layer diagnostics, about 20 times per run, one line per layer:
                        {"step": 40, "layer": 3, "values": {"routing_entropy": 2.1, "load": [1.02, 0.97, ...]}}; a value
                        is a number or a list of numbers (null: not finite), named by the variant; the layers after the
                        last block are the shortcuts
    events.jsonl        assigned (a worker takes the run), started or resumed, first_step, how it ended
    result.json         the final numbers, written once at the end of the run
    suites/             what evaluation suites measured beside the primary metric (workbench.results.scores)
    report.parquet      every report document (confirmation runs): columns suite, task, document, then numerators and
                        denominators (nll_nats and bytes, or errors and answers), cluster (documents of one number are
                        alike) and labels of the data source. Older folders have no suite, task and cluster.
    checkpoint/         see workbench.training.checkpoint
    loggers.json        logger -> identifier of the run there (workbench.results.loggers)
    log.txt             output of the process

Files are replaced atomically or appended to line by line; a last line torn by a crash is ignored.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from workbench.config import ConfigError
from workbench.files import append_json, checksum, locked, read_json, read_jsonl, replacing, sync, write_json
from workbench.metric import Metric
from workbench.results.record import RunRecord, read_environment, read_result, read_state
from workbench.results.scores import FOLDER, read_scores, truncate_scores
from workbench.status import ENDED, RETRYABLE, Stage, Status

REPORT = "report.parquet"
LOGS = ("metrics.jsonl", "evaluations.jsonl", "diagnostics.jsonl")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # polars would expand a relative path that begins with ~

    @classmethod
    def create(cls, path: Path, record: RunRecord) -> RunFolder:
        """The folder of a run; an existing record is left as it is."""
        folder = cls(path)
        path.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            write_json(path / "run.json", record.plain())
        return folder

    def exists(self) -> bool:
        """Whether this is the folder of a run."""
        return RunRecord.read(read_json(self.path / "run.json")) is not None

    def record(self) -> RunRecord:
        """What the run trains.

        Raises:
            ConfigError: if this is not the folder of a run.
        """
        record = RunRecord.read(read_json(self.path / "run.json"))
        if record is None:
            raise ConfigError.at(
                "folder",
                got=str(self.path),
                expected="the folder of a run",
                do="Runs of `workbench train` are in results/runs, those of an ablation in results/<ablation>/runs.",
            )
        return record

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """``{"status": …, "reason": …, …}``.

        A result decides: the process may have been killed before it wrote the status that follows it. Without a result
        nothing has ended, and a running run whose process is gone has status killed.
        """
        state = read_state(self.path / "status.json") or {"status": Status.WAITING}
        if state["status"] == Status.RUNNING and not self.is_locked():
            # it may have ended between reading and testing the lock
            state = read_state(self.path / "status.json") or state
            if state["status"] == Status.RUNNING:
                reason = "its process disappeared; it resumes from its checkpoint"
                state = {**state, "status": Status.KILLED, "reason": reason}
        return decided(state, self.result())

    def set_status(self, status: Status, reason: str | None = None, **more: Any) -> None:
        write_json(self.path / "status.json", {"status": Status(status), "reason": reason, "at": time.time(), **more})

    def result(self) -> dict[str, Any]:
        """The final numbers; empty until the run has ended."""
        return read_result(self.path / "result.json")

    def finish(self, status: Status, reason: str | None = None, **numbers: Any) -> None:
        """Write the final numbers, then the status: a process that sees the status can read the numbers, and one that
        sees the numbers needs no status (:meth:`status`)."""
        write_json(self.path / "result.json", {"status": status, "reason": reason, **numbers})
        self.event(status, reason=reason)
        self.set_status(status, reason)

    def damage(self) -> str | None:
        """The file of a finished run that is missing or damaged, if there is one."""
        if not self.exists():
            return "run.json"
        result = self.result()
        if not result:
            return "result.json"
        if result["status"] != Status.DONE or self.record().stage != Stage.CONFIRMATION:
            return None
        try:
            self._read_report()
        except ConfigError:
            return REPORT
        return None

    def discard_result(self, damage: str) -> None:
        """Remove the result of a run of which a file is damaged, so that the run resumes from its last checkpoint."""
        self.event("damaged", file=damage)
        (self.path / "result.json").unlink(missing_ok=True)
        self.set_status(Status.INTERRUPTED, f"{damage} is damaged")

    def settle(self) -> dict[str, Any]:
        """Write the status that the result decides, where a process was killed between the two; the result."""
        result = self.result()
        if read_state(self.path / "status.json").get("status") != result["status"]:
            self.set_status(result["status"], result.get("reason"))
            self.event(result["status"], reason=result.get("reason"))
        return result

    def reopen(self, statuses: Collection[Status] = RETRYABLE) -> None:
        """Remove a result, so that the run is trained again; its events keep how it ended before.

        A crash depends on the machine rather than the model, so the run resumes from its checkpoint. A run that
        diverged starts again from its first step: its checkpoint is on the way to the same end.

        Args:
            statuses: results that are removed; others stay.
        """
        result = self.result()
        if result.get("status") in statuses:
            events = self.events()
            if not events or events[-1].get("event") != "reopened":  # else a process was killed on the way from here
                self.event("reopened", was=result["status"], reason=result.get("reason"))
            if result["status"] == Status.DIVERGED:
                shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
            (self.path / "result.json").unlink()
            self.set_status(Status.INTERRUPTED, "run again")

    def lock(self) -> contextlib.AbstractContextManager[bool]:
        """Lock the run for this process; yields False if another process runs it."""
        return locked(self.path / "lock", timeout=1.0)  # is_locked() in another process takes it for a moment

    def is_locked(self) -> bool:
        """Whether a process runs it."""
        if not (self.path / "lock").exists():
            return False
        with locked(self.path / "lock", timeout=0) as acquired:
            return not acquired

    # -- environment and logs ----------------------------------------------------------------------------------------

    def environment(self) -> dict[str, Any]:
        """Where the run was last started; empty before."""
        return read_environment(self.path / "environment.json")

    def add_to_environment(self, **more: Any) -> None:
        """Add what is known only after the first step."""
        write_json(self.path / "environment.json", {**self.environment(), **more})

    def logger_ids(self) -> dict[str, str]:
        """Logger -> identifier of this run there, of loggers that it was copied to."""
        return {name: value for name, value in read_json(self.path / "loggers.json").items() if isinstance(value, str)}

    def set_logger_id(self, name: str, identifier: str) -> None:
        write_json(self.path / "loggers.json", {**self.logger_ids(), name: identifier})

    def event(self, name: str, **more: Any) -> None:
        append_json(self.path / "events.jsonl", {"event": name, "at": time.time(), **more})

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "events.jsonl")

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        append_json(self.path / "metrics.jsonl", row)

    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "metrics.jsonl")

    def add_evaluations(self, step: int, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows (suite, task, metric, value, n) measured on ``split`` after optimiser step ``step``."""
        for row in rows:
            append_json(self.path / "evaluations.jsonl", {"step": step, "split": split, **row})

    def evaluations(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "evaluations.jsonl")

    def add_diagnostics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            append_json(self.path / "diagnostics.jsonl", row)

    def diagnostics(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "diagnostics.jsonl")

    def sync_logs(self) -> None:
        """Write the lines so far to the disk."""
        for name in LOGS:
            if (self.path / name).exists():
                sync(self.path / name)

    def truncate_after(self, step: int) -> None:
        """Drop metrics, evaluations, diagnostics and scores after ``step``, and evaluations on the report split: a
        resumed run writes them again."""
        for name in LOGS:
            rows = [row for row in read_jsonl(self.path / name) if _is_before(row, step)]
            with replacing(self.path / name) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        truncate_scores(self.suites_path, step)

    @property
    def suites_path(self) -> Path:
        """Folder of what evaluation suites measured."""
        return self.path / FOLDER

    def scores(self) -> pl.DataFrame:
        """What evaluation suites measured: columns in :data:`workbench.results.scores.SCORE_SCHEMA`, then labels."""
        return read_scores(self.suites_path)

    # -- report documents --------------------------------------------------------------------------------------------

    def write_report(self, documents: pl.DataFrame) -> str:
        """Replace ``report.parquet``; its checksum, to be a number of the result (``report_checksum``)."""
        with replacing(self.path / REPORT) as temporary:
            documents.write_parquet(temporary)
        return checksum(self.path / REPORT)

    def report(self, metric: Metric) -> pl.DataFrame:
        """The report documents of a metric's suite and task; for the columns see the module.

        Raises:
            ConfigError: before the report split was measured, or if the file is damaged.
        """
        return documents_of(self._read_report(), metric)

    def _read_report(self) -> pl.DataFrame:
        path, reason = self.path / REPORT, ""
        try:
            actual = checksum(path)
            if self.result().get("report_checksum", actual) != actual:
                reason = "another checksum than that of its run's result"
            else:
                return pl.read_parquet(path, glob=False)
        except FileNotFoundError:
            reason = "no such file"
        except (pl.exceptions.PolarsError, IsADirectoryError) as error:
            reason = str(error).splitlines()[0]
        raise ConfigError.at(
            str(path),
            got=f"a damaged file: {reason}",
            expected="the report documents of a finished run",
            do="`workbench run` with the ablation's file measures it again, from the last checkpoint.",
        )


def decided(state: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a run, given the content of ``status.json`` and of ``result.json``."""
    if result:
        return {**state, "status": result["status"], "reason": result.get("reason")}
    if state["status"] in ENDED:
        return {**state, "status": Status.INTERRUPTED, "reason": "it has no result; it resumes from its checkpoint"}
    return state


def _is_before(row: Mapping[str, Any], step: int) -> bool:
    """Whether a row was logged up to ``step`` of the training."""
    number = row.get("step")
    return isinstance(number, int) and number <= step and row.get("split", "selection") == "selection"


def documents_of(report: pl.DataFrame, metric: Metric) -> pl.DataFrame:
    """The rows of a metric's suite and task; all rows of an older report, which has neither column."""
    if "suite" not in report.columns:
        return report
    return report.filter((pl.col("suite") == metric.suite) & (pl.col("task") == metric.task))
