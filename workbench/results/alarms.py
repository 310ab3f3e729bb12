"""Limits of layer diagnostics beyond which a run is in danger, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl


@dataclass(frozen=True)
class Alarm:
    """A limit of one diagnostic; of a vector its largest entry counts. A value that is not finite is beyond it."""

    diagnostic: str
    limit: float
    meaning: str
    """What is wrong, and what helps."""


ALARMS = (
    # the threshold of QK-clip (Kimi K2, arXiv 2507.20534)
    Alarm("attention_score_max", 100.0, "attention saturates; qk_norm, a soft-cap or a lower rate bounds the scores"),
    # arXiv 2509.01322, eq. 9
    Alarm("r_g", 0.1, "the balance loss outweighs the training loss in the router; lower balance_weight"),
    # ours: where exp(-x) of the other scores is below the resolution of bf16 by far
    Alarm("router_logit_max", 50.0, "router scores saturate; z_weight bounds them"),
    # ours; arXiv 2402.17762 calls activations above 100 and 1,000 times the median massive
    Alarm("activation_max", 1000.0, "massive activations; hidden_z bounds those of the last layer"),
    # ours
    Alarm("hidden_z_excess", 1e5, "the last hidden states grow; hidden_z bounds them"),
    # ours: the paper that studies epsilon (arXiv 2509.01322, §4) finds harm once it nears the gradients
    Alarm("below_epsilon", 0.01, "epsilon slows the update of these parameters; lower optimiser.epsilon"),
    # see workbench.feedforwards.monitors
    Alarm("collapsed", 0.5, "most experts of the layer get no token; raise the balance loss or the bias step"),
)
"""All limits."""
_BY_NAME = {alarm.diagnostic: alarm for alarm in ALARMS}


def alarms_of(values: Mapping[str, Any]) -> list[Alarm]:
    """The alarms of one layer's diagnostics, as stored in diagnostics.jsonl: numbers, lists of numbers, None."""
    return [alarm for name, value in values.items() if (alarm := _BY_NAME.get(name)) and _is_beyond(value, alarm)]


def _is_beyond(value: Any, alarm: Alarm) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return any(number is None or number > alarm.limit for number in numbers)


def alarm_table(diagnostics: pl.DataFrame) -> pl.DataFrame:
    """The first alarm of every run, diagnostic and layer.

    Args:
        diagnostics: columns of ``workbench.results.tables.DIAGNOSTICS_SCHEMA``.

    Returns:
        columns arm, stage, run, seed, name, layer, step (first), value (largest; null where one is not finite), limit,
        meaning.
    """
    limits = pl.DataFrame([vars(alarm) for alarm in ALARMS]).rename({"diagnostic": "name"})
    beyond = diagnostics.join(limits, on="name").filter(pl.col("value").is_null() | (pl.col("value") > pl.col("limit")))
    return (
        beyond.group_by("arm", "stage", "run", "seed", "name", "layer", "limit", "meaning")
        .agg(
            step=pl.col("step").min(),
            value=pl.when(pl.col("value").is_null().any()).then(None).otherwise(pl.col("value").max()),
        )
        .select("arm", "stage", "run", "seed", "name", "layer", "step", "value", "limit", "meaning")
        .sort("arm", "run", "name", "layer")
    )
