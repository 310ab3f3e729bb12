"""Llama checkpoints in and out: the same function, errors that name the fields in the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, random_tokens, small_model, small_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.pretrained import import_model, load, read, save
from workbench.pretrained.folder import stop_tokens
from workbench.testing import relative_error

LLAMA: dict[str, Any] = {
    "mixers": {"full": {"heads": 4, "kv_heads": 2, "rotary_theta": 5e5}},
    "feedforwards": {"swiglu": {"hidden": 72}},
}
"""Fields of a model that Llama can express."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def llama_checkpoint(folder: Path, *, shards: int = 1, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A random checkpoint in fp64 under Llama's names, written without this workbench. Returns fields and tensors."""
    fields = {
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
    } | changes
    D, inner, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    kv = (fields["num_key_value_heads"] or heads) * (D // heads)
    shapes = {"model.embed_tokens.weight": (fields["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(fields["num_hidden_layers"]):
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
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], D)
    # small embeddings, so that epsilon matters
    tensors = {
        name: torch.rand(shape, dtype=torch.float64) + 0.5
        if len(shape) == 1
        else torch.randn(shape, dtype=torch.float64) * (0.01 if "embed" in name else 0.2)
        for name, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        files = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return fields, tensors


def llama_reference(fields: dict[str, Any], tensors: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """Llama's logits (B, T, V), written from its papers alone. B batch, T time, H, G heads, K channels."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + fields["rms_norm_eps"]).sqrt() * tensors[name]

    def rotate_half(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    (B, T), H = tokens_BT.shape, fields["num_attention_heads"]
    G, K = fields["num_key_value_heads"] or H, fields["hidden_size"] // H
    inverse = 1.0 / fields["rope_theta"] ** (torch.arange(0, K, 2, dtype=torch.float64) / K)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * inverse
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos(), angle.sin()
    x = tensors["model.embed_tokens.weight"][tokens_BT]
    for i in range(fields["num_hidden_layers"]):
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
    head = tensors["model.embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm.weight") @ head.T


# -- checkpoints read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rms_norm_eps": 1e-6, "num_key_value_heads": None},
        {"num_key_value_heads": 1, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 3e4, "head_dim": 8},
    ],
    ids=["gqa", "mha", "mqa", "rope_parameters"],
)
def test_a_checkpoint_keeps_its_function(changes: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    fields, tensors = llama_checkpoint(tmp_path, tie_word_embeddings=tied, shards=3 if tied else 1, **changes)
    if "rope_parameters" in changes:  # the newer spelling alone
        edit_config(tmp_path, lambda config: config.pop("rope_theta"))
    tokens_BT = random_tokens(2, 21)
    expected = llama_reference(fields, tensors, tokens_BT)
    assert relative_error(logits(import_model(tmp_path), tokens_BT), expected) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
def test_the_epsilon_of_the_norms_matters(tied: bool, tmp_path: Path) -> None:
    """Another epsilon changes these logits visibly, so that the test above would fail if it were ignored."""
    fields, tensors = llama_checkpoint(tmp_path, tie_word_embeddings=tied)
    tokens_BT = random_tokens(2, 21)
    ignored = llama_reference({**fields, "rms_norm_eps": 1e-6}, tensors, tokens_BT)
    assert relative_error(ignored, llama_reference(fields, tensors, tokens_BT)) > 1e-3


@pytest.fixture
def narrow(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint in bf16 in ``tmp_path``."""
    fields, tensors = llama_checkpoint(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return fields, tensors


@pytest.mark.parametrize(("value", "expected"), [(None, set()), (2, {2}), ([2, 5], {2, 5})])
def test_ids_that_end_a_text(value: Any, expected: set[int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    assert stop_tokens(tmp_path) == expected


def test_generation_config_adds_ids_that_end_a_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert stop_tokens(tmp_path) == {2, 7}


def test_generation_ends_where_the_checkpoint_says(tmp_path: Path) -> None:
    fields, _ = llama_checkpoint(tmp_path)
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(fields["vocab_size"])}, unk_token="w0"))
    plain.save(str(tmp_path / "tokenizer.json"))
    greedy = Sampling(max_tokens=6, temperature=0)
    first, *_ = Engine(load(tmp_path)[0]).generate([[3, 1]], greedy).tokens[0]
    edit_config(tmp_path, lambda config: config.update(eos_token_id=first))
    assert Engine(load(tmp_path)[0]).generate([[3, 1]], greedy).tokens == [[]]


def test_rotary_positions_that_are_not_scaled_may_say_so(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path, rope_scaling={"rope_type": "default"})
    assert import_model(tmp_path)


def test_a_checkpoint_in_bf16_becomes_fp32(narrow: Any, tmp_path: Path) -> None:
    assert {parameter.dtype for parameter in import_model(tmp_path).parameters()} == {torch.float32}


def test_a_checkpoint_in_bf16_keeps_its_function(narrow: Any, tmp_path: Path) -> None:
    (fields, tensors), tokens_BT = narrow, random_tokens(2, 21)
    expected = llama_reference(fields, {name: t.double() for name, t in tensors.items()}, tokens_BT)
    assert relative_error(logits(import_model(tmp_path), tokens_BT).double(), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        ({"attention_bias": True}, "attention_bias"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope_parameters.low_freq_factor",
        ),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"model_type": "mistral"}, "model_type"),
        ({"vocab_size": None}, "vocab_size"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_a_checkpoint_that_cannot_be_expressed_is_refused_by_field(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    llama_checkpoint(tmp_path)
    edit_config(tmp_path, lambda fields: fields.update(changes))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{field}: got"):
        import_model(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(tmp_path, lambda tensors: tensors.update({bias: tensors.pop("model.norm.weight")}))
    with pytest.raises(ConfigError, match=rf"(?s)without model.norm.weight;.*unknown {bias};"):
        import_model(tmp_path)


def test_a_tied_head_may_be_stored(tmp_path: Path) -> None:
    _, tensors = llama_checkpoint(tmp_path, tie_word_embeddings=True)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    edit_tensors(tmp_path, lambda stored: stored.update(head))
    assert import_model(tmp_path).head is None


def test_a_tied_head_of_another_content_is_refused(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda stored: stored.update({"lm_head.weight": torch.zeros(300, 48)}))
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        import_model(tmp_path)


def test_stored_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda stored: stored.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    assert import_model(tmp_path).config.width == 48


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights"):
        import_model(tmp_path)


def test_shards_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    llama_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(ConfigError, match=r"no file \.\./outside"):
        import_model(tmp_path)


# -- checkpoints written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [import_model, lambda folder: load(folder)[0]], ids=["import_model", "load"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_the_same_model(tied: bool, reader: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, tokens_BT = small_model(**LLAMA, tied=tied), random_tokens(2, 21)
    loaded = reader(save(model, tokenizer, tmp_path / "export", format="llama", shard_bytes=50_000))
    assert loaded.config.canonical() == model.config.canonical()
    assert torch.equal(logits(loaded, tokens_BT), logits(model, tokens_BT))


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_fields_of_llama(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model(**LLAMA, tied=tied)
    folder = save(model, tokenizer, tmp_path / "export", format="llama", provenance={"context": 128})
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128,
        "attention_bias": False,
    }
    fields = json.loads((folder / "config.json").read_text())
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_function_of_llama(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, tokens_BT = small_model(**LLAMA, tied=tied), random_tokens(2, 21)
    folder = save(model, tokenizer, tmp_path / "export", format="llama")
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    expected = llama_reference(json.loads((folder / "config.json").read_text()), tensors, tokens_BT)
    assert relative_error(logits(model.double(), tokens_BT), expected) < 1e-12


def test_an_export_of_the_other_format_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model(**LLAMA)
    folder = save(model, tokenizer, tmp_path / "export", format="llama")
    save(model, tokenizer, folder)
    assert read(folder)[0].canonical() == model.config.canonical()


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_a_model_that_llama_cannot_express_is_refused_by_field(
    changes: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        save(small_model(**changes), tokenizer, tmp_path / "export", format="llama")
    assert not (tmp_path / "export").exists()


# -- transformers as the judge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_from_our_export(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens_BT = small_model(**LLAMA, tied=tied), random_tokens(2, 40)
    folder = save(model, tokenizer, tmp_path / "export", format="llama", shard_bytes=50_000)
    llama, loading = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        assert relative_error(llama(tokens_BT).logits, logits(model, tokens_BT)) < 1e-5


def test_transformers_encodes_the_same_from_our_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save(small_model(**LLAMA), tokenizer, tmp_path / "export", format="llama")
    text = "value of a gate é\n<|document|> written out\n"  # text, as in training
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == load(folder)[1].encode(text).ids


@pytest.mark.parametrize("tied", [True, False])
def test_we_compute_the_same_from_transformers_checkpoint(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
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
    llama, tokens_BT = transformers.LlamaForCausalLM(config).eval(), random_tokens(2, 40)
    llama.save_pretrained(tmp_path / "export", max_shard_size="100KB")
    with torch.no_grad():
        assert relative_error(logits(import_model(tmp_path / "export"), tokens_BT), llama(tokens_BT).logits) < 1e-5


def test_the_default_end_of_text_is_that_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert stop_tokens(tmp_path) == {2}


def test_a_flag_is_no_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": True}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        stop_tokens(tmp_path)
