"""A run at one moment: what tables and figures are computed from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import polars as pl

from workbench.dashboards.view import RunView
from workbench.files import stamp
from workbench.results.tables import Line, frame_of

if TYPE_CHECKING:
    from workbench.ablation.verdict.effort import Effort
    from workbench.ablation.verdict.summary import Summary
    from workbench.ablation.verdict.verdict import Verdict


class Snapshot:
    """A run at one moment: every file is read once, so that all figures drawn from it agree.

    Args:
        run: the run.
        previous: an earlier snapshot of the same run; its verdict is reused while no confirmation run has changed.
    """

    def __init__(self, run: RunView, previous: Snapshot | None = None):
        source = run._run if isinstance(run, Snapshot) else run
        self._run: RunView = source
        self._last_judgement = previous._newest_judgement if previous else None
        self._unfiltered: Snapshot | None = None  # the snapshot that this is a part of
        self.name, self.question, self.arms, self.baseline = source.name, source.question, source.arms, source.baseline
        self.names = source.names
        self.seeds, self.tuning, self.planned, self.total = source.seeds, source.tuning, source.planned, source.total
        self.components = source.components
        self.folder, self.identity, self.metric, self.alpha = (
            source.folder,
            source.identity,
            source.metric,
            source.alpha,
        )
        self.allow_mismatch, self.views, self.data_cards = source.allow_mismatch, source.views, source.data_cards
        self.design = source.design
        self.has_suites, self.scored_at, self.contexts = source.has_suites, source.scored_at, source.contexts
        self.exists, self.launched, self.archived = source.exists, source.launched, source.archived
        self.results, self.configuration = source.results, source.configuration
        self.neighbours: Neighbours = previous.neighbours if previous else Neighbours(self.results)
        """The ablations in the same folder of results."""
        self.all_arms = self.arms
        """All arms of the ablation, shown or not: an arm's colour depends on its position here."""
        self.finished = source.finished  # before the runs are read: a finished run no longer changes
        self._runs, self._lines = source.runs(), source.lines()

    @classmethod
    def of(cls, run: RunView) -> Snapshot:
        """``run`` itself where it is a snapshot, else a new one."""
        return run if isinstance(run, Snapshot) else cls(run)

    def filtered(self, arms: Collection[str], without: Collection[str] = ()) -> Self:
        """The same moment with only some arms and runs. The verdict still covers all of them: its correction for
        multiple comparisons was declared before launch.

        Args:
            arms: names of the arms to show.
            without: names of runs to leave out.
        """
        part = copy(self)
        part._unfiltered = self.unfiltered
        part.arms = [arm for arm in self.all_arms if arm in arms]
        part._runs = self._runs.filter(pl.col("arm").is_in(part.arms) & ~pl.col("run").is_in(list(without)))
        part._lines = [line for line in self._lines if line.arm in part.arms and line.run not in without]
        return part

    @property
    def unfiltered(self) -> Snapshot:
        """The same moment with every arm and run."""
        return self._unfiltered or self

    def runs(self) -> pl.DataFrame:
        return self._runs

    def lines(self) -> list[Line]:
        return self._lines

    def curves(self) -> pl.DataFrame:
        return frame_of(self._lines)

    def diagnostics(self) -> pl.DataFrame:
        """Diagnostics of the runs that are shown."""
        return self._diagnostics.filter(pl.col("run").is_in([line.run for line in self._lines]))

    @cached_property
    def _diagnostics(self) -> pl.DataFrame:
        return self._run.diagnostics() if self._unfiltered is None else self._unfiltered._diagnostics

    def reports(self) -> Iterable[tuple[str, int, pl.DataFrame]]:
        """Per-document measurements of the confirmation runs that are shown."""
        shown = set(self._runs.filter(pl.col("stage") == "confirmation").select("arm", "seed").rows())
        return (report for report in self._run.reports() if report[:2] in shown)

    def scores(self) -> pl.DataFrame:
        """What suites measured of the runs that are shown, and of the baseline's."""
        shown, arm = [*self._runs["run"], *(line.run for line in self._lines)], pl.col("arm")
        hides_baseline = self.baseline not in self.arms
        return self._scores.filter(pl.col("run").is_in(shown) | ((arm == self.baseline) & hides_baseline))

    @cached_property
    def _scores(self) -> pl.DataFrame:
        return self._run.scores() if self._unfiltered is None else self._unfiltered._scores

    def cost(self) -> pl.DataFrame:
        table = self._run.cost()
        return table.filter(pl.col("arm").is_in(self.arms)) if "arm" in table.columns else table

    def efforts(self) -> Mapping[str, Effort]:
        return {arm: effort for arm, effort in self.unfiltered._efforts.items() if arm in self.arms}

    @cached_property
    def _efforts(self) -> Mapping[str, Effort]:
        return self._run.efforts()

    def failures(self) -> dict[str, str]:
        return self._run.failures()

    def provenance(self) -> dict[str, str]:
        return self._run.provenance()

    def deviations(self) -> list[dict[str, Any]]:
        return self._run.deviations()

    def workers(self) -> list[int]:
        return self._run.workers()

    def waiting_workers(self) -> list[str]:
        return self._run.waiting_workers()

    def verdict(self) -> Verdict | None:
        return self.unfiltered._judgement[1]

    def summary(self, verdict: Verdict | None = None) -> Summary | None:
        verdict = verdict or self.verdict()
        return None if verdict is None else self._run.summary(verdict)

    @cached_property
    def _judgement(self) -> tuple[Any, Verdict | None]:
        """What the verdict depends on, and the verdict."""
        confirmations = self._runs.filter(pl.col("stage") == "confirmation").select("run", "status").rows()
        basis = self.identity, self.deviations(), self.finished, confirmations, self.failures(), self.scored_at
        last = self._last_judgement
        return last if last is not None and last[0] == basis else (basis, self._run.verdict())

    @property
    def _newest_judgement(self) -> tuple[Any, Verdict | None] | None:
        """The newest verdict computed so far, here or in an earlier snapshot, none of which is kept alive for it."""
        return self.unfiltered.__dict__.get("_judgement", self.unfiltered._last_judgement)


class Neighbours:
    """Snapshots of the ablations in a folder of results; a finished ablation is read once, until its own files change.

    Args:
        results: the folder.
    """

    def __init__(self, results: Path):
        self.results = results
        self._snapshots: dict[Path, tuple[tuple[Any, ...], Snapshot]] = {}

    def folders(self) -> list[Path]:
        """The folders that hold an ablation, by name."""
        return sorted(path.parent for path in self.results.glob("*/ablation.json"))

    def snapshot(self, folder: Path) -> Snapshot:
        """The ablation in ``folder`` as it is now.

        Raises:
            ConfigError: when there is no ablation in that folder.
        """
        from workbench.ablation.run import AblationRun

        names = ("ablation", "selection", "finished", "verdict", "notes")
        stamps = tuple(stamp(folder / f"{name}.json") for name in names)
        last_stamps, snapshot = self._snapshots.get(folder, (None, None))
        if snapshot is None or last_stamps != stamps or not snapshot.finished:
            snapshot = Snapshot(AblationRun(folder), snapshot)
            self._snapshots[folder] = stamps, snapshot
        return snapshot
