"""Which ablations are sizes of one series: the same arms, trained and measured alike, at another size or horizon.

Scaling laws and comparisons over sizes join what :func:`series` joins, and nothing else. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from workbench.ablation.folder import LaunchRecord
from workbench.config import deep_merge, expand_dotted, flatten
from workbench.metric import Metric

__all__ = ["SAME_SIZE", "Candidate", "Design", "Series", "design_of", "distinct_sizes", "series"]

SAME_SIZE = 1.05
"""Sizes within this factor count as one (our choice): a budget's solver matches its target within a few per cent."""

SIZE_FIELDS = (
    "model.scale",
    "model.width",
    "model.depth",
    "model.vocabulary",  # data of another vocabulary has another fingerprint
    "model.mixers.*.heads",
    "model.mixers.*.kv_heads",
    "model.mixers.*.*_dim",
    "model.mixers.*.*_rank",
    "model.mixers.*.query_latent",
    "model.feedforwards.*.hidden",
    "training.tokens",
    "training.batch_size",
    "training.learning_rate",
)
"""Fields of a run that differ between sizes of one arm; patterns of ``fnmatch``."""
OTHER_FIELDS = (
    "data.*",  # compared by its fingerprint
    "evaluation*",
    "seed",
    "seeds.*",
    "model.mixers.*.chunk",
    "model.mixers.*.backend",
    "training.accumulate",
    "training.ranks",
    "training.expert_parallel",
    "training.precision",
    "training.compile",
    "training.recompute",
    "training.deterministic",
    "training.keep_trunk",
    "training.log_every",
    "training.evaluations",
    "training.checkpoint_every",
)
"""Fields that change how a run is carried out or watched, not what is trained but for rounding."""
SHOWN = 3
"""Differing fields that a reason names."""


@dataclass(frozen=True)
class Design:
    """What the ablations of a series have in common."""

    metric: Metric
    split: str
    """Split that the confirmation runs are measured on."""
    data: Mapping[str, str]
    """Arm -> fingerprint of its prepared data."""
    definitions: Mapping[str, Mapping[str, Any]]
    """Arm -> the fields that the ablation's description sets in it, by dotted path; fields of size left out."""
    free: frozenset[str] = frozenset()
    """Fields that tuning or the budget's solver sets: not part of a definition."""

    def unlike(self, arm: str, other: Design, other_arm: str) -> str:
        """Why values of an arm of ``other`` are not values of the same quantity as those of an arm of this design:
        another metric, task, split or other data; "" if they are."""
        ours, theirs = self.metric, other.metric
        if theirs != ours:
            return f"measured in {theirs.unit} ({theirs.name}), not in {ours.unit} ({ours.name})"
        if (theirs.suite, theirs.task) != (ours.suite, ours.task):
            return f"another task ({theirs.suite}/{theirs.task}, not {ours.suite}/{ours.task})"
        if other.split != self.split:
            return f"measured on the {other.split} split, not on the {self.split} split"
        missing = "an unknown fingerprint"
        data = other.data.get(other_arm, missing), self.data.get(arm, missing)
        if data[0] != data[1] or missing in data:
            return f"other data ({data[0]}, not {data[1]})"
        return ""

    def difference(self, other: Design, arm: str) -> str:
        """Why an arm of ``other`` is not that of this design at another size; "" if it is."""
        if unlike := self.unlike(arm, other, arm):
            return unlike
        free = self.free | other.free
        one, two = (
            {path: value for path, value in design.definitions.get(arm, {}).items() if path not in free}
            for design in (other, self)
        )
        paths = [path for path in sorted({*one, *two}) if one.get(path) != two.get(path)]
        named = "; ".join(f"{path} is {_value(one, path)}, not {_value(two, path)}" for path in paths[:SHOWN])
        return f"{named}; {len(paths) - SHOWN} further fields differ" if len(paths) > SHOWN else named


def _value(fields: Mapping[str, Any], path: str) -> str:
    return repr(fields[path]) if path in fields else "unset"


