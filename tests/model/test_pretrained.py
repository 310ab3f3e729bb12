"""Exports, imports and generation: exact weights, Llama's function, errors that name what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields, write_corpus
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import Capabilities, feedforwards, mixers
from workbench.data.preparation import DOCUMENT_SYMBOL
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained import generate, import_llama, load, read, save
from workbench.results import RunFolder
from workbench.testing.conformance import relative_error
from workbench.training.export import export
from workbench.training.trial import train

BASE: dict[str, Any] = {"width": 64, "depth": 2, "vocabulary": 300}
LLAMA: dict[str, Any] = {
    **BASE,
    "mixers": {"full": {"heads": 4, "kv_heads": 2, "rotary_theta": 5e5}},
    "feedforwards": {"swiglu": {"hidden": 72}},
}


def case_models() -> dict[str, dict[str, Any]]:
    """Every registered variant in every case of its conformance suite, and all of them in one model."""
    models = {}
    for pattern, settings, registry in (
        ("pattern", "mixers", mixers),
        ("feedforward", "feedforwards", feedforwards),
    ):
        for name in registry:
            for number, case in enumerate(registry[name].conformance_cases):
                models[f"{name}-{number}"] = {pattern: name, settings: {name: case} if case else {}}
    every = [[name for name in registry if registry[name].capabilities.decode] for registry in (mixers, feedforwards)]
    tiles = dict(zip(("pattern", "feedforward"), map(" ".join, every)))
    depth = math.lcm(*map(len, every))
    models["hybrid"] = {
        **tiles,
        "depth": depth,
        "at": {0: {"kind": "full", "kv_heads": 1}},
        "feedforward_at": {1: "swiglu"},
    }
    models["shortcut"] = {"shortcut": "experts", "feedforwards": {"experts": {"kind": "moe", "top_k": 1}}}
    models["objectives"] = {
        "mtp": {"mixer": "gdn", "start": 0.5},
        "hidden_z": 1e-6,
        "embedding": {"kind": "ngram", "size": 2},
    }
    return models


MODELS = case_models()


def decodes(name: str) -> bool:
    """Whether every variant of the model of this name decodes."""
    return all(cls.capabilities.decode for cls, _ in ModelConfig.parse({**BASE, **MODELS[name]}).variants())


def build(**changes: Any) -> LanguageModel:
    """A model none of whose parameters stands at a round number, gains included."""
    model = LanguageModel(ModelConfig.parse({**BASE, **changes}), seed=int(torch.randint(2**31, ())))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.no_grad()
def scores(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    return model.logits(model(tokens_BT))


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a hybrid, laid out as `workbench run` does: results/cache, results/<ablation>/runs/<run>."""
    results = tmp_path_factory.mktemp("results")
    fields = run_fields(write_corpus(results / "texts"), model={"pattern": "full sliding", "feedforward": "swiglu moe"})
    folder = make_run(results / "ablation" / "runs" / "one", results / "cache", fields)
    assert train(folder.path, results / "cache")["status"] == "done"
    return folder


@pytest.fixture(scope="module")
def tokenizer(run: RunFolder) -> Tokenizer:
    return Tokenizer.from_file(str(run.path.parents[2] / "cache" / run.about()["data"] / "tokenizer.json"))


# -- exports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_an_export_is_the_same_model(name: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(**MODELS[name], tied=tied)
    again, loaded_tokenizer = load(save(model, tokenizer, tmp_path / "export"))
    assert again.config.canonical() == model.config.canonical()
    assert (
        again.state_dict().keys()
        == model.state_dict().keys()
        == load_file(tmp_path / "export/model.safetensors").keys()
    )
    tokens_BT = some_tokens(2, 19)
    assert torch.equal(scores(again, tokens_BT), scores(model, tokens_BT))
    text = f"query {DOCUMENT_SYMBOL} é\n"
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    tokenizer.encode_special_tokens = True  # as preparation does
    wanted = tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded_tokenizer.encode(text).ids == [symbol, *wanted] and symbol not in wanted


