"""An ablation, from its configuration to a folder that workers can work on."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.studies import earlier_trials, set_aside_damaged
from workbench.ablation.matching.cost_card import check_budget, cost_table, measure_arms, residual_table, timed
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.registration import deviate, register
from workbench.config import ConfigError, difference
from workbench.data import Source, prepare
from workbench.environment import environment
from workbench.files import locked, read_json, write_json


def usable_cores() -> int:
    """Cores that this process may run on: those of taskset or a container's set, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES knows the GPUs of this process."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


class Ablation:
    """Arms under comparison, before launch.

    Example::

        ablation = wb.Ablation.load("sweeps/quickstart.yaml")
        ablation.cost()
        run = ablation.launch()

    Args:
        config: the ablation as data.
        results: folder of all results.
    """

    def __init__(self, config: AblationConfig, results: str | Path = "results"):
        self.config, self.results = config, Path(results)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), results: str | Path = "results") -> Ablation:
        """From a YAML file, with overrides such as ``"base.training.tokens=1e6"``.

        Raises:
            ConfigError: with every mistake, its path and what to do.
        """
        return cls(AblationConfig.load(path, overrides), results)

    @classmethod
    def parse(cls, data: dict[str, Any], results: str | Path = "results") -> Ablation:
        """From a mapping with the fields of the YAML file."""
        return cls(AblationConfig.parse(data), results)

    def __repr__(self) -> str:
        return f"Ablation({self.config.name!r}: {', '.join(self.config.order)}; identity {self.config.identity})"

    @property
    def folder(self) -> Path:
        return self.results / self.config.name

    @property
    def workers(self) -> int:
        """Worker processes that ``launch`` starts."""
        if self.config.launch.workers:
            return self.config.launch.workers
        return torch.cuda.device_count() or min(2, usable_cores())

    @property
    def threads(self) -> int:
        """Threads of one trial, so that the workers share the machine."""
        return max(1, usable_cores() // self.workers)

    def describe(self, arm: str) -> str:
        """The expanded layer table of an arm."""
        return self.config.run(arm, seed=0).model.describe()

    def cost(self, *, measure: bool = True, progress: Callable[[str], None] | None = None) -> pl.DataFrame:
        """The cost card, one row an arm (columns: :func:`workbench.ablation.matching.cost_card.cost_table`).

        Args:
            measure: train every arm, or a shrunken one, for a few real steps on this machine, to tell time and memory.
        """
        return self._cost(measure=measure, progress=progress)[1]

    def _cost(
        self,
        *,
        measure: bool = True,
        data: Mapping[str, Source] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> tuple[AblationConfig, pl.DataFrame]:
        """This ablation with the solver's values written down, and its cost card."""
        config = self.config
        measured = measure_arms(config, threads=self.threads, data=data, progress=progress) if measure else {}
        config = timed(config, measured) if measure else config
        return config.fixed(), cost_table(config, measured)

    def pilot(self, seeds: int = 8, arms: int = 1) -> Ablation:
        """A small ablation that tells the noise before this one: the baseline and the first ``arms`` others as they are,
        nothing tuned, on seeds of its own, measured on the selection split so that the report split stays sealed."""
        config = self.config
        taken = {*config.confirmation.seeds, config.tuning.seed}
        own = [seed for seed in range(2_000, 2_000 + seeds + len(taken)) if seed not in taken][:seeds]
        like = [config.like] if config.like else []
        names = list(dict.fromkeys([*config.order[: 1 + arms], *like]))
        return Ablation(
            config.changed(
                name=f"{config.name}-pilot",
                arms={arm: config.arms[arm] for arm in names},
                baseline=config.order[0],
                tuning={"trials": 0},
                confirmation={"seeds": own, "split": "selection"},
                exploratory="a pilot",
            ),
            self.results,
        )

    def create(self, progress: Callable[[str], None] = lambda line: None) -> AblationRun:
        """The folder of this ablation, made now or found as an earlier call left it; starts nothing.

        Raises:
            ConfigError: when the folder holds an ablation with other content, when arms do not match the budget, or
                when the data cannot be prepared.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "plan.lock"):
            about = read_json(self.folder / "ablation.json")
            if not about:
                about = self._create(progress)
            elif about["identity"] != self.config.identity and (deviation := self._deviation(about)):
                about = self._change(about, deviation)
                self._prepare_again(about["data"], progress)
            elif about["identity"] != self.config.identity:
                changes = difference(about["canonical"], self.config.canonical())
                shown = "; ".join(
                    f"{path}: {old!r} there, {new!r} here" for path, (old, new) in list(changes.items())[:6]
                )
                raise ConfigError.at(
                    "name",
                    got=f"{self.config.name!r}, which holds another ablation",
                    expected="a name of its own for every ablation",
                    do=f"Differences: {shown}. Give another name (name=...), or remove {self.folder}.",
                )
            else:
                self._prepare_again(about["data"], progress)
                if (anew := self._carried_out(about)) != about:
                    write_json(self.folder / "ablation.json", anew)
        run = AblationRun(self.folder)
        with locked(self.folder / "plan.lock"):
            if not run.workers():
                set_aside_damaged(self.folder)
            Plan(run).advance(relaunch=True)
        return run

    def launch(self, workers: int | None = None, progress: Callable[[str], None] = lambda line: None) -> AblationRun:
        """Start, or go on with, this ablation. Returns at once; trials are processes of their own.

        A finished trial is never repeated. Runs that crashed or ran out of memory are tried again.

        Args:
            workers: worker processes, those still alive from an earlier call counted in.
        """
        run = self.shared_by(workers).create(progress)
        if not run.finished:
            run.start_workers(self.workers if workers is None else workers)
        return run

    def shared_by(self, workers: int | None) -> Ablation:
        """This ablation with at least as many workers sharing the machine, so that a trial takes fewer threads."""
        if workers is None or workers <= self.workers:
            return self
        launch = self.config.launch.model_copy(update={"workers": workers})
        return Ablation(self.config.model_copy(update={"launch": launch}), self.results)

    def _create(self, progress: Callable[[str], None]) -> dict[str, Any]:
        if self.config.budget.axis != "seconds":  # before anything takes time
            check_budget(self.config, residual_table(self.config))
        prepared = {arm: self._prepare(arm, progress) for arm in self.config.order}
        measures = self.config.launch.measure or self.config.budget.axis == "seconds"
        config, table = self._cost(measure=measures, data=prepared, progress=progress)
        check_budget(config, table)
        _check_alike(prepared)
        data = {arm: own.fingerprint for arm, own in prepared.items()}
        where = environment()
        about = {
            "name": config.name,
            "identity": config.identity,
            "order": config.order,
            "config": config.plain(),
            "canonical": config.canonical(),
            "data": data,
            "data_cards": {arm: own.card for arm, own in prepared.items()},
            "metric": config.run(config.order[0], seed=config.tuning.seed).data.metric.plain(),
            "views": dict(config.run(config.order[0], seed=config.tuning.seed).data.views),
            "workers": self.workers,
            "warm_start": self._earlier(),
            "storage_key": secrets.token_hex(4) if config.launch.storage else None,
            "gpus": visible_gpus(),
            "threads": self.threads,
            "cost": table.to_dicts(),
            "provenance": {
                "ablation": config.identity,
                "code": where["code"],
                "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "data": ", ".join(sorted(set(data.values()))),
                "device": where["device"],
                "python": where["python"],
                **where["libraries"],
            },
        }
        about["registration"] = register(about)
        write_json(self.folder / "ablation.json", about)
        return about

    def _deviation(self, about: dict[str, Any]) -> dict[str, Any] | None:
        """What this configuration changes in how a launched ablation is read; None where it changes what is run."""
        return deviate(about, self.config.canonical(), self.config.deviation)

    def _change(self, about: dict[str, Any], deviation: dict[str, Any]) -> dict[str, Any]:
        """Write a changed analysis down, beside what was declared at launch."""
        if AblationRun(self.folder).workers():
            raise ConfigError.at(
                "deviation",
                got="workers that are still at work",
                expected="a stopped ablation",
                do=f"Stop them first: workbench stop {self.folder}.",
            )
        config = self.config.fixed(about["config"]["budget"]["solved"])
        changed = {
            **self._carried_out(about),
            "config": config.plain(),
            "canonical": config.canonical(),
            "identity": config.identity,
        }
        deviation["hash"] = register(changed)["hash"]
        changed["deviations"] = [*about.get("deviations", []), deviation]
        write_json(self.folder / "ablation.json", changed)
        return changed

    def _carried_out(self, about: dict[str, Any]) -> dict[str, Any]:
        """``about`` with the way in which the work is carried out from now on, on this machine."""
        launch, held = self.config.launch.plain(), about["config"]["launch"]
        key = about.get("storage_key")
        if launch["storage"] != held.get("storage"):
            if AblationRun(self.folder).workers():
                raise ConfigError.at(
                    "launch.storage",
                    got="another database, while workers are at work with the old one",
                    expected="a stopped ablation",
                    do=f"First: workbench stop {self.folder}.",
                )
            key = secrets.token_hex(4) if launch["storage"] else None
        return {
            **about,
            "config": {**about["config"], "launch": launch},
            "storage_key": key,
            "workers": self.workers,
            "threads": self.threads,
            "gpus": visible_gpus(),
        }

    def _earlier(self) -> dict[str, list[dict[str, Any]]]:
        """Arm -> the trials of earlier ablations that its sampler starts from; as many for every arm."""
        config = self.config
        found = {
            arm: [
                trial for folder in config.tuning.warm_start for trial in earlier_trials(folder, arm, config.space(arm))
            ]
            for arm in config.order
        }
        counts = {arm: len(trials) for arm, trials in found.items()}
        if config.tuning.warm_start and (len(set(counts.values())) > 1 or not min(counts.values())):
            raise ConfigError.at(
                "tuning.warm_start",
                got=f"finished trials inside the search space: {counts}",
                expected="as many for every arm, and at least one",
                do="Arms are found by name; their tuned fields must be the same and their values lie in the "
                "ranges here.",
            )
        return found

    def _prepare(self, arm: str, progress: Callable[[str], None]) -> Source:
        run = self.config.run(arm, seed=self.config.tuning.seed)
        return prepare(run.data, run.model.vocabulary or 0, self.results / "cache", progress)

    def _prepare_again(self, data: dict[str, str], progress: Callable[[str], None]) -> None:
        """Make prepared data that somebody has removed anew; the trials to come must see what the earlier ones saw."""
        for arm, fingerprint in data.items():
            try:
                now = Source.open(self.results / "cache", fingerprint).fingerprint
            except ConfigError:
                now = self._prepare(arm, progress).fingerprint
            if now != fingerprint:
                raise ConfigError.at(
                    f"arms.{arm}.data",
                    got=f"data that has changed since the launch ({now})",
                    expected=f"the data of the launch ({fingerprint})",
                    do="Put the text back, or give the ablation another name (name=...).",
                )


def _check_alike(prepared: dict[str, Source]) -> None:
    """Raise ConfigError where an arm, the baseline being the first, is measured on other documents: their differences would
    be no pairs."""
    wanted, *_ = (source.report.columns for source in prepared.values())
    for arm, source in prepared.items():
        own = source.report.columns
        if set(own) != set(wanted) or not all(np.array_equal(own[name], wanted[name]) for name in wanted):
            raise ConfigError.at(
                f"arms.{arm}.data",
                got="report documents of its own",
                expected="every arm measured on the same ones",
                do="Arms may differ in tokenizer and training data, not in what is measured.",
            )
