"""A run that exists in memory only: generated frames behind the interface of an AblationRun."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from workbench.ablation.spec.protocol import ScoreMetric
from workbench.ablation.spec.tuning import Tuning
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge, judge_in_order
from workbench.ablation.verdict.scores import final_scores, measured_score
from workbench.ablation.verdict.sequential import Reading
from workbench.ablation.verdict.verdict import Verdict
from workbench.dashboards.view import EmptyRun
from workbench.results.tables import (
    CURVE_SCHEMA,
    DIAGNOSTICS_SCHEMA,
    POINT_SCHEMA,
    RUN_SCHEMA,
    SCORES_SCHEMA,
    Line,
    Points,
)


class FakeRun(EmptyRun):
    """An ablation of ``arms`` whose runs have completed the fraction ``progress`` of their steps."""

    def __init__(
        self,
        folder: Path,
        arms: tuple[str, ...] = ("full", "gdn"),
        *,
        trials: int = 3,
        seeds: int = 3,
        points: int = 20,
        progress: float = 1.0,
        status: str = "done",
        confirmed: bool = True,
        diagnosed: bool = False,
        tuned: tuple[str, ...] = ("lr", "norm"),
        looks: tuple[int, ...] = (),
        suites: bool = False,
    ):
        super().__init__(folder, arms)
        self.launched = True
        self.name, self.question = "a <b>name</b>", "Is <i>gdn</i> better & cheaper?"
        self.seeds, self.tuning = list(range(seeds)), Tuning(trials=trials)
        self.trials, self.points, self.progress = trials, points, progress
        self.status, self.confirmed, self.looks = status, confirmed, looks
        self.diagnosed, self.has_suites = diagnosed, suites
        self.contexts = dict.fromkeys(arms, 256)
        self.tuned, self.broken = tuned, False

    @property
    def exists(self) -> bool:  # type: ignore[override]
        return self.folder.exists()

    @property
    def finished(self) -> bool:  # type: ignore[override]
        return self.progress == 1.0 and self.trials > 0

    def _each(self) -> list[dict[str, Any]]:
        each = []
        for a, arm in enumerate(self.arms):
            for i in range(self.trials):
                values = {"lr": 10.0 ** (-4 + i), "norm": ["pre", "post"][i % 2]}
                each.append(
                    {
                        "arm": arm,
                        "stage": "tuning",
                        "seed": 1000,
                        "i": i,
                        "a": a,
                        "selected": i == 1,
                        "run": f"tuning-{a}-{i}",
                        "hyperparameters": {k: values[k] for k in self.tuned},
                    }
                )
            for seed in self.seeds if self.confirmed and self.trials else []:
                each.append(
                    {
                        "arm": arm,
                        "stage": "confirmation",
                        "seed": seed,
                        "i": seed,
                        "a": a,
                        "selected": False,
                        "run": f"confirmation-{a}-{seed}",
                        "hyperparameters": {},
                    }
                )
        return each

    def runs(self) -> pl.DataFrame:
        if self.broken:
            raise OSError("the <disk> is away")
        done, step = self.status == "done" and self.progress == 1.0, int(self.points * self.progress)
        status = self.status if self.progress == 1.0 else "running"
        rows = [
            {
                **{k: run[k] for k in ("arm", "stage", "run", "seed", "selected")},
                "status": status,
                "step": step,
                "steps": self.points,
                "tokens": step * 1000,
                "target_tokens": self.points * 1000,
                "seconds": step * 0.5,
                "seconds_left": None if done else 1.0,
                "loss": 3.0,
                "metric": self.metric.unit,
                "selection_value": 1.2 + 0.1 * run["i"] if done else None,
                "report_value": 1.1 if done else None,
                "tokens_per_second": 2000.0,
                "parameters": 1_000_000,
                "flops": step * 1e9,
                "hyperparameters": json.dumps(run["hyperparameters"]),
                "reason": None if done else "loss <nan> & more",
                "folder": str(self.folder),
            }
            for run in self._each()
        ]
        return pl.DataFrame(rows, schema=RUN_SCHEMA, orient="row")

    def curves(self) -> pl.DataFrame:
        rows = []
        for run in self._each():
            for step in range(1, int(self.points * self.progress) + 1):
                loss = 9 / step**0.3 + 0.1 * run["a"] + 0.05 * run["i"]
                rows.append(
                    {
                        **{k: run[k] for k in ("arm", "stage", "run", "seed")},
                        "step": step,
                        "tokens": step * 1000,
                        "flops": step * 1e9,
                        "loss": loss,
                        "seconds": step * (0.5 + 0.01 * run["i"]),
                        "learning_rate": 1e-3,
                        "gradient_norm": 1.0,
                        "tokens_per_second": 2000.0,
                        "selection_value": loss / 3 if step % 5 == 0 else None,
                    }
                )
        return pl.DataFrame(rows, schema=CURVE_SCHEMA, orient="row")

    def lines(self) -> list[Line]:
        frames = self.curves().partition_by("arm", "stage", "run", "seed", as_dict=True, maintain_order=True)
        return [Line(*key, Points(frame.select(list(POINT_SCHEMA)))) for key, frame in frames.items()]

    def diagnostics(self) -> pl.DataFrame:
        rows = [
            (run["arm"], run["stage"], run["run"], run["seed"], step, layer, name, None, step + layer + run["i"] + half)
            for run in self._each()
            for step in (1, 10)
            for layer in range(3)
            for name, half in (("state_norm", 0.0), ("half_life_p10", 0.5))
            if self.diagnosed
        ]
        rows += [
            (run["arm"], run["stage"], run["run"], run["seed"], 10, 1, "load", expert, 1.0 + expert)
            for run in self._each()
            for expert in range(4)
            if self.diagnosed
        ]
        return pl.DataFrame(rows, schema=DIAGNOSTICS_SCHEMA, orient="row")

    def scores(self) -> pl.DataFrame:
        """Two tasks of RULER at three lengths, which later arms solve better, and the bits of a text."""
        random, rows = np.random.default_rng(1), []
        for run in self._each() if self.has_suites else []:
            if run["stage"] != "confirmation":
                continue
            for task in ("vt", "niah_single_1"):
                lengths = np.repeat([128, 256, 1024], 8)
                rate = np.clip(0.9 - 0.2 * np.log2(lengths / 128) / (1 + run["a"]) + random.normal(0, 0.05), 0, 1)
                right = (random.uniform(size=24) < rate).astype(float)
                rows += self._documents(run, "ruler", task, "accuracy", right, lengths)
            bits = random.normal(2 - 0.1 * run["a"], 0.01, 4)
            rows += self._documents(run, "loss", "text", "bits per byte", bits)
        return pl.DataFrame(rows, schema={**SCORES_SCHEMA, "length": pl.Int64}, orient="row")

    def _documents(
        self, run: Any, suite: str, task: str, metric: str, values: np.ndarray, lengths: Any = None
    ) -> list[dict[str, Any]]:
        about = {k: run[k] for k in ("arm", "stage", "run", "seed")}
        about |= {"step": self.points, "split": "report", "suite": suite, "task": task, "metric": metric, "count": 1.0}
        about |= {"higher_is_better": suite == "ruler", "upper": 1.0 if suite == "ruler" else None}
        whole = about | {"value": float(values.mean()), "count": float(len(values))}
        return [whole] + [
            about | {"document": d, "value": float(v), "length": None if lengths is None else int(lengths[d])}
            for d, v in enumerate(values)
        ]

    def cost(self) -> pl.DataFrame:
        return pl.DataFrame(
            [
                {
                    "arm": arm,
                    "parameters": 1_234_567,
                    "cache_bytes": 3_400_000_000,
                    "training_flops": 4.1e15,
                    "trials": 6,
                    "seconds_per_trial": 120.0,
                    "residual": 0.0,
                    "mismatch": "" if arm == self.baseline else "tokens +9.0%",
                }
                for arm in self.arms
            ]
        )

    def provenance(self) -> dict[str, str]:
        return {"code": "1.0+<script>alert(1)</script>"}

    def workers(self) -> list[int]:
        return [] if self.finished else [1, 2]

    def verdict(self) -> Verdict | None:
        if not (self.finished and self.confirmed):
            return None
        seeds = range(max(4, len(self.seeds)))  # fewer decide nothing
        noise, sizes = np.random.default_rng(0), np.array([900, 1200, 700])
        base = noise.normal(0.7, 0.01, (len(seeds), 3))
        measured = []
        for a, arm in enumerate(self.arms):
            losses = sizes * (base + 0.02 * a + noise.normal(0, 5e-4, base.shape))
            failed = {} if self.status == "done" else {seed: "diverged" for seed in seeds}
            amounts = {} if failed else {seed: losses[i] for i, seed in enumerate(seeds)}
            measured.append(ArmMeasurements(arm, amounts, sizes, failed))
        readings = None
        if self.looks:
            readings = dict.fromkeys(self.arms[1:], Reading(self.looks.index(len(seeds)) + 1, self.looks))
        verdict = judge(measured[0], measured[1:], seeds=seeds, replicates=200, readings=readings)
        if not self.has_suites:
            return verdict
        scores = final_scores(self.scores(), self.runs())
        secondary = [
            ScoreMetric(suite="ruler", task="vt", metric="accuracy", where={"length": 1024}),
            ScoreMetric(suite="loss", metric="bits per byte", margin=0.05),
            ScoreMetric(suite="longbench", metric="F1"),
        ]
        judged = judge_in_order(
            [measured_score(scores, metric, self.arms, seeds) for metric in secondary],
            baseline=self.baseline,
            seeds=seeds,
            replicates=200,
        )
        return replace(verdict, secondary=judged)
