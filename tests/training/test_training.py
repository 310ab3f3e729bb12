"""Optimiser, schedules, divergence, and what a run leaves behind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers import make_run, run_fields, write_corpus
from safetensors.torch import load_file

from workbench.config import ConfigError
from workbench.model import LanguageModel
from workbench.training.checkpoint import load_checkpoint
from workbench.training.config import RunConfig, TrainingConfig
from workbench.training.export import export
from workbench.training.schedule import rate_at
from workbench.training.trial import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_wsd_schedule_warms_up_stays_and_decays() -> None:
    config = TrainingConfig(tokens=100 * 2048, warmup=0.1, decay=0.2, final=0.1)
    rates = [rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == rates[79] == 1.0
    assert rates[80] == pytest.approx(1.0) and all(a > b for a, b in itertools.pairwise(rates[80:]))
    assert 0.1 < rates[99] < 0.15
    assert max(rates) == 1.0


def test_cosine_schedule_ends_near_its_final_rate() -> None:
    config = TrainingConfig(tokens=100 * 2048, schedule="cosine", warmup=0.05, final=0.2)
    rates = [rate_at(step, config) for step in range(100)]
    assert rates[5] == 1.0 and rates[99] == pytest.approx(0.2, abs=1e-3)


def test_a_run_learns_and_leaves_files_that_need_no_pickle(corpus: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus, training={"tokens": 120 * 64}))
    result = train(folder.path, tmp_path / "cache")
    rows = folder.metrics()
    assert result["status"] == "done" and rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[-1]["tokens"] == 120 * 64 and rows[-1]["flops"] > 0
    assert result["report_value"] > 0 and result["selection_value"] == rows[-1]["selection_value"]
    suffixes = {path.suffix for path in folder.path.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".parquet", ".txt", ""}
    weights = load_file(next(folder.path.glob("checkpoint/step-120/model.safetensors")))
    assert "embedding.weight" in weights


def test_tuning_runs_never_open_the_report_split(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.data import PreparedData

    def sealed(self: PreparedData) -> None:
        raise AssertionError("the report split was opened")

    monkeypatch.setattr(PreparedData, "report", property(sealed))
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus), stage="tuning")
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "done" and "report_value" not in result


def test_loss_that_is_not_finite_ends_as_diverged_with_its_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = LanguageModel.loss
    calls = []

    def poisoned(self: LanguageModel, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        value = losses(self, *args, **kwargs)  # type: ignore[arg-type]
        return value * float("nan") if len(calls) == 7 else value

    monkeypatch.setattr(LanguageModel, "loss", poisoned)
    fields = run_fields(corpus, training={"log_every": 5})
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "diverged" and result["step"] == 7 and "step 7" in result["reason"]
    assert folder.status()["status"] == "diverged"
    # the poisoned weights never reach a checkpoint
    assert [path.name for path in (folder.path / "checkpoint").glob("step-*")] == ["step-5"]


def test_spikes_are_skipped_counted_and_resumed_exactly(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with a wild gradient and one with NaN leave weights, moments and step counts as they were."""
    loss = LanguageModel.loss
    seen: dict[int, torch.Tensor] = {}
    calls = []

    def wild(self: LanguageModel, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        seen[len(calls)] = self.embedding.weight.detach().clone()
        return loss(self, *args, **kwargs) * {7: 1e6, 12: float("nan")}.get(len(calls), 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "loss", wild)
    fields = run_fields(corpus, training={"spike_factor": 50.0})
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    result = train(folder.path, tmp_path / "cache")
    rows = folder.metrics()
    assert result["status"] == "done" and [row["skipped"] for row in rows[5:12]] == [0, 1, 1, 1, 1, 1, 2]
    assert torch.equal(seen[7], seen[8]) and torch.equal(seen[12], seen[13]) and not torch.equal(seen[8], seen[9])
    state = load_checkpoint(folder.path / "checkpoint" / "step-20")
    assert {float(s["step"]) for s in state["optimiser"]["state"].values()} == {18.0}


def test_nothing_but_spikes_ends_as_diverged(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda self, *args, **kwargs: loss(self, *args, **kwargs) * float("inf"))
    fields = run_fields(corpus, training={"spike_factor": 50.0, "tokens": 40 * 64})
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "diverged" and result["step"] == 20 and "20 steps in a row" in result["reason"]


def test_recomputed_activations_change_no_bit(corpus: Path, tmp_path: Path) -> None:
    results = []
    for recompute in (False, True):
        model = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 2}}, "pattern": "full gdn"}
        fields = run_fields(corpus, model=model, training={"recompute": recompute})
        folder = make_run(tmp_path / f"{recompute}", tmp_path / "cache", fields)
        results.append(train(folder.path, tmp_path / "cache")["report_value"])
        assert folder.environment()["paths"] == {
            "attention": ["torch"],
            "delta_rule": ["torch"],
            "experts": ["torch"],
            "router": ["torch"],
            "short_convolution": ["torch"],
        }
    assert results[0] == results[1]


