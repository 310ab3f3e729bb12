"""The number of seeds, from the noise of a pilot."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import ablation_fields
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.power import Pilot, pilot_of, plan_seeds
from workbench.ablation.verdict.statistics import equivalence_power, equivalent, pooled_sd, seeds_for_equivalence
from workbench.files import write_json


def test_sample_sizes_are_those_of_exact_t_tests() -> None:
    """sd 0.0015: unpaired columns do not apply here; paired rho 0.5, 0.8, 0.9, and rho 0.5 with Holm over four arms."""
    wanted = {0.001: (20, 10, 6, 29), 0.002: (7, 5, 4, 10), 0.003: (5, 4, 3, 7)}
    for effect, counts in wanted.items():
        found = [
            plan_seeds(Pilot.assumed(0.0015, rho), arms=arms, effect=effect).for_effect
            for rho, arms in ((0.5, 1), (0.8, 1), (0.9, 1), (0.5, 4))
        ]
        assert found == list(counts)


def test_power_of_equivalence_is_what_simulation_finds() -> None:
    assert [seeds_for_equivalence(m) for m in (1, 1.5, 2, 3)] == [11, 6, 4, 3]
    rng = np.random.default_rng(0)
    for n, margin in ((6, 1.5), (4, 2.0)):
        found = np.mean([equivalent(rng.normal(size=n), margin) for _ in range(4_000)])
        assert found == pytest.approx(equivalence_power(n, margin), abs=0.025)
    assert equivalence_power(1, 5.0) == 0.0


def test_noise_of_a_pilot() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=200)
    values = {
        arm: dict(enumerate(1 + 0.01 * (math.sqrt(0.8) * shared + math.sqrt(0.2) * rng.normal(size=200))))
        for arm in "ab"
    }
    found = pilot_of(values, "a")
    assert found.sd == pytest.approx(0.01, rel=0.1) and found.df == 398 and found.rho == pytest.approx(0.8, abs=0.06)
    assert found.sd_difference == pytest.approx(0.01 * math.sqrt(0.4), rel=0.12)
    alone = pilot_of({"a": values["a"]}, "a")
    assert alone.rho is None and alone.sd_difference == pytest.approx(alone.sd * math.sqrt(2)) and alone.floor
    with pytest.raises(ValueError, match="two seeds"):
        pilot_of({"a": {0: 1.0}, "b": {0: 2.0}}, "a")
    assert pooled_sd([[1.0], [2.0]])[1] == 0


def test_plan_in_words_and_on_the_command_line(tmp_path: Path) -> None:
    nothing = plan_seeds(Pilot.assumed(0.01), arms=2)
    assert nothing.seeds is None and "Declare protocol.effect" in nothing.sentences()[-1]
    both = plan_seeds(Pilot.assumed(0.01, 0.5), arms=1, effect=0.01, margin=0.01)
    assert both.seeds == max(10, 11) and both.table().height == 10
    write_json(tmp_path / "a.yaml", {**ablation_fields(tmp_path), "protocol": {"effect": 0.01}})
    told = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "a.yaml"), "--sd", "0.01", "--rho", "0.5"])
    assert told.exit_code == 0 and "10 paired seeds" in told.output, told.output
    missing = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "a.yaml"), "--results", str(tmp_path)])
    assert missing.exit_code and "workbench pilot" in str(missing.exception)


def test_a_pilot_has_seeds_of_its_own_and_tunes_nothing(tmp_path: Path) -> None:
    small = Ablation.parse({**ablation_fields(tmp_path), "baseline": "sliding"}).pilot(8)
    config = small.config
    assert config.name == "test-pilot" and config.order == ["sliding", "full"] and config.tuning.trials == 0
    assert len(config.confirmation.seeds) == 8 and not {0, 1, 2, 1000} & set(config.confirmation.seeds)
    assert config.confirmation.split == "selection" and config.exploratory
