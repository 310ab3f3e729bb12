"""What an ablation declares before its first run, the hash of it, and deviations since."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.protocol import Stopping
from workbench.config import ConfigError, difference, require
from workbench.metric import Metric

__all__ = ["Deviation", "Registration", "all_deviations", "describe", "digest", "record_deviation", "register"]

ANALYSIS = ("question", "alpha", "margin", "exploratory", "protocol", "confirmation")
"""Fields that affect how runs are read, not what is run: these may be changed after launch, as a deviation."""

SECONDARY_TEST = (
    "They are tested over paired seeds as the primary metric is, those of an arm in this order, with a family-wise "
    "error rate of alpha over arms and metrics, apart from the primary metric's (Bretz et al. 2009)."
)
LIMITS = {"effect": "smallest difference of interest", "margin": "equivalence margin"}


class Registration(BaseModel):
    """The pre-registration of an ablation."""

    content: dict[str, Any]
    """What is declared, as plain data (:func:`preregistration`)."""
    hash: str
    """:func:`digest` of the launch record."""
    at: str
    """Time of the launch."""


class Deviation(BaseModel):
    """A change of the analysis after launch."""

    what: str
    when: str = "unknown"
    why: str = "not given"
    hash: str | None = None
    """:func:`digest` after the change; None if nobody recorded it."""
    planned: bool = False
    """Whether the declared design allows it: further seeds of an anytime-valid one. The verdict is not exploratory."""


def preregistration(config: AblationConfig, metric: Metric) -> dict[str, Any]:
    """What an ablation declares, as plain data."""
    plain = config.plain()
    budget, tuning, protocol = plain["budget"], plain["tuning"], plain["protocol"]
    exact = "exact tests over paired seeds (sign flips, share of seeds that solve the task)"
    test = "paired t over seeds" if metric.upper is None else exact
    if protocol["control_variate"]:
        test += f", adjusted by the control variate {protocol['control_variate']}"
    return {
        "question": config.question,
        "baseline": config.order[0],
        "arms": config.order[1:],
        "metric": metric.unit,
        "split": config.confirmation.split,
        "budget": {name: budget[name] for name in ("axis", "target", "tolerance", "allow_mismatch")},
        "effect": protocol["effect"],
        "margin": config.margin,
        "seeds": plain["confirmation"]["seeds"],
        "tuning": {
            name: tuning[name]
            for name in ("trials", "policy", "sampler", "space", "variants", "pruner", "repeats", "interpolate")
        },
        "search": config.tuning.describe(),
        "test": f"{test}, Holm over {'arms' if config.protocol.comparisons == 'baseline' else 'all pairs of arms'}",
        "secondary": [metric.plain() | {"label": metric.label} for metric in config.protocol.secondary],
        "alpha": config.alpha,
        "stopping": protocol["stopping"],
        "exclusions": protocol["exclusions"],
    }


def digest(record: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of a launch record's configuration, except how the work is carried out.

    Args:
        record: the content of ``ablation.json``, as it is on disk.
    """
    config = {name: value for name, value in record["config"].items() if name not in ("launch", "deviation")}
    content = {"config": config, "order": record["order"], "metric": record["metric"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def register(record: Mapping[str, Any], config: AblationConfig, metric: Metric) -> Registration:
    """The pre-registration of a launch record: what the verdict quotes, the hash of the configuration, the time."""
    return Registration(content=preregistration(config, metric), hash=digest(record), at=_now())


def record_deviation(old: Mapping[str, Any], new: Mapping[str, Any], why: str | None) -> Deviation | None:
    """The deviation that a changed configuration is; None if it changes what is run.

    Seeds added to an anytime-valid design are no deviation in substance: they are recorded as planned.

    Args:
        old: canonical configuration of the launch.
        new: canonical configuration now.
        why: the reason given.

    Raises:
        ConfigError: if it is a deviation and no reason is given, or declared seeds are removed.
    """
    changes = difference(old, new)
    if any(path.split(".")[0].split("[")[0] not in ANALYSIS or path == "confirmation.split" for path in changes):
        return None
    old_seeds, new_seeds = (list(config["confirmation"]["seeds"]) for config in (old, new))
    require(
        new_seeds[: len(old_seeds)] == old_seeds,
        "confirmation.seeds",
        got=new_seeds,
        expected=f"the declared seeds {old_seeds} first",
        do="Seeds may be added, as a deviation; declared ones stay.",
    )
    what = "; ".join(f"{path}: {before!r} → {after!r}" for path, (before, after) in changes.items())
    if _is_anytime(old) and all(path.startswith("confirmation.seeds[") for path in changes):
        return Deviation(what=what, when=_now(), why="an anytime-valid design may add seeds", planned=True)
    if not why:
        raise ConfigError.at(
            "deviation",
            got=f"no reason for the changes since the launch ({what})",
            expected="a reason, which the verdict quotes",
            do='State the deviation: deviation="why". The verdict quotes it and is exploratory; a confirmation takes '
            "new seeds, and new documents where there are any.",
        )
    return Deviation(what=what, when=_now(), why=why)


def _is_anytime(config: Mapping[str, Any]) -> bool:
    stopping = config["protocol"]["stopping"]
    return isinstance(stopping, Mapping) and bool(stopping.get("anytime"))


def all_deviations(
    record: Mapping[str, Any], registration: Registration | None, recorded: list[Deviation]
) -> list[Deviation]:
    """Every deviation from what was declared: the recorded ones, and an unrecorded change of the file.

    Args:
        record: the content of ``ablation.json``, as it is on disk.
    """
    if registration is None:
        return [Deviation(what="ablation.json holds no registration", why="not registered")]
    latest = recorded[-1].hash if recorded else registration.hash
    if digest(record) == latest:
        return list(recorded)
    return [*recorded, Deviation(what="ablation.json was changed by hand after launch")]


def describe(registration: Registration | None, deviations: list[Deviation]) -> tuple[str, ...]:
    """The pre-registration and the deviations as sentences, for the head of a verdict."""
    if registration is None:
        return ("Not registered: no declaration was hashed before the first run.",)
    content, unit = registration.content, registration.content["metric"]
    budget, seeds = content["budget"], content["seeds"]
    axis = budget["axis"].replace("_", " ")
    target = "" if budget["target"] is None else f" as {budget['target']}"
    matched = f"{axis} equal{target} within {100 * budget['tolerance']:g} %"
    if budget["allow_mismatch"]:
        matched = f"{axis} not matched ({budget['allow_mismatch']})"
    effect = "not declared" if content["effect"] is None else f"{content['effect']:g} {unit}"
    margin = "none" if content["margin"] is None else f"±{content['margin']:g} {unit}"
    question = content["question"] or "no question"
    lines = [
        f"Declared at launch, {registration.at} (hash {registration.hash}): {question}",
        f"Primary: {unit} on the {content['split']} split, {content['test']}, alpha {content['alpha']:g}; "
        f"budget: {matched}; smallest difference of interest: {effect}; equivalence margin: {margin}; "
        f"{len(seeds)} paired seeds ({', '.join(map(str, seeds))}); "
        f"stopping: {_stopping(content['stopping'], len(seeds))}; "
        f"exclusions: {content['exclusions']}.",
    ]
    if secondary := content.get("secondary"):
        lines.append(f"Secondary, in this order: {'; '.join(map(_secondary, secondary))}. {SECONDARY_TEST}")
    if "search" in content:
        lines.append(f"Tuning: {content['search']}.")
    return (
        *lines,
        *(
            f"{'Extension' if deviation.planned else 'Deviation'}, {deviation.when}: {deviation.what} "
            f"(why: {deviation.why})."
            for deviation in deviations
        ),
    )


def _secondary(declared: Mapping[str, Any]) -> str:
    """A declared secondary metric in words."""
    limits = [f"{word} {declared[name]:g}" for name, word in LIMITS.items() if declared[name] is not None]
    return f"{declared['label']} ({', '.join(limits)})" if limits else str(declared["label"])


def _stopping(declared: str | Mapping[str, Any], num_seeds: int) -> str:
    """The declared design in words; earlier versions declared text."""
    return declared if isinstance(declared, str) else Stopping.parse(declared).sentence(num_seeds)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