def test_trained_weights_are_a_start_and_name_the_run(corpus: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "runs" / "first", tmp_path / "cache", run_fields(corpus))
    before = train(first.path, tmp_path / "cache")
    weights = export(first.path, tmp_path / "weights", cache=tmp_path / "cache")
    start = {"folder": str(weights)}
    sliding = {"pattern": "sliding", "mixers": {"sliding": {"window": 16}}}
    for name, model in (("same", {}), ("akin", sliding), ("stranger", {"pattern": "gdn full"})):
        folder = make_run(tmp_path / "runs" / name, tmp_path / "cache", run_fields(corpus, start=start, model=model))
        result = train(folder.path, tmp_path / "cache")
        (event,) = [
            json.loads(line)
            for line in (folder.path / "events.jsonl").read_text().splitlines()
            if "weights_loaded" in line
        ]
        kept = event["random_weights"]
        assert bool(kept) == (name == "stranger") and all(n.startswith("blocks.0.mixer.") for n in kept)
        assert folder.metrics()[0]["loss"] < first.metrics()[0]["loss"] - 0.5 and result["status"] == "done"
    fields = run_fields(corpus, start=start)
    identity = RunConfig.parse(fields).identity
    moved = weights.rename(tmp_path / "elsewhere")
    assert RunConfig.parse({**fields, "start": {"folder": str(moved)}}).identity == identity
    with pytest.raises(ConfigError, match=r"start.folder.*config.json and"):
        RunConfig.parse({**fields, "start": {"folder": str(tmp_path)}}).identity  # noqa: B018
    assert before["status"] == "done"


def test_a_crash_is_a_row_with_its_reason(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LanguageModel, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("the mixer fell over")

    monkeypatch.setattr(LanguageModel, "loss", broken)
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus))
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "crashed" and "the mixer fell over" in result["reason"]


def test_same_seed_same_bits_and_other_seed_other_bits(corpus: Path, tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = make_run(tmp_path / name, tmp_path / "cache", run_fields(corpus), seed=seed)
        results.append(train(folder.path, tmp_path / "cache")["report_value"])
    assert results[0] == results[1] != results[2]


def test_an_epsilon_near_the_gradients_is_told_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[list[float]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        answer = step(self, *args, **kwargs)  # type: ignore[arg-type]
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        exact.append(sorted(float(g.double().square().mean().sqrt()) for g in gradients))
        return answer

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    told = {}
    for epsilon in (1e-15, 1e-2):
        folder = make_run(
            tmp_path / f"{epsilon}",
            tmp_path / "cache",
            run_fields(corpus, training={"optimiser": {"epsilon": epsilon}}),
        )
        exact.clear()
        train(folder.path, tmp_path / "cache")
        for row, rms in zip(folder.metrics(), exact, strict=True):
            wanted = rms[0], rms[(len(rms) - 1) // 2], rms[-1]
            assert [row[f"gradient_rms_{name}"] for name in ("min", "median", "max")] == pytest.approx(wanted, rel=1e-5)
        told[epsilon] = (folder.path / "events.jsonl").read_text().count("epsilon_near_gradients")
    assert told == {1e-15: 0, 1e-2: 1}


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_a_deterministic_run_refuses_what_does_not_repeat(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = LanguageModel.loss

    def unrepeatable(self: LanguageModel, *args: object, **kwargs: object) -> torch.Tensor:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return loss(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LanguageModel, "loss", unrepeatable)
    before = torch.are_deterministic_algorithms_enabled()
    results = []
    for strict in (False, True):
        fields = run_fields(corpus, training={"deterministic": strict})
        folder = make_run(tmp_path / f"{strict}", tmp_path / "cache", fields)
        results.append(train(folder.path, tmp_path / "cache"))
        assert torch.are_deterministic_algorithms_enabled() == before
    assert results[0]["status"] == "done"
    assert results[1]["status"] == "crashed" and "put_ does not have a deterministic" in results[1]["reason"]
    assert RunConfig.parse({"training": {"deterministic": True}}).identity != RunConfig().identity == "473e57e66f25"


def test_bad_training_fields_say_what_to_do() -> None:
    for fields, path in (
        ({"tokens": 10}, "training.tokens"),
        ({"warmup": 0.9, "decay": 0.9}, "training.decay"),
        ({"learning_rate": -1}, "training.learning_rate"),
        ({"schedule": "linear"}, "training.schedule"),
        ({"lerning_rate": 1e-3}, "training.lerning_rate"),
    ):
        with pytest.raises(ConfigError) as raised:
            RunConfig.parse({"training": fields})
        assert raised.value.problems[0].path == path


def test_layers_say_something_about_themselves_twenty_times_a_run(corpus: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus, model={"pattern": "gdn full"}, training={"tokens": 40 * 64, "log_every": 7})
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    train(folder.path, tmp_path / "cache")
    rows = folder.diagnostics()
    assert [row["step"] for row in rows] == list(range(2, 41, 2)) and {row["layer"] for row in rows} == {0}
    assert all(isinstance(value, float | list) for value in rows[0]["values"].values())
