"""Exported folders: exact weights in and out, atomic writes, errors that name what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import case_models, decoding_models, logits, random_tokens, small_model, small_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from workbench.config import ConfigError
from workbench.contract import feedforwards, mixers
from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.decoding import Engine, Sampling
from workbench.model import ModelConfig
from workbench.pretrained import load, save

pytestmark = pytest.mark.process

MODELS = case_models()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


# -- exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_the_same_model(name: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, tokens_BT = small_model(**MODELS[name], tied=tied), random_tokens(2, 19)
    loaded, _ = load(save(model, tokenizer, tmp_path / "export"))
    assert loaded.config.canonical() == model.config.canonical()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded, tokens_BT), logits(model, tokens_BT))


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_stores_every_tensor_once(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model(tied=tied)
    folder = save(model, tokenizer, tmp_path / "export")
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_a_loaded_tokenizer_begins_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, loaded = load(save(small_model(), tokenizer, tmp_path / "export"))
    text, symbol = "query é\n", tokenizer.token_to_id(DOCUMENT_SYMBOL)
    assert loaded.encode(text).ids == [symbol, *tokenizer.encode(text, add_special_tokens=False).ids]


def test_the_document_symbol_in_a_text_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, loaded = load(save(small_model(), tokenizer, tmp_path / "export"))
    ids = loaded.encode(f"query {DOCUMENT_SYMBOL}").ids
    assert ids.count(tokenizer.token_to_id(DOCUMENT_SYMBOL)) == 1


@pytest.fixture(scope="module")
def exported_model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ModelConfig in the config.json of a hybrid of all variants, as plain data."""
    folder = save(small_model(**MODELS["hybrid"]), tokenizer, tmp_path_factory.mktemp("exports") / "hybrid")
    return json.loads((folder / "config.json").read_text())["workbench"]["model"]


@pytest.mark.parametrize(
    ("registry", "fields"), [(mixers, ("mixers", "at")), (feedforwards, ("feedforwards", "feedforward_at"))]
)
def test_an_export_does_not_depend_on_defaults(
    registry: Any, fields: tuple[str, str], exported_model: dict[str, Any]
) -> None:
    """Every setting of every variant in use is written out, also where the configuration left it to the default."""
    for settings in [*exported_model[fields[0]].values(), *exported_model[fields[1]].values()]:
        assert settings.keys() == registry[settings["kind"]].Config.model_fields.keys()


def test_settings_written_out_are_the_same_model(exported_model: dict[str, Any]) -> None:
    config = small_model(**MODELS["hybrid"]).config
    assert ModelConfig.parse(exported_model).canonical() == config.canonical()


@pytest.mark.parametrize("name", MODELS)
def test_bf16_rounds_every_weight_once(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model(**MODELS[name])
    loaded, _ = load(save(model, tokenizer, tmp_path / "export", dtype="bf16"))
    for parameter, stored in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter.bfloat16(), stored)


@pytest.mark.parametrize("name", decoding_models())
def test_models_in_bf16_generate(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded, _ = load(save(small_model(**MODELS[name]), tokenizer, tmp_path / "export", dtype="bf16"))
    assert len(Engine(loaded).generate([[1, 2, 3]], Sampling(max_tokens=3)).tokens[0]) == 3


# -- shards -----------------------------------------------------------------------------------------------------------

SHARD_BYTES = 100_000


@pytest.fixture
def sharded(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save(small_model(tied=False), tokenizer, tmp_path / "export", shard_bytes=SHARD_BYTES)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_large_models_are_split_into_numbered_shards(sharded: Path) -> None:
    count = len(shards(sharded))
    assert count > 2
    assert [f.name for f in shards(sharded)] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]


def test_shards_are_within_the_limit(sharded: Path) -> None:
    assert max(sum(t.nbytes for t in load_file(f).values()) for f in shards(sharded)) <= SHARD_BYTES


def test_the_index_names_the_shard_of_every_tensor(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f.name for f in shards(sharded) for name in load_file(f)}


def test_the_index_has_the_total_size(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in shards(sharded) for t in load_file(f).values())


def test_shards_are_the_same_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, tokens_BT = small_model(tied=False), random_tokens(1, 9)
    folder = save(model, tokenizer, tmp_path / "export", shard_bytes=SHARD_BYTES)
    assert torch.equal(logits(load(folder)[0], tokens_BT), logits(model, tokens_BT))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards(sharded)[1].unlink()
    with pytest.raises(ConfigError, match="no file model-00002-of"):
        load(sharded)


def test_an_export_replaces_the_shards_of_an_earlier_one(sharded: Path, tokenizer: Tokenizer) -> None:
    save(small_model(), tokenizer, sharded)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in sharded.iterdir()) == files


