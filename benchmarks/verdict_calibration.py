"""Calibration of the verdict: how often it claims a difference where there is none, and how often it detects a planted
one.

    python benchmarks/verdict_calibration.py                    # synthetic tables, and the stored pool of real runs
    python benchmarks/verdict_calibration.py --train 48         # train the pool again, on 48 seeds (two runs each)

*Synthetic tables* are ablations whose tables are drawn from a model of seeds, documents and tuning trials; nothing is
trained. *Resampled runs* are ablations assembled from a pool of real training runs of one setting (and of one with a
planted fault) on many seeds. Both go through the steps of a real ablation after training: choice on selection values,
pairing by seed, ratio of sums, t-test, Holm, equivalence, bootstrap (workbench.ablation.verdict.judge). The scenarios
are our own definitions. Results go to results/calibration.

Legend: S seeds, D documents.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.random import Generator
from scipy import stats

from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.statistics import Floats, power_of
from workbench.ablation.verdict.verdict import Verdict
from workbench.environment import environment
from workbench.status import Status

OUTPUT = Path(__file__).parents[1] / "results" / "calibration"
REPLICATES = 400
"""Bootstrap draws per arm. The bootstrap does not enter the verdict, so a few are enough."""
FAULT = 1.3
"""The planted fault of the real pool: the learning rate is divided by this factor."""


@dataclass(frozen=True)
class Rate:
    """A count of ablations, with its exact (Clopper–Pearson) 95 % interval."""

    count: int
    of: int

    def plain(self) -> dict[str, Any]:
        low, high = stats.binomtest(self.count, self.of).proportion_ci(0.95, method="exact")
        return {
            "count": self.count,
            "of": self.of,
            "rate": self.count / self.of,
            "low": float(low),
            "high": float(high),
        }

    def within(self, rate: float) -> bool:
        """Whether the count lies inside the central 95 % of Binomial(of, rate)."""
        low, high = stats.binom.ppf([0.025, 0.975], self.of, rate)
        return bool(low <= self.count <= high)


@dataclass(frozen=True)
class Scenario:
    """How the tables of a synthetic ablation are drawn. The sd over seeds is 1."""

    name: str
    arms: int = 4
    seeds: int = 5
    rho: float = 0.5
    """Correlation of arms over paired seeds."""
    effect: float = 0.0
    """True difference of the first arm to the baseline, in units of the sd of paired differences."""
    tails: float | None = None
    """Degrees of freedom of a t-distribution for the noise over seeds; None is normal."""
    documents: int = 24
    document_sd: float = 0.5
    """Standard deviation over documents of the interaction of arm and document."""
    trials: int = 0
    """Tuning trials per arm; 0 uses the best setting."""
    spacing: float = 0.0
    """How much worse each setting is than the one before it."""
    selection_noise: float = 1.0
    """Noise of a tuning trial on the selection split."""
    margin: float | None = None
    """Equivalence margin, in units of the sd of paired differences."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """Expected rates: ``claims`` (at most), ``detected`` and ``equivalent`` (planned power)."""

    @property
    def sd_difference(self) -> float:
        return math.sqrt(2 * (1 - self.rho))


def _power(seeds: int, effect: float, arms: int) -> dict[str, float]:
    return {"detected": power_of(seeds, effect, 0.05 / arms)}


SCENARIOS = (
    Scenario("A/A", expected={"claims": 0.05}),
    Scenario("A/A, one arm", arms=1, expected={"claims": 0.05}),
    Scenario("A/A, unpaired noise (rho 0), 8 seeds", rho=0.0, seeds=8, expected={"claims": 0.05}),
    Scenario("A/A, heavy tails (t with 3 degrees of freedom)", tails=3.0, expected={"claims": 0.05}),
    Scenario("A/A, tuned, settings well apart", trials=3, spacing=10.0, expected={"claims": 0.05}),
    Scenario("A/A, tuned, settings one seed's sd apart", trials=3, spacing=1.0),
    Scenario("effect of 1.5 sd, one arm", arms=1, effect=1.5, expected=_power(5, 1.5, 1)),
    Scenario("effect of 1.5 sd, one arm, 8 seeds", arms=1, seeds=8, effect=1.5, expected=_power(8, 1.5, 1)),
    Scenario("effect of 2.5 sd in one of four arms", effect=2.5, expected=_power(5, 2.5, 4)),
    Scenario("equal, margin of 2 sd", arms=1, seeds=5, margin=2.0, expected={"claims": 0.05}),
    Scenario("different by the margin of 2 sd", arms=1, seeds=5, margin=2.0, effect=2.0),
)
"""The simulated ablations. Arms tuned over settings that are one sd over seeds apart have no expected rate: equal arms
with different chosen settings do differ."""


def draw(scenario: Scenario, rng: Generator) -> Verdict:
    """One synthetic ablation, from tuning to verdict."""
    S, D, arms = scenario.seeds, scenario.documents, scenario.arms + 1
    sizes_D = rng.integers(200, 2000, D)

    def noise(*shape: int) -> Floats:
        if scenario.tails is None:
            return rng.normal(size=shape)
        return rng.standard_t(scenario.tails, shape) / math.sqrt(scenario.tails / (scenario.tails - 2))

    shared_S = noise(S)
    document_D = 20.0 * rng.normal(size=D)  # documents differ far more than seeds; cancels in differences
    measured = []
    for arm in range(arms):
        setting = 0
        if scenario.trials:  # as in a real ablation, the smallest selection value
            values = scenario.spacing * np.arange(scenario.trials) + scenario.selection_noise * rng.normal(
                size=scenario.trials
            )
            setting = int(values.argmin())
        level = 100.0 + setting * scenario.spacing + (scenario.effect * scenario.sd_difference if arm == 1 else 0.0)
        seed_S = math.sqrt(scenario.rho) * shared_S + math.sqrt(1 - scenario.rho) * noise(S)
        interaction_SD = document_D + scenario.document_sd * rng.normal(size=(S, D))
        # centred, so that the mean over documents is the seed's
        interaction_SD -= ((interaction_SD - document_D) * sizes_D).sum(1, keepdims=True) / sizes_D.sum()
        amounts_SD = sizes_D * (level + seed_S[:, None] + interaction_SD)
        measured.append(ArmMeasurements(f"arm{arm}", dict(enumerate(amounts_SD)), sizes_D))
    margin = None if scenario.margin is None else scenario.margin * scenario.sd_difference
    return judge(measured[0], measured[1:], seeds=range(S), margin=margin, replicates=REPLICATES)


def _count(make: Callable[[], Verdict], ablations: int) -> dict[str, Rate]:
    """Count ablations in which any arm is judged different (claims), the first arm is judged worse (detected) or
    equivalent, and in which the bootstrap interval of the first arm excludes zero."""
    counts = dict.fromkeys(("claims", "detected", "equivalent", "bootstrap"), 0)
    for _ in range(ablations):
        rows = make().rows[1:]
        different = [row.verdict in ("better", "worse") for row in rows]
        counts["claims"] += any(different)
        counts["detected"] += rows[0].verdict == "worse"
        counts["equivalent"] += rows[0].verdict == "equivalent"
        low, high = rows[0].bootstrap_low, rows[0].bootstrap_high
        counts["bootstrap"] += low is not None and high is not None and not low <= 0 <= high
    return {name: Rate(count, ablations) for name, count in counts.items()}


def _report(scenario: dict[str, Any], rates: Mapping[str, Rate], expected: Mapping[str, float]) -> dict[str, Any]:
    plain = {name: rate.plain() for name, rate in rates.items()}
    for name, rate in expected.items():
        plain[name] |= {"expected": rate, "within": rates[name].within(rate)}
        if name == "claims":  # an error rate may be smaller
            plain[name]["within"] |= rates[name].count < rate * rates[name].of
    return {**scenario, "rates": plain}


def calibrate_tables(
    ablations: int = 1000,
    seed: int = 0,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Simulate every scenario ``ablations`` times. Returns its settings, rates with intervals, and expected rates."""
    reports = []
    for number, scenario in enumerate(scenarios):
        progress(scenario.name)
        rng = np.random.default_rng([seed, number])
        rates = _count(lambda scenario=scenario, rng=rng: draw(scenario, rng), ablations)  # type: ignore[misc]
        plain = {k: v for k, v in asdict(scenario).items() if k != "expected"}
        reports.append(_report(plain, rates, scenario.expected))
    return reports


