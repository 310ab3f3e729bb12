"""One optimiser step: accumulation, skipped steps, logged gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from workbench.data import Batch
from workbench.mixers import mixers
from workbench.model import LanguageModel
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.step import DIAGNOSTIC_SNAPSHOTS, TrainStep, build_step

MODEL = {"width": 32, "depth": 2, "vocabulary": 300, "pattern": "gdn full"}
TRAINING = {"tokens": 20 * 64, "batch_size": 2, "context": 32, "log_every": 1, "compile": False}


def step_of(model: dict[str, Any] | None = None, **training: Any) -> TrainStep:
    config = RunConfig.parse({"model": {**MODEL, **(model or {})}, "training": {**TRAINING, **training}})
    return build_step(LanguageModel(config.model, seed=0), config, parallel.launch(devices=1))[0]


def batches(rows: int = 2) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens_BT = torch.randint(300, (rows, 33), generator=generator)
        segments_BT = torch.zeros(rows, 32, dtype=torch.int32)
        yield Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT, segments_BT.long())


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in step.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def spoil(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """Multiply the loss of the n-th forward pass by ``factors[n]``."""
    loss, calls = LanguageModel.loss, iter(range(1, 1000))

    def spoilt(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        return loss(self, *args, **kwargs) * factors.get(next(calls), 1.0)

    monkeypatch.setattr(LanguageModel, "loss", spoilt)


def test_accumulated_micro_batches_have_the_gradient_of_one_batch() -> None:
    batch = next(batches(rows=4))
    whole, parts = step_of(batch_size=4, tokens=10 * 128), step_of(batch_size=2, accumulate=2, tokens=10 * 128)
    whole(1, iter([batch]))
    parts(1, (Batch(*(part[start : start + 2] for part in batch)) for start in (0, 2)))
    assert float(parts.gradient_norm) == pytest.approx(float(whole.gradient_norm), rel=1e-5)


def test_recomputed_activations_change_no_bit() -> None:
    model = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 2}}}
    results = []
    for recompute in (False, True):
        step = step_of(model, recompute=recompute)
        stream = batches()
        for number in (1, 2):
            step(number, stream)
        results.append(weights(step))
    assert same(*results)


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_spike_leaves_the_weights_unchanged(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {2: factor})
    step, stream = step_of(guards=[{"kind": "ratio", "factor": 50.0}]), batches()
    step(1, stream)
    before = weights(step)
    step(2, stream)
    assert same(before, weights(step))


def test_a_spike_is_not_counted_as_a_step_of_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {2: 1e6})
    step, stream = step_of(guards=[{"kind": "ratio", "factor": 50.0}]), batches()
    for number in (1, 2, 3):
        step(number, stream)
    assert {float(state["step"]) for state in step.optimiser.state.values()} == {2.0}


def test_the_step_after_a_spike_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {2: 1e6})
    step, stream = step_of(guards=[{"kind": "ratio", "factor": 50.0}]), batches()
    for number in (1, 2):
        step(number, stream)
    before = weights(step)
    step(3, stream)
    assert not same(before, weights(step))


def test_a_return_to_earlier_weights_is_one_to_earlier_router_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {6: float("nan")})
    moe = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 4, "top_k": 1, "bias": "sign"}}}
    step = step_of(moe, guards=[{"kind": "not_finite", "action": "roll_back"}], roll_back_window=2)
    stream, states = batches(), {}
    for number in range(1, 7):
        step(number, stream)
        states[number] = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    assert any(name.endswith("bias") for name in states[2])
    assert same(states[6], states[2]) and not same(states[5], states[2])


def test_the_learning_rate_follows_the_schedule() -> None:
    step, stream = step_of(warmup=0.5, decay=0.0, lr_factors={"embedding.*": 0.5}, learning_rate=1e-2), batches()
    step(3, stream)
    assert sorted({group["lr"] for group in step.optimiser.param_groups}) == pytest.approx([1.5e-3, 3e-3])


def test_logged_gradients_are_those_the_optimiser_receives() -> None:
    step = step_of()
    exact: list[float] = []

    def measure(*_: Any) -> None:
        gradients = [p.grad for group in step.optimiser.param_groups for p in group["params"]]
        exact.extend(sorted(float(g.double().square().mean().sqrt()) for g in gradients))

    step.optimiser.register_step_pre_hook(measure)
    step(1, batches())
    values, names = step.take_log_values()
    logged = dict(zip(names, values[-len(names) :].tolist()))
    assert [logged[f"gradient_rms_{name}"] for name in ("min", "median", "max")] == pytest.approx(
        [exact[0], exact[(len(exact) - 1) // 2], exact[-1]], rel=1e-5
    )


def test_the_loss_window_restarts_when_it_is_taken() -> None:
    step, stream = step_of(), batches()
    for number in (1, 2):
        step(number, stream)
    assert float(step.take_log_values()[0][1]) == 2 * 64, "targets of two steps"
    step(3, stream)
    assert float(step.take_log_values()[0][1]) == 64


def test_gradients_are_freed_after_the_update() -> None:
    step = step_of()
    step(1, batches())
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_snapshots_are_spread_evenly_over_a_run() -> None:
    steps = sorted(step_of(tokens=4 * DIAGNOSTIC_SNAPSHOTS * 64).diagnose_at)
    assert steps == [4 * number for number in range(1, DIAGNOSTIC_SNAPSHOTS + 1)]


def test_a_step_without_a_snapshot_has_no_diagnostics() -> None:
    step, stream = step_of(tokens=2 * DIAGNOSTIC_SNAPSHOTS * 64), batches()
    step(1, stream)
    assert step.diagnostics == {}


def test_a_snapshot_has_values_by_layer() -> None:
    step, stream = step_of(tokens=2 * DIAGNOSTIC_SNAPSHOTS * 64), batches()
    step(2, stream)
    assert list(step.diagnostics) == [0, 1]


def test_phases_are_announced_in_order() -> None:
    step = step_of(accumulate=2, tokens=10 * 128)
    phases: list[str] = []
    step.on_phase = phases.append
    step(1, batches())
    assert phases == ["forward", "backward", "forward", "backward", "update"]


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", sorted(mixers))
def test_diagnostics_of_a_step_on_the_device(mixer: str) -> None:
    step = step_of({"width": 128, "pattern": mixer, "feedforward": "moe"}, context=256, tokens=20 * 512)
    tokens_BT = torch.randint(300, (2, 256), device="cuda")
    segments_BT = torch.zeros_like(tokens_BT, dtype=torch.int32)
    segments_BT[:, 100:] = 1
    segments_BT[1, 200:] = -1
    step(1, iter([Batch(tokens_BT, tokens_BT.roll(-1, 1), segments_BT, segments_BT.long())]))
    assert step.take_log_values()[0].isfinite().all()
    assert all(torch.isfinite(value).any() for layer in step.diagnostics.values() for value in layer.values())
