"""The stage at the start of training that a layer declares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ranks import on_ranks

from workbench.config import ConfigError
from workbench.data import Batch
from workbench.model import LanguageModel
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.branch import branched
from workbench.training.checkpoint import checkpoints_in, load_weights
from workbench.training.checkpoint import step_of as step_of_checkpoint
from workbench.training.config import RunConfig
from workbench.training.step import TrainStep, build_step
from workbench.training.trial import train

MODEL: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "vocabulary": 300,
    "pattern": "dsa full",
    "mixers": {"dsa": {"top_k": 4, "warm_up": 0.25}},
}
TRAINING = {"tokens": 8 * 64, "batch_size": 2, "context": 32, "log_every": 1, "compile": False}
ALONE = {"mixers": {"dsa": {"top_k": 4, "warm_up": 0.25, "warm_up_trains": "index"}}}


def step_of(batch_size: int = 2, accumulate: int = 1, **model: Any) -> TrainStep:
    training = {**TRAINING, "batch_size": batch_size, "accumulate": accumulate}
    config = RunConfig.parse({"model": {**MODEL, **model}, "training": training})
    return build_step(LanguageModel(config.model, seed=0), config, parallel.launch(devices=1))[0]


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens_BT, segments_BT = torch.randint(300, (2, 33), generator=generator), torch.zeros(2, 32, dtype=torch.int32)
        yield Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT, segments_BT.long())


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}


def test_a_layer_is_in_its_stage_for_the_declared_fraction_of_the_steps() -> None:
    step, stream, stages, seen = step_of(), batches(), [], []
    step.model.blocks[0].mixer.register_forward_hook(
        lambda mixer, inputs, keywords, output: seen.append(keywords["aux"].warming_up), with_kwargs=True
    )
    for number in range(1, 9):
        step(number, stream)
        stages.append(step.warming_up)
    assert stages == [[True, False]] * 2 + [[False, False]] * 6
    assert seen == [True] * 2 + [False] * 6


def test_the_whole_model_trains_in_the_stage() -> None:
    step = step_of()
    before = weights(step)
    step(1, batches())
    assert not step.is_alone
    assert [name for name, weight in weights(step).items() if torch.equal(weight, before[name])] == []


@pytest.mark.parametrize("mixers", [MODEL["mixers"], ALONE["mixers"]])
def test_accumulated_micro_batches_have_the_gradient_of_one_batch(mixers: dict[str, Any]) -> None:
    """In the warm-up and behind it."""
    rows = next(batches())
    for number in (1, 8):
        whole, parts = step_of(mixers=mixers), step_of(mixers=mixers, batch_size=1, accumulate=2)
        whole(number, iter([rows]))
        parts(number, (Batch(*(part[row : row + 1] for part in rows)) for row in (0, 1)))
        assert float(parts.gradient_norm) == pytest.approx(float(whole.gradient_norm), rel=1e-5)


def test_an_index_that_trains_alone_leaves_everything_else_as_it_is() -> None:
    step, stream = step_of(**ALONE, feedforward="moe", feedforwards={"moe": {"experts": 2, "bias": "sign"}}), batches()
    before, counters = weights(step), step.counters.counters
    for number in (1, 2):
        step(number, stream)
        assert step.is_alone
    changed = {name for name, weight in weights(step).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".index." in name}
    assert not any(counter.bias.any() for counter in counters), "biases of routers moved"
    assert {p for p in step.optimiser.state} == {p for n, p in step.model.named_parameters() if ".index." in n}
    step(3, stream)
    assert not step.is_alone
    assert [name for name, weight in weights(step).items() if torch.equal(weight, before[name])] == []


def test_a_multi_token_head_is_in_no_stage() -> None:
    step, seen = step_of(**ALONE, mtp={"mixer": "dsa"}), []
    step.model.mtp.block.mixer.register_forward_hook(
        lambda mixer, inputs, keywords, output: seen.append(keywords["aux"].warming_up), with_kwargs=True
    )
    step(1, batches())
    assert seen == [False]


@pytest.mark.process
def test_a_run_that_stops_in_its_stage_resumes_to_the_same_weights(new: Callable[..., RunFolder], cache: Any) -> None:
    """Also where the optimiser has no state yet of what the stage leaves as it is; diagnostics follow the index."""
    changes: dict[str, Any] = {
        "model": {"depth": 1, "pattern": "dsa", "mixers": {"dsa": {**ALONE["mixers"]["dsa"], "warm_up": 0.5}}},
        "training": {"checkpoint_every": 3},
    }
    whole, parts = new("whole", **changes), new("parts", **changes)
    train(whole.path, cache)
    answers = iter([False] * 3 + [True])
    train(parts.path, cache, should_stop=lambda: next(answers))
    assert parts.status()["status"] == "interrupted"
    assert step_of_checkpoint(checkpoints_in(parts.path / "checkpoint")[-1]) == 4
    train(parts.path, cache)
    one, two = (load_weights(checkpoints_in(folder.path / "checkpoint")[-1]) for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    values = [row["values"] for row in whole.diagnostics()]
    assert all(0 < of["index_recall"] <= 1 and 0 < of["index_mass"] <= 1 for of in values)
    assert values[-1]["index_divergence"] < values[0]["index_divergence"]


def test_a_longer_run_with_another_stage_is_refused() -> None:
    config = RunConfig.parse({"model": MODEL, "training": {"tokens": 100 * 2048}})
    with pytest.raises(ConfigError, match=r"model.mixers: got 'a layer whose warm-up takes 0.25"):
        branched(config, 200 * 2048)


@pytest.mark.process
@pytest.mark.parametrize("trains", ["model", "index"])
def test_two_ranks_train_as_one(trains: str, new: Callable[..., RunFolder], cache: Any) -> None:
    """Sharded parameters, an index that a later layer reads, in the stage and behind it."""
    mixer = {"kind": "lsa", "top_k": 6, "sink_tokens": 1, "window_tokens": 3, "warm_up": 0.5, "warm_up_trains": trains}
    changes: dict[str, Any] = {
        "model": {"pattern": "lsa reader", "mixers": {"lsa": mixer, "reader": {**mixer, "shared_index": True}}},
        "training": {"tokens": 8 * 4 * 32, "batch_size": 4, "checkpoint_every": 8},
    }
    one, two = new("one", **changes), new("two", **changes)
    train(one.path, cache)
    on_ranks(2, partial(train, devices=2), two.path, cache)
    weights, exact = (load_weights(checkpoints_in(run.path / "checkpoint")[-1]) for run in (two, one))
    for name, weight in exact.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5, msg=name)
