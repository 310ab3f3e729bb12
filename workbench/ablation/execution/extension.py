"""Further confirmation seeds for a finished ablation, recorded as what they are.

An anytime-valid design may be extended: its verdict holds at any number of seeds. A fixed design was to be read once,
and a group-sequential one at its declared looks: seeds that are added after the values were seen keep no error rate.
Those of a fixed design are a deviation, with a reason, and the verdict is exploratory; a group-sequential design is not
extended, because its levels are those of its declared looks.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.roster import Roster
from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.spec.registration import Deviation, record_deviation
from workbench.ablation.verdict.measurements import looks_taken
from workbench.ablation.verdict.sequential import decided
from workbench.config import ConfigError, require
from workbench.data import Source
from workbench.results.ledger import history

__all__ = ["extend", "unused_seeds"]

WORKERS_END = 30.0
"""Seconds to wait for the workers of a finished ablation to end."""


def extend(folder: AblationFolder, seeds: int | Sequence[int], why: str | None = None) -> Deviation:
    """Add confirmation seeds to a finished ablation; starts no worker.

    Args:
        folder: of the ablation.
        seeds: their number, or the seeds; a number takes seeds that no launch of the folder of results has opened.
        why: the reason, which the verdict quotes; needed unless the design is anytime-valid.

    Returns:
        what was recorded; ``planned`` where the declared design allows it.

    Raises:
        ConfigError: if the ablation is not finished, its design does not allow it, every arm is decided, the seeds are
            not new, a reason is missing, or the data are gone.
    """
    _let_workers_end(folder)
    with folder.plan_lock():
        record = folder.record()
        _check(folder, record)
        known = record.config.confirmation.seeds
        new = _unused(folder, record, seeds) if isinstance(seeds, int) else tuple(seeds)
        require(new and not {*new} & {*known}, "seeds", got=list(new), expected=f"at least one, none of {list(known)}")
        confirmation = record.config.confirmation.changed(seeds=(*known, *new))
        config = record.config.changed(confirmation=confirmation, deviation=why)
        deviation = record_deviation(record.canonical, config.canonical(), why)
        assert deviation is not None  # only seeds were added
        for fingerprint in set(record.data.values()):
            Source.open(folder.cache_path, fingerprint)
        folder.write_record(record.with_analysis(config, deviation))
        Roster(folder).forget_notifications()
        Plan(folder).advance(relaunch=True)
    return deviation


def unused_seeds(results: Path, used: Collection[int], count: int, first: int = 0) -> tuple[int, ...]:
    """The next ``count`` seeds that no launch in the folder of results has opened.

    Args:
        results: the folder of results.
        used: further seeds to leave out.
        count: how many.
        first: least seed.
    """
    taken = {*used, *(opening.seed for opening in history(results).openings)}
    free = (seed for seed in itertools.count(first) if seed not in taken)
    return tuple(itertools.islice(free, max(count, 0)))


def _unused(folder: AblationFolder, record: LaunchRecord, count: int) -> tuple[int, ...]:
    known = record.config.confirmation.seeds
    used = {*known, *record.config.tuning.seeds, *(seed for runs in record.control.values() for seed in runs.measured)}
    return unused_seeds(folder.path.parent, used, count, max(known) + 1)


def _let_workers_end(folder: AblationFolder) -> None:
    """Wait for the workers of a finished ablation, which take a moment to end."""
    deadline = time.monotonic() + WORKERS_END
    while folder.is_finished and Roster(folder).live_workers() and time.monotonic() < deadline:
        time.sleep(0.2)


def _check(folder: AblationFolder, record: LaunchRecord) -> None:
    where, stopping = str(folder.path), record.config.protocol.stopping
    require(not folder.is_archived, where, got="an archive", expected="the folder of an ablation, with its runs")
    require(
        folder.is_finished and not Roster(folder).live_workers(),
        where,
        got="an ablation that has not ended",
        expected="a finished one",
        do=f"`workbench run {folder.path} --results {folder.path.parent}` resumes it.",
    )
    require(
        record.config.confirmation.components is None,
        where,
        got="a study of noise components",
        expected="an ablation whose runs have a seed each",
        do="Launch one with more seeds of a component.",
    )
    if stopping.looks:
        raise ConfigError.at(
            "protocol.stopping",
            got=f"looks at {list(stopping.looks)} seeds",
            expected="a fixed or an anytime-valid design",
            do="The levels of a group-sequential design hold at its declared looks only. Launch an ablation with a new "
            "name and new seeds; with stopping: {anytime: true} it can be extended.",
        )
    if stopping.anytime:
        open_arms = [arm for arm in record.order[1:] if arm not in decided(looks_taken(folder))]
        require(
            open_arms,
            "seeds",
            got="further seeds for arms that are all decided",
            expected="an arm that is undecided",
            do="The verdict stands; nothing would be run.",
        )
