"""Looks: how often the report documents of an ablation were opened, and whether its runs were opened before.

The rule (ours). A *look* is a launch that was measured on report documents; its number counts the launches before it
that opened at least one of the same documents. A verdict is **exploratory** if one of its runs (setting and seed, hence
the trained weights) was opened by an earlier launch, on whatever documents: the unit of the test is the seed, a known
run is no new draw, and a good one is good on other documents too. New seeds are new draws, so the same arms may be
tested again on the same documents: such a *repeat* is a confirmation, but k tests of one comparison at level alpha
have a chance of up to 1 − (1 − alpha)^k of a false claim among them, which the verdict states. Other arms on the
same documents are ordinary reuse of a benchmark; the number of the look is stated and nothing else follows. A verdict
is exploratory as well if the ledger was changed, or lacks one of its openings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.files import read_json
from workbench.results.ledger import ORIGIN, History, history
from workbench.status import Stage, Status

__all__ = ["Look", "Run", "look_at", "look_of", "missing_lines"]


class EarlierLook(BaseModel):
    """A launch that opened some of the same report documents before."""

    model_config = ConfigDict(frozen=True)

    ablation: str
    at: str
    """Its first opening, UTC."""
    shared: int
    """Documents that it opened of those in question."""


class KnownRun(BaseModel):
    """A run whose setting and seed an earlier launch opened."""

    model_config = ConfigDict(frozen=True)

    arm: str
    seed: int
    ablation: str
    """Where it was opened first."""


class Look(BaseModel):
    """What the ledger knows of a launch."""

    model_config = ConfigDict(frozen=True)

    number: int
    """From 1."""
    documents: int
    """Report documents."""
    earlier: tuple[EarlierLook, ...] = ()
    """Earlier looks at some of the documents, oldest first."""
    known: tuple[KnownRun, ...] = ()
    """Runs that were opened before."""
    repeats: dict[str, int] = {}
    """Arm -> earlier looks with the same arm and baseline (before tuning) on some of the documents; arms without any
    are left out."""
    faults: tuple[str, ...] = ()
    """What is wrong with the ledger."""

    @property
    def exploratory(self) -> list[str]:
        """Why the verdict is exploratory; empty if it is a confirmation."""
        reasons = [f"known before: {_runs(self.known)}"] if self.known else []
        return reasons + [f"the ledger: {fault}" for fault in self.faults]

    def sentences(self, alpha: float) -> list[str]:
        """The look in words, for the head of a verdict and before a launch.

        Args:
            alpha: error rate of one verdict.
        """
        lines = [f"Look {self.number} at these {self.documents} report documents{_opened_before(self.earlier)}."]
        if self.known:
            lines.append(f"Known before: {_runs(self.known)}. A known run is no new draw; the verdict is exploratory.")
        arms_by_count: dict[int, list[str]] = {}
        for arm, count in self.repeats.items() if not self.known else ():
            arms_by_count.setdefault(count, []).append(arm)
        for count, arms in arms_by_count.items():
            tests = count + 1
            lines.append(
                f"Test {tests} of {' and '.join(arms)} against the baseline on these documents: alpha {alpha:g} is the "
                f"error rate of one test, {1 - (1 - alpha) ** tests:.3g} that of all {tests}; a claim that holds over "
                f"all of them needs an adjusted p below {alpha / tests:.3g}."
            )
        return lines + [f"The ledger: {fault}; the verdict is exploratory." for fault in self.faults]


def _opened_before(earlier: Sequence[EarlierLook]) -> str:
    if not earlier:
        return "; the ledger has no earlier one"
    shown = ", ".join(f"{look.ablation} ({look.at[:10]}, {look.shared} of them)" for look in earlier[-5:])
    more = f" and {len(earlier) - 5} older ones" if len(earlier) > 5 else ""
    times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
    return f", opened {times} before: {shown}{more}"


def _runs(known: Sequence[KnownRun]) -> str:
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in known:
        seeds.setdefault((run.arm, run.ablation), []).append(run.seed)
    return "; ".join(
        f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))} of {arm} (in {ablation})"
        for (arm, ablation), numbers in seeds.items()
    )


class Run(NamedTuple):
    """A confirmation run, opened or about to be."""

    arm: str
    setting: str
    seed: int
    position: int | None = None
    """Number of openings before it; None before it is opened."""


def look_at(
    past: History,
    launch: str,
    digests: Collection[str],
    identities: Mapping[str, str],
    runs: Sequence[Run],
    faults: Sequence[str] = (),
) -> Look:
    """The look that a launch takes.

    Args:
        past: what the ledgers know.
        launch: its identifier; its openings are not counted as an earlier look.
        digests: content hashes of its report documents.
        identities: arm -> setting before tuning, the baseline first.
        runs: its confirmation runs; before the launch every one that tuning may choose.
        faults: of the ledger.
    """
    wanted = set(digests)
    first = min((len(past.openings) if run.position is None else run.position for run in runs), default=0)
    at: dict[str, str] = {}
    names: dict[str, str] = {}
    shared: dict[str, set[str]] = {}
    arms: dict[str, set[str]] = {}
    opened: dict[tuple[str, int], tuple[int, str]] = {}
    for position, opening in enumerate(past.openings):
        if opening.launch == launch:
            continue
        opened.setdefault((opening.setting, opening.seed), (position, opening.ablation))
        common = wanted & past.documents.get(opening.documents, frozenset())
        if position < first and common:
            at.setdefault(opening.launch, opening.at)
            names[opening.launch] = opening.ablation
            shared.setdefault(opening.launch, set()).update(common)
            arms.setdefault(opening.launch, set()).add(opening.arm_identity)
    known = []
    for run in dict.fromkeys(runs):
        position, ablation = opened.get((run.setting, run.seed), (len(past.openings), ""))
        if ablation and (run.position is None or position < run.position):
            known.append(KnownRun(arm=run.arm, seed=run.seed, ablation=ablation))
    baseline, *others = identities.items()
    repeats = {arm: sum({baseline[1], identity} <= found for found in arms.values()) for arm, identity in others}
    return Look(
        number=len(at) + 1,
        documents=len(digests),
        earlier=tuple(EarlierLook(ablation=names[name], at=at[name], shared=len(shared[name])) for name in at),
        known=tuple(dict.fromkeys(known)),
        repeats={arm: count for arm, count in repeats.items() if count},
        faults=tuple(faults),
    )


def look_of(folder: AblationFolder, record: LaunchRecord) -> Look | None:
    """The look that a launched ablation takes; None before it has opened a report document, if it does not open any, or
    if it was launched by a version without a ledger."""
    if folder.is_archived:
        plain = read_json(folder.openings_path)
        return Look.model_validate(plain) if plain else None
    if not record.launch or record.config.confirmation.split != "report":
        return None
    past = history(folder.path.parent)
    faults = [*past.breaks, *missing_lines(folder, record, past)]
    own = [(position, opening) for position, opening in enumerate(past.openings) if opening.launch == record.launch]
    if not own:
        return Look(number=1, documents=0, faults=tuple(faults)) if faults else None
    digests = set().union(*(past.documents.get(opening.documents, frozenset()) for _, opening in own))
    identities = {opening.arm: opening.arm_identity for _, opening in own}
    identities = {arm: identities[arm] for arm in record.order if arm in identities}
    runs = [Run(opening.arm, opening.setting, opening.seed, position) for position, opening in own]
    return look_at(past, record.launch, digests, identities, runs, faults)


def missing_lines(folder: AblationFolder, record: LaunchRecord, past: History) -> list[str]:
    """Lines that the launch or its runs keep the hash of, and that the ledger does not have."""
    hashes = {line for ledger in past.ledgers for line in ledger.hashes}
    faults: list[str] = []
    if folder.is_archived:  # it has left its ledger
        return faults
    if record.ledger_head not in ("", ORIGIN) and record.ledger_head not in hashes:
        faults.append("its last line at the launch of this ablation is gone")
    done = [run for run in folder.run_folders(Stage.CONFIRMATION) if run.result().get("status") == Status.DONE]
    lines = {event["ledger_line"] for run in done for event in run.events() if "ledger_line" in event}
    if gone := lines - hashes:
        faults.append(f"{len(gone)} of the {len(lines)} openings of this ablation are gone, or were changed")
    return faults
