"""What is declared before launch is quoted; what is changed afterwards is a deviation, and what is run cannot be changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields, write_corpus

from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.diagnostics import best_of_table, drift
from workbench.ablation.execution.plan import CONFIRMATION, Plan
from workbench.ablation.execution.studies import slots
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.registration import quote, standing
from workbench.config import ConfigError
from workbench.training.trial import train

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def ablation(corpus: Path, results: Path, **changes: Any) -> Ablation:
    fields = ablation_fields(corpus, tuning={"trials": 0}, confirmation={"seeds": [0, 1]}, question="Is it so?")
    return Ablation.parse({**fields, **changes}, results)


def test_declared_at_launch_and_quoted(corpus: Path, tmp_path: Path) -> None:
    declared = {"metric": "bits per byte", "effect": 0.02, "stopping": "two seeds", "exclusions": "none"}
    run = ablation(corpus, tmp_path, protocol=declared, margin=0.01).create()
    assert not run.deviations() and len(run.about["registration"]["hash"]) == 12
    text = " ".join(quote(run.about))
    for words in (
        "Is it so?",
        "bits per byte on the report split",
        "parameters equal within 2 %",
        "0.02 bits per byte",
        "±0.01 bits per byte",
        "2 paired seeds (0, 1)",
        "two seeds",
        run.about["registration"]["hash"],
    ):
        assert words in text, words


def test_a_change_of_the_analysis_is_a_deviation_with_a_reason(corpus: Path, tmp_path: Path) -> None:
    before = ablation(corpus, tmp_path).create()
    with pytest.raises(ConfigError, match=r"deviation: got .*margin: None → 0.01"):
        ablation(corpus, tmp_path, margin=0.01).create()
    with pytest.raises(ConfigError, match="declared seeds"):
        ablation(corpus, tmp_path, confirmation={"seeds": [0, 2]}, deviation="x").create()
    more = {"margin": 0.01, "confirmation": {"seeds": [0, 1, 2]}, "deviation": "a reviewer asked"}
    run = ablation(corpus, tmp_path, **more).create()
    (deviation,) = run.deviations()
    assert deviation["why"] == "a reviewer asked" and "margin: None → 0.01" in deviation["what"]
    assert run.about["registration"] == before.about["registration"] and run.seeds == [0, 1, 2]
    assert len(slots(Plan(run).study("full", CONFIRMATION))) == 3
    assert "deviation: a reviewer asked" in (run._exploratory() or "")
    assert ablation(corpus, tmp_path, **more).create().deviations() == [deviation], "the same call adds none"
    with pytest.raises(ConfigError, match="another ablation"):
        ablation(corpus, tmp_path, **more, arms={"full": {}}).create()


def test_a_file_changed_by_hand_is_told(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path).create()
    held = run.about["config"]
    arms = {**held["arms"], "sliding": {"model.pattern": "sliding", "model.mixers.sliding.window": 8}}
    edits: tuple[dict[str, Any], ...] = (
        {"margin": 0.5},
        {"arms": arms},
        {"base": {}},
        {"tuning": {**held["tuning"], "seed": 7}},
        {"budget": {**held["budget"], "solved": {"sliding": {"model.depth": 3}}}},
    )
    for edit in edits:
        about = {**run.about, "config": {**held, **edit}}
        (run.folder / "ablation.json").write_text(json.dumps(about))
        (deviation,) = AblationRun(run.folder).deviations()
        assert "by hand" in deviation["what"] and "Deviation" in quote(about)[-1], edit
    assert standing({**run.about, "config": {**held, "launch": {**held["launch"], "workers": 9}}}) == []


def test_what_was_never_registered_is_told(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path).create()
    run.about.pop("registration")
    assert "not registered" in (run._exploratory() or "") and "Not registered" in quote(run.about)[0]
    # kept from before there was a registration: its verdict stands
    for folder in sorted(Path("results/ablations").iterdir()):
        kept = AblationRun(folder)
        verdict = kept.verdict()
        assert verdict is not None and verdict.exploratory is None, folder
        assert "registration" in kept.about or str(verdict).startswith("Not registered"), folder


def test_the_report_split_is_opened_once(corpus: Path, tmp_path: Path) -> None:
    run = ablation(
        corpus, tmp_path, tuning={"trials": 1, "space": {"training.learning_rate": {"low": 1e-3, "high": 2e-3}}}
    ).create()
    plan = Plan(run)
    plan.folder_for("full", CONFIRMATION, 0, {"training.learning_rate": 5e-3})
    with pytest.raises(ConfigError, match="one opening of the report split"):
        plan._check_sealed("full", {"hyperparameters": {"training.learning_rate": 1e-3}})
    plan._check_sealed("sliding", {"hyperparameters": {"training.learning_rate": 1e-3}})


def test_a_pilot_leaves_the_report_split_sealed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ablation(corpus, tmp_path, confirmation={"seeds": [0], "split": "selection"}).create()
    folder = Plan(run).folder_for("full", CONFIRMATION, 0, {})
    from workbench.data import PreparedData

    seen = []
    whole = PreparedData.__init__

    def sealed(self: PreparedData, *arguments: Any) -> None:
        whole(self, *arguments)
        seen.append(self)
        self.report = None  # type: ignore[assignment]

    monkeypatch.setattr(PreparedData, "__init__", sealed)
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "done" and seen
    assert result["report_value"] == pytest.approx(result["selection_value"], rel=1e-6)
    assert "selection split" in (run._exploratory() or "")


def test_what_contradicts_itself_is_refused(corpus: Path) -> None:
    fields = ablation_fields(corpus)
    with pytest.raises(ConfigError, match=r"margin: got 0.05; expected at most protocol.effect"):
        AblationConfig.parse({**fields, "margin": 0.05, "protocol": {"effect": 0.02}})
    with pytest.raises(ConfigError, match=r"protocol.metric: got 'accuracy'"):
        AblationConfig.parse({**fields, "protocol": {"metric": "accuracy"}})


def test_drift_of_the_baseline() -> None:
    def table(values: list[float], speeds: list[float], devices: list[str]) -> pl.DataFrame:
        n = len(values)
        return pl.DataFrame(
            {
                "run": ["r"] * n,
                "seed": range(n),
                "began": [float(i) for i in range(n)],
                "value": values,
                "tokens_per_second": speeds,
                "device": devices,
                "code": ["c"] * n,
                "torch": ["t"] * n,
            }
        )

    (calm,) = drift(table([1.0, 1.2, 1.1, 1.0, 1.15, 1.05], [10.0] * 6, ["gpu"] * 6))
    assert calm.startswith("No trend") and "DRIFT" not in calm
    told = drift(table([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [10.0, 10, 10, 8, 8, 8], ["gpu"] * 5 + ["other"]))
    assert told[0].count("DRIFT") == 2 and "-20.0%" in told[0] and "more than one device: gpu, other" in told[1]
    assert drift(table([1.0], [1.0], ["gpu"])) == []


def test_best_of_k_counts_failures(tmp_path: Path) -> None:
    class Run:
        arms = ("full",)

        def runs(self) -> pl.DataFrame:
            return pl.DataFrame(
                {
                    "arm": ["full"] * 3,
                    "stage": ["tuning"] * 3,
                    "status": ["done", "diverged", "done"],
                    "selection_value": [2.0, None, 1.0],
                }
            )

    table = best_of_table(Run())  # type: ignore[arg-type]
    assert table["best"].to_list() == [None, pytest.approx((1 + 1 + 2) / 3), 1.0] and table["finished"][0] == 2
