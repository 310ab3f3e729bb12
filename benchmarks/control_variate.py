"""What a control variate costs and gains (workbench.ablation.verdict.control): false positives without a difference by
simulation, and the share of variance that it would take away in archived ablations.

    python benchmarks/control_variate.py                  # writes results/calibration/control_variate.json

The archived runs hold the selection and report value of every report seed. Their correlation rho over paired seeds
gives the variance with P earlier runs, 1 − rho² P / (S + P) of the plain one, for a known slope; archives have few
seeds, so rho is rough and its square is biased upwards by about 1 / (S − 1).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import typer
from common import ROOT, write_report
from scipy import special

from workbench.ablation.run import AblationRun
from workbench.status import Stage, Status

DESIGNS = [(4, 4), (4, 8), (5, 8), (8, 8), (8, 4)]
"""Report seeds, earlier paired seeds."""


def simulate(noise: str, rho: float, seeds: int, pilot: int, count: int) -> dict[str, float]:
    """Rate of p < 0.05 without a difference, and variance and width of the interval relative to the plain paired one.

    The formulas of :class:`AdjustedTTest` over many ablations at once.
    """
    random = np.random.default_rng([seeds, pilot, round(100 * rho), len(noise)])
    shape = (3, count, seeds + pilot)
    draws = {
        "normal": lambda: random.normal(size=shape),
        "t3": lambda: random.standard_t(3, shape),
        "lognormal": lambda: random.lognormal(0, 1, shape) - np.exp(0.5),
    }[noise]()
    common, own, other = draws
    measured, selection = (np.sqrt(rho) * common + np.sqrt(1 - rho) * part for part in (own, other))
    d_S, x_S, d_P, x_P = measured[:, :seeds], selection[:, :seeds], measured[:, seeds:], selection[:, seeds:]
    centred = x_P - x_P.mean(1, keepdims=True)
    slope = (centred * d_P).sum(1) / (centred**2).sum(1) * pilot / (seeds + pilot)
    mean = (d_S - slope[:, None] * x_S).mean(1) + slope * x_P.mean(1)
    variance = (d_S - slope[:, None] * x_S).var(1, ddof=1) / seeds + slope**2 * x_P.var(1, ddof=1) / pilot
    p = 2 * special.stdtr(min(seeds, pilot) - 1, -np.abs(mean) / np.sqrt(variance))
    plain_p = 2 * special.stdtr(seeds - 1, -np.abs(d_S.mean(1)) / (d_S.std(1, ddof=1) / np.sqrt(seeds)))
    return {
        "false_positives": float((p < 0.05).mean()),
        "plain_false_positives": float((plain_p < 0.05).mean()),
        "relative_variance": float(mean.var() / d_S.mean(1).var()),
    }


def archived(folder: Path) -> list[dict[str, Any]]:
    """Correlation of paired report and selection differences in one archive, and what 8 earlier runs would leave."""
    run = AblationRun(folder)
    done = run.runs().filter((pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE))
    by_arm = {
        arm: {
            seed: (report, selection)
            for seed, report, selection in done.filter(pl.col("arm") == arm)
            .select("seed", "report_value", "selection_value")
            .iter_rows()
        }
        for arm in run.arms
    }
    rows = []
    for arm in run.arms[1:]:
        seeds = sorted(set(by_arm[arm]) & set(by_arm[run.baseline]))
        differences = np.array([np.subtract(by_arm[arm][s], by_arm[run.baseline][s]) for s in seeds], float)
        if len(seeds) < 3 or not np.ptp(differences, 0).all():
            continue
        rho = float(np.corrcoef(differences.T)[0, 1])
        left = 1 - rho**2 * 8 / (len(seeds) + 8)
        rows.append({"ablation": run.name, "arm": arm, "seeds": len(seeds), "rho": rho, "variance_with_8": left})
    return rows


def main(
    count: Annotated[int, typer.Option(help="Simulated ablations per cell.")] = 20_000,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = ROOT
    / "results/calibration/control_variate.json",
) -> None:
    """Simulate, read the archives, write both."""
    started, cells = time.perf_counter(), []
    for noise in ("normal", "t3", "lognormal"):
        for rho in (0.0, 0.5, 0.9):
            for seeds, pilot in DESIGNS:
                numbers = simulate(noise, rho, seeds, pilot, count)
                cells.append({"noise": noise, "rho": rho, "seeds": seeds, "pilot": pilot, **numbers})
                print(cells[-1])
    folders = sorted(path.parent for path in (ROOT / "results/ablations").glob("*/ablation.json"))
    archives = [row for folder in folders for row in archived(folder)]
    for row in archives:
        left = f"leaves {row['variance_with_8']:.0%}"
        print(f"{row['ablation']}, {row['arm']}: rho {row['rho']:+.2f} over {row['seeds']} seeds, {left}")
    median = float(np.median([row["variance_with_8"] for row in archives]))
    print(f"median over {len(archives)} arms: {median:.0%} of the variance left")
    report = {"count": count, "simulated": cells, "archived": archives, "median_variance_with_8": median}
    write_report(out, report, started)


if __name__ == "__main__":
    typer.run(main)
