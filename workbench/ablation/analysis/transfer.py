"""Whether an optimum found on small models holds on large ones: its drift over sizes, and the loss given away.

An ablation for this has one arm for every size and parametrisation, a grid over the learning rate, and repeats of every
setting of the grid on further seeds (``sweeps/transfer.yaml``). The smallest arm of a parametrisation is the proxy.
The measures are ours.

Legend: G values of the field, S seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from workbench.ablation.verdict.statistics import Floats, paired_interval
from workbench.config import deep_merge, expand_dotted, require
from workbench.status import Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["Curve", "Transfer", "sizes_of", "transfer", "transfer_of"]

WINDOW = 2
"""Values on each side of the best one through which the parabola of an optimum is fitted."""


@dataclass(frozen=True)
class Curve:
    """Loss of one arm over the values of one field."""

    values_G: Floats
    """Ascending, positive."""
    loss_GS: Floats
    """Selection value; infinite where a run diverged."""

    def optimum(self, columns: Sequence[int] | None = None) -> float:
        """log2 of the best value, of the mean over seeds (or over ``columns``): the vertex of the parabola through the
        best value of the grid and up to two on either side; the best value itself at an end of the grid, or where the
        parabola has no minimum between its neighbours."""
        x_G = np.log2(self.values_G)
        mean_G = (self.loss_GS if columns is None else self.loss_GS[:, list(columns)]).mean(1)
        best = int(np.argmin(np.where(np.isfinite(mean_G), mean_G, np.inf)))
        if best in (0, len(x_G) - 1):
            return float(x_G[best])
        near = [g for g in range(best - WINDOW, best + WINDOW + 1) if 0 <= g < len(x_G) and np.isfinite(mean_G[g])]
        if len(near) < 3:
            return float(x_G[best])
        square, slope, _ = np.polyfit(x_G[near] - x_G[best], mean_G[near], 2)
        vertex = float(x_G[best] - slope / (2 * square)) if square > 0 else math.inf
        return vertex if x_G[best - 1] <= vertex <= x_G[best + 1] else float(x_G[best])

    @property
    def is_at_edge(self) -> bool:
        """Whether the best value is the first or last one of the grid: the optimum may be outside."""
        return self.optimum() in (math.log2(self.values_G[0]), math.log2(self.values_G[-1]))

    def loss_at(self, x: float) -> Floats:
        """(S,) loss at log2 value ``x``, by a parabola through the three nearest values; infinite where one of the two
        around it is, or beyond the grid."""
        x_G = np.log2(self.values_G)
        if not x_G[0] - 1e-9 <= x <= x_G[-1] + 1e-9:
            return np.full(self.loss_GS.shape[1], np.inf)
        around = np.argsort(np.abs(x_G - x), kind="stable")[:3]
        losses = []
        for loss_G in self.loss_GS.T:
            finite = [g for g in around if np.isfinite(loss_G[g])]
            if len(finite) < 2 or around[0] not in finite:
                losses.append(math.inf)
            else:
                losses.append(float(np.polyval(np.polyfit(x_G[finite] - x, loss_G[finite], len(finite) - 1), 0.0)))
        return np.array(losses)


@dataclass(frozen=True)
class Transfer:
    """Optima over sizes."""

    table: pl.DataFrame
    """One row per arm. Columns: parametrisation, arm, size, optimum, at_edge, drift (of the optimum from the proxy's,
    in factors of sqrt 2), drift_low, drift_high, given_away (loss at the proxy's optimum minus loss at the arm's own),
    given_away_low, given_away_high (95 % t-intervals over seeds, of the drift by the jackknife; null with one seed, and
    for the proxy), seeds."""
    curves: pl.DataFrame
    """Columns: parametrisation, arm, size, value, seed, loss."""
    field: str
    over: str
    """What the size is: width, depth or parameters."""
    unit: str

    def __str__(self) -> str:
        lines = []
        for row in self.table.iter_rows(named=True):
            name = f"{row['parametrisation']}, {self.over} {row['size']:g} ({row['arm']})"
            edge = ", at an end of the grid" if row["at_edge"] else ""
            line = f"{name}: optimum {row['optimum']:.3g}{edge}"
            if row["drift"] is not None:
                line += f"; drift {row['drift']:+.2f} factors of √2{_span(row, 'drift', '+.2f')}"
                line += f"; loss given away {row['given_away']:.4f} {self.unit}{_span(row, 'given_away', '.4f')}"
            lines.append(f"{line}.")
        return "\n".join(lines)


def _span(row: Mapping[str, Any], name: str, form: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f" ({low:{form}} to {high:{form}})" if low is not None else ""


def transfer(run: AblationRun, field: str = "training.learning_rate") -> Transfer:
    """The transfer of ``field`` over the sizes of an ablation's arms, from its tuning trials and their repeats.

    Raises:
        ConfigError: when no parametrisation has arms of two sizes with trials over three values of the field.
    """
    over, places = sizes_of(run)
    ended = run.runs().filter(pl.col("stage").is_in([Stage.TUNING, Stage.REPEAT]))
    losses: dict[str, dict[tuple[float, int], float]] = {}
    for row in ended.iter_rows(named=True):
        hyperparameters = json.loads(row["hyperparameters"] or "{}")
        if field not in hyperparameters or row["status"] not in (Status.DONE, Status.DIVERGED):
            continue
        loss = row["selection_value"] if row["status"] == Status.DONE else None
        place = float(hyperparameters[field]), int(row["seed"])
        losses.setdefault(row["arm"], {})[place] = math.inf if loss is None else float(loss)
    curves = {}
    for arm, by_place in losses.items():
        kept = [seed for seed in _seeds(by_place) if all((v, seed) in by_place for v in _values(by_place))]
        values = _values(by_place)
        if len(values) >= 3 and kept:
            table = np.array([[by_place[value, seed] for seed in kept] for value in values])
            curves[arm] = Curve(np.array(values), table), kept
    return transfer_of({arm: (*places[arm], *curve) for arm, curve in curves.items()}, field, over, run.metric.unit)


def _values(losses: Mapping[tuple[float, int], float]) -> list[float]:
    return sorted({value for value, _ in losses})


def _seeds(losses: Mapping[tuple[float, int], float]) -> list[int]:
    return sorted({seed for _, seed in losses})


def sizes_of(run: AblationRun) -> tuple[str, dict[str, tuple[str, float]]]:
    """What distinguishes the sizes of the arms (width, depth, or both: width · depth), and for each arm its
    parametrisation and size."""
    from workbench.model.config import ModelConfig

    config, models = run.record.config, {}
    for arm, changes in config.arms.items():
        fields = deep_merge(expand_dotted(config.base), expand_dotted(changes))
        fields = deep_merge(fields, expand_dotted(run.record.solved.get(arm, {})))
        models[arm] = ModelConfig.parse(fields.get("model", {}))
    differing = [name for name in ("width", "depth") if len({getattr(model, name) for model in models.values()}) > 1]
    over = " · ".join(differing) or "width"
    return over, {
        arm: (model.parametrisation.kind, float(math.prod(getattr(model, name) for name in over.split(" · "))))
        for arm, model in models.items()
    }


def transfer_of(
    curves: Mapping[str, tuple[str, float, Curve, Sequence[int]]], field: str, over: str, unit: str
) -> Transfer:
    """From curves.

    Args:
        curves: arm -> parametrisation, size, curve, seeds of its columns.

    Raises:
        ConfigError: when no parametrisation has two sizes.
    """
    rows: list[tuple[Any, ...]] = []
    by_kind: dict[str, list[str]] = {}
    for arm, (kind, *_) in curves.items():
        by_kind.setdefault(kind, []).append(arm)
    compared = {kind: arms for kind, arms in by_kind.items() if len({curves[arm][1] for arm in arms}) > 1}
    require(
        compared,
        "arms",
        got=", ".join(f"{kind}: {len(arms)} arm(s)" for kind, arms in by_kind.items()) or "no finished grid",
        expected=f"a parametrisation with arms of two sizes, each with three values of {field}",
    )
    for kind, arms in compared.items():
        arms = sorted(arms, key=lambda arm: curves[arm][1])
        _, _, proxy, proxy_seeds = curves[arms[0]]
        proxy_optimum = proxy.optimum()
        for arm in arms:
            _, size, curve, seeds = curves[arm]
            optimum = curve.optimum()
            row: list[Any] = [kind, arm, size, 2**optimum, curve.is_at_edge]
            if arm == arms[0]:
                row += [None] * 6
            else:
                lost_S = curve.loss_at(proxy_optimum) - curve.loss_at(optimum)
                drift = 2 * (optimum - proxy_optimum)
                row += [drift, *_drift_interval(drift, (proxy, proxy_seeds), (curve, seeds))]
                row += [float(lost_S.mean()), *_interval(lost_S)]
            rows.append((*row, len(seeds)))
    names = ["parametrisation", "arm", "size", "optimum", "at_edge", "drift", "drift_low", "drift_high"]
    names += ["given_away", "given_away_low", "given_away_high", "seeds"]
    points = [
        (kind, arm, size, float(value), seed, float(loss))
        for arm, (kind, size, curve, seeds) in curves.items()
        for value, loss_S in zip(curve.values_G, curve.loss_GS)
        for seed, loss in zip(seeds, loss_S)
    ]
    columns = ["parametrisation", "arm", "size", "value", "seed", "loss"]
    table = pl.DataFrame(rows, schema=names, orient="row", strict=False)
    return Transfer(table, pl.DataFrame(points, schema=columns, orient="row"), field, over, unit)


def _interval(values: Sequence[float] | Floats) -> tuple[float | None, float | None]:
    """95 % t-interval of the mean, None with one value."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    found = paired_interval(values)
    return found.low, found.high


def _drift_interval(
    drift: float, proxy: tuple[Curve, Sequence[int]], larger: tuple[Curve, Sequence[int]]
) -> tuple[float | None, float | None]:
    """95 % t-interval around the drift of the mean curves, with the jackknife's standard error over seeds: optima of
    single seeds jump between neighbouring values of a flat curve, and their mean is not the optimum of the mean."""
    shared = sorted(set(proxy[1]) & set(larger[1]))
    if len(shared) < 2:
        return None, None
    without = []
    for left_out in shared:
        kept = [seed for seed in shared if seed != left_out]
        optima = [curve.optimum([seeds.index(seed) for seed in kept]) for curve, seeds in (proxy, larger)]
        without.append(2 * (optima[1] - optima[0]))
    low, high = _interval([len(shared) * drift - (len(shared) - 1) * value for value in without])  # pseudo-values
    if low is None or high is None:
        return None, None
    half = (high - low) / 2
    return drift - half, drift + half
