"""One optimiser step is the same however its rows are split into micro-batches, and whatever padding they have.

The rows have unequal numbers of targets and of tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.data import IGNORE_INDEX, Batch
from workbench.model import LanguageModel
from workbench.model.objectives import mtp_targets
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.step import TrainStep, build_step

ROWS, CONTEXT, VOCABULARY = 8, 24, 300
MOE = {"experts": 4, "zero_experts": 2, "top_k": 3, "renormalise": False, "z_weight": 1e-2, "bias": "proportional"}
MODEL: dict[str, Any] = {"width": 32, "depth": 2, "vocabulary": VOCABULARY, "pattern": "full gdn", "tied": False}
EVERY_LOSS: dict[str, Any] = {
    "feedforward": "moe",
    "feedforwards": {"moe": {**MOE, "balance_weight": 0.1}},
    "mtp": {"mixer": {"kind": "full"}, "feedforward": {"kind": "moe", **MOE, "balance_weight": 0.1}},
    "hidden_z": 1e-2,
}


def rows() -> Batch:
    """Two documents and padding in every row; from 1 to 15 targets and from 10 to 24 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(VOCABULARY, (ROWS, CONTEXT), generator=generator)
    targets_BT = torch.full((ROWS, CONTEXT), IGNORE_INDEX)
    segments_BT = torch.full((ROWS, CONTEXT), -1, dtype=torch.int32)
    for r in range(ROWS):
        end = 10 + 2 * r
        segments_BT[r, :end] = (torch.arange(end) >= 5).int()
        targeted = torch.randperm(end, generator=generator)[: 1 + 2 * r]
        targets_BT[r, targeted] = torch.randint(VOCABULARY, (len(targeted),), generator=generator)
        tokens_BT[r, end:] = 0
    return Batch(tokens_BT, targets_BT, segments_BT, segments_BT.long())


def split(batch: Batch, parts: int) -> list[Batch]:
    return [Batch(*columns) for columns in zip(*(part.chunk(parts) for part in batch))]


def without_padding(batch: Batch) -> list[Batch]:
    """Every row by itself, cut behind its last token."""
    ends = (batch.segments_BT >= 0).sum(1).tolist()
    return [Batch(*(part[r : r + 1, :end] for part in batch)) for r, end in enumerate(ends)]


