"""Calibration of secondary metrics: how often claims about several metrics in their declared order are false, and what
they find beside Holm's procedure over all of them.

    python benchmarks/secondary_calibration.py

Ablations are drawn from a model: paired differences of arms and metrics, in units of their sd over seeds, with a part
that all metrics of a seed share. A loss is the difference itself; a rate counts errors over 200 answers, whose
probability varies over seeds by 0.06. Comparisons and claims are those of the verdict
(workbench.ablation.verdict.judge). The scenarios are our own definitions. The result goes to
results/calibration/secondary.json.

Legend: A arms beside the baseline, K metrics, S seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import exact_rate, write_report
from numpy.random import Generator

from workbench.ablation.verdict.comparison import ArmMeasurements, Claim, Comparison, Rules
from workbench.ablation.verdict.judge import claims, claims_in_order
from workbench.ablation.verdict.statistics import Floats

OUTPUT = Path(__file__).parents[1] / "results" / "calibration" / "secondary.json"
ALPHA, ANSWERS, SPREAD = 0.05, 200, 0.06


@dataclass(frozen=True)
class Scenario:
    """How simulated ablations are drawn."""

    name: str
    effects: tuple[float, ...]
    """True difference of every arm in each metric, in units of the sd of paired differences."""
    arms: int = 1
    seeds: int = 8
    shared: float = 0.0
    """Share of the variance that all metrics of an arm and seed have in common; negative: with alternating signs."""
    rate: bool = False
    """Whether the metrics are rates, judged by exact tests."""


NOTHING, FIRST, SMALL, ALL = (0.0,) * 4, (3.0, 0.0, 0.0, 0.0), (0.2,) * 4, (2.0,) * 4
SCENARIOS = (
    *(Scenario("no difference", NOTHING, arms, shared=shared) for arms in (1, 3) for shared in (0.0, 0.9)),
    *(Scenario("only the first differs", FIRST, arms, shared=shared) for arms in (1, 3) for shared in (0.0, 0.9)),
    *(Scenario("small differences", SMALL, arms, shared=shared) for arms in (1, 3) for shared in (0.0, 0.9, -0.9)),
    *(Scenario("all differ", ALL, arms, seeds) for arms in (1, 3) for seeds in (6, 8)),
    *(Scenario("only the first differs", FIRST, arms, rate=True) for arms in (1, 3)),
    *(Scenario("all differ", ALL, arms, seeds, rate=True) for arms in (1, 3) for seeds in (6, 8)),
)


def draw(scenario: Scenario, rng: Generator) -> Floats:
    """Paired values of the arms and of the baseline, (A + 1, K, S), the baseline first; less is better."""
    arms, metrics, seeds = scenario.arms + 1, len(scenario.effects), scenario.seeds
    share = abs(scenario.shared)
    signs_K = np.where(np.arange(metrics) % 2, math.copysign(1, scenario.shared), 1.0)[:, None]
    common_AS = rng.normal(size=(arms, 1, seeds)) * signs_K
    value_AKS = math.sqrt(share) * common_AS + math.sqrt(1 - share) * rng.normal(size=(arms, metrics, seeds))
    value_AKS = value_AKS / math.sqrt(2)  # the sd of a difference is 1
    value_AKS[1:] += np.array(scenario.effects)[:, None]
    if not scenario.rate:
        return value_AKS
    return rng.binomial(ANSWERS, np.clip(0.4 + SPREAD * value_AKS, 0, 1)).astype(float)


def compare(scenario: Scenario, value_AKS: Floats, *, together: bool) -> list[list[Comparison]]:
    """The comparisons with the baseline, (K, A).

    Args:
        scenario: of the ablation.
        value_AKS: from :func:`draw`.
        together: whether they are adjusted as one family, rather than in an order.
    """
    size_D = np.array([float(ANSWERS)]) if scenario.rate else np.ones(1)
    family = scenario.arms * (len(scenario.effects) if together else 1)
    rules = Rules(ALPHA, family, upper=1.0 if scenario.rate else None, replicates=0, ordered=not together)
    seeds = range(scenario.seeds)

    def measured(arm: int, metric: int) -> ArmMeasurements:
        return ArmMeasurements(str(arm), {s: value_AKS[arm, metric, s : s + 1] for s in seeds}, size_D)

    return [
        [Comparison(measured(0, k), measured(a, k), seeds, rules) for a in range(1, scenario.arms + 1)]
        for k in range(len(scenario.effects))
    ]


def outcome(scenario: Scenario, judged_KA: Sequence[Sequence[Claim]]) -> tuple[bool, list[float]]:
    """Whether any claim is false (no difference, or the other sign), and the share of arms claimed in each metric."""
    words_KA = [[claim.word for claim in judged_A] for judged_A in judged_KA]
    wrong = ("better", "worse"), ("better",)
    false = any(word in wrong[effect > 0] for effect, words_A in zip(scenario.effects, words_KA) for word in words_A)
    return false, [float(np.mean([word in wrong[0] for word in words_A])) for words_A in words_KA]


def calibrate(scenario: Scenario, ablations: int, seed: int) -> dict[str, Any]:
    """Rates of false claims with exact intervals, and the share of arms claimed in each metric."""
    rng = np.random.default_rng(seed)
    false, found = np.zeros((2, ablations), bool), np.zeros((2, ablations, len(scenario.effects)))
    for i in range(ablations):
        value_AKS = draw(scenario, rng)
        in_order = claims_in_order(compare(scenario, value_AKS, together=False), ALPHA)
        flat = iter(claims([c for part in compare(scenario, value_AKS, together=True) for c in part], ALPHA))
        together = [[next(flat) for _ in range(scenario.arms)] for _ in scenario.effects]
        for number, judged_KA in enumerate((in_order, together)):
            false[number, i], found[number, i] = outcome(scenario, judged_KA)
    return {
        **asdict(scenario),
        **{
            name: {"false": exact_rate(false_R.sum(), ablations), "claimed": found_RK.mean(0).round(4).tolist()}
            for name, false_R, found_RK in zip(("in_order", "holm_over_all"), false, found)
        },
    }


def write(output: Path, ablations: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Calibrate every scenario and write the JSON file ``output``."""
    started, rows = time.perf_counter(), []
    for number, scenario in enumerate(SCENARIOS):
        rows.append(row := calibrate(scenario, ablations, number))
        about = f"{scenario.name}, {scenario.arms} arms, {scenario.seeds} seeds, shared {scenario.shared:g}"
        numbers = "; ".join(
            f"{n} {row[n]['false']['rate']:.4f} {row[n]['claimed']}" for n in ("in_order", "holm_over_all")
        )
        progress(f"{about}{', rates' * scenario.rate}: {numbers}")
    report = {"scenarios": rows, "ablations": ablations, "alpha": ALPHA, "intervals": "exact (Clopper-Pearson), 95 %"}
    write_report(output, report, started)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the result")
    parser.add_argument("--ablations", type=int, default=2_000, help="per scenario")
    options = parser.parse_args()
    write(options.output, options.ablations, lambda line: print(line, file=sys.stderr, flush=True))
    print(options.output)


if __name__ == "__main__":
    main()
