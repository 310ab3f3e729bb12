"""Batch plans change which rank computes what and when, never the gradient of a step."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_run
from ranks import TIMEOUT, on_ranks

from workbench.data import Source, StepLoader, prepare
from workbench.latency import LatencyTable
from workbench.model import LanguageModel
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.checkpoint import load_checkpoint
from workbench.training.config import RunConfig
from workbench.training.latency import measure_latencies
from workbench.training.replay import replay
from workbench.training.step import build_step
from workbench.training.trial import run_in_process, train

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks do not share the only GPU"),
]

ROWS, PARTS, CONTEXT = 8, 2, 64
BUCKETS = (16, 32, 64)
PLANS = ("contiguous", "length_balanced", "sparsity_aware")
MOBA = {"kind": "moba", "block": 8, "top_k": 3, "head_dim": 8}
MODEL = {"width": 16, "depth": 2, "vocabulary": 300, "pattern": "moba", "mixers": {"moba": MOBA}}


@pytest.fixture(scope="module")
def fields(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on documents of drawn lengths, with a latency table of its model."""
    text = {"kind": "files", "path": str(corpus)}
    data = {
        "corpus": {"kind": "drawn_lengths", "text": text, "distribution": "long_tail", "scale": 1 / 512, "facts": 0},
        "evaluation_documents": 3,
        "evaluation_bytes": 100,
    }
    training = {"context": CONTEXT, "buckets": BUCKETS, "batch_size": ROWS // PARTS, "accumulate": PARTS}
    run = {"model": MODEL, "data": data, "training": {**training, "compile": False, "tokens": 6 * ROWS * CONTEXT}}
    path = tmp_path_factory.mktemp("table") / "table.json"
    measure_latencies(RunConfig.parse(run), [16, 32, 64], [1, 2, 3, 6]).save(path)
    assert LatencyTable.load(path).order
    return {**run, "table": str(path)}


def planned(fields: dict[str, Any], plan: str, ranks: str) -> dict[str, Any]:
    """The run with another plan."""
    loads = {"loads": {"kind": "measured", "table": fields["table"]}} if plan == "sparsity_aware" else {}
    training = {**fields["training"], "batch_plan": {"kind": plan, **loads}, "ranks": ranks}
    return {"model": fields["model"], "data": fields["data"], "training": training}


def gradients(fields: dict[str, Any], cache: Path, data: str, world: int) -> dict[str, Any]:
    """The first step's gradients, in fp64, and the plan of every case."""
    found: dict[str, Any] = {}
    for ranks in ("replicated", "sharded") if world > 1 else ("replicated",):
        fabric = parallel.launch(world, ranks)
        for plan in PLANS:
            config = RunConfig.parse(planned(fields, plan, ranks))
            training = config.training
            loader = StepLoader(
                config.stream(Source.open(cache, data)),
                config.batch_plan,
                batch_size=training.batch_size,
                accumulate=training.accumulate,
                steps=1,
                rank=fabric.global_rank,
                world=world,
            )
            step, _ = build_step(LanguageModel(config.model, seed=0).double(), config, fabric)
            gradient: dict[str, np.ndarray] = {}

            def keep(*_: Any, step: Any = step, gradient: dict[str, np.ndarray] = gradient) -> None:
                for name, p in step.model.named_parameters():
                    gradient[name] = parallel.full_tensor(p.grad).cpu().numpy().copy()

            step.optimiser.register_step_pre_hook(keep)
            step(1, iter(list(loader)))
            lengths = [[documents.tolist() for documents in of_rank] for of_rank in loader.lengths(0)]
            found[f"{plan}, {ranks}"] = gradient, lengths
    return found


@pytest.fixture(scope="module")
def taken(fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Gradients of one process, then of two ranks, then of four."""
    cache = tmp_path_factory.mktemp("cache")
    data = prepare(RunConfig.parse(planned(fields, "contiguous", "sharded")).data, 300, cache).fingerprint
    alone = gradients(fields, cache, data, 1)["contiguous, replicated"]
    first, second = on_ranks(2, gradients, fields, cache, data, 2)
    return [{"": alone}, first, second, *on_ranks(4, gradients, fields, cache, data, 4)]


@pytest.mark.parametrize("ranks", ["replicated", "sharded"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("first", [1, 3], ids=["two ranks", "four ranks"])
def test_every_plan_has_the_gradient_of_the_global_batch(
    taken: list[dict[str, Any]], plan: str, ranks: str, first: int
) -> None:
    expected, got = taken[0][""][0], taken[first][f"{plan}, {ranks}"][0]
    for name, gradient in expected.items():
        np.testing.assert_allclose(got[name], gradient, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("plan", PLANS)
def test_all_ranks_know_the_same_plan(taken: list[dict[str, Any]], plan: str) -> None:
    assert taken[1][f"{plan}, sharded"][1] == taken[2][f"{plan}, sharded"][1]
    assert len({str(of_rank[f"{plan}, sharded"][1]) for of_rank in taken[3:]}) == 1


def test_balanced_plans_deal_out_other_micro_batches(taken: list[dict[str, Any]]) -> None:
    plans = [taken[1][f"{plan}, sharded"][1] for plan in PLANS]
    assert plans[0] != plans[1]


TUNED_STEPS = 4


def tuned(fields: dict[str, Any]) -> RunConfig:
    """Learned plans and tuned budgets, of four rows in a micro-batch."""
    run = planned(fields, "sparsity_aware", "replicated")
    run["training"]["budgets"] = {"kind": "dst", "table": fields["table"], "tolerance": 0.3}
    return RunConfig.parse(run)


def tuned_on_a_rank(fields: dict[str, Any], cache: Path, data: str, world: int) -> tuple[list[Any], dict[str, Any]]:
    """What every step measured, and the weights at the end."""
    config = tuned(fields)
    training = config.training
    fabric = parallel.launch(world, "replicated")
    loader = StepLoader(
        config.stream(Source.open(cache, data)),
        config.batch_plan,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        steps=TUNED_STEPS,
        rank=fabric.global_rank,
        world=world,
    )
    step, _ = build_step(LanguageModel(config.model, seed=0).double(), config, fabric)
    step.diagnose_at, step.step_lengths = set(), loader.lengths
    measured, batches = [], iter(loader)
    for number in range(TUNED_STEPS):
        step(number + 1, batches)
        measured.append(step.measurements(loader.lengths(number)))
        loader.record(number, measured[-1])
    batches.close()
    return measured, {name: p.detach().cpu().numpy().copy() for name, p in step.model.named_parameters()}


def test_four_replayed_ranks_train_as_four_real_ones(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same plans, which follow from the budgets of earlier steps, the same budgets, the same weights."""
    cache = tmp_path_factory.mktemp("cache")
    measured_table = LatencyTable.load(fields["table"])
    layers = {
        key: replace(layer, seconds=tuple(tuple(x * k / 1e6 for k in layer.budgets) for x in layer.lengths))
        for key, layer in measured_table.layers.items()
    }
    replace(measured_table, layers=layers).save(cache / "table.json")  # times that cannot be alike by chance
    fields = {**fields, "table": str(cache / "table.json")}
    config = tuned(fields)
    data = prepare(config.data, 300, cache).fingerprint
    model = LanguageModel(config.model, seed=0).double()
    replayed = list(replay(config, config.stream(Source.open(cache, data)), 4, TUNED_STEPS, model))
    of_ranks = on_ranks(4, tuned_on_a_rank, fields, cache, data, 4)
    for measured, weights in of_ranks:
        assert [step["budgets"] for step in measured] == [step.blocks_RAL.tolist() for step in replayed]
        lengths = [[[x.tolist() for x in of_rank] for of_rank in step.lengths] for step in replayed]
        assert [step["lengths"] for step in measured] == lengths
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(weights[name], parameter.detach().cpu().numpy(), rtol=1e-7, atol=1e-9)
    budgets = np.array([step.blocks_RAL for step in replayed])
    assert len(np.unique(budgets)) > 1, "budgets vary"


def run_of(path: Path, fields: dict[str, Any]) -> RunFolder:
    tuned = planned(fields, "sparsity_aware", "replicated")
    tuned["training"] |= {
        "budgets": {"kind": "dst", "table": fields["table"]},
        "log_every": 1,
        "evaluations": 1,
        "checkpoint_every": 3,
    }
    return make_run(path / "run", path / "cache", tuned)


@pytest.fixture(scope="module")
def whole(fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Trained in a trial's process, which starts the other rank."""
    folder = run_of(tmp_path_factory.mktemp("whole"), fields)
    arguments = (str(folder.path), str(folder.path.parent / "cache"), 1, 2)
    process = multiprocessing.get_context("forkserver").Process(target=run_in_process, args=arguments)
    process.start()
    process.join(TIMEOUT)
    process.kill()
    assert folder.status()["status"] == "done", (folder.path / "log.txt").read_text()
    return folder


def test_budgets_that_were_chosen_are_learned(whole: RunFolder) -> None:
    state = load_checkpoint(whole.path / "checkpoint" / "step-6")["loader"]["states"]
    assert set(state) >= {"4", "5"}  # of the last steps
    assert all(len(budgets) == 2 and min(budgets) >= 1 for budgets in state["5"].values())


def test_times_of_ranks_are_logged(whole: RunFolder) -> None:
    for row in whole.metrics():
        assert row["rank_imbalance"] >= 1
        assert 0 <= row["waiting"] < 1
        assert np.shape(row["ranks"]["micro_batches"]) == (2, PARTS)
        assert min(row["ranks"]["waiting"]) == 0  # the last rank waits for nobody
        assert sum(row["ranks"]["micro_batches"][0]) <= row["ranks"]["step"][0]


def test_a_run_that_learns_budgets_resumes_exactly(whole: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("resumed")
    folder = RunFolder(shutil.copytree(whole.path, path / "run"))
    shutil.copytree(whole.path.parent / "cache", path / "cache")
    shutil.rmtree(folder.path / "checkpoint" / "step-6")
    (folder.path / "result.json").unlink()
    on_ranks(2, partial(train, devices=2), folder.path, path / "cache")
    assert [row["loss"] for row in folder.metrics()] == [row["loss"] for row in whole.metrics()]
