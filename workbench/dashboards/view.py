"""The interface between dashboards and runs: everything that panels, tables, figures, report and export read of a run.

An ablation that is running or finished (:class:`workbench.ablation.run.AblationRun`), one that has not been launched
(:class:`PlannedRun`), runs of ``workbench train`` (:class:`SingleRuns`) and a
:class:`~workbench.dashboards.snapshot.Snapshot` of any of them provide it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import polars as pl

from workbench.ablation.spec.tuning import Tuning
from workbench.config import ConfigError
from workbench.formatting import distinct_ends
from workbench.metric import BITS_PER_BYTE, Metric
from workbench.results.store import RunFolder
from workbench.results.tables import (
    CURVE_SCHEMA,
    DIAGNOSTICS_SCHEMA,
    RUN_SCHEMA,
    SCORES_SCHEMA,
    Line,
    diagnostics_of,
    frame_of,
    points_of,
    scores_of,
)
from workbench.status import Stage

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.design import Design
    from workbench.ablation.spec.protocol import Components
    from workbench.ablation.verdict.effort import Effort
    from workbench.ablation.verdict.summary import Summary
    from workbench.ablation.verdict.verdict import Verdict


@runtime_checkable
class RunView(Protocol):
    """What dashboards read of a run."""

    @property
    def name(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def identity(self) -> str:
        """Hash of the ablation's configuration."""

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The fields of the ablation's YAML file as plain data; empty of what is no ablation."""

    @property
    def folder(self) -> Path: ...

    @property
    def results(self) -> Path:
        """The folder of results that holds this ablation and others."""

    @property
    def exists(self) -> bool:
        """Whether there is something on disk to read; False once the folder of a launched ablation is deleted."""

    @property
    def arms(self) -> list[str]:
        """Arm names, the baseline first."""

    @property
    def baseline(self) -> str: ...

    @property
    def names(self) -> Mapping[str, str]:
        """Arm -> the name under which it is shown."""

    @property
    def seeds(self) -> list[int]:
        """Seeds of the confirmation runs of each arm."""

    @property
    def tuning(self) -> Tuning:
        """The search for each arm's setting, as declared."""

    @property
    def planned(self) -> Mapping[str, Mapping[Stage, int]]:
        """Arm -> stage -> runs planned."""

    @property
    def components(self) -> Components | None:
        """How confirmation runs cross seeds of single components, if they do."""

    @property
    def total(self) -> int:
        """Planned runs, of all arms and stages."""

    @property
    def metric(self) -> Metric: ...

    @property
    def alpha(self) -> float:
        """Significance level of the verdict."""

    @property
    def allow_mismatch(self) -> str | None:
        """Why arms may differ in what the budget matches."""

    @property
    def views(self) -> Mapping[str, Sequence[str]]:
        """Panels that the data source asks for -> columns of report.parquet that they draw."""

    @property
    def has_suites(self) -> bool:
        """Whether evaluation suites have measured anything."""

    @property
    def scored_at(self) -> int:
        """Time of the newest change of what suites measured, in nanoseconds since 1970; 0 before the first one."""

    @property
    def contexts(self) -> Mapping[str, int]:
        """Arm -> tokens of the rows that it is trained on, where they are known."""

    @property
    def design(self) -> Design | None:
        """What ablations at other sizes must have in common with it; None of what is no launched ablation."""

    @property
    def data_cards(self) -> Mapping[str, Any]:
        """Arm -> what its data splits hold."""

    @property
    def launched(self) -> bool:
        """Whether it has ever been launched."""

    @property
    def finished(self) -> bool:
        """Whether every planned run has ended."""

    @property
    def archived(self) -> bool:
        """Whether tables and verdict are all that is left: no checkpoints, no logs."""

    def runs(self) -> pl.DataFrame:
        """One row per training run (columns: ``RUN_SCHEMA``)."""

    def lines(self) -> list[Line]:
        """Every run with its logged points."""

    def curves(self) -> pl.DataFrame:
        """Every logged point (columns: ``CURVE_SCHEMA``)."""

    def diagnostics(self) -> pl.DataFrame:
        """Logged layer diagnostics (columns: ``DIAGNOSTICS_SCHEMA``)."""

    def reports(self) -> Iterable[tuple[str, int, pl.DataFrame]]:
        """Arm, seed and per-document measurements of every finished confirmation run."""

    def scores(self) -> pl.DataFrame:
        """What evaluation suites measured (columns: ``SCORES_SCHEMA``, then labels of documents)."""

    def cost(self) -> pl.DataFrame:
        """The cost card, one row per arm."""

    def efforts(self) -> Mapping[str, Effort]:
        """Arm -> how well it was tuned, for arms whose tuning has ended."""

    def failures(self) -> dict[str, str]:
        """Arms that could not be confirmed -> reason."""

    def provenance(self) -> dict[str, str]:
        """Code version, data fingerprint, device, date."""

    def deviations(self) -> list[dict[str, Any]]:
        """Changes of the analysis after launch."""

    def workers(self) -> list[int]:
        """Process ids of live workers."""

    def waiting_workers(self) -> list[str]:
        """Jobs whose workers have not started."""

    def verdict(self) -> Verdict | None:
        """The verdict; None while confirmation runs are missing."""

    def summary(self, verdict: Verdict | None = None) -> Summary | None:
        """The verdict (default :meth:`verdict`) in short; None while there is none."""