def trained(micro_batches: list[Batch], **model: Any) -> tuple[TrainStep, dict[str, Tensor]]:
    """One step in fp64 with diagnostics, and the gradient that the optimiser received."""
    accumulate, (batch_size, context) = len(micro_batches), micro_batches[0].tokens_BT.shape
    training = {"batch_size": batch_size, "accumulate": accumulate, "context": context, "clip": 1e9, "log_every": 1}
    training |= {"tokens": 20 * accumulate * batch_size * context, "compile": False}
    config = RunConfig.parse({"model": {**MODEL, **model}, "training": training})
    step, _ = build_step(LanguageModel(config.model, seed=0).double(), config, parallel.launch(devices=1))
    gradient: dict[str, Tensor] = {}
    step.optimiser.register_step_pre_hook(
        lambda *_: gradient.update({n: p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None})
    )
    step(1, iter(micro_batches))
    return step, gradient


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the first."""
    assert a.keys() == b.keys()
    vectors = [torch.cat([gradient[name].flatten() for name in a]) for gradient in (a, b)]
    return float((vectors[0] - vectors[1]).norm() / vectors[0].norm())


def logged(step: TrainStep) -> dict[str, float]:
    (loss_sum, targets, *_), names = (values := step.take_log_values())[0].tolist(), values[1]
    return {"loss": loss_sum / targets, **dict(zip(names, values[0][-len(names) :].tolist()))}


def flat(step: TrainStep) -> dict[str, Any]:
    """Diagnostics by layer and name."""
    return {f"{i}.{name}": value.tolist() for i, layer in step.diagnostics.items() for name, value in layer.items()}


class Run:
    """One step on the rows in equal parts, with every loss."""

    def __init__(self, micro_batches: list[Batch]):
        step, self.gradient = trained(micro_batches, **EVERY_LOSS)
        self.logged, self.diagnostics = logged(step), flat(step)
        self.biases = [buffer for name, buffer in step.model.named_buffers() if name.endswith("bias")]


@cache
def run(parts: int) -> Run:
    return Run(split(rows(), parts))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_have_the_gradient_of_one_batch(parts: int) -> None:
    assert distance(run(1).gradient, run(parts).gradient) < 1e-12


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_log_what_one_batch_logs(parts: int) -> None:
    assert run(1).logged.keys() >= {"loss", "mtp_loss", "hidden_z_excess", "gradient_rms_median"}
    assert run(parts).logged == pytest.approx(run(1).logged, rel=1e-10)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_diagnose_what_one_batch_diagnoses(parts: int) -> None:
    exact, diagnosed = run(1).diagnostics, run(parts).diagnostics
    assert {"0.ffn_experts_sd", "1.half_life_low", "1.step_norm", "1.r_g_centred"} < exact.keys() == diagnosed.keys()
    for name, value in exact.items():
        assert diagnosed[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_update_the_selection_bias_alike(parts: int) -> None:
    assert len(run(1).biases) == 3
    for one, other in zip(run(1).biases, run(parts).biases, strict=True):
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


def test_padding_changes_nothing() -> None:
    """Rows padded to one length, against the same rows without padding."""
    padded, bare = run(1), Run(without_padding(rows()))
    assert distance(padded.gradient, bare.gradient) < 1e-12
    assert padded.logged == pytest.approx(bare.logged, rel=1e-10)
    for name, value in padded.diagnostics.items():
        if name != "1.state_norm":  # of rows that do not end with padding
            assert value == pytest.approx(bare.diagnostics[name], rel=1e-5), name


def test_the_objective_is_a_sum_over_all_targets_divided_by_their_number() -> None:
    """Against scores of all rows at once, and the definitions of the losses."""
    model, batch = {"mtp": {"mixer": {"kind": "full"}}, "hidden_z": 1e-2}, rows()
    step, gradient = trained(split(batch, 4), **model)
    network = LanguageModel(RunConfig.parse({"model": {**MODEL, **model}}).model, seed=0).double()
    embedded_BTD, x_BTD = network._states(batch.tokens_BT, batch.segments_BT, None, None)
    assert network.mtp is not None
    ahead_BTD = network.mtp(x_BTD, next_embedding_BTD=embedded_BTD.roll(-1, 1), segments=batch.segments_BT)
    after_BT = mtp_targets(batch.targets_BT, batch.segments_BT)
    losses = []
    for hidden_BTD, targets_BT in ((network.norm(x_BTD), batch.targets_BT), (ahead_BTD, after_BT)):
        scores_NV = network.logits(hidden_BTD).flatten(0, 1)
        nll = F.cross_entropy(scores_NV, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        losses.append(nll / (targets_BT >= 0).sum())
    hidden_z = x_BTD[batch.segments_BT >= 0].abs().exp().sum(-1).log().square().mean()
    (losses[0] + 0.3 * losses[1] + 1e-2 * hidden_z).backward()
    assert distance({name: p.grad for name, p in network.named_parameters() if p.grad is not None}, gradient) < 1e-12
    values = logged(step)
    assert values["loss"] == pytest.approx(float(losses[0].detach()), rel=1e-12)
    assert values["mtp_loss"] == pytest.approx(float(losses[1].detach()), rel=1e-12)


def test_the_logged_loss_is_the_mean_over_all_targets_of_its_steps() -> None:
    few, many = split(rows(), 2)
    training = {
        "batch_size": 4,
        "context": CONTEXT,
        "tokens": 2 * 4 * CONTEXT,
        "learning_rate": 1e-30,
        "compile": False,
    }
    config = RunConfig.parse({"model": MODEL, "training": training})
    step, _ = build_step(LanguageModel(config.model, seed=0).double(), config, parallel.launch(devices=1))
    step(1, iter([few]))
    step(2, iter([many]))
    assert logged(step)["loss"] == pytest.approx(logged(trained([rows()])[0])["loss"], rel=1e-12)


@pytest.mark.parametrize(("balance_over", "same"), [("step", True), ("running", False), ("micro_batch", False)])
def test_only_a_balance_loss_over_micro_batches_depends_on_them(balance_over: str, same: bool) -> None:
    moe = {**MOE, "balance_weight": 1.0, "balance_over": balance_over}
    model = {"feedforward": "moe", "feedforwards": {"moe": moe}}
    gradients = [trained(split(rows(), parts), **model)[1] for parts in (1, 4)]
    assert (distance(*gradients) < 1e-12) is same
