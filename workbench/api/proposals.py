"""Proposals: one change against a baseline, decided by a declared sequential design.

A proposal is an ablation of two arms, the baseline and the baseline with the change, registered before its first run
and read at declared looks only, so that a program that proposes one change after the other cannot stop where it likes.
Every proposal takes seeds that no launch has opened: its verdict is a confirmation. Nothing statistical is new here.

``keep``: the verdict is better. ``discard``: it is worse, equivalent (a difference inside the declared margin does not
matter), or the change's runs failed. ``undecided``: neither is shown, or the verdict is exploratory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.api.ablations import status_of, verdict_of
from workbench.api.answers import Proposal, VerdictAnswer
from workbench.config import (
    ConfigError,
    apply_overrides,
    deep_merge,
    expand_dotted,
    flatten,
    hash_of,
    read_yaml,
    require,
)

if TYPE_CHECKING:
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.run import AblationRun

__all__ = ["create", "decide", "prepare"]

LOOKS = (4, 6, 8)
"""Paired seeds at the looks of the default design."""
ARM, TAG = "proposal", "proposal"
SETTLED: dict[str, Literal["keep", "discard"]] = {
    "better": "keep",
    "worse": "discard",
    "equivalent": "discard",
    "failed": "discard",
}


def prepare(
    change: Sequence[str],
    against: str | Path,
    results: str | Path = "results",
    *,
    fields: Sequence[str] = (),
    looks: Sequence[int] = (),
    anytime: int | None = None,
    seeds: Sequence[int] | None = None,
    name: str | None = None,
) -> Ablation:
    """The ablation that decides about a change. The same change against the same baseline is the same ablation, so that
    a second call resumes it.

    Args:
        change: fields of a run, ``"model.pattern=gdn full"``, or YAML files with them.
        against: the baseline as YAML: an ablation, for its base and its baseline arm, or a single run.
        results: folder of all results.
        fields: fields of the ablation to change: ``"margin=0.01"``.
        looks: paired seeds at the looks of a group-sequential design. Default: the file's design if it is sequential,
            else :data:`LOOKS`.
        anytime: the most seeds of an anytime-valid design instead.
        seeds: confirmation seeds. Default: those that no launch of the folder of results has opened.
        name: of the ablation; default made from the baseline and the change.

    Raises:
        ConfigError: with every mistake; a change of nothing and a change of a tuned field are mistakes too.
    """
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.spec.ablation import AblationConfig

    changed = _change(change)
    plain = _declared(apply_overrides(_ablation(against), fields))
    baseline = plain.pop("baseline")
    before = plain["arms"][baseline]
    tuned = [path for path in flatten(changed) if path in plain.get("tuning", {}).get("space", {})]
    require(
        not tuned,
        "change",
        got=tuned,
        expected="fields that are not tuned",
        do="Tuning would choose another value. Take the field out of tuning.space: --set 'tuning={trials: 0}'.",
    )
    arm = ARM if baseline != ARM else f"{ARM}-2"
    after = deep_merge(before, changed)
    plain |= {"arms": {baseline: before, arm: after}, "baseline": baseline}
    plain["protocol"] = {**plain.get("protocol", {}), "stopping": _stopping(plain, looks, anytime)}
    identity = {key: plain[key] for key in sorted(plain) if key != "launch"} | {"most": anytime, "seeds": seeds}
    plain["name"] = name or f"propose-{hash_of(identity)[:10]}"
    plain["confirmation"] = {"seeds": list(seeds or _seeds(plain, Path(results), anytime))}
    ablation = Ablation(AblationConfig.parse(plain), results)
    require(
        ablation.arms[arm].run().setting != ablation.arms[baseline].run().setting,
        "change",
        got=changed,
        expected="a change of what is trained",
        do="The baseline has these values already.",
    )
    return ablation


def create(ablation: Ablation, why: str = "", progress: Callable[[str], None] | None = None) -> AblationRun:
    """The folder of a prepared proposal, tagged as one; starts no worker.

    Args:
        ablation: of :func:`prepare`.
        why: the reason for the change, kept as a note.
        progress: called with a line about each step.
    """
    run = ablation.create(progress or (lambda line: None))
    if TAG not in run.notes().tags:
        run.annotate(why, tags=[TAG])
    return run


def decide(run: AblationRun) -> Proposal:
    """What a proposal has come to: ``running`` before its end, then ``keep``, ``discard`` or ``undecided``."""
    config, status = run.record.config, status_of(run)
    before, after = (flatten(change) for _, change in config.canonical()["arms"])
    verdict = verdict_of(run) if run.finished else None
    row: Mapping[str, Any] = verdict.verdict["rows"][1] if verdict and verdict.verdict else {}
    number = 1 + _earlier(run)
    decision, reason = _decision(run.finished, verdict, row)
    repeated = ("repeated_low", "repeated_high") if row.get("level") is not None else ("low", "high")
    return Proposal(
        name=run.name,
        folder=str(run.folder),
        decision=decision,
        reason=reason,
        change={path: value for path, value in after.items() if before.get(path) != value},
        metric=run.metric.unit,
        word=row.get("verdict"),
        difference=row.get("difference"),
        low=row.get(repeated[0]),
        high=row.get(repeated[1]),
        p=row.get("p_holm"),
        seeds=row.get("seeds"),
        looks=[look["seeds"] for look in run.files.looks()],
        design=config.protocol.stopping.sentence(len(config.confirmation.seeds)),
        alpha=run.alpha,
        exploratory=verdict.verdict["exploratory"] if verdict and verdict.verdict else None,
        number=number,
        false_keeps=1 - (1 - run.alpha / 2) ** number,
        status=status,
        verdict=verdict,
    )


def _decision(
    finished: bool, verdict: VerdictAnswer | None, row: Mapping[str, Any]
) -> tuple[Literal["keep", "discard", "undecided", "running"], str]:
    if not finished:
        return "running", "Runs are missing; the same call resumes them."
    if verdict is None or verdict.verdict is None or not row:
        return "undecided", "No run was confirmed."
    exploratory = verdict.verdict["exploratory"]
    if exploratory and row["verdict"] != "failed":
        return "undecided", f"The verdict is exploratory ({exploratory}): {row['sentence']}"
    return SETTLED.get(row["verdict"], "undecided"), str(row["sentence"])


def _change(change: Sequence[str]) -> dict[str, Any]:
    """The change as nested fields of a run."""
    merged: dict[str, Any] = {}
    for part in change:
        is_file = part.endswith((".yaml", ".yml")) and "=" not in part
        fields = expand_dotted(read_yaml(part)) if is_file else apply_overrides({}, [part])
        merged = deep_merge(merged, fields)
    require(merged, "change", got="nothing", expected="fields of a run, such as 'model.pattern=gdn full'")
    return merged


def _ablation(path: str | Path) -> dict[str, Any]:
    """The fields of an ablation in a YAML file, made of those of a single run where it has one."""
    fields = read_yaml(path)
    if "arms" in fields or "base" in fields:
        return {"arms": {"baseline": {}}, **fields}
    return {"base": fields, "arms": {"baseline": {}}, "tuning": {"trials": 0}}


def _declared(fields: dict[str, Any]) -> dict[str, Any]:
    """The ablation without what concerns other arms than the baseline."""
    arms = fields["arms"]
    baseline = fields.get("baseline") or next(iter(arms), None)
    if not isinstance(arms, Mapping) or baseline not in arms:
        raise ConfigError.at("baseline", got=baseline, expected="the name of an arm")
    kept = {name: value for name, value in fields.items() if name not in ("name", "question", "deviation")}
    protocol = {k: v for k, v in (kept.get("protocol") or {}).items() if k not in ("control_variate", "comparisons")}
    return {
        **kept,
        "protocol": protocol,
        "arms": {baseline: expand_dotted(arms[baseline] or {})},
        "baseline": baseline,
        "question": f"Is the change better than {baseline}?",
    }


def _stopping(plain: Mapping[str, Any], looks: Sequence[int], anytime: int | None) -> Any:
    from workbench.ablation.spec.protocol import Stopping

    if looks:
        return {"looks": list(looks)}
    if anytime:
        return {"anytime": True}
    declared = plain["protocol"].get("stopping", "fixed")
    is_sequential = declared != "fixed" and Stopping.parse(declared).is_sequential
    return declared if is_sequential else {"looks": list(LOOKS)}


def _seeds(plain: Mapping[str, Any], results: Path, anytime: int | None) -> tuple[int, ...]:
    """Seeds of an earlier launch of the same name, else unused ones."""
    from workbench.ablation.execution.extension import unused_seeds
    from workbench.ablation.folder import AblationFolder
    from workbench.ablation.spec.protocol import Confirmation
    from workbench.ablation.spec.tuning import Tuning

    folder = AblationFolder(results / plain["name"])
    if folder.exists:
        return folder.record().config.confirmation.seeds
    stopping = plain["protocol"]["stopping"]
    declared = Confirmation.parse(plain.get("confirmation") or {}).seeds
    count = max(stopping.get("looks") or [anytime or max(len(declared), stopping.get("first", LOOKS[0]))])
    return unused_seeds(results, {*Tuning.parse(plain.get("tuning") or {}).seeds}, count)


def _earlier(run: AblationRun) -> int:
    """Earlier proposals against the same baseline in the folder of results."""
    from workbench.ablation.run import AblationRun

    def key(other: AblationRun) -> tuple[Any, Any]:
        canonical = other.record.canonical
        return canonical["base"], dict(canonical["arms"])[canonical["baseline"]]

    count, created = 0, _created(run)
    for path in run.results.glob("*/ablation.json"):
        if path.parent == run.folder:
            continue
        try:
            other = AblationRun(path.parent)
            count += TAG in other.notes().tags and key(other) == key(run) and _created(other) < created
        except (ConfigError, KeyError):
            continue
    return count


def _created(run: AblationRun) -> tuple[str, str]:
    return run.provenance().get("created", ""), run.name
