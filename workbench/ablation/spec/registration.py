"""What an ablation declared before its first run, its hash, and what was changed since. Plain data; imports no torch."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from workbench.config import ConfigError, difference

__all__ = ["declared", "deviate", "digest", "quote", "register", "standing"]

ANALYSIS = ("question", "alpha", "margin", "exploratory", "protocol", "confirmation")
"""Fields that say how runs are read, not what is run: these may be changed after launch, as a deviation."""


def declared(config: Mapping[str, Any], order: list[str], metric: Mapping[str, Any]) -> dict[str, Any]:
    """The pre-registration that follows from an ablation's plain configuration."""
    budget, tuning, protocol = config["budget"], config["tuning"], config["protocol"]
    return {
        "question": config["question"],
        "baseline": order[0],
        "arms": order[1:],
        "metric": metric["unit"],
        "split": config["confirmation"]["split"],
        "budget": {k: budget[k] for k in ("axis", "target", "tolerance", "allow_mismatch")},
        "effect": protocol["effect"],
        "margin": config["margin"],
        "seeds": config["confirmation"]["seeds"],
        "tuning": {k: tuning[k] for k in ("trials", "sampler", "space", "variants", "pruner")},
        "test": "paired t over seeds, Holm over arms",
        "alpha": config["alpha"],
        "stopping": protocol["stopping"],
        "exclusions": protocol["exclusions"],
    }


def digest(about: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of an ablation's whole configuration, all but how the work is carried out."""
    config = {name: value for name, value in about["config"].items() if name not in ("launch", "deviation")}
    content = {"config": config, "order": about["order"], "metric": about["metric"]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def register(about: Mapping[str, Any]) -> dict[str, Any]:
    """The pre-registration as it is written down at launch: what is quoted of it, the hash of the configuration, time."""
    content = declared(about["config"], about["order"], about["metric"])
    return {"content": content, "hash": digest(about), "at": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def deviate(about: Mapping[str, Any], canonical: Mapping[str, Any], why: str | None) -> dict[str, Any] | None:
    """What a changed configuration changes in how the runs are read; None where it changes what is run.

    Raises:
        ConfigError: when it is such a change and no reason is given, or declared seeds are taken away.
    """
    changes = difference(about["canonical"], canonical)
    if any(path.split(".")[0].split("[")[0] not in ANALYSIS or path == "confirmation.split" for path in changes):
        return None
    old, new = (c["confirmation"]["seeds"] for c in (about["canonical"], canonical))
    if list(new[: len(old)]) != list(old):
        raise ConfigError.at(
            "confirmation.seeds",
            got=list(new),
            expected=f"the declared seeds {list(old)} first",
            do="Seeds may be added, as a deviation; those that were declared stay.",
        )
    told = "; ".join(f"{path}: {a!r} → {b!r}" for path, (a, b) in changes.items())
    if not why:
        raise ConfigError.at(
            "deviation",
            got=f"no reason for what has changed since the launch ({told})",
            expected="a reason, which the verdict quotes",
            do='Add deviation="why", and the verdict is exploratory; or give another name (name=...).',
        )
    return {"what": told, "when": time.strftime("%Y-%m-%d %H:%M:%S %z"), "why": why}


def standing(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every deviation from what was declared: those written down, and a change of the file that nobody wrote down."""
    if "registration" not in about:
        return [{"what": "ablation.json holds no registration", "when": "not known", "why": "not registered"}]
    found = list(about.get("deviations", []))
    last = found[-1]["hash"] if found else about["registration"]["hash"]
    if digest(about) != last:
        found.append({"what": "ablation.json was changed by hand after launch", "when": "not known", "why": "not said"})
    return found


def quote(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The pre-registration and the deviations as sentences, for the head of a verdict."""
    if "registration" not in about:
        return ("Not registered: nothing that was declared and hashed before the first run is on record.",)
    held = about["registration"]
    content, unit = held["content"], held["content"]["metric"]
    budget, seeds = content["budget"], content["seeds"]
    axis = budget["axis"].replace("_", " ")
    target = "" if budget["target"] is None else f" as {budget['target']}"
    matched = f"{axis} equal{target} within {100 * budget['tolerance']:g} %"
    if budget["allow_mismatch"]:
        matched = f"{axis} not matched ({budget['allow_mismatch']})"
    effect = "not declared" if content["effect"] is None else f"{content['effect']:g} {unit}"
    margin = "none" if content["margin"] is None else f"±{content['margin']:g} {unit}"
    lines = [
        f"Declared at launch, {held['at']} (hash {held['hash']}): {content['question'] or 'no question'}",
        f"Primary: {unit} on the {content['split']} split, {content['test']}, alpha {content['alpha']:g}; budget: {matched}; "
        f"smallest difference of interest: {effect}; equivalence margin: {margin}; {len(seeds)} paired seeds "
        f"({', '.join(map(str, seeds))}); stopping: {content['stopping']}; exclusions: {content['exclusions']}.",
    ]
    lines += [f"Deviation, {d['when']}: {d['what']} (why: {d['why']})." for d in standing(about)]
    return tuple(lines)