def test_an_export_does_not_depend_on_defaults(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every setting of every variant in use is written out, also where the configuration left it to the default."""
    config = build(**MODELS["hybrid"]).config
    save(build(**MODELS["hybrid"]), tokenizer, tmp_path / "export")
    held = json.loads((tmp_path / "export/config.json").read_text())["workbench"]["model"]
    for registry, named, at in ((mixers, "mixers", "at"), (feedforwards, "feedforwards", "feedforward_at")):
        for settings in (*held[named].values(), *held[at].values()):
            assert settings.keys() == registry[settings["kind"]].Config.model_fields.keys()
    assert ModelConfig.parse(held).canonical() == config.canonical()


def test_large_models_are_cut_into_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, limit = build(tied=False), 100_000
    folder = save(model, tokenizer, tmp_path / "export", shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(f).values()) <= limit for f in files)
    assert {n: f.name for f in files for n in load_file(f)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    tokens_BT = some_tokens(1, 9)
    assert torch.equal(scores(load(folder)[0], tokens_BT), scores(model, tokens_BT))
    files[1].unlink()
    with pytest.raises(ConfigError, match=files[1].name):
        load(folder)
    save(model, tokenizer, folder)  # in one file again, and nothing of the shards is left
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_bf16_rounds_every_weight_once(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(**MODELS[name])
    again, _ = load(save(model, tokenizer, tmp_path / "export", dtype="bf16"))
    for parameter, stored in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter.bfloat16(), stored)
    if decodes(name):
        assert isinstance(generate(again, tokenizer, "key", tokens=3), str)


def test_a_run_becomes_a_folder_that_stands_by_itself(run: RunFolder, tmp_path: Path) -> None:
    folder = export(run.path, tmp_path / "exports" / "mine")
    model, tokenizer = load(folder)
    checkpoint = load_file(run.path / "checkpoint/step-20/model.safetensors")
    assert all(torch.equal(t, checkpoint[f"model.{name}"]) for name, t in model.state_dict().items())
    provenance = json.loads((folder / "config.json").read_text())["workbench"]["provenance"]
    assert provenance["run"] == run.about()["identity"] and provenance["code"]
    assert (provenance["step"], provenance["tokens"], provenance["context"]) == (20, 20 * 64, 32)
    assert generate(model, tokenizer, "attention", tokens=8, seed=1) == generate(
        model, tokenizer, "attention", tokens=8, seed=1
    )
    earlier = export(run.path / "checkpoint/step-15", folder)  # takes the place of the first
    assert json.loads((earlier / "config.json").read_text())["workbench"]["provenance"]["tokens"] == 15 * 64
    assert [p.name for p in folder.parent.iterdir()] == ["mine"]


def test_runs_that_cannot_be_exported(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    cache = run.path.parents[2] / "cache"
    with pytest.raises(ConfigError, match=r"no prepared data"):
        export(copy.path, tmp_path / "out", cache=tmp_path)
    (copy.path / "checkpoint/step-20/model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"step-20 is damaged.*checkpoint/step-15"):
        export(copy.path, tmp_path / "out", cache=cache)
    (copy.path / "result.json").unlink()
    copy.set_status("interrupted")
    with pytest.raises(ConfigError, match=r"interrupted.*expected a finished run.*checkpoint/step-15"):
        export(copy.path, tmp_path / "out", cache=cache)
    shutil.rmtree(copy.path / "checkpoint")
    with pytest.raises(ConfigError, match="without a whole checkpoint"):
        export(copy.path, tmp_path / "out", cache=cache)
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_exports_are_replaced_and_only_by_whole_ones(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    for name, content in (("notes.txt", "mine"), ("config.json", '{"model_type": "llama"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content)
        with pytest.raises(ConfigError, match="an earlier export"):
            save(model, tokenizer, tmp_path / name)
        assert (tmp_path / name / name).read_text() == content
    with pytest.raises(ConfigError, match="is a file"):
        save(model, tokenizer, tmp_path / "notes.txt" / "notes.txt")
    (tmp_path / "export").mkdir()
    folder = save(model, tokenizer, tmp_path / "export")  # an empty folder is free

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("workbench.pretrained.tensors.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(build(), tokenizer, folder)
    assert torch.equal(load(folder)[0].embedding.weight, model.embedding.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "export", "notes.txt"]


# -- folders that cannot be loaded -----------------------------------------------------------------------------------


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads((folder / "config.json").read_text())
    change(about)
    (folder / "config.json").write_text(json.dumps(about))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_named_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(build(), tokenizer, tmp_path / "export")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["norm.weight"]
        tensors["blocks.7.extra"] = torch.zeros(1)
        tensors["embedding.weight"] = torch.zeros(299, 64)

    edit_tensors(folder, change)
    with pytest.raises(ConfigError) as raised:
        load(folder)
    for words in ("without norm.weight", "unknown blocks.7.extra", "embedding.weight (299, 64), not (300, 64)"):
        assert words in str(raised.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_and_damaged_files_are_named(file: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(build(), tokenizer, tmp_path / "export")
    (folder / file).write_text("{")
    with pytest.raises(ConfigError, match=file):
        load(folder)
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=file):
        load(folder)


def test_configurations_that_cannot_be_built(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def model_of(about: dict[str, Any]) -> dict[str, Any]:
        return about["workbench"]["model"]

    def forget(about: dict[str, Any]) -> None:
        about["workbench"]["model"] = json.loads(json.dumps(model_of(about)).replace('"full"', '"fulll"'))

    for change, words in (
        (forget, r"workbench.model.mixers.fulll.kind: got 'fulll'; expected a registered mixer.*'full'"),
        (lambda about: model_of(about)["mixers"]["full"].update(gate=1), r"workbench.model.mixers.full.gate"),
        (lambda about: about.update(model_type="gpt2"), r"model_type: got 'gpt2'"),
        (lambda about: about["workbench"].update(format=99), r"format 99"),
        (lambda about: model_of(about).update(vocabulary=100), r"tokenizer.json|embedding.weight"),
    ):
        folder = save(build(), tokenizer, tmp_path / "export")
        edit_config(folder, change)
        with pytest.raises(ConfigError, match=words):
            load(folder)


# -- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", filter(decodes, MODELS))
def test_greedy_text_is_that_of_full_passes(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, loaded_tokenizer = load(save(build(**MODELS[name]), tokenizer, tmp_path / "export"))
    model.double()
    prompt, steps = "the window of a head\n", 24
    ids = loaded_tokenizer.encode(prompt).ids
    tokens_1T = torch.tensor([ids])
    for _ in range(steps):
        tokens_1T = torch.cat((tokens_1T, scores(model, tokens_1T)[:, -1].argmax(-1, keepdim=True)), dim=1)
    new = tokens_1T[0, len(ids) :]
    assert torch.equal(model.generate(torch.tensor([ids]), steps, temperature=0)[0], new)
    ended = new.tolist().index(ids[0]) if ids[0] in new else steps
    text = generate(model, loaded_tokenizer, prompt, tokens=steps, temperature=0)
    assert text == loaded_tokenizer.decode([*ids, *new[:ended].tolist()])[len(prompt) :]


def test_text_ends_with_the_document(tokenizer: Tokenizer) -> None:
    model, symbol = build(tied=False), tokenizer.token_to_id(DOCUMENT_SYMBOL)
    assert model.head is not None
    with torch.no_grad():
        model.norm.weight.zero_()  # every score is 0, and the symbol has the lowest id
    assert symbol == 0 and generate(model, tokenizer, "key", temperature=0) == ""


def test_seeds_and_temperatures(tokenizer: Tokenizer) -> None:
    model = build()
    first, second = (generate(model, tokenizer, "key", seed=seed) for seed in (1, 2))
    assert first != second == generate(model, tokenizer, "key", seed=2)
    cold = generate(model, tokenizer, "key", temperature=1e-6, seed=3)
    assert cold == generate(model, tokenizer, "key", temperature=0)


def test_a_tokenizer_from_elsewhere_begins_in_its_own_way(tokenizer: Tokenizer) -> None:
    model, other = build(), Tokenizer.from_str(tokenizer.to_str().replace(DOCUMENT_SYMBOL, "<s>"))
    other.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    new = model.generate(torch.tensor([other.encode("key").ids]), 12, temperature=0)[0].tolist()
    assert other.encode("key").ids[0] == 0
    assert generate(model, other, "key", tokens=12, temperature=0) == other.decode(new)


def test_what_generate_refuses(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    for settings, path in (
        ({"tokens": 0}, "tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
    ):
        with pytest.raises(ConfigError, match=path):
            generate(model, tokenizer, "key", **settings)
    monkeypatch.setattr(mixers["full"], "capabilities", Capabilities(decode=False))
    with pytest.raises(ConfigError, match="got 'full'; expected components that decode"):
        generate(model, tokenizer, "key")


# -- Llama -----------------------------------------------------------------------------------------------------------


def llama_checkpoint(folder: Path, *, shards: int = 1, **fields: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A random checkpoint in fp64 under Llama's names, written by hand."""
    about = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "use_cache": True,
    } | fields
    D, inner, channels = (
        about["hidden_size"],
        about["intermediate_size"],
        about["hidden_size"] // about["num_attention_heads"],
    )
    kv = (about["num_key_value_heads"] or about["num_attention_heads"]) * channels
    shapes = {"model.embed_tokens.weight": (about["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(about["num_hidden_layers"]):
        layer = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (D, D),
            "self_attn.k_proj": (kv, D),
            "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (inner, D),
            "mlp.up_proj": (inner, D),
            "mlp.down_proj": (D, inner),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not about["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (about["vocab_size"], D)
    # small embeddings, so that epsilon shows
    tensors = {
        name: torch.rand(shape, dtype=torch.float64) + 0.5
        if len(shape) == 1
        else torch.randn(shape, dtype=torch.float64) * (0.01 if "embed" in name else 0.2)
        for name, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        where = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(tensors)}
        for file in set(where.values()):
            save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return about, tensors


def llama_reference(about: dict[str, Any], tensors: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """Llama's logits (B, T, V), written from its papers and nothing of ours. B batch, T time, H, G heads, K channels."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + about["rms_norm_eps"]).sqrt() * tensors[name]

    def rotate_half(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    (B, T), H = tokens_BT.shape, about["num_attention_heads"]
    G, K = about["num_key_value_heads"] or H, about["hidden_size"] // H
    inverse = 1.0 / about["rope_theta"] ** (torch.arange(0, K, 2, dtype=torch.float64) / K)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * inverse
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos(), angle.sin()
    x = tensors["model.embed_tokens.weight"][tokens_BT]
    for i in range(about["num_hidden_layers"]):
        w = {n.removeprefix(f"model.layers.{i}."): t for n, t in tensors.items() if n.startswith(f"model.layers.{i}.")}
        h = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = (
            (h @ w[f"self_attn.{n}_proj.weight"].T).view(B, T, heads, K).transpose(1, 2)
            for n, heads in (("q", H), ("k", G), ("v", G))
        )
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (t[:, :, None].expand(B, G, H // G, T, K).reshape(B, H, T, K) for t in (k, v))
        score = q @ k.transpose(-1, -2) / math.sqrt(K) + torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
        x = x + (score.softmax(-1) @ v).transpose(1, 2).reshape(B, T, H * K) @ w["self_attn.o_proj.weight"].T
        h = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T
    head = tensors["model.embed_tokens.weight" if about["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rms_norm_eps": 1e-6, "num_key_value_heads": None},
        {"num_key_value_heads": 1, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 3e4, "head_dim": 8},
    ],
    ids=["gqa", "mha", "mqa", "rope_parameters"],
)
def test_llama_checkpoints_keep_their_function(fields: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    about, tensors = llama_checkpoint(tmp_path, tie_word_embeddings=tied, shards=3 if tied else 1, **fields)
    if "rope_parameters" in fields:  # the newer spelling alone
        edit_config(tmp_path, lambda there: there.pop("rope_theta"))
    model, tokens_BT = import_llama(tmp_path), some_tokens(2, 21)
    wanted = llama_reference(about, tensors, tokens_BT)
    assert relative_error(scores(model, tokens_BT), wanted) < 1e-12
    ignored = llama_reference({**about, "rms_norm_eps": 1e-6}, tensors, tokens_BT)
    assert about["rms_norm_eps"] == 1e-6 or relative_error(ignored, wanted) > 1e-3  # it would have been seen
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    narrow = import_llama(tmp_path)
    assert narrow.embedding.weight.dtype == torch.float32
    wanted = llama_reference(about, {name: t.bfloat16().double() for name, t in tensors.items()}, tokens_BT)
    assert relative_error(scores(narrow, tokens_BT).double(), wanted) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_llama_round_trip(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(**LLAMA, tied=tied)
    folder = save(
        model, tokenizer, tmp_path / "export", format="llama", shard_bytes=50_000, provenance={"context": 128}
    )
    about = json.loads((folder / "config.json").read_text())
    assert {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128,
        "attention_bias": False,
    }.items() <= about.items()
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokens_BT = some_tokens(2, 21)
    for again in (import_llama(folder), load(folder)[0]):
        assert again.config.canonical() == model.config.canonical()
        assert torch.equal(scores(again, tokens_BT), scores(model, tokens_BT))
    tensors = {n: t.double() for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    wanted = llama_reference(about, tensors, tokens_BT)
    assert relative_error(scores(model.double(), tokens_BT), wanted) < 1e-12
    save(model, tokenizer, folder)  # an export of either format takes the place of the other
    assert read(folder)[0].canonical() == model.config.canonical()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "gdn full"}, r"model.mixer.kind: got 'gdn' in layer 0; expected 'full'"),
        ({"pattern": "sliding"}, r"'sliding' in layer 0, 1"),
        ({"feedforward": "moe"}, r"model.feedforward.kind: got 'moe'"),
        ({"mixers": {"full": {"qk_norm": True}}}, r"model.mixer.qk_norm: got True in layer 0, 1; expected False"),
        ({"mixers": {"full": {"rotary": False}}}, r"model.mixer.rotary: got False"),
        (
            {"at": {1: {"kind": "full", "rotary_theta": 7.0}}},
            r"model.mixer.rotary_theta: got 7.0 in layer 1; expected 10000.0",
        ),
        ({"feedforward_at": {1: {"kind": "swiglu", "hidden": 8}}}, r"model.feedforward.hidden: got 8 in layer 1"),
    ],
)
def test_what_llama_cannot_express(changes: dict[str, Any], words: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        save(build(**changes), tokenizer, tmp_path / "export", format="llama")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters.rope_type"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 16}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"model_type": "mistral"}, "model_type"),
        ({"vocab_size": None}, "vocab_size"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "kv_heads"),
    ],
)
def test_llama_checkpoints_that_we_cannot_express(fields: dict[str, Any], field: str, tmp_path: Path) -> None:
    llama_checkpoint(tmp_path)
    edit_config(tmp_path, lambda about: about.update(fields))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{field}: got"):
        import_llama(tmp_path)


def test_llama_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t.pop("model.norm.weight")}))
    with pytest.raises(
        ConfigError, match=r"(?s)without model.norm.weight;.*unknown model.layers.0.self_attn.q_proj.bias;"
    ):
        import_llama(tmp_path)
    _, tensors = llama_checkpoint(tmp_path, tie_word_embeddings=True)
    head, buffer = (
        {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        {"model.rotary_emb.inv_freq": torch.ones(4)},
    )
    edit_tensors(tmp_path, lambda t: t.update({**head, **buffer}))
    import_llama(tmp_path)  # both are there in some checkpoints, and say nothing new
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(300, 48)}))
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        import_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights"):
        import_llama(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(ConfigError, match=r"no file \.\./outside"):
        import_llama(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_agrees(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens_BT = build(**LLAMA, tied=tied), some_tokens(2, 40)
    folder = save(model, tokenizer, tmp_path / "ours", format="llama", shard_bytes=50_000)
    its, loading = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        assert relative_error(its(tokens_BT).logits, scores(model, tokens_BT)) < 1e-5
    text = "value of a gate é\n"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == load(folder)[1].encode(text).ids
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    its = transformers.LlamaForCausalLM(config).eval()
    its.save_pretrained(tmp_path / "its", max_shard_size="100KB")
    with torch.no_grad():
        assert relative_error(scores(import_llama(tmp_path / "its"), tokens_BT), its(tokens_BT).logits) < 1e-5
