"""An ablation's description: the mistakes a new user makes, and its identity. Nothing here needs a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.budget import Budget
from workbench.config import ConfigError


def problem(fields: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        AblationConfig.parse({**fields, **changes})
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tunning": {}}, "Nearest valid name: 'tuning'"),
        ({"baseline": "ful"}, "baseline: got 'ful'"),
        ({"confirmation": {"seeds": [1, 1]}}, "all different"),
        ({"tuning": {"trials": 2, "sampler": "random", "seed": 1}}, "none of the confirmation seeds"),
        ({"tuning": {"trials": 2, "space": {"seed": {"values": [1, 2]}}}}, "never a hyper-parameter"),
        ({"tuning": {"trials": 2, "space": {"seeds.init": {"values": [1, 2]}}}}, "never a hyper-parameter"),
        ({"budget": {"free": ["seeds.order"]}}, "never a hyper-parameter"),
        ({"confirmation": {"seeds": [2**63]}}, "an integer of at most 9223372036854775807"),
        ({"tuning": {"seed": 2**63}}, "an integer of at most 9223372036854775807"),
        ({"confirmation": {"components": {"init": 1}}}, "confirmation.components: got 'one seed of every component'"),
        ({"confirmation": {"components": {"init": 3}, "seeds": [1, 2]}}, "one for each of the 3 runs"),
        ({"arms": {}}, "no arm"),
        ({"name": "../x"}, "name: got '../x'"),
        ({"name": "x" * 81 + "-pilot"}, "a name of 81 bytes'"),
        ({"name": "x" * 300}, "a name of 300 bytes'"),
        ({"arms": {"y" * 200: {}}, "baseline": None}, "a name of 200 bytes'"),
        ({"arms": {"漢" * 80: {}}, "baseline": None}, "a name of 240 bytes"),
        ({"name": "cache"}, "which folders of results have"),
        ({"name": "ablations"}, "which folders of results have"),
        ({"name": "exports"}, "which folders of results have"),
        ({"name": "ledger.jsonl"}, "which folders of results have"),
        ({"margin": 0.05, "protocol": {"effect": 0.02}}, "margin: got 0.05; expected at most protocol.effect"),
        ({"budget": {"tolerance": 0.05}}, "budget.tolerance: got 0.05; expected at most 0.02"),
        ({"budget": {"target": "ful"}}, "budget.target: got 'ful'"),
        ({"budget": {"target": "ful"}}, "'full'"),
        ({"budget": {"axis": "seconds"}}, "[training.tokens] where axis is seconds"),
        ({"budget": {"free": ["data.seed"]}}, "never a hyper-parameter"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    assert message in problem(fields, **changes)


def test_a_field_is_either_solved_or_tuned(fields: dict[str, Any]) -> None:
    hidden = "model.feedforwards.swiglu.hidden"
    tuning = {"trials": 2, "space": {hidden: {"values": [64, 72]}}}
    assert "a field that is not tuned" in problem(fields, budget={"free": [hidden]}, tuning=tuning)


def test_a_large_tolerance_needs_a_reason() -> None:
    assert Budget(tolerance=0.05, allow_mismatch="a pilot").tolerance == 0.05


def test_parsing_builds_no_model(fields: dict[str, Any]) -> None:
    AblationConfig.parse({**fields, "arms": {"a": {"model.pattern": "no such mixer"}}})


def test_identity_ignores_how_the_work_is_carried_out(fields: dict[str, Any]) -> None:
    config = AblationConfig.parse(fields)
    assert config.identity == AblationConfig.parse({**fields, "launch": {"workers": 7}}).identity


def test_identity_depends_on_the_analysis(fields: dict[str, Any]) -> None:
    assert AblationConfig.parse(fields).identity != AblationConfig.parse({**fields, "alpha": 0.01}).identity


def test_plain_data_parse_to_the_same_ablation(fields: dict[str, Any]) -> None:
    config = AblationConfig.parse(fields)
    assert AblationConfig.parse(config.plain()) == config


def test_a_description_imports_neither_torch_nor_optuna(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from workbench.ablation.spec.ablation import AblationConfig; "
        "AblationConfig.parse({'name': 'x', 'arms': {'a': {}}}); "
        "print([name for name in ('torch', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