def design_of(record: LaunchRecord) -> Design:
    """The design of a launched ablation."""
    config = record.config
    base = expand_dotted(config.base)
    definitions = {arm: _definition(deep_merge(base, expand_dotted(config.arms[arm]))) for arm in record.order}
    tuned = {*config.tuning.space, *(field for space in record.spaces.values() for field in space)}
    solved = {field for fields in record.solved.values() for field in fields}
    free = frozenset({*tuned, *solved, *config.budget.free})
    return Design(record.metric, config.confirmation.split, record.data, definitions, free)


def _definition(fields: Mapping[str, Any]) -> dict[str, Any]:
    ignored = (*SIZE_FIELDS, *OTHER_FIELDS)
    return {
        path: value
        for path, value in flatten(fields).items()
        if path and value != {} and not any(fnmatchcase(path, pattern) for pattern in ignored)
    }


@dataclass(frozen=True)
class Candidate:
    """An ablation that may belong to a series."""

    name: str
    design: Design | None
    """None where it is not known: of views that are no launched ablation."""
    finished: bool
    sizes: Mapping[str, float]
    """Arm -> its size: parameters, FLOPs or tokens."""


@dataclass(frozen=True)
class Series:
    """The ablations of a series and what is not in it."""

    arms: tuple[tuple[str, ...], ...]
    """Arms of every candidate that belong to the series, in its order; empty if it does not."""
    left_out: tuple[str, ...]
    """What is not in the series and why, one sentence each."""


def series(reference: Candidate, others: Sequence[Candidate] = ()) -> Series:
    """The sizes of the arms of ``reference``.

    An ablation belongs to the series if it is finished and its size differs from every earlier one by more than
    :data:`SAME_SIZE`; an arm of it, if it has the name, metric, task, split, data and definition of the reference's arm
    up to :data:`SIZE_FIELDS`. So repetitions of an ablation, whose seeds are the same, do not count twice.

    Args:
        reference: the ablation whose arms are followed.
        others: further ablations, in the order in which they are preferred.
    """
    arms: list[tuple[str, ...]] = []
    left_out: list[str] = []
    taken: list[Candidate] = []
    for candidate in (reference, *others):
        found, reasons = _belonging(reference, candidate)
        if found:
            same = next((other for other in taken if _have_one_size(candidate, other, found)), None)
            if same is not None:
                found, reasons = (), {f"of the size of {same.name}": found}
            else:
                taken.append(candidate)
        arms.append(found)
        for reason, affected in reasons.items():
            whole = not found and len(reasons) == 1
            subject = candidate.name if whole else f"{candidate.name}, {', '.join(affected)}"
            left_out.append(f"{subject}: {reason}.")
    return Series(tuple(arms), tuple(left_out))


def _belonging(reference: Candidate, candidate: Candidate) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Arms of a candidate that are those of the reference, and reason -> the arms of these names that are not."""
    shared = tuple(arm for arm in reference.sizes if arm in candidate.sizes)
    if not candidate.finished:
        return (), {"not finished": shared}
    if candidate is reference:
        return shared, {}
    if not shared:
        return (), {f"no arm of {reference.name} in it": ()}
    if reference.design is None or candidate.design is None:
        return (), {"not a launched ablation" if candidate.design is None else "nothing to compare it with": shared}
    found: list[str] = []
    reasons: dict[str, tuple[str, ...]] = {}
    for arm in shared:
        if reason := reference.design.difference(candidate.design, arm):
            reasons[reason] = (*reasons.get(reason, ()), arm)
        else:
            found.append(arm)
    return tuple(found), reasons


def _have_one_size(one: Candidate, other: Candidate, arms: Sequence[str]) -> bool:
    """Whether the first arm that both have is of one size in both."""
    shared = [arm for arm in arms if arm in other.sizes]
    return bool(shared) and len(distinct_sizes([one.sizes[shared[0]], other.sizes[shared[0]]])) == 1


def distinct_sizes(sizes: Sequence[float]) -> list[float]:
    """The sizes, ascending, that differ from the last one kept by more than :data:`SAME_SIZE`."""
    kept: list[float] = []
    for size in sorted(sizes):
        if not kept or size > SAME_SIZE * kept[-1]:
            kept.append(size)
    return kept
