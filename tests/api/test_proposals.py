"""A session of a program: propose a change as JSON, get keep, discard or undecided with the evidence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers import run_fields, write_corpus

from workbench.ablation.run import AblationRun
from workbench.api.answers import Proposal, VerdictAnswer, schema_of
from workbench.api.proposals import _decision, prepare
from workbench.config import ConfigError
from workbench.files import write_json

Call = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A baseline as a single run, with a learning rate that is far too small."""
    corpus = write_corpus(tmp_path / "corpus")
    write_json(tmp_path / "run.yaml", run_fields(corpus, training={"learning_rate": 1e-5}))
    return tmp_path / "run.yaml"


FAST = ("--set", "launch={workers: 2, heartbeat: 1, measure: false}")


@pytest.mark.process
def test_a_session_from_a_proposal_to_a_decision(run_file: Path, call: Call, tmp_path: Path) -> None:
    results = tmp_path / "results"
    propose = ["propose", "--against", run_file, "--results", results, *FAST]
    code, answer = call(*propose, "training.learning_rate=5e-3", "--why", "it hardly learns")
    jsonschema.validate(answer, schema_of("propose", Proposal))
    found = answer["data"]
    assert code == 0 and found["decision"] == "keep" and found["word"] == "better"
    assert found["change"] == {"training.learning_rate": 5e-3}
    assert found["difference"] < 0 and found["high"] < 0 and found["p"] <= 0.05
    assert found["looks"] == [4] and found["seeds"] == 4 and found["number"] == 1, "decided at the first look"
    assert found["exploratory"] is None and found["status"]["state"] == "finished"

    code, again = call(*propose, "training.learning_rate=5e-3")
    assert again["data"]["decision"] == "keep" and again["data"]["folder"] == found["folder"], "it is not run again"

    code, answer = call(*propose, "training.learning_rate=1e-9")
    found = answer["data"]
    assert code == 0 and found["decision"] == "discard" and found["word"] == "worse"
    assert found["number"] == 2 and found["false_keeps"] == pytest.approx(1 - 0.975**2)
    second = AblationRun(found["folder"])
    assert not {*second.seeds} & {0, 1, 2, 3}, "seeds that were opened are not used again"
    _, journal = call("journal", results)
    assert "it hardly learns" in journal["data"]["text"]


def prepared(run_file: Path, *change: str, **options: Any) -> Any:
    return prepare(change, run_file, run_file.parent / "results", **options).config


def test_the_design_is_declared(run_file: Path) -> None:
    config = prepared(run_file, "training.learning_rate=1e-3")
    assert config.protocol.stopping.looks == (4, 6, 8) and len(config.confirmation.seeds) == 8
    assert config.order == ["baseline", "proposal"] and config.tuning.trials == 0
    assert prepared(run_file, "training.learning_rate=1e-3").name == config.name
    assert prepared(run_file, "training.learning_rate=2e-3").name != config.name
    assert prepared(run_file, "training.learning_rate=1e-3", fields=["launch={workers: 1}"]).name == config.name
    anytime = prepared(run_file, "training.learning_rate=1e-3", anytime=12)
    assert anytime.name != prepared(run_file, "training.learning_rate=1e-3", anytime=20).name
    assert anytime.protocol.stopping.anytime and len(anytime.confirmation.seeds) == 12


def test_an_ablation_gives_its_baseline_and_protocol() -> None:
    sweep = Path(__file__).parents[2] / "sweeps/quickstart.yaml"
    config = prepare(["model.pattern=gdn full"], sweep, "/nowhere", fields=["margin=0.01"]).config
    assert config.order == ["full", "proposal"] and config.margin == 0.01 and config.protocol.effect == 0.02
    assert config.budget.free and config.tuning.trials == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([], "nothing"),
        (["training.learning_rate=1e-5"], "has these values already"),
        (["training.learning_rat=1"], "learning_rate"),
        (["nothing"], r"path\.to\.field=value"),
    ],
)
def test_a_change_that_is_none_is_refused(change: list[str], expected: str, run_file: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        prepared(run_file, *change)


def test_a_tuned_field_cannot_be_proposed() -> None:
    sweep = Path(__file__).parents[2] / "sweeps/quickstart.yaml"
    with pytest.raises(ConfigError, match="not tuned"):
        prepare(["training.learning_rate=1e-3"], sweep, "/nowhere")


def verdict(exploratory: str | None) -> VerdictAnswer:
    content = {"rows": [], "exploratory": exploratory}
    common: dict[str, Any] = {"name": "", "folder": "", "question": "", "text": "", "savings": [], "notes": []}
    return VerdictAnswer(**common, finished=True, metric="", verdict=content, summary="", failed=False)


def test_words_become_decisions() -> None:
    words = ("better", "worse", "equivalent", "failed", "undecided")
    decisions = [_decision(True, verdict(None), {"verdict": word, "sentence": ""})[0] for word in words]
    assert decisions == ["keep", "discard", "discard", "discard", "undecided"]
    assert _decision(True, verdict("known seeds"), {"verdict": "better", "sentence": ""})[0] == "undecided"
    assert _decision(False, None, {})[0] == "running"
