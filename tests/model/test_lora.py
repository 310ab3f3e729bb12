"""Low-rank adapters: the weight they make, what is trained, rescaling, accounting, a run from start to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, make_run, random_tokens, run_fields, small_model, write_corpus

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import Mixer
from workbench.model import LanguageModel, ModelConfig
from workbench.model.folding import folded
from workbench.model.lora import AdaptedLinear, adapter_factor
from workbench.pretrained import load
from workbench.results import RunFolder
from workbench.training import RunConfig
from workbench.training.checkpoint import latest, load_checkpoint
from workbench.training.export import export
from workbench.training.optimiser import training_state_bytes
from workbench.training.trial import train
from workbench.transforms import apply_transforms, build_transforms, transforms

LORA = {"rank": 4, "alpha": 6.0}
PATTERNS = ["full", "mla", "gdn"]


def adapted(pattern: str = "full", **fields: Any) -> LanguageModel:
    """A small model in fp64 whose adapters are not zero."""
    return small_model(pattern=pattern, lora=LORA, **fields).double()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merged_weights_compute_the_same(pattern: str) -> None:
    model, tokens_BT = adapted(pattern), random_tokens(2, 20)
    config, tensors = folded(model.config, model.state_dict())
    assert config.lora is None
    plain = LanguageModel(config).double()
    plain.load_state_dict(tensors)
    torch.testing.assert_close(logits(plain, tokens_BT), logits(model, tokens_BT))


def test_the_weight_is_the_frozen_one_plus_a_product() -> None:
    module = adapted().blocks[0].mixer.get_submodule("out")
    assert isinstance(module, AdaptedLinear)
    parameters = dict(module.named_parameters())
    product = parameters["lora_b"] @ parameters["lora_a"]
    torch.testing.assert_close(module.weight, parameters["weight"] + 1.5 * product)


def test_the_start_is_the_model_without_adapters() -> None:
    fields = {"width": 64, "depth": 2, "vocabulary": 300}
    plain, with_adapters = (LanguageModel(ModelConfig.parse({**fields, **more}), 3) for more in ({}, {"lora": LORA}))
    tokens_BT = random_tokens(2, 20)
    assert torch.equal(logits(plain, tokens_BT), logits(with_adapters, tokens_BT))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_adapters_alone_have_gradients(pattern: str) -> None:
    model, tokens_BT = adapted(pattern), random_tokens(2, 21)
    model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith((".lora_a", ".lora_b")), name


def test_accounting_counts_what_is_trained() -> None:
    config = ModelConfig.parse({"pattern": "mla full", "feedforward": "swiglu", "lora": LORA})
    with torch.device("meta"):
        model = LanguageModel(config)
    cost, plain = account(config, 256), account(config.changed(lora=None), 256)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (cost.trainable, cost.parameters - plain.parameters) == (trained, trained)
    assert plain.trainable == plain.parameters
    run = RunConfig().model_copy(update={"model": config})
    tensors = sum(1 for parameter in model.parameters() if parameter.requires_grad)
    assert training_state_bytes(run) == 8 * trained + 4 * tensors


@pytest.mark.parametrize("pairs", [["lora"], ["qk", "vo"], ["lora", "qk", "vo"]])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("pattern", ["full", "mla"])
def test_rescaling_keeps_the_function(pairs: list[str], granularity: str, pattern: str) -> None:
    model, tokens_BT = adapted(pattern), random_tokens(2, 20)
    fields = {"kind": "wisca", "pairs": pairs, "granularity": granularity}
    weights = model.state_dict()
    new, _ = apply_transforms(build_transforms([transforms.parse(fields)]), weights, None, model.config, model.config)
    changed = {name.rpartition(".")[2] for name, tensor in new.items() if not torch.equal(tensor, weights[name])}
    assert {"lora_a", "lora_b"} <= changed
    rescaled = LanguageModel(model.config).double()
    rescaled.load_state_dict(new)
    torch.testing.assert_close(logits(rescaled, tokens_BT), logits(model, tokens_BT))


def test_factors_of_attention_scores_reach_the_adapter() -> None:
    mixer = adapted().blocks[0].mixer
    assert isinstance(mixer, Mixer)
    parameters = dict(mixer.named_parameters())
    factor = mixer.score_factors(torch.tensor([0.25, 1.0], dtype=torch.float64))["qkv.weight"]
    module: Any = mixer.get_submodule("qkv")
    before = module.weight.detach().clone()
    with torch.no_grad():
        for name, by in {"qkv.weight": factor, **adapter_factor("qkv.weight", factor, parameters)}.items():
            parameters[name].mul_(by)
    torch.testing.assert_close(module.weight, factor * before)


def test_a_block_compiles_as_one_graph() -> None:
    block, x_BTD = adapted().blocks[0], torch.randn(1, 8, 64, dtype=torch.float64)
    compiled = torch.compile(block.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_BTD), block(x_BTD))


def test_random_weights_are_not_adapted() -> None:
    with pytest.raises(ConfigError, match="trained weights to start from"):
        RunConfig.parse({"model": {"lora": LORA}})


def test_the_identity_has_no_adapters_by_default() -> None:
    assert "lora" not in ModelConfig().canonical()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model; beside it the texts and the cache of prepared data."""
    folder = tmp_path_factory.mktemp("base")
    fields = run_fields(write_corpus(folder / "texts"), training={"tokens": 4 * 64})
    run = make_run(folder / "run", folder / "cache", fields)
    assert train(run.path, folder / "cache")["status"] == "done"
    return export(run.path, folder / "export", cache=folder / "cache")


def adapting(base: Path, path: Path) -> RunFolder:
    """A finished run that adapts the model ``base``."""
    corpus, cache = base.parent / "texts", base.parent / "cache"
    fields = run_fields(corpus, model={"lora": LORA}, start={"folder": str(base)}, training={"ema": {"decay": 0.9}})
    run = make_run(path, cache, fields)
    assert train(run.path, cache)["status"] == "done"
    return run


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return adapting(base, tmp_path_factory.mktemp("adapting") / "run")


def last_state(run: RunFolder) -> dict[str, Any]:
    path, _ = latest(run.path / "checkpoint")
    assert path is not None
    return load_checkpoint(path)


@pytest.mark.process
def test_trained_weights_stay(run: RunFolder, base: Path) -> None:
    state, start = last_state(run), load(base)[0].state_dict()
    frozen = {name: tensor for name, tensor in state["model"].items() if "lora" not in name}
    assert all(torch.equal(tensor, start[name]) for name, tensor in frozen.items())
    assert len(state["optimiser"]["state"]) == len(state["model"]) - len(frozen)


@pytest.mark.process
def test_an_export_is_one_model(run: RunFolder, base: Path, tmp_path: Path) -> None:
    model, tokens_BT = LanguageModel(RunConfig.parse(run.record().config).model).eval(), random_tokens(2, 20)
    model.load_state_dict(last_state(run)["model"])
    exported = load(export(run.path, tmp_path / "merged", cache=base.parent / "cache", weights="trained"))[0].eval()
    assert exported.config.lora is None
    torch.testing.assert_close(logits(exported, tokens_BT), logits(model, tokens_BT))
    assert not torch.allclose(logits(exported, tokens_BT), logits(load(base)[0].eval(), tokens_BT))