class EmptyRun:
    """A view without runs; base class of views that provide only some members.

    Args:
        folder: the folder that the view reads.
        arms: arm names, the baseline first.
    """

    name = ""
    question = ""
    identity = ""
    exists = True
    launched = False
    tuning = Tuning(trials=0)
    components: Components | None = None
    metric = BITS_PER_BYTE
    alpha = 0.05
    allow_mismatch: str | None = None
    finished = False
    archived = False
    has_suites = False
    scored_at = 0
    design: Design | None = None

    def __init__(self, folder: Path, arms: Sequence[str] = ()):
        self.folder, self.arms = folder, list(arms)
        self.seeds: list[int] = []
        self.views: dict[str, Sequence[str]] = {}
        self.data_cards: dict[str, Any] = {}
        self.contexts: dict[str, int] = {}
        self.configuration: Mapping[str, Any] = {}

    @property
    def results(self) -> Path:
        return self.folder.parent

    @property
    def baseline(self) -> str:
        return self.arms[0] if self.arms else ""

    @property
    def names(self) -> Mapping[str, str]:
        return {arm: arm for arm in self.arms}

    @property
    def planned(self) -> Mapping[str, Mapping[Stage, int]]:
        stages = {Stage.TUNING: self.tuning.trials, Stage.CONFIRMATION: len(self.seeds)}
        return dict.fromkeys(self.arms, stages)

    @property
    def total(self) -> int:
        return sum(sum(stages.values()) for stages in self.planned.values())

    def runs(self) -> pl.DataFrame:
        return pl.DataFrame(schema=RUN_SCHEMA)

    def lines(self) -> list[Line]:
        return []

    def curves(self) -> pl.DataFrame:
        return pl.DataFrame(schema=CURVE_SCHEMA)

    def diagnostics(self) -> pl.DataFrame:
        return pl.DataFrame(schema=DIAGNOSTICS_SCHEMA)

    def reports(self) -> Iterable[tuple[str, int, pl.DataFrame]]:
        return []

    def scores(self) -> pl.DataFrame:
        return pl.DataFrame(schema=SCORES_SCHEMA)

    def cost(self) -> pl.DataFrame:
        return pl.DataFrame(schema={"arm": pl.String})

    def efforts(self) -> Mapping[str, Effort]:
        return {}

    def failures(self) -> dict[str, str]:
        return {}

    def provenance(self) -> dict[str, str]:
        return {}

    def deviations(self) -> list[dict[str, Any]]:
        return []

    def workers(self) -> list[int]:
        return []

    def waiting_workers(self) -> list[str]:
        return []

    def verdict(self) -> Verdict | None:
        return None

    def summary(self, verdict: Verdict | None = None) -> Summary | None:
        from workbench.ablation.verdict.summary import summarise

        verdict = verdict or self.verdict()
        return None if verdict is None else summarise(verdict)


class ResultsFolder(EmptyRun):
    """A folder of results in which no ablation is open."""

    name = "Ablations"

    @property
    def results(self) -> Path:
        return self.folder


class PlannedRun(EmptyRun):
    """An ablation that has not been launched: its description and cost card, no runs.

    Args:
        ablation: the ablation.
        cost: its cost card; default one without measured times and memory.
    """

    def __init__(self, ablation: Ablation, cost: pl.DataFrame | None = None):
        config = ablation.config
        super().__init__(ablation.folder.resolve(), config.order)
        self.name, self.question, self.identity = config.name, config.question, config.identity
        self.configuration = config.plain()
        self.seeds, self.tuning = list(config.planned_seeds), config.tuning
        self._planned = {name: arm.planned for name, arm in ablation.arms.items()}
        self.alpha, self.allow_mismatch = config.alpha, config.budget.allow_mismatch
        self.components = config.confirmation.components
        data = ablation.arms.baseline.run().data
        self.metric, self.views = data.metric, dict(data.judged.views)
        self._cost = ablation.cost(measure=False) if cost is None else cost

    @property
    def planned(self) -> Mapping[str, Mapping[Stage, int]]:
        return self._planned

    def cost(self) -> pl.DataFrame:
        return self._cost

    def provenance(self) -> dict[str, str]:
        return {"ablation": self.identity}


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of one length, that differ from each other.

    Raises:
        ConfigError: when a folder is given twice.
    """
    if len({path.resolve() for path in folders}) < len(folders):  # links and dots included
        raise ConfigError.at("folders", got=[str(path) for path in folders], expected="every folder once")
    return distinct_ends([path.parts for path in folders], "/")


class SingleRuns(EmptyRun):
    """Runs of ``workbench train`` side by side, each as an arm of its own.

    Args:
        folders: folders of runs; a folder's name is the name of its arm, with as many of its parents as it takes to
            tell two runs apart.

    Raises:
        ConfigError: when a folder is not that of a run, or the runs differ in their metric.
    """

    def __init__(self, *folders: str | Path):
        self._folders = [RunFolder(Path(folder).absolute()) for folder in folders]
        self._records = [folder.record() for folder in self._folders]
        metrics = [record.metric for record in self._records]
        if len(set(metrics)) != 1:
            raise ConfigError.at(
                "folders",
                got=f"runs measured in {', '.join(sorted({m.unit for m in metrics})) or 'nothing'}",
                expected="at least one run, all with the same metric",
            )
        super().__init__(self._folders[0].path.parent, distinct_names([folder.path for folder in self._folders]))
        self.name, self.metric = ", ".join(self.arms), metrics[0]

    def lines(self) -> list[Line]:
        return [
            Line(arm, record.stage, arm, record.seed, points_of(folder))
            for arm, folder, record in zip(self.arms, self._folders, self._records)
        ]

    def curves(self) -> pl.DataFrame:
        return frame_of(self.lines())

    def diagnostics(self) -> pl.DataFrame:
        return diagnostics_of(zip(self.lines(), self._folders))

    @property
    def has_suites(self) -> bool:  # type: ignore[override]
        return any(list(folder.suites_path.glob("*.parquet")) for folder in self._folders)

    def scores(self) -> pl.DataFrame:
        return scores_of(zip(self.lines(), self._folders))
