"""One optimiser step is the same on one rank and on two, however many micro-batches it has.

Rows come from the streams of real data: of tasks, whose rows have unequal numbers of targets and end with padding, and
of text. Where there are two GPUs, the ranks use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks

from workbench.data import Source, StepLoader, prepare, tasks
from workbench.model import LanguageModel
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.step import build_step

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks do not share the only GPU"),
]

ROWS = 8
PARTS = 1, 2, 4
MOE = {
    "experts": 4,
    "zero_experts": 1,
    "top_k": 2,
    "renormalise": False,
    "bias": "proportional",
    "balance_weight": 0.1,
    "z_weight": 1e-2,
}
MODEL: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "vocabulary": 300,
    "pattern": "full gdn",
    "feedforward": "moe",
    "feedforwards": {"moe": MOE},
    "mtp": {"mixer": {"kind": "full"}, "feedforward": {"kind": "moe", **MOE}},
    "hidden_z": 1e-2,
    "embedding": {"kind": "ngram", "size": 2},
}
MIXES = [{"length": 48, "pairs": 1}, {"length": 48, "pairs": 12}, {"length": 20, "pairs": 5}]
Step = tuple[dict[str, np.ndarray], dict[str, float], dict[str, Any], dict[str, np.ndarray]]
"""Gradient by parameter; logged numbers; diagnostics; buffers, which hold the selection biases."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def runs(corpus: Path, cache: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Fields and fingerprint of the data, by the kind of rows."""
    text = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3, "evaluation_bytes": 200}
    needles = {"kind": "needle", "lengths": [100, 120, 200], "value": "word", "examples": 6, "text": text}
    kinds = {
        "mqar": ({"kind": "mqar", "mixes": MIXES, "examples": 6}, 56),
        "needle": (needles, 220),
        "text": (text, 48),
    }
    prepared = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 10)
        for name, (data, context) in kinds.items():
            tokens = 20 * ROWS * context
            fields = {"model": MODEL, "data": data, "training": {"context": context, "tokens": tokens}}
            source = prepare(RunConfig.parse(fields).data, 300, cache)
            prepared[name] = (fields, source.fingerprint)
    return prepared


def steps(runs: dict[str, tuple[dict[str, Any], str]], cache: Path, world: int) -> dict[str, Step]:
    """The first step of every run, split in every way; called on every rank."""
    fabric = parallel.launch(world)
    return {
        f"{name}, {world} ranks, {parts} parts": _step(fields, Source.open(cache, data), parts, world, fabric)
        for name, (fields, data) in runs.items()
        for parts in PARTS
    }


def _step(fields: dict[str, Any], data: Source, parts: int, world: int, fabric: Any) -> Step:
    split = {"batch_size": ROWS // parts, "accumulate": parts, "clip": 1e9, "log_every": 1, "compile": False}
    config = RunConfig.parse({**fields, "training": {**fields["training"], **split}})
    training = config.training
    stream = data.stream(context=training.context, seed=7)
    loader = StepLoader(
        stream,
        config.batch_plan,
        batch_size=training.batch_size,
        accumulate=parts,
        steps=1,
        rank=fabric.global_rank,
        world=world,
    )
    step, _ = build_step(LanguageModel(config.model, seed=0).double(), config, fabric)
    gradient: dict[str, np.ndarray] = {}
    step.optimiser.register_step_pre_hook(
        lambda *_: gradient.update(
            {
                n: parallel.full_tensor(p.grad).cpu().numpy().copy()
                for n, p in step.model.named_parameters()
                if p.grad is not None
            }
        )
    )
    step(1, iter(list(loader)))
    values, names = step.take_log_values()
    numbers = values.tolist()
    logged = dict(zip(["loss_sum", "targets", "gradient_norm"], numbers))
    logged |= dict(zip(names, numbers[len(numbers) - len(names) :]))
    diagnosed = {f"{i}.{name}": v.tolist() for i, layer in step.diagnostics.items() for name, v in layer.items()}
    biases = {name: buffer for name, buffer in step.model.named_buffers() if name.endswith("bias")}
    buffers = {name: bias.cpu().numpy().copy() for name, bias in biases.items()}
    return gradient, logged, diagnosed, buffers


@pytest.fixture(scope="module")
def taken(runs: dict[str, tuple[dict[str, Any], str]], cache: Path) -> dict[str, Step]:
    return {**steps(runs, cache, 1), **on_ranks(2, steps, runs, cache, 2)[0]}


OTHERS = [f"{world} ranks, {parts} parts" for world in (1, 2) for parts in PARTS][1:]


@pytest.fixture(params=["mqar", "needle", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=OTHERS)
def pair(request: pytest.FixtureRequest, taken: dict[str, Step], kind: str) -> tuple[Step, Step]:
    """The step in one piece on one rank, and split."""
    return taken[f"{kind}, 1 ranks, 1 parts"], taken[f"{kind}, {request.param}"]


def test_rows_have_unequal_numbers_of_targets(
    runs: dict[str, tuple[dict[str, Any], str]], cache: Path, kind: str
) -> None:
    fields, data = runs[kind]
    rows = Source.open(cache, data).stream(context=fields["training"]["context"], seed=7)
    numbers = {int((rows.row(r)[1] >= 0).sum()) for r in range(ROWS)}
    assert (len(numbers) > 1) is (kind != "text")


def test_the_gradient_is_that_of_one_piece(pair: tuple[Step, Step]) -> None:
    whole, parts = (step[0] for step in pair)
    assert whole.keys() == parts.keys()
    error = sum(((whole[name] - parts[name]) ** 2).sum() for name in whole)
    assert (error / sum((value**2).sum() for value in whole.values())) ** 0.5 < 1e-12


def test_logged_numbers_are_those_of_one_piece(pair: tuple[Step, Step]) -> None:
    whole, parts = (step[1] for step in pair)
    assert (
        parts.keys()
        == whole.keys()
        >= {
            "loss_sum",
            "targets",
            "gradient_norm",
            "mtp_loss",
            "hidden_z_excess",
            "gradient_rms_median",
        }
    )
    for name, value in whole.items():  # root mean squares of gradients are fp32
        assert parts[name] == pytest.approx(value, rel=1e-6 if "rms" in name else 1e-9), name


def test_diagnostics_are_those_of_one_piece(pair: tuple[Step, Step]) -> None:
    whole, parts = (step[2] for step in pair)
    assert {"0.ffn_experts_sd", "1.half_life_low"} < whole.keys() == parts.keys()
    for name, value in whole.items():  # NaN: no row of a task has a state at its end, as it ends with padding
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name


def test_selection_biases_are_those_of_one_piece(pair: tuple[Step, Step]) -> None:
    whole, parts = (step[3] for step in pair)
    assert len(whole) == 3
    for name, value in whole.items():
        assert np.abs(value).sum() > 0
        assert np.array_equal(parts[name], value), name
