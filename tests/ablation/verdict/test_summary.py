"""The short form of a verdict says what the verdict says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.summary import Launched, Summary, deciding_interval, summarise
from workbench.ablation.verdict.verdict import Verdict
from workbench.cli import app

SIZES = np.array([900, 1200])
ARCHIVES = Path(__file__).parents[3] / "results" / "ablations"


def verdict(shifts: dict[str, float], seeds: int = 5, noise: float = 5e-4, **options: float) -> Verdict:
    random = np.random.default_rng(0)
    arms = []
    for arm, shift in {"full": 0.0, **shifts}.items():
        amounts = {seed: SIZES * random.normal(1 + shift, noise, 2) for seed in range(seeds)}
        arms.append(ArmMeasurements(arm, amounts, SIZES))
    return judge(arms[0], arms[1:], seeds=range(seeds), replicates=0, **options)


def launched(obstacle: str = "", effect: float | None = None, anytime: bool = False) -> Launched:
    return Launched("results/mine", "mine", (0, 1, 2, 3, 4), effect, 1_000, 2_000, 60.0, obstacle, anytime)


def failed(*arms: str) -> Summary:
    lost = dict.fromkeys(range(5), "diverged")
    good = {seed: SIZES * (1 + 0.001 * seed) for seed in range(5)}
    parts = [
        ArmMeasurements(arm, {} if arm in arms else good, SIZES, lost if arm in arms else {}) for arm in ("full", "gdn")
    ]
    return summarise(judge(parts[0], parts[1:], seeds=range(5), replicates=0), launched())


def test_a_headline_names_the_arm_the_size_and_the_certainty() -> None:
    headline = summarise(verdict({"gdn": 0.1})).headline
    assert headline.startswith("gdn is worse than full by 0.099") and "95 % interval" in headline
    assert "5 paired seeds" in headline


def test_several_arms_share_a_headline() -> None:
    headline = summarise(verdict({"a": -0.1, "b": -0.2, "c": 0.1})).headline
    assert headline.startswith("a and b are better than full, b most, by 0.2") and headline.endswith("; c is worse.")


def test_no_better_arm_comes_first() -> None:
    assert summarise(verdict({"a": 0.1, "b": 0.2})).headline.startswith("No arm is better than full: a and b are worse")


def test_equivalence_names_the_margin() -> None:
    assert "equivalent to full within ±0.1" in summarise(verdict({"gdn": 0.0}, margin=0.1)).headline


def test_few_seeds_decide_nothing() -> None:
    found = summarise(verdict({"gdn": 0.1}, seeds=3), launched())
    assert found.headline.startswith("Too few seeds") and "--seeds +2" in found.steps[0].command


@pytest.mark.parametrize(("arms", "text"), [(("full", "gdn"), "Every run failed"), (("gdn",), "gdn failed on every")])
def test_failure_is_the_headline(arms: tuple[str, ...], text: str) -> None:
    found = failed(*arms)
    assert found.failed and found.headline.startswith(text)


def test_an_undecided_arm_is_extended() -> None:
    steps = summarise(verdict({"gdn": 0.0}, noise=0.01), launched(effect=0.01)).steps
    assert steps[0].command.startswith("workbench extend results/mine --seeds +") and "--why" in steps[0].command
    assert "name=mine-" in steps[1].command and "[5,6," in steps[1].command


def test_an_archive_is_run_under_a_new_name() -> None:
    (step,) = summarise(verdict({"gdn": 0.0}, noise=0.01), launched("an archive", 0.01)).steps
    assert step.command.startswith("workbench run results/mine name=mine-")


def test_an_anytime_design_needs_no_reason() -> None:
    (step,) = summarise(verdict({"gdn": 0.0}, noise=0.01), launched(effect=0.01, anytime=True)).steps
    assert "--why" not in step.command and "exploratory" not in step.text


def test_a_decided_question_is_asked_of_longer_training() -> None:
    (step,) = summarise(verdict({"gdn": 0.1}), launched()).steps
    assert "base.training.tokens=4000" in step.command


def test_the_simultaneous_interval_decides() -> None:
    row = verdict({"gdn": 0.1, "kda": 0.2}).rows[1]
    assert deciding_interval(row) == (row.simultaneous_low, row.simultaneous_high)


def test_the_command_wraps_at_words() -> None:
    result = CliRunner().invoke(app, ["verdict", str(ARCHIVES / "scmoe")])
    assert result.exit_code == 0 and result.output.startswith("scmoe and strict are better than interleaved")
    sentences = [line for line in result.output.splitlines() if "  " not in line]
    assert max(map(len, sentences)) <= 100


def test_failure_exits_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.ablation.run.AblationRun.summary", lambda self, verdict=None: failed("gdn"))
    assert CliRunner().invoke(app, ["verdict", str(ARCHIVES / "scmoe")]).exit_code == 1


def test_an_archive_is_loaded_with_overrides() -> None:
    from workbench.ablation.ablation import Ablation

    loaded = Ablation.load(ARCHIVES / "muon", ["name=longer", "base.training.tokens=1_600_000"])
    assert loaded.config.name == "longer" and loaded.config.base["training"]["tokens"] == 1_600_000