# -- folders that are not replaced ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("notes.txt", "mine"), ("config.json", '{"model_type": "llama"}')])
def test_only_exports_are_replaced(name: str, content: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="an earlier export"):
        save(small_model(), tokenizer, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_a_file_is_not_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is a file"):
        save(small_model(), tokenizer, tmp_path / "notes.txt")


def test_an_empty_folder_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    assert (save(small_model(), tokenizer, tmp_path / "export") / "config.json").is_file()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to fill the disk."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    return lambda: monkeypatch.setattr("workbench.pretrained.tensors.save_file", fail)


def test_an_export_that_fails_leaves_the_earlier_one(
    full_disk: Callable[[], None], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = small_model()
    folder = save(model, tokenizer, tmp_path / "export")
    full_disk()
    with pytest.raises(OSError, match="no space"):
        save(small_model(), tokenizer, folder)
    assert torch.equal(load(folder)[0].embedding.weight, model.embedding.weight)


def test_an_export_that_fails_leaves_no_other_folder(
    full_disk: Callable[[], None], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    full_disk()
    with pytest.raises(OSError, match="no space"):
        save(small_model(), tokenizer, tmp_path / "export")
    assert not list(tmp_path.iterdir())


# -- folders that cannot be loaded ------------------------------------------------------------------------------------


@pytest.fixture
def export(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save(small_model(), tokenizer, tmp_path / "export")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def test_tensors_that_do_not_fit_are_named_together(export: Path) -> None:
    tensors = load_file(export / "model.safetensors")
    del tensors["norm.weight"]
    tensors |= {"blocks.7.extra": torch.zeros(1), "embedding.weight": torch.zeros(299, 64)}
    save_file(tensors, export / "model.safetensors")
    reasons = r"(?s)without norm.weight;.*unknown blocks.7.extra;.*embedding.weight \(299, 64\), not \(300, 64\)"
    with pytest.raises(ConfigError, match=reasons):
        load(export)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_named(file: str, export: Path) -> None:
    (export / file).write_text("{")
    with pytest.raises(ConfigError, match=file):
        load(export)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(file: str, export: Path) -> None:
    (export / file).unlink()
    with pytest.raises(ConfigError, match=file):
        load(export)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: got 'no such folder'; .*`workbench export`"):
        load(tmp_path / "nowhere")


def misspell(model: dict[str, Any]) -> None:
    model["mixers"] = json.loads(json.dumps(model["mixers"]).replace('"full"', '"fulll"'))
    model["pattern"] = "fulll"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misspell, r"workbench.model.mixers.fulll.kind: got 'fulll'; expected a registered mixer.*'full'"),
        (lambda model: model["mixers"]["full"].update(gate=1), r"workbench.model.mixers.full.gate"),
        (lambda model: model.update(vocabulary=100), r"tokenizer.json|embedding.weight"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_by_field(
    change: Callable[[dict[str, Any]], Any], message: str, export: Path
) -> None:
    edit_config(export, lambda fields: change(fields["workbench"]["model"]))
    with pytest.raises(ConfigError, match=message):
        load(export)


def test_another_model_type_is_refused(export: Path) -> None:
    edit_config(export, lambda fields: fields.update(model_type="gpt2"))
    with pytest.raises(ConfigError, match=r"model_type: got 'gpt2'; expected workbench \(format 1\) or one of .*llama"):
        load(export)


def test_a_later_format_is_refused(export: Path) -> None:
    edit_config(export, lambda fields: fields["workbench"].update(format=99))
    with pytest.raises(ConfigError, match="format 99"):
        load(export)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(export: Path, tokenizer: Tokenizer) -> None:
    larger = Tokenizer.from_str(tokenizer.to_str())
    larger.add_tokens([f"<{i}>" for i in range(300)])
    larger.save(str(export / "tokenizer.json"))
    with pytest.raises(ConfigError, match="expected ids below the model's vocabulary of 300"):
        load(export)


# -- folders of strangers --------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save(small_model(), tokenizer, tmp_path / "export")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(exported: Path, value: float) -> None:
    tensors = load_file(exported / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(ConfigError, match=f"not finite: {name}"):
        load(exported)


def test_a_pipe_is_no_configuration(exported: Path) -> None:
    (exported / "config.json").unlink()
    os.mkfifo(exported / "config.json")
    with pytest.raises(ConfigError, match="no regular file"):
        load(exported)


def test_a_device_is_no_configuration(exported: Path) -> None:
    (exported / "config.json").unlink()
    (exported / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="no regular file"):
        load(exported)


def test_nested_json_is_refused(exported: Path) -> None:
    (exported / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="valid JSON"):
        load(exported)


def test_a_file_of_gigabytes_is_not_read(exported: Path) -> None:
    with open(exported / "config.json", "r+b") as file:
        file.truncate(2**32)
    with pytest.raises(ConfigError, match="at most"):
        load(exported)


def test_an_export_keeps_the_ends_of_text_of_an_imported_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model()
    model.stop_tokens = frozenset((5, 7))
    loaded, _ = load(save(model, tokenizer, tmp_path / "export"))
    assert loaded.stop_tokens == {5, 7, tokenizer.token_to_id(DOCUMENT_SYMBOL)}


def test_a_truncation_inside_a_file_cuts_no_prompt(exported: Path) -> None:
    path = exported / "tokenizer.json"
    limited = Tokenizer.from_file(str(path))
    limited.enable_truncation(3)
    limited.save(str(path))
    model, loaded = load(exported)
    assert len(Engine(model, loaded).encode("query key value head")) > 4
