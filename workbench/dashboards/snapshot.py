"""What tables and figures are drawn from: a run as it was at one moment, or as it will be."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import polars as pl

from workbench.files import stamp
from workbench.results.tables import RUN_SCHEMA, Line, frame_of

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.run import AblationRun
    from workbench.ablation.verdict.judge import Verdict


class Snapshot:
    """A run as it was at one moment: every file is read once, so that figures drawn from it agree with one another.

    Args:
        run: the run.
        before: an earlier snapshot of it; its verdict is kept where no confirmation run has changed since.
    """

    _run: AblationRun

    def __init__(self, run: AblationRun | Snapshot, before: Snapshot | None = None):
        source = run._run if isinstance(run, Snapshot) else run
        self._run, self._judged_before = source, before._judged_last if before else None
        self._whole: Snapshot | None = None  # what this is a part of
        self.name, self.question, self.arms, self.baseline = source.name, source.question, source.arms, source.baseline
        self.seeds, self.total, self.folder, self.about = source.seeds, source.total, source.folder, source.about
        self.metric = source.metric
        self.every_arm = self.arms
        """The arms of the ablation, whichever are shown: colours go by them."""
        self.finished = source.finished  # read first: a finished run does not change any more
        self._runs, self._lines = source.runs(), source.lines()

    def showing(self, arms: Collection[str], without: Collection[str] = ()) -> Self:
        """The same moment with some arms only, and without some runs. The verdict stays that over all arms and runs: its
        correction for their number was declared before launch.

        Args:
            arms: names of the arms to show.
            without: names of runs to leave out.
        """
        part = copy(self)
        part._whole = self.whole
        part.arms = [arm for arm in self.every_arm if arm in arms]
        part._runs = self._runs.filter(pl.col("arm").is_in(part.arms) & ~pl.col("run").is_in(list(without)))
        part._lines = [line for line in self._lines if line.arm in part.arms and line.run not in without]
        return part

    @property
    def whole(self) -> Snapshot:
        """The same moment with everything shown."""
        return self._whole or self

    def runs(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.runs`."""
        return self._runs

    def lines(self) -> list[Line]:
        """See :meth:`workbench.ablation.run.AblationRun.lines`."""
        return self._lines

    def diagnostics(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.diagnostics`; only of the runs that are shown."""
        return self._diagnosed.filter(pl.col("run").is_in(self._runs["run"].implode()))

    @cached_property
    def _diagnosed(self) -> pl.DataFrame:
        return self._run.diagnostics() if self._whole is None else self._whole._diagnosed

    def reports(self) -> Iterator[tuple[str, int, pl.DataFrame]]:
        """See :meth:`workbench.ablation.run.AblationRun.reports`; only of the runs that are shown."""
        shown = set(self._runs.filter(pl.col("stage") == "confirmation").select("arm", "seed").rows())
        return (report for report in self._run.reports() if report[:2] in shown)

    def curves(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.curves`."""
        return frame_of(self._lines)

    def cost(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.cost`."""
        said = self._run.cost()
        return said.filter(pl.col("arm").is_in(self.arms)) if "arm" in said.columns else said

    def failures(self) -> dict[str, str]:
        """See :meth:`workbench.ablation.run.AblationRun.failures`."""
        return self._run.failures()

    def provenance(self) -> dict[str, str]:
        """See :meth:`workbench.ablation.run.AblationRun.provenance`."""
        return self._run.provenance()

    def workers(self) -> list[int]:
        """See :meth:`workbench.ablation.run.AblationRun.workers`."""
        return self._run.workers()

    def verdict(self) -> Verdict | None:
        """See :meth:`workbench.ablation.run.AblationRun.verdict`; worked out once."""
        return self.whole._judged[1]

    @cached_property
    def _judged(self) -> tuple[Any, Verdict | None]:
        """What the verdict rests on, and the verdict."""
        held = self._runs.filter(pl.col("stage") == "confirmation").select("run", "status").rows()
        basis = self.about, self.finished, held, self.failures()
        before = self._judged_before
        return before if before is not None and before[0] == basis else (basis, self._run.verdict())

    @property
    def _judged_last(self) -> tuple[Any, Verdict | None] | None:
        """The latest verdict that has been worked out, here or before; no snapshot before is kept alive for it."""
        return self.whole.__dict__.get("_judged", self.whole._judged_before)


_looks: dict[Path, tuple[tuple[Any, ...], Snapshot]] = {}
"""Folder of an ablation -> what its own files looked like, and the latest snapshot."""


def look(folder: Path) -> Snapshot:
    """The ablation in ``folder`` as it is now. One that has finished is read once: nothing in it changes without its own files.

    Raises:
        ConfigError: when there is no ablation in that folder.
    """
    from workbench.ablation.run import AblationRun

    files = tuple(stamp(folder / f"{name}.json") for name in ("ablation", "selection", "finished", "verdict"))
    held, before = _looks.get(folder, (None, None))
    if before is None or held != files or not before.finished:
        before = Snapshot(AblationRun(folder), before)
        _looks[folder] = files, before
    return before


class Planned:
    """An ablation before launch, seen as a run with nothing in it."""

    def __init__(self, ablation: Ablation):
        config = ablation.config
        self.name, self.question, self.arms, self.baseline = config.name, config.question, config.order, config.order[0]
        self.seeds = list(config.confirmation.seeds)
        self.total = len(self.arms) * (config.tuning.trials + len(self.seeds))
        data = config.run(self.baseline, seed=config.tuning.seed).data
        self.metric, self.folder, self.finished = data.metric, ablation.folder.resolve(), False
        self.about: dict[str, Any] = {"config": config.plain(), "views": dict(data.views), "identity": config.identity}
        self._cost = ablation.cost(measure=False)

    def runs(self) -> pl.DataFrame:
        return pl.DataFrame(schema=RUN_SCHEMA)

    def cost(self) -> pl.DataFrame:
        return self._cost

    def lines(self) -> list[Any]:
        return []

    def failures(self) -> dict[str, str]:
        return {}

    def provenance(self) -> dict[str, str]:
        return {"ablation": self.about["identity"]}

    def workers(self) -> list[int]:
        return []

    def verdict(self) -> None:
        return None


Run: TypeAlias = "AblationRun | Snapshot"
