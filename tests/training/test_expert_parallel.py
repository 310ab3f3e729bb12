"""Ranks that store whole experts: the numbers, weights and checkpoints of ranks that gather them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields
from ranks import on_ranks

from workbench.config import ConfigError
from workbench.contract import feedforwards
from workbench.data import Source, StepLoader, prepare
from workbench.feedforwards.router import Router
from workbench.model import LanguageModel
from workbench.pretrained import load
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.checkpoint import load_checkpoint
from workbench.training.config import RunConfig
from workbench.training.export import export
from workbench.training.step import build_step
from workbench.training.trial import train

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks do not share the only GPU"),
]

STEPS, SAVED = 4, 2
NONE: dict[str, Any] = {"state": {}, "param_groups": []}
MOE = {"experts": 4, "zero_experts": 2, "top_k": 3, "bias": "proportional", "renormalise": False, "shared": 1}
SHORTCUT = {"pattern": "full gdn", "shortcut": "moe", "feedforwards": {"moe": MOE}, "mtp": {"start": 0.4}}
CASES: dict[str, dict[str, Any]] = {
    "shortcut": {"model": SHORTCUT},
    "muon": {"training": {"optimiser": {"kind": "muon", "precision": "fp32"}, "accumulate": 2, "recompute": True}},
    "one rank's experts": {"training": {"clip": 0.1}},
    "moe_capacity": {"model": {"feedforward": "moe_capacity"}},
    "moe_random_zero": {"model": {"feedforward": "moe_random_zero"}},
    "moe_expert_choice": {"model": {"feedforward": "moe_expert_choice"}, "allow_document_leaks": True},
}


def fields_of(corpus: Path, case: str, expert_parallel: bool = True) -> dict[str, Any]:
    changes = CASES[case]
    kind = changes.get("model", {}).get("feedforward", "moe")
    model = {"feedforwards": {kind: {"experts": 4}}, **changes.get("model", {"feedforward": "moe"})}
    training = {"batch_size": 4, "ema": {"decay": 0.9}, "compile": False, **changes.get("training", {})}
    training |= {"tokens": STEPS * 4 * 32 * training.get("accumulate", 1), "expert_parallel": expert_parallel}
    leaks = {"allow_document_leaks": changes.get("allow_document_leaks", False)}
    return {**run_fields(corpus, model=model, training=training), **leaks, "seed": 3}


def copied(state: Any) -> Any:
    """A state with tensors of its own."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return type(state)(map(copied, state)) if isinstance(state, list | tuple) else state


def choose_the_first_experts(model: LanguageModel) -> None:
    """Two experts take all tokens; with two ranks, both belong to the first."""

    def select(scores_NC: torch.Tensor, logits_NC: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0, 1], device=scores_NC.device).repeat(len(scores_NC), 1)

    for module in model.modules():
        if isinstance(module, Router):
            module.select = select  # type: ignore[method-assign]


def trained(
    fields: dict[str, Any], cache: Path, data: str, world: int, case: str, saved: Any = None, steps: int = STEPS
) -> dict[Any, Any]:
    """Numbers of the steps, in fp64 unless the products are bf16, and the whole state after step :data:`SAVED` and the
    last; continues from a saved state."""
    config = RunConfig.parse(fields)
    training = config.training
    fabric = parallel.launch(world, training.ranks, expert_parallel=training.expert_parallel)
    rows = {"batch_size": training.batch_size, "accumulate": training.accumulate, "steps": training.steps}
    loader = StepLoader(
        config.stream(Source.open(cache, data)), config.batch_plan, rank=fabric.global_rank, world=world, **rows
    )
    model = LanguageModel(config.model, seed=0)
    if training.precision == "fp32":
        model = model.double()
    if case == "one rank's experts":
        choose_the_first_experts(model)
    step, _ = build_step(model, config, fabric)
    first, batches = 0, list(loader)
    found: dict[Any, Any] = {"norms": [], "rms": [], "layers": []}
    if saved is not None:
        parallel.load_full_state(step.model, step.optimiser, *copied(saved))  # torch puts shards into what it loads
        first = SAVED
        found[first] = copied(parallel.full_state(step.model, step.optimiser))
    remaining = iter(batches[first * training.accumulate :])
    for number in range(first + 1, steps + 1):
        step(number, remaining)
        found["norms"].append(step.gradient_norm.clone())
        found["rms"].append(torch.stack(list(step.gradient_metrics.values())))
        found["layers"].append([values["gradient_norm"].clone() for values in step.diagnostics.values()])
        if number in (SAVED, STEPS):
            found[number] = copied(parallel.full_state(step.model, step.optimiser))
    return found


