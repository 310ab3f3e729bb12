"""What counts as another size of the same ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.design import Candidate, Design, design_of, distinct_sizes, series
from workbench.ablation.folder import LaunchRecord
from workbench.ablation.run import AblationRun
from workbench.metric import BITS_PER_BYTE

ARCHIVES = Path(__file__).parents[2] / "results" / "ablations"


def design(base: dict[str, Any], free: tuple[str, ...] = (), **changes: Any) -> Design:
    """Of an ablation with an arm ``full`` (``base``) and an arm ``gdn`` (its pattern)."""
    config = {
        "name": "a",
        "base": base,
        "arms": {"full": {}, "gdn": {"model.pattern": "gdn full"}},
        "budget": {"free": list(free)},
        **changes,
    }
    fields = {"name": "a", "identity": "", "order": ["full", "gdn"], "config": config, "canonical": {}}
    return design_of(LaunchRecord.parse({**fields, "metric": BITS_PER_BYTE.plain(), "data": {"full": "d", "gdn": "d"}}))


SMALL: dict[str, Any] = {
    "model": {"width": 64, "mixers": {"gdn": {"heads": 2}}},
    "training": {"tokens": 1000, "context": 128},
}


def test_width_heads_tokens_and_learning_rate_are_sizes() -> None:
    large = {
        "model": {
            "scale": "340m",
            "mixers": {"gdn": {"heads": 8, "head_dim": 64}},
            "feedforwards": {"swiglu": {"hidden": 9}},
        },
        "training": {"tokens": 10**9, "batch_size": 64, "learning_rate": 1e-3, "context": 128, "precision": "bf16"},
        "evaluation": [{"kind": "ruler"}],
    }
    assert design(SMALL).difference(design(large), "gdn") == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"training": {"context": 512}}, "training.context is 512, not 128"),
        ({"training": {"context": 128, "optimiser": "muon"}}, "training.optimiser is 'muon', not unset"),
        ({"model": {"mixers": {"gdn": {"output_gate": "silu"}}}}, "model.mixers.gdn.output_gate is 'silu', not unset"),
    ],
)
def test_what_else_differs_is_named(change: dict[str, Any], reason: str) -> None:
    other = {"model": {}, "training": SMALL["training"], **change}
    assert design(SMALL).difference(design(other), "gdn") == reason


def test_tuned_and_solved_fields_are_no_part_of_a_definition() -> None:
    tuned = {"trials": 1, "space": {"training.weight_decay": {"low": 0.01, "high": 0.1}}}
    other = {**SMALL, "training": {**SMALL["training"], "weight_decay": 0.3, "clip": 2.0}}
    assert design(SMALL, free=("training.clip",), tuning=tuned).difference(design(other), "full") == ""


def test_many_differences_are_counted() -> None:
    other = {"training": {"clip": 2.0, "warmup": 0.1, "decay": 0.1, "final": 0.1, "context": 128}}
    assert design(SMALL).difference(design(other), "full").endswith("; 1 further fields differ")


def test_an_arm_without_a_known_fingerprint_joins_nothing() -> None:
    unknown = Design(BITS_PER_BYTE, "report", {}, {})
    assert unknown.difference(unknown, "full").startswith("other data")


def candidate(name: str, size: float, finished: bool = True, **changes: Any) -> Candidate:
    return Candidate(name, design({**SMALL, **changes}), finished, {"full": size, "gdn": 1.01 * size})


def test_a_series_has_every_size_once() -> None:
    others = [candidate("b", 1.03e6), candidate("c", 4e6), candidate("d", 4.01e6), candidate("e", 9e6, finished=False)]
    joined = series(candidate("a", 1e6), others)
    assert [bool(arms) for arms in joined.arms] == [True, False, True, False, False]
    assert joined.left_out == ("b: of the size of a.", "d: of the size of c.", "e: not finished.")


def test_an_unfinished_reference_still_says_what_belongs_to_it() -> None:
    joined = series(candidate("a", 1e6, finished=False), [candidate("b", 2e6)])
    assert joined.arms == ((), ("full", "gdn"))
    assert joined.left_out == ("a: not finished.",)


def test_sizes_close_to_each_other_are_one() -> None:
    assert distinct_sizes([2.0, 1.0, 1.04, 1.5]) == [1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("one", "other"), [("mqar_delta_family", "mqar_delta_family_large"), ("muon", "scmoe"), ("wisca", "wisca_60m")]
)
def test_archives_of_other_tasks_and_data_are_no_series(one: str, other: str) -> None:
    runs = [AblationRun(ARCHIVES / name) for name in (one, other)]
    candidates = [Candidate(run.name, run.design, run.finished, dict.fromkeys(run.arms, 1.0)) for run in runs]
    joined = series(candidates[0], candidates[1:])
    assert joined.arms[0] and not joined.arms[1]
    assert joined.left_out
