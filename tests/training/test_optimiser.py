"""What training keeps beside weights and gradients, counted before it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench.data import Batch
from workbench.model import LanguageModel
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.optimiser import training_state_bytes
from workbench.training.probe import measure
from workbench.training.step import build_step
from workbench.training.weight_transforms import ScheduledTransforms

MODEL = {"width": 32, "depth": 2, "vocabulary": 300, "feedforward": "moe", "feedforwards": {"moe": {"bias": "sign"}}}
TRAINING = {"tokens": 20 * 64, "batch_size": 2, "context": 32, "compile": False}
COMPENSATED = {"kind": "wisca", "state": "compensate"}


def config_of(**training: Any) -> RunConfig:
    return RunConfig.parse({"model": MODEL, "training": {**TRAINING, **training}})


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"optimiser": {"kind": "muon"}, "ema": {"decay": 0.9}},
        {"transforms": [COMPENSATED]},
        {
            "ema": {"decay": 0.9},
            "transforms": [COMPENSATED, {**COMPENSATED, "pairs": ["up_down", "vo"]}],
            "guards": [{"kind": "ratio", "action": "roll_back"}],
        },
    ],
)
def test_all_that_training_keeps_is_counted(training: dict[str, Any]) -> None:
    config = config_of(**training)
    step, _ = build_step(LanguageModel(config.model, seed=0), config, parallel.launch(devices=1))
    ScheduledTransforms(config, step)(0)
    tokens_BT = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    segments_BT = torch.zeros(2, 32, dtype=torch.int32)
    step(1, iter([Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT, segments_BT.long())]))
    state = [value for entry in step.optimiser.state.values() for value in entry.values()]
    copies = [] if step.roll_back is None else step.roll_back.tensors()
    assert training_state_bytes(config) == bytes_of(state) + bytes_of(copies)


@pytest.mark.process
def test_measured_memory_holds_scales_and_copies() -> None:
    plain, compensated, returning = (
        config_of(**training)
        for training in (
            {},
            {"transforms": [{**COMPENSATED, "every": 5}]},
            {"guards": [{"kind": "ratio", "action": "roll_back"}]},
        )
    )
    base, base_bytes = measure(plain).peaks["update"], training_state_bytes(plain)
    for config in (compensated, returning):
        more = training_state_bytes(config) - base_bytes
        assert measure(config).peaks["update"] - base == pytest.approx(more, rel=0.05)
