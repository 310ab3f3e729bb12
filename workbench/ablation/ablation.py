"""An ablation, from its configuration to a folder that workers can work on."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from workbench.ablation.arms import Arms, resolve
from workbench.ablation.cost.card import check_budget, cost_table, residual_table
from workbench.ablation.cost.timing import match_seconds, measure_arms
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.roster import Roster
from workbench.ablation.execution.storage import open_storage, quarantine_corrupt_storage
from workbench.ablation.execution.studies import earlier_trials
from workbench.ablation.folder import AblationFolder, ControlRuns, LaunchRecord
from workbench.ablation.looks import Look, Run, look_at
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.protocol import Components
from workbench.ablation.spec.registration import Deviation, record_deviation, register
from workbench.ablation.verdict.control import control_runs
from workbench.config import ConfigError, apply_overrides, difference, require
from workbench.data import Source, prepare, sources
from workbench.environment import environment, usable_cores
from workbench.evaluation import check_score, check_suites
from workbench.model import describe_model
from workbench.results.data_card import check_lossless, check_overlap, is_lossy, is_mostly_seen
from workbench.results.ledger import FILE, Ledger, history
from workbench.results.loggers import check_loggers
from workbench.status import Stage
from workbench.training.suites import suite_conditions

__all__ = ["Ablation"]


class Ablation:
    """Arms under comparison, before launch.

    Example::

        ablation = wb.Ablation.load("sweeps/quickstart.yaml")
        ablation.cost()
        run = ablation.launch()

    Args:
        config: the ablation as data.
        results: folder of all results.

    Raises:
        ConfigError: with the mistakes of all arms, each with its path and what to do.
    """

    def __init__(self, config: AblationConfig, results: str | Path = "results"):
        self.config, self.results = config, Path(results)
        launched = AblationFolder(self.folder)  # initial weights may be elsewhere by now
        self.arms: Arms = resolve(config, weights=launched.record().weights if launched.has_record() else {})

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), results: str | Path = "results") -> Ablation:
        """From a YAML file, or from the folder of a launched or archived ablation, with overrides such as
        ``"base.training.tokens=1e6"``.

        Raises:
            ConfigError: with every mistake, its path and what to do.
        """
        launched = AblationFolder(path)
        if not launched.has_record():
            return cls(AblationConfig.load(path, overrides), results)
        return cls(AblationConfig.parse(apply_overrides(launched.record().config.plain(), overrides)), results)

    @classmethod
    def parse(cls, data: dict[str, Any], results: str | Path = "results") -> Ablation:
        """From a mapping with the fields of the YAML file.

        Raises:
            ConfigError: with every mistake, its path and what to do.
        """
        return cls(AblationConfig.parse(data), results)

    def __repr__(self) -> str:
        return f"Ablation({self.config.name!r}: {', '.join(self.arms)}; identity {self.config.identity})"

    @property
    def folder(self) -> Path:
        return self.results / self.config.name

    @property
    def workers(self) -> int:
        """Worker processes that ``launch`` starts."""
        launch = self.config.launch
        return launch.workers or max(1, (torch.cuda.device_count() or min(2, usable_cores())) // launch.devices)

    @property
    def threads(self) -> int:
        """Threads of one process of a trial, so that the workers share the machine."""
        return max(1, usable_cores() // (self.workers * self.config.launch.devices))

    def describe(self, arm: str) -> str:
        """The expanded layer table of an arm."""
        return describe_model(self.arms[arm].run().model)

    def cost(self, *, measure: bool = True, progress: Callable[[str], None] | None = None) -> pl.DataFrame:
        """The cost card, one row per arm (columns: :func:`workbench.ablation.cost.card.cost_table`).

        Args:
            measure: train every arm, or a shrunken one, for a few real steps on this machine, to measure time and
                memory.
            progress: called with a line about each step.
        """
        return self._cost(measure=measure, data=self._find_data(), progress=progress)[1]

    def pilot(self, seeds: int = 8, arms: int = 1) -> Ablation:
        """A small ablation that measures the noise before this one: the baseline and the first ``arms`` others, nothing
        tuned, on separate seeds, measured on the pilot split: documents drawn like those of the report split, which
        stays sealed."""
        config = self.config
        taken = {*config.confirmation.seeds, config.tuning.seed}
        free = [seed for seed in range(2_000, 2_000 + seeds + len(taken)) if seed not in taken][:seeds]
        reference = [config.reference_arm] if config.reference_arm else []
        names = list(dict.fromkeys([*config.order[: 1 + arms], *reference]))
        return Ablation(
            config.changed(
                name=f"{config.name}-pilot",
                arms={arm: config.arms[arm] for arm in names},
                baseline=config.order[0],
                tuning={"trials": 0},
                confirmation={"seeds": free, "split": "pilot"},
                protocol=config.protocol.changed(stopping="fixed"),
                exploratory="a pilot",
            ),
            self.results,
        )

    def components(self, init: int = 3, order: int = 3, other: int = 2, arms: int = 0) -> Ablation:
        """A small ablation that shows what the noise consists of: a :meth:`pilot` that crosses ``init`` seeds of the
        initial weights, ``order`` of the data order and ``other`` of everything else, one run for each combination."""
        crossed = Components(init=init, order=order, other=other)
        pilot = self.pilot(crossed.runs, arms).config
        return Ablation(
            pilot.changed(
                name=f"{self.config.name}-components",
                confirmation=pilot.confirmation.changed(components=crossed),
                exploratory="a study of noise components",
            ),
            self.results,
        )

    def with_workers(self, workers: int | None) -> Ablation:
        """This ablation with at least ``workers`` workers sharing the machine, so that a trial uses fewer threads."""
        if workers is None or workers <= self.workers:
            return self
        ablation = copy(self)  # the arms do not depend on the number of workers
        ablation.config = self.config.changed(launch=self.config.launch.changed(workers=workers))
        return ablation

    def launch(self, workers: int | None = None, progress: Callable[[str], None] | None = None) -> AblationRun:
        """Start, or resume, this ablation. Returns at once; trials are processes of their own.

        A finished trial is never repeated. Runs that crashed or ran out of memory are retried.

        Args:
            workers: worker processes, those still alive from an earlier call included.
            progress: as in :meth:`create`.

        Raises:
            ConfigError: as :meth:`create`.
        """
        run = self.with_workers(workers).create(progress)
        if not run.finished:
            run.start_workers(self.workers if workers is None else workers)
        return run

    def create(self, progress: Callable[[str], None] | None = None) -> AblationRun:
        """The folder of this ablation, created or as an earlier call left it; starts nothing.

        Args:
            progress: called with a line about each step, and with what the ledger of results knows of the report
                documents and the runs. Default: the latter is a warning, the steps are not reported.

        Raises:
            ConfigError: if the folder holds an ablation with other content, if arms do not match the budget, or if the
                data cannot be prepared.
        """
        asked_at = time.time()
        folder, progress = AblationFolder(self.folder), progress or _only_sentences
        check_loggers(self.config.launch.loggers)
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.plan_lock():
            if self.config.launch.storage is not None:  # before anything takes time
                open_storage(folder.path, self.config.launch.heartbeat, self.config.launch.storage)
            if not folder.has_record():
                folder.write_record(self._create(folder, progress))
            else:
                self._relaunch(folder, folder.record(), progress)
            if not Roster(folder).live_workers():
                Roster(folder).forget_notifications()
                quarantine_corrupt_storage(folder.path)
            Plan(folder).advance(relaunch=True)
        return AblationRun(folder.path, asked_at)

    def look(self, progress: Callable[[str], None] = lambda line: None) -> Look:
        """What the ledger of results knows before the launch: how often the report documents were opened, and which
        runs that tuning may choose are known already (of adaptive samplers only the settings fixed in advance).
        Prepares the data.

        Args:
            progress: called with a line about each step.
        """
        first = next(iter(self.arms))
        return self._look(self._prepare([first], progress)[first], self.arms)

    def _look(self, source: Source, arms: Arms, launch: str = "") -> Look:
        settings = [
            (name, arm.run(hyperparameters=point).setting) for name, arm in arms.items() for point in arm.points or [{}]
        ]
        runs = [Run(name, setting, seed) for name, setting in settings for seed in self.config.planned_seeds]
        identities = {name: arm.run().setting for name, arm in arms.items()}
        past = history(self.results)
        return look_at(past, launch, source.digests("report"), identities, runs, past.breaks)

    def _announcements(self, source: Source, arms: Arms, launch: str) -> list[str]:
        """What the ledger knows of the report documents and the runs, in sentences; empty if it knows nothing."""
        if self.config.confirmation.split != "report":
            return []
        look = self._look(source, arms, launch)
        if look.number == 1 and not look.exploratory:
            return []
        advice = ["New seeds make this a confirmation."] if look.known else []
        return [*look.sentences(self.config.alpha), *advice]

    def _create(self, folder: AblationFolder, progress: Callable[[str], None]) -> LaunchRecord:
        """The record of a first launch."""
        is_timed = self.config.budget.axis == "seconds"
        if not is_timed:  # before anything takes time
            check_budget(self.arms, residual_table(self.arms))
        prepared = self._prepare(self.arms, progress)
        cards = self._data_cards(prepared)
        self._check_suites(prepared)
        arms, table = self._cost(measure=self.config.launch.measure or is_timed, data=prepared, progress=progress)
        check_budget(arms, table)
        _check_same_documents(prepared)
        launch = _earlier_launch(folder) or secrets.token_hex(6)
        announced = self._announcements(prepared[self.config.order[0]], arms, launch)
        for line in announced:
            progress(line)
        fingerprints = {arm: source.fingerprint for arm, source in prepared.items()}
        where = environment()
        config, identity = self.config, self.config.identity
        record = LaunchRecord(
            name=config.name,
            identity=identity,
            order=config.order,
            config=config,
            canonical=config.canonical(),
            solved=arms.solved,
            spaces={name: dict(arm.space) for name, arm in arms.items()},
            metric=arms.metric,
            data=fingerprints,
            weights=arms.weights,
            data_cards=cards,
            contexts={name: arm.run().training.context for name, arm in arms.items()},
            views={name: list(columns) for name, columns in arms.baseline.run().data.judged.views.items()},
            workers=self.workers,
            threads=self.threads,
            launch=launch,
            announced=announced,
            ledger_head=Ledger(self.results / FILE).head,
            storage_key=secrets.token_hex(4) if config.launch.storage else None,
            warm_start=self._warm_start(),
            control=self._control_runs(),
            cost=table.to_dicts(),
            provenance={
                "ablation": identity,
                "code": where["code"],
                "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "data": ", ".join(sorted(set(fingerprints.values()))),
                "device": where["device"],
                "python": where["python"],
                **where["libraries"],
            },
        )
        registration = register(record.plain(), config, record.metric)
        if not _has_runs(folder):
            return record.changed(registration=registration)
        what = "ablation.json was missing or damaged after the first run; this is a later declaration"
        lost = Deviation(what=what, when=registration.at, why="the first declaration is lost", hash=registration.hash)
        return record.changed(registration=registration, deviations=[lost])

    def _cost(
        self,
        *,
        measure: bool = True,
        data: Mapping[str, Source] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> tuple[Arms, pl.DataFrame]:
        """The arms, a budget of seconds converted to tokens, and their cost card."""
        measured = measure_arms(self.arms, threads=self.threads, data=data, progress=progress) if measure else {}
        arms = match_seconds(self.arms, measured) if measure else self.arms
        return arms, cost_table(arms, measured, data)

    def _relaunch(self, folder: AblationFolder, record: LaunchRecord, progress: Callable[[str], None]) -> None:
        """Update the record of an earlier launch, if this configuration may continue it."""
        deviation = None
        if record.identity != self.config.identity:
            self._check_extension(record)
            deviation = record_deviation(record.canonical, self.config.canonical(), self.config.deviation)
            if deviation is None:
                raise self._other_content(record)
        updated = self._with_launch(folder, record)
        if deviation is not None:
            updated = self._with_analysis(folder, updated, deviation)
        if updated != record:
            folder.write_record(updated)
        self._restore_data(record.data, progress)

    def _check_extension(self, record: LaunchRecord) -> None:
        """Refuse a file that has all but the last seeds, such as those that `workbench extend` has added since."""
        declared, known = self.config.confirmation.seeds, record.config.confirmation.seeds
        added = known[len(declared) :]
        others = difference(record.canonical, self.config.canonical())
        if added and known[: len(declared)] == declared and all(p.startswith("confirmation.seeds[") for p in others):
            elsewhere = "" if self.results == Path("results") else f" --results {self.results}"
            raise ConfigError.at(
                "confirmation.seeds",
                got=list(declared),
                expected=f"the seeds {list(added)} too, with which the ablation was launched or extended",
                do=f"`workbench run {self.folder}{elsewhere}` resumes it with all seeds, as it is recorded; in the "
                f"file they would be seeds: {list(known)}.",
            )

    def _other_content(self, record: LaunchRecord) -> ConfigError:
        changes = difference(record.canonical, self.config.canonical())
        shown = "; ".join(f"{path}: {old!r} there, {new!r} here" for path, (old, new) in list(changes.items())[:6])
        return ConfigError.at(
            "name",
            got=f"{self.config.name!r}, which holds another ablation",
            expected="a separate name for every ablation",
            do=f"Differences: {shown}. Continue {self.folder} with its configuration. A different ablation has its own "
            "name and, as a confirmation, seeds that no earlier one used: the ledger counts its look.",
        )

    def _with_launch(self, folder: AblationFolder, record: LaunchRecord) -> LaunchRecord:
        """The record with how the work is carried out from now on, on this machine."""
        launch, key = self.config.launch, record.storage_key
        if launch.storage != record.config.launch.storage:
            _require_stopped(folder, "launch.storage", "another database, while workers use the old one")
            key = secrets.token_hex(4) if launch.storage else None
        return record.changed(
            config=record.config.changed(launch=launch),
            storage_key=key,
            workers=self.workers,
            threads=self.threads,
        )

    def _with_analysis(self, folder: AblationFolder, record: LaunchRecord, deviation: Deviation) -> LaunchRecord:
        """The record with a changed analysis, beside what was declared at launch."""
        _require_stopped(folder, "deviation", "workers that are still at work")
        is_controlled = self.config.protocol.control_variate != record.config.protocol.control_variate
        changes = {"control": self._control_runs()} if is_controlled else {}
        return record.with_analysis(self.config, deviation, **changes)

    def _warm_start(self) -> dict[str, list[dict[str, Any]]]:
        """Arm -> the trials of earlier ablations that its sampler starts from; as many for every arm."""
        folders = self.config.tuning.warm_start
        trials = {
            name: [trial for folder in folders for trial in earlier_trials(folder, name, arm.space)]
            for name, arm in self.arms.items()
        }
        counts = {arm: len(earlier) for arm, earlier in trials.items()}
        require(
            not folders or (len(set(counts.values())) == 1 and min(counts.values())),
            "tuning.warm_start",
            got=f"finished trials inside the search space: {counts}",
            expected="as many for every arm, and at least one",
            do="Arms are matched by name; their tuned fields must be the same and their values within this "
            "ablation's ranges.",
        )
        return trials

    def _control_runs(self) -> dict[str, ControlRuns]:
        """Arm -> runs of the ablation that ``protocol.control_variate`` names."""
        name, config = self.config.protocol.control_variate, self.config
        if name is None:
            return {}
        path, unbounded = "protocol.control_variate", self.arms.metric.upper is None
        require(
            unbounded, path, got=name, expected="nothing for a metric that is tested exactly, such as an error rate"
        )
        is_simple = not config.protocol.stopping.is_sequential and config.protocol.comparisons == "baseline"
        require(is_simple, path, got=name, expected="a fixed number of seeds, and comparisons with the baseline")
        return control_runs(AblationFolder(self.results / name), {*config.confirmation.seeds, config.tuning.seed})

    def _prepare(self, arms: Iterable[str], progress: Callable[[str], None]) -> dict[str, Source]:
        """The data of arms; what several of them share is prepared, and verified, once."""
        prepared: dict[tuple[str, int], Source] = {}
        by_arm = {}
        for arm in arms:
            run = self.arms[arm].run()
            vocabulary = run.model.vocabulary or 0
            key = run.data.identity, vocabulary
            if key not in prepared:
                prepared[key] = prepare(run.data, vocabulary, self.results / "cache", progress)
            by_arm[arm] = prepared[key]
        return by_arm

    def _check_suites(self, prepared: Mapping[str, Source]) -> None:
        """Raise ConfigError for an evaluation suite whose data are missing, or that an arm does not fit, and for a
        secondary metric that no suite measures."""
        for arm, source in prepared.items():
            run = self.arms[arm].run()
            try:
                check_suites(run.evaluation, suite_conditions(run, source))
            except ConfigError as error:
                raise error.under(f"arms.{arm}") from None
            suites = {suite.label: suite for suite in run.evaluation}
            conditions = suite_conditions(run, source, "report")
            for index, score in enumerate(self.config.protocol.secondary):
                try:
                    check_score(suites[score.suite], conditions, score.task, score.metric, score.where)
                except ConfigError as error:
                    raise error.under(f"protocol.secondary[{index}]") from None

    def _find_data(self) -> dict[str, Source]:
        """The data of every arm; empty if that of some arm is not prepared."""
        found: dict[str, Source] = {}
        for arm in self.arms:
            run = self.arms[arm].run()
            try:
                source = sources[run.data.kind].find(run.data, run.model.vocabulary or 0, self.results / "cache")
            except ConfigError:  # its text is not on this machine
                source = None
            if source is None:
                return {}
            found[arm] = source
        return found

    def _data_cards(self, prepared: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
        """The data card of every arm, with the reasons to measure on data seen in training, or with a lossy tokenizer,
        where they are needed.

        Raises:
            ConfigError: such a reason is needed and not given.
        """
        cards, split = {}, self.config.confirmation.split
        for arm, source in prepared.items():
            data = self.arms[arm].run().data
            check_overlap(source.card, split, data.allow_overlap, f"arms.{arm}.data")
            check_lossless(source.card, split, data.allow_lossy, f"arms.{arm}.data")
            reasons = {}
            if is_mostly_seen(source.card, split):
                reasons["allow_overlap"] = data.allow_overlap
            if is_lossy(source.card, split):
                reasons["allow_lossy"] = data.allow_lossy
            cards[arm] = {**source.card, **reasons}
        return cards

    def _restore_data(self, data: Mapping[str, str], progress: Callable[[str], None]) -> None:
        """Prepare data again that was removed since the launch; later trials must see what the earlier ones saw."""
        arms: dict[str, str] = {}
        for arm, fingerprint in data.items():
            arms.setdefault(fingerprint, arm)
        for fingerprint, arm in arms.items():
            try:
                now = Source.open(self.results / "cache", fingerprint, thorough=True).fingerprint
            except ConfigError:
                now = self._prepare([arm], progress)[arm].fingerprint
            require(
                now == fingerprint,
                f"arms.{arm}.data",
                got=f"data that has changed since the launch ({now})",
                expected=f"the data of the launch ({fingerprint})",
                do="Restore the text: this ablation was trained and measured on it.",
            )


def _only_sentences(line: str) -> None:
    """Warn of what the ledger knows; steps, which are no sentences, are not reported."""
    if line.endswith("."):
        warnings.warn(line, stacklevel=2)


def _require_stopped(folder: AblationFolder, path: str, got: str) -> None:
    require(
        not Roster(folder).live_workers(),
        path,
        got=got,
        expected="a stopped ablation",
        do=f"First: workbench stop {folder.path}.",
    )


def _has_runs(folder: AblationFolder) -> bool:
    """Whether a run was created in the folder."""
    return folder.runs_path.is_dir() and any(folder.runs_path.iterdir())


def _earlier_launch(folder: AblationFolder) -> str:
    """The launch that the runs in a folder belong to whose record is damaged; "" without runs."""
    return next((run.record().launch for stage in Stage for run in folder.run_folders(stage)), "")


def _check_same_documents(prepared: Mapping[str, Source]) -> None:
    """Raise ConfigError if an arm is measured on other documents than the baseline, the first: differences would not be
    paired."""
    wanted, *_ = (source.report.columns for source in prepared.values())
    for arm, source in prepared.items():
        columns = source.report.columns
        require(
            set(columns) == set(wanted) and all(np.array_equal(columns[name], wanted[name]) for name in wanted),
            f"arms.{arm}.data",
            got="other report documents than the baseline",
            expected="every arm measured on the same ones",
            do="Arms may differ in tokenizer and training data, not in what is measured.",
        )
