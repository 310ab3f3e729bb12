"""What layers show of their stability, against direct computation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.data import Batch
from workbench.model import LanguageModel
from workbench.ops.hidden_z import hidden_z_loss
from workbench.optimisers import optimisers
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.layer_monitors import epsilon_values
from workbench.training.step import TrainStep, build_step

MODEL = {"width": 32, "depth": 2, "vocabulary": 300, "pattern": "full gdn", "mixers": {"full": {"head_dim": 16}}}


def step_of(**training: Any) -> TrainStep:
    fields = {"tokens": 20 * 64, "batch_size": 2, "context": 32, "log_every": 1, "compile": False, **training}
    config = RunConfig.parse({"model": MODEL, "training": fields})
    return build_step(LanguageModel(config.model, seed=0), config, parallel.launch(devices=1))[0]


def batch(rows: int = 2) -> Batch:
    tokens_BT = torch.randint(300, (rows, 33), generator=torch.Generator().manual_seed(0))
    segments_BT = torch.zeros(rows, 32, dtype=torch.int32)
    segments_BT[:, 20:] = 1
    segments_BT[0, 28:] = -1
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT, segments_BT.long())


def stream() -> Iterator[Batch]:
    while True:
        yield batch()


@pytest.fixture(scope="module")
def first() -> tuple[TrainStep, dict[str, list[Tensor]]]:
    """A first step with diagnostics; what layers received and returned, and the gradients before clipping."""
    step = step_of(clip=1e-3)
    seen: dict[str, list[Tensor]] = {"inputs": [], "outputs": [], "gradients": []}

    def see(_: Any, arguments: tuple[Tensor], output: Tensor) -> None:
        seen["inputs"].append(arguments[0].detach())
        seen["outputs"].append(output.detach())

    handles = [block.register_forward_hook(see) for block in step.model.blocks]
    clip = torch.nn.utils.clip_grad_norm_

    def clip_later(parameters: list[Tensor], limit: float) -> Tensor:
        seen["gradients"] = [
            torch.cat([p.grad.flatten() for p in block.parameters()]).clone() for block in step.model.blocks
        ]
        return clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_later)
        seen["weights"] = [p.detach().clone() for p in step.model.blocks[0].parameters()]
        initial = {name: value.clone() for name, value in step.model.state_dict().items()}
        step(1, stream())
    for handle in handles:
        handle.remove()
    seen["initial"] = [initial]  # type: ignore[list-item]
    return step, seen


def test_activations_are_of_tokens(first: tuple[TrainStep, dict[str, list[Tensor]]]) -> None:
    step, seen = first
    is_token_BT = batch().segments_BT >= 0
    for layer, output_BTD in enumerate(seen["outputs"]):
        rms = output_BTD.double().square().mean(-1).sqrt()[is_token_BT].mean()
        largest = output_BTD.abs()[is_token_BT].max()
        assert float(step.diagnostics[layer]["activation_rms"]) == pytest.approx(float(rms), rel=1e-5)
        assert float(step.diagnostics[layer]["activation_max"]) == pytest.approx(float(largest), rel=1e-6)


def test_the_hidden_z_excess_is_of_the_last_block(first: tuple[TrainStep, dict[str, list[Tensor]]]) -> None:
    step, seen = first
    z_ND = seen["outputs"][1][batch().segments_BT >= 0]
    expected = float(hidden_z_loss(z_ND)) - math.log(32) ** 2
    assert float(step.diagnostics[1]["hidden_z_excess"]) == pytest.approx(expected, rel=1e-4)
    assert "hidden_z_excess" not in step.diagnostics[0]


def test_gradient_norms_are_those_before_clipping(first: tuple[TrainStep, dict[str, list[Tensor]]]) -> None:
    step, seen = first
    for layer, gradient in enumerate(seen["gradients"]):
        expected = float(gradient.double().norm())
        assert float(step.diagnostics[layer]["gradient_norm"]) == pytest.approx(expected, rel=1e-5)


def test_scores_are_of_the_weights_of_the_step(first: tuple[TrainStep, dict[str, list[Tensor]]]) -> None:
    step, seen = first
    model = LanguageModel(step.config.model, seed=0)
    block, segments_BT = model.blocks[0], batch().segments_BT
    (scores,) = block.mixer.scores(block.mixer_norm(seen["inputs"][0]), segments=segments_BT)
    q, k = scores.q_BTHK.double(), scores.k_BTGK.double()
    products_BHTT = torch.einsum("bthk,bshk->bhts", q, k) / 4
    visible_BTT = torch.ones(32, 32).tril().bool() & (segments_BT[:, :, None] == segments_BT[:, None])
    visible_BTT = visible_BTT & (segments_BT >= 0)[:, :, None]
    expected_H = products_BHTT.masked_fill(~visible_BTT[:, None], -math.inf).amax((0, 2, 3))
    assert step.diagnostics[0]["attention_score_max"].tolist() == pytest.approx(expected_H.tolist(), rel=1e-5)


def test_a_layer_without_scores_has_no_largest_one(first: tuple[TrainStep, dict[str, list[Tensor]]]) -> None:
    assert "attention_score_max" not in first[0].diagnostics[1]


def test_micro_batches_are_pooled() -> None:
    whole, parts = step_of(batch_size=2), step_of(batch_size=1, accumulate=2)
    whole(1, stream())
    parts(1, (Batch(*(part[row : row + 1] for part in batch())) for row in (0, 1)))
    for layer, values in whole.diagnostics.items():
        for name, value in values.items():
            assert parts.diagnostics[layer][name].tolist() == pytest.approx(value.tolist(), rel=1e-4), name


def test_no_hook_stays() -> None:
    step = step_of()
    step(1, stream())
    assert not any(block._forward_hooks for block in step.model.blocks)


def test_watching_changes_no_bit() -> None:
    watched, plain = step_of(), step_of()
    plain.diagnose_at = set()
    for number in (1, 2):
        watched(number, stream())
        plain(number, stream())
    for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_share_below_epsilon_counts_trained_parameters(kind: str) -> None:
    config = RunConfig.parse({"training": {"optimiser": {"kind": kind, "epsilon": 1e-3}}}).training.optimiser
    layer = torch.nn.Linear(4, 1, bias=False)
    group = {"params": [layer.weight], "eps": 1e-3, "betas": (0.9, 0.95)}
    optimiser = torch.optim.AdamW([group])
    layer.weight.grad = torch.tensor([[0.0, 1e-5, 1e-4, 1.0]])  # its root mean square after one step is itself
    optimiser.step()
    (values,) = epsilon_values([layer], optimiser, optimisers[kind](config), torch.device("cpu"))
    assert float(values["below_epsilon"]) == pytest.approx(2 / 3)


def test_without_an_epsilon_there_is_no_share() -> None:
    layer = torch.nn.Linear(4, 1)
    sgd = optimisers["sgd"](optimisers.parse({"kind": "sgd"}))
    layer.weight.grad = torch.ones(1, 4)
    optimiser = torch.optim.SGD(layer.parameters(), momentum=0.9)
    optimiser.step()
    assert epsilon_values([layer], optimiser, sgd, torch.device("cpu")) == [{}]