def on_one_rank(every: dict[tuple[str, bool], dict[str, Any]], cache: Path, data: str, path: Path) -> None:
    """Every case with gathered and with exchanged experts; then states of each loaded by the other, and resumed."""
    found = {key: trained(fields, cache, data, 2, key[0]) for key, fields in every.items()}
    for case in ("shortcut", "muon"):
        for exchanged in (False, True):
            saved = found[case, exchanged][SAVED]
            box = [saved if parallel.is_rank_zero() else None]
            torch.distributed.broadcast_object_list(box, src=0)
            fields = every[case, not exchanged]
            found[case, exchanged, "other"] = trained(fields, cache, data, 2, case, box[0], steps=SAVED)
            found[case, exchanged, "resumed"] = trained(every[case, exchanged], cache, data, 2, case, box[0])
    if parallel.is_rank_zero():
        torch.save(found, path)
    parallel.barrier()


@pytest.fixture(scope="module")
def every(corpus: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    return {(case, exchanged): fields_of(corpus, case, exchanged) for case in CASES for exchanged in (False, True)}


@pytest.fixture(scope="module")
def prepared(every: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, prepare(RunConfig.parse(every["shortcut", True]).data, 300, cache).fingerprint


@pytest.fixture(scope="module")
def found(every: Any, prepared: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    path = tmp_path_factory.mktemp("found") / "found.pt"
    on_ranks(2, on_one_rank, every, *prepared, path)
    loaded: dict[Any, Any] = torch.load(path, weights_only=False)
    return loaded


def close(got: Any, expected: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 1e-3)


def same(got: Any, expected: Any) -> None:
    """Whether states are equal, bit for bit."""
    (weights, state), (exact_weights, exact_state) = got, expected
    torch.testing.assert_close(dict(weights), dict(exact_weights), rtol=0, atol=0)
    torch.testing.assert_close(state["state"], exact_state["state"], rtol=0, atol=0)
    assert state["param_groups"] == exact_state["param_groups"]


@pytest.mark.parametrize("case", CASES)
def test_exchanged_experts_train_as_gathered_ones(found: dict[Any, Any], case: str) -> None:
    gathered, exchanged = found[case, False], found[case, True]
    close(exchanged["norms"], gathered["norms"])
    for name in ("rms", "layers"):  # summed in fp32
        close(exchanged[name], gathered[name], 1e-6)
    close(exchanged[STEPS][0], gathered[STEPS][0], 1e-7)


@pytest.mark.parametrize("case", ["shortcut", "muon", "one rank's experts"])
def test_exchanged_experts_train_as_one_process(
    found: dict[Any, Any], every: Any, prepared: tuple[Path, str], case: str
) -> None:
    alone, exchanged = trained(every[case, True], *prepared, 1, case), found[case, True]
    close(exchanged["norms"], alone["norms"])
    for name in ("rms", "layers"):  # summed in fp32
        close(exchanged[name], alone[name], 1e-6)
    close(exchanged[STEPS][0], alone[STEPS][0], 1e-7)


@pytest.mark.parametrize("case", ["shortcut", "muon"])
@pytest.mark.parametrize("exchanged", [False, True])
def test_a_state_is_that_of_either_kind_of_ranks(found: dict[Any, Any], case: str, exchanged: bool) -> None:
    same(found[case, exchanged, "other"][SAVED], found[case, exchanged][SAVED])
    same(found[case, exchanged, "resumed"][STEPS], found[case, exchanged][STEPS])


@pytest.mark.parametrize("case", ["shortcut", "muon"])
def test_a_state_of_exchanged_experts_is_one_of_a_single_process(
    found: dict[Any, Any], every: Any, prepared: tuple[Path, str], case: str
) -> None:
    saved = found[case, True][SAVED]
    same(trained(every[case, True], *prepared, 1, case, saved, steps=SAVED)[SAVED], saved)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two ranks with bf16 products, trained to its end."""
    return run_in(tmp_path_factory.mktemp("whole"), corpus)


def run_in(path: Path, corpus: Path) -> RunFolder:
    fields = fields_of(corpus, "shortcut")
    fields["training"] |= {"precision": "bf16", "checkpoint_every": SAVED, "log_every": 1}
    return finished(make_run(path / "run", path / "cache", fields), 2)


def finished(folder: RunFolder, devices: int) -> RunFolder:
    cache = folder.path.parent / "cache"
    if devices == 1:
        result = train(folder.path, cache)
    else:
        result, *_ = on_ranks(devices, partial(train, devices=devices), folder.path, cache)
    assert result["status"] == "done", result
    return folder


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_resumes_on_any_number_of_devices(whole: RunFolder, tmp_path: Path, devices: int) -> None:
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    shutil.copytree(whole.path.parent / "cache", tmp_path / "cache")
    shutil.rmtree(folder.path / "checkpoint" / f"step-{STEPS}")
    (folder.path / "result.json").unlink()
    finished(folder, devices)
    got, exact = (load_checkpoint(run.path / "checkpoint" / f"step-{STEPS}") for run in (folder, whole))
    if devices == 2:
        same((got["model"], got["optimiser"]), (exact["model"], exact["optimiser"]))
        assert [row["loss"] for row in folder.metrics()] == [row["loss"] for row in whole.metrics()]
    else:
        for name, tensor in exact["model"].items():
            assert float((got["model"][name] - tensor).norm() / tensor.norm().clamp_min(1e-9)) < 0.02, name
    assert folder.result()["report_value"] == pytest.approx(whole.result()["report_value"], rel=1e-2)


def test_growth_transforms_and_guards_keep_experts_distributed(corpus: Path, tmp_path: Path) -> None:
    """Losses and weights are those of one process; an export has the weights of the last step."""
    fields = fields_of(corpus, "muon")
    fields["growth"] = {"model": {"depth": 1}, "at": 0.5, "transforms": [{"kind": "stack"}]}
    guard = {"kind": "ratio", "factor": 100.0, "action": "roll_back"}
    fields["training"] |= {"transforms": [{"kind": "wisca"}], "guards": [guard], "roll_back_window": 2}
    one, two = (make_run(tmp_path / name, tmp_path / "cache", fields) for name in ("one", "two"))
    finished(one, 1)
    finished(two, 2)
    assert [row["loss"] for row in two.metrics()] == pytest.approx([row["loss"] for row in one.metrics()], rel=1e-3)
    weights = load_checkpoint(two.path / "checkpoint" / f"step-{STEPS}")["model"]
    for name, tensor in load_checkpoint(one.path / "checkpoint" / f"step-{STEPS}")["model"].items():
        assert float((weights[name] - tensor).norm() / tensor.norm()) < 1e-2, name
    model = load(export(two.path, tmp_path / "export", weights="trained"))[0]
    same((model.state_dict(), NONE), (weights, NONE))


def first_norm(fields: dict[str, Any], cache: Path, data: str) -> float:
    """The gradient norm of the first step."""
    return float(trained(fields, cache, data, 2, "moe_capacity", steps=1)["norms"][0])


@pytest.mark.compile
def test_compiled_blocks_exchange_rows_between_their_graphs(
    found: dict[Any, Any], corpus: Path, prepared: tuple[Path, str]
) -> None:
    fields = fields_of(corpus, "moe_capacity")
    fields["training"]["compile"] = True
    eager = float(found["moe_capacity", True]["norms"][0])
    assert on_ranks(2, first_norm, fields, *prepared) == [pytest.approx(eager, rel=1e-6)] * 2


def norms_on_gpus(every: dict[str, dict[str, Any]], cache: Path, data: str, case: str) -> dict[str, list[float]]:
    return {name: [float(n) for n in trained(run, cache, data, 2, case)["norms"]] for name, run in every.items()}


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", ["shortcut", "one rank's experts"])
def test_kernels_and_compiled_blocks_exchange_rows_on_gpus(corpus: Path, prepared: tuple[Path, str], case: str) -> None:
    runs = {}
    for name, exchanged in (("gathered", False), ("exchanged", True)):
        runs[name] = fields_of(corpus, case, exchanged)
        runs[name]["training"] |= {"precision": "bf16", "compile": case == "shortcut"}
    for norms in on_ranks(2, norms_on_gpus, runs, *prepared, case):
        assert norms["exchanged"] == pytest.approx(norms["gathered"], rel=5e-2)


def test_experts_that_ranks_cannot_divide_are_refused_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    fields = fields_of(corpus, "shortcut")
    fields["model"]["feedforwards"]["moe"] = {**MOE, "experts": 6}
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    with pytest.raises(ConfigError, match=r"moe.experts: got 6; expected a multiple of the 4 devices.* Nearest: 8"):
        train(folder.path, tmp_path / "cache", devices=4)
    assert not (folder.path / "status.json").exists()


def test_feedforwards_whose_experts_cannot_be_divided_are_refused_by_name(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig.parse(fields_of(corpus, "moe_capacity"))
    monkeypatch.setattr(feedforwards["moe_capacity"], "num_experts", lambda config: 0)
    with pytest.raises(ConfigError, match=r"training.expert_parallel: got \"true with feed-forward .*moe_capacity"):
        config.check_experts(2)
    config.check_experts(1)


def test_ranks_that_store_all_weights_have_no_experts_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"expert_parallel: got 'true with ranks: replicated"):
        RunConfig.parse({"training": {"expert_parallel": True, "ranks": "replicated"}})


def test_the_setting_is_part_of_the_identity_where_it_is_on() -> None:
    runs = [RunConfig.parse({"training": {"expert_parallel": value}}) for value in (False, True)]
    assert [runs[0].identity == run.identity for run in (RunConfig(), runs[1])] == [True, False]