def pool_run(learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of one run of the real pool: two layers of width 32 on Python's standard library, 60 steps."""
    return {
        "model": {"width": 32, "depth": 2, "vocabulary": 512},
        "data": {
            "corpus": {"kind": "stdlib", "limit_bytes": 1_000_000},
            "evaluation_documents": 24,
            "evaluation_bytes": 512,
        },
        "training": {
            "tokens": 60 * 4 * 64,
            "batch_size": 4,
            "context": 64,
            "learning_rate": learning_rate,
            "evaluations": 1,
            "checkpoint_every": 10**9,
            "log_every": 20,
        },
        "seed": seed,
    }


def train_pool(
    seeds: int, progress: Callable[[str], None] = lambda line: None, learning_rate: float = 5e-3
) -> pl.DataFrame:
    """Train the real pool in this process: ``seeds`` seeds of the right setting, and as many with the learning rate
    divided by :data:`FAULT`.

    Columns: setting ("right", "fault"), seed, document, bits, bytes.
    """
    from workbench.training.config import RunConfig
    from workbench.training.trial import new_run, train

    frames = []
    with tempfile.TemporaryDirectory() as scratch:
        for setting, rate in (("right", learning_rate), ("fault", learning_rate / FAULT)):
            for seed in range(seeds):
                progress(f"pool: {setting}, seed {seed}")
                config = RunConfig.parse(pool_run(rate, seed))
                folder = new_run(Path(scratch) / "run", Path(scratch) / "cache", config)
                result = train(folder.path, Path(scratch) / "cache")
                if result["status"] != Status.DONE:
                    raise RuntimeError(f"pool: {setting}, seed {seed} ended as {result['status']}: {result['reason']}")
                report = pl.read_parquet(folder.path / "report.parquet")
                frames.append(
                    report.select(
                        pl.lit(setting).alias("setting"),
                        pl.lit(seed).alias("seed"),
                        "document",
                        (pl.col("nll_nats") / math.log(2)).alias("bits"),
                        "bytes",
                    )
                )
                shutil.rmtree(folder.path)
    return pl.concat(frames)


def calibrate_pool(
    pool: pl.DataFrame, ablations: int = 400, seeds: int = 5, arms: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Ablations assembled from a pool of real runs.

    A/A: baseline and arms use disjoint seeds of the right setting, drawn without replacement, so pairs share nothing
    (rho 0). Planted: the arm has the fault, on the same seeds as the baseline. Ablations share runs, so the intervals
    of the rates are conditional on this pool.
    """
    rng = np.random.default_rng(seed)
    table = {
        key[0]: np.stack(
            [
                part["bits"].to_numpy()
                for _, part in group.sort("seed", "document").group_by("seed", maintain_order=True)
            ]
        )
        for key, group in pool.group_by("setting")
    }
    right_SD, fault_SD = table["right"], table["fault"]
    sizes_D = pool.filter((pl.col("setting") == "right") & (pl.col("seed") == 0)).sort("document")["bytes"].to_numpy()
    per_byte = sizes_D.sum()
    if len(right_SD) < seeds * (arms + 1):
        raise ValueError(f"pool: got {len(right_SD)} seeds; expected at least {seeds * (arms + 1)} for disjoint ones.")

    def arm(name: str, rows_SD: Floats) -> ArmMeasurements:
        return ArmMeasurements(name, dict(enumerate(rows_SD)), sizes_D)

    def same() -> Verdict:
        drawn = rng.permutation(len(right_SD))[: seeds * (arms + 1)].reshape(arms + 1, seeds)
        first, *others = (arm(f"arm{i}", right_SD[rows]) for i, rows in enumerate(drawn))
        return judge(first, others, seeds=range(seeds), replicates=REPLICATES)

    def planted() -> Verdict:
        rows = rng.permutation(len(right_SD))[:seeds]
        return judge(
            arm("right", right_SD[rows]), [arm("fault", fault_SD[rows])], seeds=range(seeds), replicates=REPLICATES
        )

    differences_S = (fault_SD - right_SD).sum(1) / per_byte
    effect = float(differences_S.mean() / differences_S.std(ddof=1))
    common = {
        "runs": int(2 * len(right_SD)),
        "seeds": seeds,
        "sd_over_seeds": float((right_SD.sum(1) / per_byte).std(ddof=1)),
        "unit": "bits per byte",
    }
    reports = [
        _report({"name": "A/A, resampled real runs", "arms": arms, **common}, _count(same, ablations), {"claims": 0.05})
    ]
    about = {
        "name": f"learning rate off by {FAULT:g}, resampled real runs",
        "arms": 1,
        **common,
        "difference": float(differences_S.mean()),
        "effect_in_sd_of_differences": effect,
    }
    reports.append(
        _report(about, _count(planted, ablations), {"detected": power_of(seeds, effect, 0.05)} if effect > 0 else {})
    )
    return reports


def write(output: Path, ablations: int, pool: pl.DataFrame | None, progress: Callable[[str], None]) -> dict[str, Any]:
    """Calibrate on tables and pool, and write ``calibration.json`` (and ``pool.parquet``) in ``output``."""
    started = time.perf_counter()
    tables = calibrate_tables(ablations, progress=progress)
    resampled = [] if pool is None else calibrate_pool(pool, max(200, ablations * 2 // 5))
    report = {
        "synthetic_tables": tables,
        "resampled_runs": resampled,
        "alpha": 0.05,
        "intervals": "exact (Clopper-Pearson), 95 %",
        "environment": {
            **environment(),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - started, 1),
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    if pool is not None:
        pool.write_parquet(output / "pool.parquet")
    (output / "calibration.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the result")
    parser.add_argument("--ablations", type=int, default=1000, help="synthetic ablations per scenario, at least 20")
    parser.add_argument("--train", type=int, default=0, help="train the pool of real runs again, on this many seeds")
    options = parser.parse_args()
    if options.ablations < 20:
        parser.error("--ablations: at least 20")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    path = options.output / "pool.parquet"
    stored = pl.read_parquet(path) if path.exists() else None
    pool = train_pool(options.train, progress) if options.train else stored
    report = write(options.output, options.ablations, pool, progress)
    for row in report["synthetic_tables"] + report["resampled_runs"]:
        rates = ", ".join(f"{name} {_rate(row['rates'][name])}" for name in ("claims", "detected", "equivalent"))
        print(f"{row['name']} ({row['rates']['claims']['of']} ablations): {rates}")
    if pool is None:
        print("There is no pool of real runs; --train 48 creates one.")
    print(options.output / "calibration.json")


def _rate(rate: dict[str, Any]) -> str:
    text = f"{rate['rate']:.3f} ({rate['low']:.3f}–{rate['high']:.3f})"
    return (
        text if "expected" not in rate else f"{text}, expected {rate['expected']:.3f}{'' if rate['within'] else ' !'}"
    )


if __name__ == "__main__":
    main()
