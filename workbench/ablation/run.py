"""A launched ablation, seen from outside: reads its folder, from any process, at any time. Imports no torch."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from workbench.ablation.folder import AblationFolder, Note, Notes
from workbench.ablation.spec.tuning import Tuning
from workbench.config import ConfigError, nearest, require
from workbench.metric import Metric
from workbench.results.store import documents_of
from workbench.results.tables import RUN_SCHEMA, Line, confirmed, diagnostics, evaluations, frame_of
from workbench.status import Stage

if TYPE_CHECKING:
    from workbench.ablation.design import Design
    from workbench.ablation.execution.pool import WorkerPool
    from workbench.ablation.looks import Look
    from workbench.ablation.spec.protocol import Components
    from workbench.ablation.spec.registration import Deviation
    from workbench.ablation.verdict.effort import Effort
    from workbench.ablation.verdict.summary import Summary
    from workbench.ablation.verdict.verdict import Verdict

__all__ = ["AblationRun", "ablation_folders", "named_ablations", "table"]


def table(results: str | Path = "results") -> pl.DataFrame:
    """One row per run over all ablations below ``results``: the ablation's name, then the columns of
    :meth:`AblationRun.runs`. Folders that cannot be read are left out."""
    frames = []
    for path in ablation_folders(results):
        try:
            runs = AblationRun(path).runs()
        except ConfigError:
            continue
        frames.append(runs.insert_column(0, pl.lit(path.name).alias("ablation")))
    frames = [frame for frame in frames if len(frame)]
    return pl.concat(frames) if frames else pl.DataFrame(schema={"ablation": pl.String, **RUN_SCHEMA})


def ablation_folders(results: str | Path) -> list[Path]:
    """The folders in ``results`` that hold an ablation or an archive, by name."""
    return sorted(path.parent for path in Path(results).glob("*/ablation.json"))


def named_ablations(names: Sequence[str], results: str | Path = "results") -> list[Path]:
    """The folders that ``names`` mean: names of ablations in ``results``, paths of ablations and archives, or folders
    of them, such as results/ablations.

    Raises:
        ConfigError: for a name that is none of these.
    """
    found: list[Path] = []
    for name in names:
        candidates = [Path(results) / name, Path(name)]
        one = [path for path in candidates if (path / "ablation.json").exists()][:1]
        folders = one or [folder for path in candidates if path.is_dir() for folder in ablation_folders(path)]
        known = [path.name for path in ablation_folders(results)]
        require(
            folders,
            "ablation",
            got=name,
            expected=f"an ablation in {results}, or the path of one, of an archive, or of a folder of them",
            do=nearest(name, known),
        )
        found += [folder for folder in folders if folder not in found]
    return found


class AblationRun:
    """A launched ablation: tables, verdict, workers.

    Args:
        folder: ``results/<name>``, or an archive.
        asked_at: when the launch began that this is part of, in seconds of ``time.time``.

    Raises:
        ConfigError: if there is no ablation in that folder.
    """

    def __init__(self, folder: str | Path, asked_at: float | None = None):
        self.files, self._asked_at = AblationFolder(folder), asked_at
        self.folder = self.files.path
        self.record = self.files.record()

    def __repr__(self) -> str:
        counts = dict(self.runs()["status"].value_counts().iter_rows())
        state = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing started"
        return f"AblationRun({self.name!r}: {state}; {self.total} runs planned)"

    def _repr_html_(self) -> str:
        """Question, state and a row per arm; of a finished ablation its verdict in a sentence."""
        from workbench import notebook
        from workbench.results.listing import arm_rows, cell_text, columns_of, constants

        runs = self.runs()
        state = f"{len(runs)} of {self.total} runs, {'finished' if self.finished else 'not finished'}"
        head = [
            notebook.paragraph(self.name, strong=True),
            notebook.paragraph(f"{self.question} ({state})" if self.question else state),
        ]
        summary = self.summary() if self.finished else None
        if summary is not None:
            head.append(notebook.paragraph(summary.headline))
        rows = arm_rows(runs, self.arms)
        same = constants(rows, keep=("arm", "report", "selection", "runs"))
        left_out = {*same, "report_sd", "selection_sd", "loss", "tokens", "tokens_per_second"}
        names = [name for name in columns_of(rows) if name not in left_out]
        names = [name for name in names if any(row[name] is not None for row in rows)]
        units = {name: f"{name} ({self.metric.short})" for name in ("report", "selection")}
        titles = [units.get(name, name.replace("_", " ")) for name in names]
        table = [[cell_text(name, row) for name in names] for row in rows]
        shown = notebook.table(titles, table, numeric=range(1, len(names))) if rows else ""
        return "".join([*head, shown, notebook.paragraph(str(self.folder), faint=True)])

    # -- what was launched ---------------------------------------------------------------------------------------

    @property
    def about(self) -> dict[str, Any]:
        """The content of ``ablation.json``; :attr:`record` is the same, typed."""
        return self.record.raw

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def results(self) -> Path:
        """The folder of results that holds this ablation and others."""
        return self.folder.parent

    launched = True
    """Its folder exists only since it was launched."""

    @property
    def identity(self) -> str:
        """Hash of the configuration, except how the work is carried out."""
        return self.record.identity

    @property
    def configuration(self) -> dict[str, Any]:
        """The fields of its YAML file, as launched."""
        return self.record.config.model_dump(mode="json", serialize_as_any=True, exclude_unset=True)

    @property
    def question(self) -> str:
        return self.record.config.question

    @property
    def arms(self) -> list[str]:
        """Arm names, the baseline first."""
        return self.record.order

    @property
    def baseline(self) -> str:
        return self.arms[0]

    @property
    def metric(self) -> Metric:
        """What arms are judged by."""
        return self.record.metric

    @property
    def seeds(self) -> list[int]:
        """Seeds of the confirmation runs."""
        return list(self.record.config.planned_seeds)

    @property
    def tuning(self) -> Tuning:
        """The search as declared."""
        return self.record.config.tuning

    @property
    def planned(self) -> dict[str, dict[Stage, int]]:
        """Arm -> stage -> training runs planned; in a sequential design, the most there can be after its looks."""
        if not self.record.config.protocol.stopping.is_sequential:
            return self.record.planned
        from workbench.ablation.verdict.measurements import looks_taken
        from workbench.ablation.verdict.sequential import seeds_needed_now

        seeds = seeds_needed_now(self.record.config, looks_taken(self.files), at_most=True)
        return {arm: {**planned, Stage.CONFIRMATION: seeds[arm]} for arm, planned in self.record.planned.items()}

    @property
    def components(self) -> Components | None:
        """How confirmation runs cross seeds of single components, if they do."""
        return self.record.config.confirmation.components

    @property
    def total(self) -> int:
        """Training runs planned, of all arms and stages."""
        return sum(sum(stages.values()) for stages in self.planned.values())

    @property
    def alpha(self) -> float:
        """Bound of the rates of false differences and of false equivalences in the verdict."""
        return self.record.config.alpha

    @property
    def allow_mismatch(self) -> str | None:
        """Why arms may differ in what the budget matches; None if they may not."""
        return self.record.config.budget.allow_mismatch

    @property
    def views(self) -> dict[str, list[str]]:
        """Dashboard panels that the data source asks for -> columns of report.parquet that they draw."""
        return self.record.views

    @property
    def has_suites(self) -> bool:
        """Whether evaluation suites have measured anything."""
        return self.scored_at > 0

    @property
    def scored_at(self) -> int:
        """Time of the newest change of what suites measured, in nanoseconds since 1970; 0 before the first one."""
        return self.files.scored_at

    @property
    def contexts(self) -> dict[str, int]:
        """Arm -> tokens of the rows that it is trained on; empty in ablations of earlier versions."""
        return self.record.contexts

    @property
    def data_cards(self) -> dict[str, Any]:
        """Arm -> description of its prepared data."""
        return self.record.data_cards

    @property
    def design(self) -> Design:
        """What ablations at other sizes must have in common with it to be sizes of one series."""
        from workbench.ablation.design import design_of

        return design_of(self.record)

    def cost(self) -> pl.DataFrame:
        """The cost card at launch, one row per arm."""
        from workbench.ablation.cost.printed import CostCard

        return CostCard(self.record.cost, infer_schema_length=None)

    def provenance(self) -> dict[str, str]:
        """Where the numbers come from: code, device, versions, data."""
        recorded = dict(self.record.provenance)
        if recorded.get("code") == "not installed":  # written by versions that knew neither a commit nor a hash
            recorded["code"] = "version not recorded"
        return recorded

    def deviations(self) -> list[dict[str, Any]]:
        """What was changed after launch in how the runs are read: ``what``, ``when``, ``why``."""
        return [deviation.model_dump() for deviation in self.record.all_deviations()]

    def look(self) -> Look | None:
        """How often its report documents were opened before, and which of its runs were known; None before it has
        opened one, and of ablations that were launched without a ledger."""
        from workbench.ablation.looks import look_of

        return look_of(self.files, self.record)

    # -- what has happened ---------------------------------------------------------------------------------------

    def runs(self) -> pl.DataFrame:
        """One row per training run (columns: workbench.results.tables.RUN_SCHEMA). ``report_value`` is null until the
        ablation is finished, or a declared look is reached."""
        from workbench.ablation.verdict.seal import sealed

        return sealed(self.files.runs(), self._readable_seeds())

    def curves(self) -> pl.DataFrame:
        """Every logged point (columns: workbench.results.tables.CURVE_SCHEMA)."""
        return frame_of(self.lines())

    def lines(self) -> list[Line]:
        """Every run with its logged points, without the copying of :meth:`curves`."""
        return self.files.lines()

    def diagnostics(self) -> pl.DataFrame:
        """What layers logged about themselves (columns: workbench.results.tables.DIAGNOSTICS_SCHEMA)."""
        return diagnostics(self.folder)

    def scores(self) -> pl.DataFrame:
        """What evaluation suites measured (columns: workbench.results.tables.SCORES_SCHEMA, then labels of documents).
        Rows of the report split are left out until they may be read (:meth:`runs`)."""
        return self._readable(self.files.scores())

    def evaluations(self) -> pl.DataFrame:
        """Every evaluation of every run by the primary suite (columns: workbench.results.tables.EVALUATION_SCHEMA), as
        far as it may be read (:meth:`runs`); empty of archives."""
        return self._readable(evaluations(self.folder))

    def _readable(self, frame: pl.DataFrame) -> pl.DataFrame:
        """A table with the columns split and seed, without rows of the report split that may not be read yet."""
        readable = self._readable_seeds()
        if readable is None:
            return frame
        return frame.filter((pl.col("split") != "report") | pl.col("seed").is_in(list(readable)))

    def reports(self) -> Iterator[tuple[str, int, pl.DataFrame]]:
        """Arm, seed and the report documents of the metric's task, for each confirmation run that is done and whose
        values may be read (:meth:`runs`)."""
        readable = self._readable_seeds()
        for arm, seed, report in self.files.reports():
            if readable is None or seed in readable:
                yield arm, seed, documents_of(report, self.metric)

    def _readable_seeds(self) -> Collection[int] | None:
        from workbench.ablation.verdict.seal import readable_seeds

        return readable_seeds(self.files, self.record)

    def selection(self) -> dict[str, dict[str, Any]]:
        """Arm -> its chosen setting, for arms whose tuning has ended (:class:`workbench.ablation.folder.Choice`)."""
        return {arm: choice.plain() for arm, choice in self.files.choices().items()}

    def efforts(self) -> dict[str, Effort]:
        """Arm -> how well it was tuned, for arms whose tuning has ended."""
        from workbench.ablation.verdict.effort import efforts

        return efforts(self.files, self.record)

    def failures(self) -> dict[str, str]:
        """Arms that could not be confirmed because every tuning trial failed -> why."""
        return self.files.failures()

    def verdict(self) -> Verdict | None:
        """The verdict, or None while confirmation runs are missing."""
        from workbench.ablation.verdict.measurements import verdict

        return verdict(self.files, self.record)

    def paper_table(self, path: str | Path) -> Path:
        """Write the verdict as a table for a paper: rounded to what the intervals support, the best in bold, with
        caption and label.

        Args:
            path: a file that ends in .tex (booktabs) or .md; .csv or .parquet for all numbers, with every digit.

        Raises:
            ConfigError: while there is no verdict, or for another ending.
        """
        from workbench.ablation.verdict.paper import verdict_table
        from workbench.paper import export_table, provenance_line

        verdict = self.verdict()
        if verdict is None:
            raise ConfigError.at(
                str(self.folder),
                got="no verdict: confirmation runs are missing",
                expected="a finished ablation",
                do="The same `workbench run` command resumes it.",
            )
        table = verdict_table(verdict, self.name, self.metric, names=self.names)
        return export_table(table, path, provenance_line(self))

    def summary(self, verdict: Verdict | None = None) -> Summary | None:
        """The verdict in short, with what to run next; None while there is no verdict.

        Args:
            verdict: the verdict of this ablation, where it is known already.
        """
        from workbench.ablation.verdict.summary import Launched, summarise

        verdict = verdict or self.verdict()
        return None if verdict is None else summarise(verdict, Launched.of(self.files, self.record))

    @property
    def exists(self) -> bool:
        """Whether its folder still exists."""
        return self.files.exists

    @property
    def archived(self) -> bool:
        """Whether the folder is an archive (`workbench archive`): tables and the verdict, no runs."""
        return self.files.is_archived

    @property
    def finished(self) -> bool:
        """Whether every planned run has ended (done or failed)."""
        return self.files.is_finished

    # -- notes ---------------------------------------------------------------------------------------------------

    def notes(self) -> Notes:
        """Display names of arms, tags and notes."""
        return self.files.notes()

    @property
    def names(self) -> dict[str, str]:
        """Arm -> its display name; by default the arm's own."""
        names = self.notes().names
        return {arm: names.get(arm, arm) for arm in self.arms}

    def rename(self, names: Mapping[str, str]) -> None:
        """Give arms display names. Their own names, which are part of the hash, stay.

        Args:
            names: arm -> display name; an empty one, or the arm's own, removes it.

        Raises:
            ConfigError: for an arm that does not exist, or two arms of one name.
        """
        for arm in names:
            known = arm in self.arms
            require(known, f"names.{arm}", got=arm, expected="an arm", do="" if known else nearest(arm, self.arms))
        notes = self.notes()
        chosen = {arm: name.strip() for arm, name in {**notes.names, **names}.items()}
        chosen = {arm: name for arm, name in chosen.items() if name and name != arm}
        shown = [chosen.get(arm, arm) for arm in self.arms]
        require(len({*shown}) == len(shown), "names", got=shown, expected="a different name for every arm")
        self.files.write_notes(notes.model_copy(update={"names": chosen}))

    def annotate(self, text: str = "", tags: Collection[str] = (), untag: Collection[str] = ()) -> None:
        """Add a note, add tags, remove tags. None of them changes what is trained, measured or concluded.

        Args:
            text: of the note; empty adds none.
            tags: to add.
            untag: tags to remove.
        """
        notes = self.notes()
        kept = [tag for tag in dict.fromkeys([*notes.tags, *tags]) if tag not in untag]
        added = [Note(at=time.strftime("%Y-%m-%d %H:%M:%S %z"), text=text.strip())] if text.strip() else []
        self.files.write_notes(notes.model_copy(update={"tags": kept, "notes": [*notes.notes, *added]}))

    # -- its end -------------------------------------------------------------------------------------------------

    def extend(self, seeds: int | Sequence[int], why: str | None = None) -> Deviation:
        """Add confirmation seeds to this finished ablation (:func:`workbench.ablation.execution.extension.extend`);
        :meth:`start_workers` then runs them.

        Args:
            seeds: their number, or the seeds.
            why: the reason, which the verdict quotes; needed unless the design is anytime-valid.
        """
        from workbench.ablation.execution.extension import extend

        deviation = extend(self.files, seeds, why)
        self.record = self.files.record()
        return deviation

    def best(self, arm: str | None = None) -> Path:
        """The folder of the best run: of the arm with the best mean in the verdict, the confirmation run that is best
        on the selection split. Report values choose no seed.

        Args:
            arm: another arm instead.

        Raises:
            ConfigError: if it is not finished, an archive, or no run of the arm is done.
        """
        verdict = self.verdict() if self.finished and not self.archived else None
        means = {row.arm: row.value for row in verdict.rows if row.value is not None} if verdict else {}
        require(
            means,
            str(self.folder),
            got="an archive" if self.archived else "no finished confirmation run",
            expected="a finished ablation with its runs",
        )
        known = arm is None or arm in means
        do = "" if known else nearest(arm, means)
        require(known, "arm", got=arm, expected="an arm with a finished confirmation run", do=do)
        runs = confirmed(self.runs()).filter(pl.col("arm") == (arm or min(means, key=lambda name: means[name])))
        return Path(runs.sort("selection_value", nulls_last=True)["folder"][0])

    def delete(self) -> None:
        """Delete this ablation with its runs and checkpoints. The ledger of results keeps what was opened.

        Raises:
            ConfigError: while workers are alive or about to start.
        """
        busy = len(self.workers()) + len(self.waiting_workers())
        require(
            not busy,
            str(self.folder),
            got=f"{busy} worker(s) at work",
            expected="an ablation that nobody runs",
            do=f"First: workbench stop {self.folder}",
        )
        gone = self.folder.with_name(f".{self.folder.name}.deleted")  # a crash in between leaves no half ablation
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone)

    # -- workers -------------------------------------------------------------------------------------------------

    @cached_property
    def pool(self) -> WorkerPool:
        """Its workers."""
        from workbench.ablation.execution.pool import WorkerPool

        return WorkerPool(self.files)

    def workers(self) -> list[int]:
        """Process numbers of the workers that are alive. If two workers on two machines have the same number, it is
        listed twice."""
        return self.pool.workers()

    def waiting_workers(self) -> list[str]:
        """Identifiers of the launcher's jobs whose workers have not started."""
        return self.pool.waiting()

    def start_workers(self, count: int | None = None) -> list[str]:
        """Start workers until there are ``count``, live and waiting ones included. They outlive this process.

        Concurrent calls wait for one another, so that together they start no more than one would. During a launch, a
        stop that was requested since its beginning is respected.

        Args:
            count: default the number in the ablation's ``launch.workers``.

        Returns:
            the launcher's identifiers of the new jobs.
        """
        asked_at, self._asked_at = self._asked_at, None
        return self.pool.start(self.record.workers if count is None else count, asked_at)

    def stop(self, wait: float = 60.0) -> list[int]:
        """Ask every worker to stop, wherever it runs: running trials write a checkpoint and can be resumed. One that
        does not end within ten minutes is killed, and resumes from its last checkpoint.

        Args:
            wait: seconds to wait for them to end.

        Returns:
            process numbers of the workers that have not ended yet.
        """
        return self.pool.stop(wait)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the ablation is finished or no worker is left. Returns whether it is finished.

        Args:
            timeout: seconds; default without limit.
        """
        return self.pool.wait(timeout)

    def __await__(self) -> Generator[Any, None, AblationRun]:
        """``await run`` in a notebook: wait as :meth:`wait` does while the kernel stays responsive. Returns the run."""

        async def ended() -> AblationRun:
            while not self.finished and (self.workers() or self.waiting_workers()):
                await asyncio.sleep(0.5)
            return self

        return ended().__await__()
