"""The folder of an ablation: paths, records, locks. Every other module reads and writes it through this one.

    ablation.json     LaunchRecord, written at launch: configuration, solved budget, cost card, data, provenance,
                      registration
    selection.json    arm -> Choice: the setting that is confirmed; rewritten as tuning ends
    looks.json        the looks of a sequential design that were taken: seeds, arm -> word
    finished.json     exists once every planned run has ended
    ended.parquet     a copy of the rows and points of ended runs, which tables read instead of the files of each run
    study.db          Optuna's studies (SQLite), unless launch.storage names a database
    plan.lock         held by the process that changes the record, the studies or the choices
    runs/             one folder per run (workbench.results.store)
    workers/          worker processes and jobs (workbench.ablation.execution.roster)
    report.html       the report, written by `workbench run` or `workbench report`
    notes.json        Notes: display names of arms, tags and notes, outside of the identity

An archive (`workbench archive`) has no runs/ but:

    runs.csv          one row per run
    report.parquet    arm, seed and what was measured on every report document
    curves.parquet    up to 200 logged points of every confirmation run, with all of its evaluations
    scores.parquet    what evaluation suites measured, if there were any
    verdict.json      the verdict as data
    verdict.md        the verdict in words
    openings.json     what the ledger of results knew of its openings (workbench.ablation.looks)
    looks.json        of a sequential design
    notes.json        if there are any

JSON files are replaced atomically, so a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import polars as pl
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.registration import Deviation, Registration, all_deviations, digest
from workbench.config import ConfigError, nearest
from workbench.files import locked, read_json, stamp, write_json
from workbench.metric import Metric
from workbench.ranges import Range
from workbench.results.scores import FOLDER
from workbench.results.store import RunFolder
from workbench.results.tables import (
    KEY_SCHEMA,
    POINT_SCHEMA,
    RUN_SCHEMA,
    SCORES_SCHEMA,
    Line,
    Points,
    confirmed,
    lines,
    runs,
    scores,
    write_ended,
)
from workbench.status import Stage

__all__ = ["AblationFolder", "Choice", "LaunchRecord", "Note", "Notes"]


NOTES = "notes.json"
SCORES = "scores.parquet"
"""File of an archive with what evaluation suites measured."""


class ControlRuns(BaseModel):
    """The finished runs of one arm in an earlier ablation, as recorded at launch."""

    model_config = ConfigDict(frozen=True)

    setting: dict[str, Any]
    """Their configuration without its seeds."""
    data: str
    """Fingerprint of their prepared data."""
    selection: dict[int, float]
    """Seed -> metric on the selection split."""
    measured: dict[int, float]
    """Seed -> metric on the split that the earlier ablation measured."""


class LaunchRecord(BaseModel):
    """What ``ablation.json`` holds. Files of earlier versions are read as well; fields that they lack have defaults."""

    model_config = ConfigDict(frozen=True)

    name: str
    identity: str
    """Hash of the configuration, except how the work is carried out."""
    order: list[str]
    """Arm names, the baseline first."""
    config: AblationConfig
    canonical: dict[str, Any]
    """What the identity is the hash of."""
    solved: dict[str, dict[str, int]] = {}
    """Arm -> fields that the budget's solver set at launch; never solved again."""
    spaces: dict[str, dict[str, Range]] = {}
    """Arm -> the fields that it tunes and their ranges."""
    metric: Metric
    """What arms are judged by."""
    data: dict[str, str] = {}
    """Arm -> fingerprint of its prepared data."""
    weights: dict[str, str] = {}
    """Fingerprints of initial weights, by source."""
    data_cards: dict[str, dict[str, Any]] = {}
    """Arm -> description of its prepared data."""
    views: dict[str, list[str]] = {}
    """Dashboard panels that the data source asks for -> columns of report.parquet that they draw."""
    contexts: dict[str, int] = {}
    """Arm -> tokens of the rows that it is trained on; empty in records of earlier versions."""
    workers: int = 1
    threads: int = 1
    """Threads of one trial."""
    storage_key: str | None = None
    """Distinguishes launches that share a database."""
    warm_start: dict[str, list[dict[str, Any]]] = {}
    """Arm -> trials of earlier ablations that its sampler starts from."""
    control: dict[str, ControlRuns] = {}
    """Arm -> runs of the ablation that ``protocol.control_variate`` names."""
    cost: list[dict[str, Any]] = []
    """The cost card at launch, one row per arm."""
    provenance: dict[str, str] = {}
    """Code, device, versions, data."""
    launch: str = ""
    """Identifier of this launch in the ledger of results; a new launch of the same folder has another one."""
    ledger_head: str = ""
    """SHA-256 of the last line of the ledger at launch."""
    announced: list[str] = []
    """What was reported before the launch: earlier looks at the report documents, known runs."""
    registration: Registration | None = None
    deviations: list[Deviation] = []

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, data: Any) -> Any:
        """Translate the fields of earlier versions."""
        if not isinstance(data, Mapping) or not isinstance(data.get("config"), Mapping):
            return data
        config = {name: dict(value) if isinstance(value, Mapping) else value for name, value in data["config"].items()}
        upgraded = {**data, "config": config}
        budget, tuning, launch = (config.get(name, {}) for name in ("budget", "tuning", "launch"))
        if "solved" in budget:
            upgraded.setdefault("solved", budget.pop("solved"))
        tuning.pop("objectives", None)
        if "first" in tuning:
            tuning["startup_trials"] = tuning.pop("first")
        if "options" in launch:
            launch.pop("options")
            launch.pop("launcher", None)
        protocol = config.get("protocol", {})
        if isinstance(protocol.get("stopping"), str):  # the text that was declared is in the registration
            protocol["stopping"] = "fixed"
        return upgraded

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """The record whose content on disk is ``data``."""
        record = cls.model_validate(data)
        record._raw = dict(data)
        return record

    def plain(self) -> dict[str, Any]:
        """The record as plain data, fit for JSON."""
        return self.model_dump(mode="json", exclude={"config"}) | {"config": self.config.plain()}

    def changed(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        copy = self.model_copy(update=changes)
        copy._raw = copy.plain()
        return copy

    @property
    def raw(self) -> dict[str, Any]:
        """The content on disk."""
        return self._raw

    def space(self, arm: str) -> dict[str, Range]:
        """The fields that an arm tunes and their ranges; those declared for all arms where an earlier version did not
        record them."""
        return self.spaces.get(arm, self.config.tuning.space)

    @property
    def planned(self) -> dict[str, dict[Stage, int]]:
        """Arm -> stage -> training runs."""
        return {arm: self.config.planned(len(self.space(arm))) for arm in self.order}

    def with_analysis(self, config: AblationConfig, deviation: Deviation, **changes: Any) -> Self:
        """The record with a changed analysis, beside what was declared at launch.

        Args:
            config: the configuration from now on.
            deviation: what was changed and why; it gets the hash of the new content.
            changes: further fields that change.
        """
        changed = self.changed(config=config, canonical=config.canonical(), identity=config.identity, **changes)
        deviation = deviation.model_copy(update={"hash": digest(changed.plain())})
        return changed.changed(deviations=[*self.deviations, deviation])

    def all_deviations(self) -> list[Deviation]:
        """Every deviation from what was declared, an unrecorded change of the file included."""
        return all_deviations(self._raw, self.registration, self.deviations)


class Choice(BaseModel):
    """What ``selection.json`` holds for an arm: the setting chosen on the selection split, or why there is none."""

    run: str | None = None
    """The tuning run that was chosen; None if nothing was tuned or the setting was interpolated."""
    hyperparameters: dict[str, Any] = {}
    selection_value: float | None = None
    """Of the setting: of its trial, the mean over tuning seeds where it was repeated, or the fitted value where it was
    interpolated."""
    interpolated: bool = False
    """Whether the setting is the optimum fitted between trials, so that no trial has it."""
    seeds: int = 1
    """Tuning seeds that the choice rests on."""
    done: int | None = None
    """Tuning trials that were done."""
    trials: int | None = None
    """Tuning trials in total."""
    failed: str | None = None
    """Why the arm cannot be confirmed."""

    def plain(self) -> dict[str, Any]:
        """As plain data, fit for JSON."""
        return self.model_dump(mode="json", exclude_unset=True)


class LookRecord(BaseModel):
    """A look of a sequential design that was taken."""

    number: int
    seeds: int
    words: dict[str, str]
    """Arm -> word of its verdict."""
    at: str


class Note(BaseModel):
    """A note about an ablation."""

    at: str
    text: str


class Notes(BaseModel):
    """What ``notes.json`` holds: nothing of it changes what is trained, measured or concluded."""

    model_config = ConfigDict(extra="forbid")

    names: dict[str, str] = {}
    """Arm -> display name."""
    tags: list[str] = []
    notes: list[Note] = []
    """Oldest first."""


class Looks(BaseModel):
    """What ``looks.json`` holds."""

    looks: list[LookRecord]


def _nearest_ablation(path: Path) -> str:
    """Advice for a path without an ablation: what it may have meant, archives included."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return f"Run the file first: workbench run {path}"
    if (path / "run.json").exists():
        return "It is a single run; workbench status reads it."
    inside = sorted(other.parent.name for other in path.glob("*/ablation.json"))
    if inside:
        return f"It has ablations in it: {', '.join(inside)}."
    found = {
        str(other.parent.relative_to(path.parent)): other.parent.name
        for pattern in ("*/ablation.json", "ablations/*/ablation.json")
        for other in path.parent.glob(pattern)
    }
    exact = [where for where, name in found.items() if name == path.name]
    return f"There is an archive: {path.parent / exact[0]}" if exact else nearest(path.name, found)


class AblationFolder:
    """The folder of a launched ablation.

    Args:
        path: ``results/<name>``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self.runs_path = self.path / "runs"
        self.workers_path = self.path / "workers"
        self.openings_path = self.path / "openings.json"
        self.cache_path = self.path.parent / "cache"

    def __repr__(self) -> str:
        return f"AblationFolder({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        """Whether there is a launched ablation in it."""
        return (self.path / "ablation.json").is_file()

    @property
    def is_archived(self) -> bool:
        """Whether it is an archive: tables and the verdict, no runs."""
        return (self.path / "verdict.json").exists() and not self.runs_path.exists()

    @property
    def is_finished(self) -> bool:
        """Whether every planned run has ended (done or failed)."""
        return self.is_archived or (self.path / "finished.json").exists()

    # -- records -------------------------------------------------------------------------------------------------

    def record(self) -> LaunchRecord:
        """What the launch recorded.

        Raises:
            ConfigError: if there is no ablation in this folder, or its file is damaged.
        """
        path = self.path / "ablation.json"
        if not self.exists:
            raise ConfigError.at(
                str(self.path),
                got="no ablation" if self.path.exists() else "no such folder",
                expected="a folder that `workbench run` created, or an archive",
                do=_nearest_ablation(self.path),
            )
        do = (
            "Restore it from a copy. Without one, `workbench run` with the ablation's file writes it again: no run is "
            "lost, and the verdict is exploratory, because the registration is."
        )
        data = read_json(path)
        if not data:
            raise ConfigError.at(str(path), got="a damaged file", expected="the record of a launch", do=do)
        try:
            return LaunchRecord.parse(data)
        except ValidationError as error:
            reason = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise ConfigError.at(str(path), got=reason, expected="the record of a launch", do=do) from None

    def has_record(self) -> bool:
        """Whether there is a readable record."""
        try:
            LaunchRecord.parse(read_json(self.path / "ablation.json"))
        except ValidationError:
            return False
        return True

    def damaged_runs(self) -> list[str]:
        """Folders in ``runs/`` whose record is missing or damaged."""
        paths = sorted(self.runs_path.iterdir()) if self.runs_path.is_dir() else []
        return [path.name for path in paths if path.is_dir() and not RunFolder(path).exists()]

    def write_record(self, record: LaunchRecord) -> LaunchRecord:
        """Write the record; returns it as it is on disk."""
        plain = record.plain()
        write_json(self.path / "ablation.json", plain)
        return LaunchRecord.parse(plain)

    def choices(self) -> dict[str, Choice]:
        """Arm -> its chosen setting, for arms whose tuning has ended. Damaged entries are left out, like those of arms
        that are still tuned: the next launch chooses from the studies again."""
        choices = {}
        for arm, data in read_json(self.path / "selection.json").items():
            with contextlib.suppress(ValidationError):
                choices[arm] = Choice.model_validate(data)
        return choices

    def choose(self, arm: str, choice: Choice | None) -> None:
        """Record, or remove, the setting that an arm is confirmed with. Call it with the plan's lock held."""
        before = read_json(self.path / "selection.json")
        after = {name: data for name, data in before.items() if name != arm or choice is not None}
        if choice is not None:
            after[arm] = choice.plain()
        if after != before:
            write_json(self.path / "selection.json", after)

    def failures(self) -> dict[str, str]:
        """Arms that could not be confirmed because every tuning trial failed -> why."""
        return {arm: choice.failed for arm, choice in self.choices().items() if choice.failed is not None}

    def looks(self) -> list[dict[str, Any]]:
        """The looks of a sequential design that were taken, oldest first: ``number``, ``seeds``, ``words`` (arm -> word
        of its verdict), ``at``.

        Raises:
            ConfigError: if the file is damaged; what was decided at a look cannot be decided again.
        """
        path = self.path / "looks.json"
        if not path.exists():
            return []
        try:
            return Looks.model_validate(read_json(path)).model_dump()["looks"]
        except ValidationError:
            raise ConfigError.at(
                str(path), got="a damaged file", expected="the looks that were taken", do="Restore it from a copy."
            ) from None

    def add_look(self, seeds: int, words: Mapping[str, str]) -> None:
        """Record a look. Call it with the plan's lock held."""
        looks = self.looks()
        entry = {
            "number": len(looks) + 1,
            "seeds": seeds,
            "words": dict(words),
            "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        write_json(self.path / "looks.json", {"looks": [*looks, entry]})

    def notes(self) -> Notes:
        """Display names, tags and notes; empty if there are none.

        Raises:
            ConfigError: if the file is damaged.
        """
        path = self.path / NOTES
        if not path.exists():
            return Notes()
        try:
            return Notes.model_validate_json(path.read_bytes())
        except ValidationError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError.at(str(path), got=reason, expected="notes", do="Mend or remove the file.") from None

    def write_notes(self, notes: Notes) -> None:
        """Replace display names, tags and notes."""
        write_json(self.path / NOTES, notes.model_dump())

    def mark_finished(self, finished: bool) -> None:
        """Record whether every planned run has ended; then, write what their tables read into one file."""
        path = self.path / "finished.json"
        if not finished:
            path.unlink(missing_ok=True)
        elif not path.exists():
            write_ended(self.path)
            write_json(path, {"identity": read_json(self.path / "ablation.json").get("identity")})

    def plan_lock(self) -> AbstractContextManager[bool]:
        """The lock of whoever changes the record, the studies or the choices."""
        return locked(self.path / "plan.lock")

    # -- runs ----------------------------------------------------------------------------------------------------

    def run(self, name: str) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.runs_path / name)

    def run_folders(self, stage: Stage) -> list[RunFolder]:
        """The folders of all runs of a stage."""
        folders = (RunFolder(path) for path in sorted(self.runs_path.glob(f"{stage}-*")))
        return [folder for folder in folders if folder.exists()]

    def runs(self) -> pl.DataFrame:
        """One row per training run (columns: workbench.results.tables.RUN_SCHEMA)."""
        if not self.is_archived:
            return runs(self.path)
        frame = completed(pl.read_csv(self.path / "runs.csv", schema_overrides=RUN_SCHEMA, glob=False), RUN_SCHEMA)
        chosen = [choice.run for choice in self.choices().values()]
        frame = frame.with_columns(selected=pl.col("run").is_in(chosen), folder=pl.lit(str(self.path)))
        return frame.select(list(RUN_SCHEMA))

    @property
    def scored_at(self) -> int:
        """Time of the newest change of what evaluation suites measured, in nanoseconds since 1970; 0 before the first
        one."""
        files = [self.path / SCORES]
        if not self.is_archived:  # every refresh asks, and a glob takes 20 ms for 1,000 runs
            folders = (f"{self.runs_path}/{run}/{FOLDER}" for run in _names(self.runs_path))
            files = [Path(folder, name) for folder in folders for name in _names(folder) if name.endswith(".parquet")]
        return max((changed[1] for path in files if (changed := stamp(path))), default=0)

    def scores(self) -> pl.DataFrame:
        """What evaluation suites measured; columns in :data:`workbench.results.tables.SCORES_SCHEMA`, then labels."""
        path = self.path / SCORES
        if not self.is_archived or not path.exists():
            return scores(self.path)
        return completed(pl.read_parquet(path, glob=False), SCORES_SCHEMA)

    def lines(self) -> list[Line]:
        """Every run with its logged points; of an archive, every confirmation run with up to 200 points (of earlier
        versions, with its evaluations)."""
        if not self.is_archived:
            return lines(self.path)
        path = self.path / "curves.parquet"
        if not path.exists():  # an archive of an earlier version
            return []
        points = completed(pl.read_parquet(path, glob=False), POINT_SCHEMA).cast(POINT_SCHEMA)  # type: ignore[arg-type]
        parts = points.partition_by(*KEY_SCHEMA, as_dict=True, include_key=False, maintain_order=True)
        return [Line(arm, stage, run, seed, Points(part)) for (arm, stage, run, seed), part in parts.items()]

    def reports(self) -> Iterator[tuple[str, int, pl.DataFrame]]:
        """Arm, seed and ``report.parquet`` (all suites and tasks) of each confirmation run that is done."""
        if self.is_archived:
            frame = pl.read_parquet(self.path / "report.parquet", glob=False)
            parts = frame.partition_by("arm", "seed", as_dict=True, include_key=False, maintain_order=True)
            for (arm, seed), part in parts.items():
                yield arm, seed, part
            return
        for row in confirmed(self.runs()).iter_rows(named=True):
            path = Path(row["folder"]) / "report.parquet"
            if path.exists():
                yield row["arm"], row["seed"], pl.read_parquet(path, glob=False)


def _names(folder: str | Path) -> list[str]:
    """Names in a folder; none if there is no such folder."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def completed(frame: pl.DataFrame, schema: Mapping[str, Any]) -> pl.DataFrame:
    """A frame of an archive with the columns of ``schema`` that an earlier version did not write, null."""
    missing = [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in frame.columns]
    return frame.with_columns(missing)
