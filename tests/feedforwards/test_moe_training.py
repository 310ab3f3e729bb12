"""The mixture of experts in training runs: counts, diagnostics, the bias in checkpoints and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from feedforwards.moe_reference import WITH_ZERO
from helpers import make_run, run_fields, write_corpus

from workbench.feedforwards.router import Router
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained.tensors import read_tensors
from workbench.training.export import export
from workbench.training.trial import train
from workbench.transforms import initialise_from

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("accumulate", "balance_over", "micro_batches_seen"),
    [(1, "step", [1]), (2, "step", [2, 2]), (2, "running", [1, 2])],
)
def test_a_step_counts_every_choice_once(
    accumulate: int,
    balance_over: str,
    micro_batches_seen: list[int],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With accumulation and recomputed blocks; the loss sees the counts of the step, or of the step so far."""
    steps: list[list[int]] = []
    seen_by_loss: list[int] = []
    monkeypatch.setattr(Router, "update_state", lambda self, counts, *rest: steps.append(counts.tolist()))
    monkeypatch.setattr(Router, "step_loss", lambda self, counts, _: seen_by_loss.append(int(counts.sum())))
    moe = {**WITH_ZERO, "bias": "sign", "balance_over": balance_over}
    fields = run_fields(
        corpus,
        model={"feedforward": "moe", "depth": 1, "feedforwards": {"moe": moe}},
        training={"accumulate": accumulate, "recompute": True, "tokens": 6 * 64 * accumulate},
    )
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    train(folder.path, tmp_path / "cache")
    assert [sum(counts) for counts in steps] == [64 * accumulate * 3] * 6
    assert seen_by_loss == [64 * 3 * seen for _ in range(6) for seen in micro_batches_seen]
    values = folder.diagnostics()[-1]["values"]
    assert values["zero_share"] == pytest.approx(sum(steps[-1][4:]) / sum(steps[-1]))


def test_diagnostics_contain_every_monitor(corpus: Path, tmp_path: Path) -> None:
    model = {"feedforward": "moe", "depth": 1, "feedforwards": {"moe": {**WITH_ZERO, "bias": "sign"}}}
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus, model=model, training={"tokens": 64}))
    train(folder.path, tmp_path / "cache")
    assert {
        "activation_max",
        "activation_rms",
        "attention_score_max",
        "below_epsilon",
        "bias_high",
        "bias_low",
        "bias_sd",
        "collapsed",
        "dead_experts",
        "ffn_experts",
        "ffn_experts_sd",
        "forward_flops",
        "gradient_norm",
        "hidden_z_excess",
        "load",
        "load_entropy",
        "max_violation_floor_recent",
        "max_violation_floor_step",
        "max_violation_recent",
        "max_violation_step",
        "r_g",
        "r_g_centred",
        "router_cosine",
        "router_logit_max",
        "router_z",
        "routing_entropy",
        "top_k_mass",
        "zero_share",
    } == folder.diagnostics()[-1]["values"].keys()


def test_a_collapsed_router_is_reported_and_the_run_goes_to_its_end(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Router, "select", lambda self, scores_NC, _: torch.zeros_like(scores_NC[:, :1], dtype=torch.int64)
    )
    model = {"feedforward": "swiglu moe", "feedforwards": {"moe": {"experts": 4, "top_k": 1}}}
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus, model=model))
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "done"
    assert result["reason"] == "router collapsed in layer 1: most experts get no token"
    values = folder.diagnostics()[-1]["values"]
    assert values["dead_experts"] == 3
    assert values["load"] == [4, 0, 0, 0]


BIAS = "blocks.0.feedforward.router.bias"


@pytest.fixture(scope="module")
def biased_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """Fields of a run of eight steps with a proportional bias, its folder, and its weights exported in bf16."""
    path = tmp_path_factory.mktemp("biased")
    model = {"feedforward": "moe", "depth": 1, "feedforwards": {"moe": {**WITH_ZERO, "bias": "proportional"}}}
    fields = run_fields(corpus, model=model, training={"tokens": 8 * 64})
    folder = make_run(path / "run", path / "cache", fields)
    train(folder.path, path / "cache")
    return fields, folder.path, export(folder.path, path / "weights", cache=path / "cache", dtype="bf16")


def test_the_bias_is_in_checkpoints(biased_run: tuple[dict[str, Any], Path, Path]) -> None:
    bias_C = read_tensors(biased_run[1] / "checkpoint" / "step-8")[BIAS]
    assert bias_C.dtype == torch.float32
    assert 0 < float(bias_C.abs().max()) < 1
    assert (bias_C[4:] == 0).all()


def test_the_bias_is_exported_in_full_precision(biased_run: tuple[dict[str, Any], Path, Path]) -> None:
    _, run, weights = biased_run
    trained_C = read_tensors(run / "checkpoint" / "step-8")[BIAS]
    assert torch.equal(read_tensors(weights)[BIAS], trained_C)


def test_another_run_can_start_from_the_bias(biased_run: tuple[dict[str, Any], Path, Path]) -> None:
    fields, run, weights = biased_run
    trained_C = read_tensors(run / "checkpoint" / "step-8")[BIAS]
    model = LanguageModel(ModelConfig.parse(fields["model"]), seed=1)
    assert initialise_from(model, weights) == []
    assert torch.equal(model.state_dict()[BIAS], trained_C)
