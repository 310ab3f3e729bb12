"""Calibration of key channels: the measured maxima, the file beside the weights, errors where it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, small_model, small_tokenizer, write_corpus
from tokenizers import Tokenizer

from workbench.config import ConfigError
from workbench.data.corpora import corpora
from workbench.decoding import Engine, Sampling
from workbench.decoding.calibration import calibrate, measure, read_calibration, rows_of
from workbench.decoding.policy import policies
from workbench.model import LanguageModel
from workbench.pretrained import load, save

FULL: dict[str, Any] = {"mixers": {"full": {"heads": 4, "kv_heads": 2}}}
LATENT: dict[str, Any] = {"pattern": "gdn mla", "mixers": {"mla": {"head_dim": 16}}}
GREEDY = Sampling(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, str]:
    return {"kind": "files", "path": str(write_corpus(tmp_path / "texts", documents=3))}


@pytest.fixture
def export(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save(small_model(**FULL), tokenizer, tmp_path / "export")


def layer_scores(model: LanguageModel, layer: int, tokens_BT: torch.Tensor) -> Any:
    """Queries and keys of a layer in a full pass, in the expanded form."""
    found: list[Any] = []
    mixer: Any = model.blocks[layer].get_submodule("mixer")
    hook = mixer.register_forward_pre_hook(lambda module, inputs: found.extend(module.scores(inputs[0])))
    with torch.no_grad():
        model(tokens_BT)
    hook.remove()
    return found[0]


def test_importance_is_the_product_of_the_largest_magnitudes() -> None:
    model, rows = small_model(**FULL).double(), [random_tokens(1, 20), random_tokens(2, 13)]
    importance = measure(model, rows)
    assert list(importance) == [0, 1]
    for layer in importance:
        scores = [layer_scores(model, layer, row) for row in rows]
        q_HK = torch.stack([found.q_BTHK.abs().amax((0, 1)) for found in scores]).amax(0)
        k_GK = torch.stack([found.k_BTGK.abs().amax((0, 1)) for found in scores]).amax(0)
        expected = torch.stack([(q_HK[2 * g : 2 * g + 2] * k_GK[g]).mean(0) for g in range(2)])
        torch.testing.assert_close(importance[layer].double(), expected, rtol=1e-6, atol=1e-6)


def test_latents_are_calibrated_as_absorbed_queries_meet_them() -> None:
    model, row = small_model(**LATENT).double(), random_tokens(1, 17)
    importance = measure(model, [row])
    project: Any = model.blocks[1].get_submodule("mixer").project
    assert list(importance) == [1] and importance[1].shape == (1, project.C + project.R)
    inputs: list[torch.Tensor] = []
    hook = project.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(row)
        hook.remove()
        q_n, q_r, c, kr = project(inputs[0])
        up_k, _ = project.heads_of_latents()
        q_BTHC = torch.einsum("bthn,hnc->bthc", q_n, up_k[0])
    q_HK = torch.cat((q_BTHC, q_r), dim=-1).abs().amax((0, 1))
    k_K = torch.cat((c[:, :, 0], kr[:, :, 0]), dim=-1).abs().amax((0, 1))
    torch.testing.assert_close(importance[1][0].double(), q_HK.mean(0) * k_K, rtol=1e-6, atol=1e-6)


def test_rows_are_documents_one_after_the_other(tokenizer: Tokenizer, corpus: dict[str, str]) -> None:
    config = corpora.parse(corpus)
    ids = [0]
    for document in corpora["files"](config).documents():
        ids += [*tokenizer.encode(document, add_special_tokens=False).ids, 0]
    rows = torch.cat(list(rows_of(config, tokenizer, 40, 50)), dim=1)
    assert rows[0].tolist() == ids[:2000]


def test_a_calibration_names_what_it_is_of(export: Path, corpus: dict[str, str]) -> None:
    calibrate(export, corpus, rows=2, context=32)
    found = read_calibration(export)
    assert found is not None
    assert found.provenance["corpus"]["path"] == corpus["path"] and found.provenance["tokens"] == 64
    assert found.provenance["code"] and found.provenance["weights"]
    assert found.importance.keys() == {0, 1} and found.importance[0].shape == (2, 16)


def test_the_most_important_channels_are_indexed(export: Path, corpus: dict[str, str]) -> None:
    path = calibrate(export, corpus, rows=2, context=32)
    content = json.loads(path.read_text())
    content["importance"]["0"] = [[1.0 + (c in (3, 5, 8, 14)) for c in range(16)], [float(c) for c in range(16)]]
    path.write_text(json.dumps(content))
    model, tokenizer = load(export)
    fields = {"kind": "double_sparsity", "tokens": 6, "sink": 0, "local": 1, "channels": 4}
    engine = Engine(model, tokenizer, policy=fields)
    cache: Any = model.new_caches(1, 8, engine.policy.cache_for)[0]
    assert cache.selector.index.channels_Gc.tolist() == [[3, 5, 8, 14], [12, 13, 14, 15]]
    assert engine.generate(["key value"], GREEDY).metrics.new_tokens == 6


def test_a_missing_calibration_says_what_writes_it(export: Path) -> None:
    message = r"no calibration of 'full' in layer 0\"; expected calibration\.json .*`workbench calibrate FOLDER CORPUS`"
    with pytest.raises(ConfigError, match=message):
        Engine(*load(export), policy={"kind": "two_level", "channels": 4})


def test_a_model_in_memory_may_name_a_folder(export: Path, corpus: dict[str, str]) -> None:
    calibrate(export, corpus, rows=1, context=32)
    fields = {"kind": "two_level", "channels": 4, "calibration": str(export)}
    Engine(small_model(**FULL), policy=fields)


def test_a_calibration_of_other_weights_is_refused(
    export: Path, corpus: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stale = calibrate(export, corpus, rows=1, context=32).read_bytes()
    other = save(small_model(**FULL), tokenizer, tmp_path / "other")
    (other / "calibration.json").write_bytes(stale)
    with pytest.raises(ConfigError, match=r"a calibration of the weights .* expected one of the weights beside it"):
        read_calibration(other)


def test_a_new_export_drops_the_calibration(export: Path, corpus: dict[str, str], tokenizer: Tokenizer) -> None:
    calibrate(export, corpus, rows=1, context=32)
    save(small_model(**FULL), tokenizer, export)
    assert read_calibration(export) is None


@pytest.mark.parametrize(
    "damage", [{"format": 2}, {"importance": 3}, {"importance": {"0": [["a"]]}}, {"provenance": None}]
)
def test_a_damaged_calibration_is_refused(damage: dict[str, Any], export: Path, corpus: dict[str, str]) -> None:
    path = calibrate(export, corpus, rows=1, context=32)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(ConfigError, match=r"calibration\.json"):
        read_calibration(export)


def test_a_calibration_that_is_not_needed_is_not_read(export: Path) -> None:
    (export / "calibration.json").write_text("damaged")
    Engine(*load(export), policy={"kind": "double_sparsity", "channels": "all"})


def test_every_model_has_the_calibration_of_its_folder(
    export: Path, corpus: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    calibrate(export, corpus, rows=1, context=32)
    other = save(small_model(**FULL), tokenizer, tmp_path / "other")
    policy = policies["double_sparsity"](policies.parse({"kind": "double_sparsity", "channels": 4}))
    Engine(*load(export), policy=policy)
    with pytest.raises(ConfigError, match="no calibration of"):
        Engine(*load(other), policy=policy)


def test_a_calibration_of_other_shapes_is_refused(export: Path, corpus: dict[str, str]) -> None:
    path = calibrate(export, corpus, rows=1, context=32)
    content = json.loads(path.read_text())
    content["importance"]["1"] = [[1.0, 2.0]]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"calibration\.json with \(1, 2\) channels for layer 1'; expected \(2, 16\)"):
        Engine(*load(export), policy={"kind": "double_sparsity", "channels": 4})


def test_more_channels_than_keys_have_are_refused(export: Path) -> None:
    with pytest.raises(
        ConfigError, match="channels: got 32; expected at most the 16 key channels of 'full' in layer 0"
    ):
        Engine(*load(export), policy={"kind": "double_sparsity", "channels": 32})


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"context": 1}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, Any], export: Path, corpus: dict[str, str]) -> None:
    ((name, number),) = sizes.items()
    with pytest.raises(ConfigError, match=f"{name}: got {number}"):
        calibrate(export, corpus, **sizes)


def test_a_corpus_that_is_too_small_is_refused(tokenizer: Tokenizer, corpus: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"rows: got '1000000 of 64 tokens'; expected at most \d+, as many as"):
        list(rows_of(corpora.parse(corpus), tokenizer, 10**6, 64))


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="a layer of full or latent attention without a window"):
        measure(small_model(pattern="sliding gdn"), [random_tokens(1, 9)])
