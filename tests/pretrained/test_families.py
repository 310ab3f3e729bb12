"""Checkpoints of other families against transformers' own models with random weights, and refusals by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import logits, random_tokens, small_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.pretrained import import_model, save
from workbench.pretrained.families import families
from workbench.pretrained.families.llama import Llama
from workbench.testing import relative_error

HEADS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
}
LATENTS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING = ["full_attention", "sliding_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-wide-heads": ("Llama", HEADS),
    "llama-linear": ("Llama", HEADS | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-llama3": ("Llama", HEADS | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("Llama", HEADS | {"rope_parameters": YARN}),
    "llama-yarn-factor": (
        "Llama",
        HEADS | {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "truncate": False}},
    ),
    "qwen3": ("Qwen3", HEADS),
    "qwen3-tied": ("Qwen3", HEADS | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3-sliding": (
        "Qwen3",
        HEADS | {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING},
    ),
    "deepseek-v3-dense": ("DeepseekV3", LATENTS | {"first_k_dense_replace": 2, "q_lora_rank": 20}),
    "deepseek-v3-halves": ("DeepseekV3", LATENTS | {"first_k_dense_replace": 2, "rope_interleave": False}),
    "deepseek-v3-yarn": (
        "DeepseekV3",
        LATENTS | {"first_k_dense_replace": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek-v3-experts": ("DeepseekV3", LATENTS | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 2}),
    "deepseek-v2-experts": ("DeepseekV2", LATENTS | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.0}),
    "deepseek-v2-small-values": ("DeepseekV2", LATENTS | {"first_k_dense_replace": 2, "v_head_dim": 12}),
    "glm4-large-values": ("Glm4MoeLite", LATENTS | {"v_head_dim": 20, "q_lora_rank": 20}),
}


def checkpoint(case: str, folder: Path) -> Any:
    """A random model of transformers, saved in ``folder``."""
    transformers = pytest.importorskip("transformers")
    family, fields = CASES[case]
    config = getattr(transformers, f"{family}Config")(**fields, initializer_range=0.2, max_position_embeddings=64)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:  # gains, and the biases of routers
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("embed_tokens.weight"):
                tensor.normal_(0, 0.02, generator=generator)  # small, so that epsilon matters
            else:
                tensor.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_the_function_of_transformers(case: str, tmp_path: Path) -> None:
    theirs, tokens_BT = checkpoint(case, tmp_path), random_tokens(2, 40)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
    assert relative_error(logits(import_model(tmp_path), tokens_BT), expected) < 2e-5


@pytest.mark.parametrize("case", ["qwen3-sliding", "llama-yarn", "deepseek-v3-experts", "glm4-large-values"])
def test_decoding_with_caches_is_the_full_pass(case: str, tmp_path: Path) -> None:
    checkpoint(case, tmp_path)
    model, tokens_BT = import_model(tmp_path).double(), random_tokens(2, 24)
    caches = model.new_caches(2, 24)
    parts = [model(tokens_BT[:, :13], caches=caches)]
    parts += [model(tokens_BT[:, t : t + 1], caches=caches) for t in range(13, 24)]
    with torch.no_grad():
        decoded = model.logits(torch.cat(parts, dim=1))
    assert relative_error(decoded, logits(model, tokens_BT)) < 1e-10


@pytest.mark.parametrize("case", ["llama-llama3", "qwen3-tied", "deepseek-v3-dense", "glm4-large-values"])
@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "quest", "tokens": 1024},
        {"kind": "two_level", "tokens": 1024, "candidates": 1024, "channels": "all"},
    ],
    ids=["quest", "two_level"],
)
def test_policies_that_keep_every_token_decode_as_dense(case: str, policy: dict[str, Any], tmp_path: Path) -> None:
    checkpoint(case, tmp_path)
    model, greedy = import_model(tmp_path).double(), Sampling(max_tokens=8, temperature=0)
    prompts = random_tokens(1, 20).tolist()
    dense = Engine(model).generate(prompts, greedy).tokens
    assert Engine(model, policy=policy).generate(prompts, greedy).tokens == dense


@pytest.mark.parametrize(
    ("case", "changes", "field"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, r"layer_types\[0\]"),
        ("qwen3", {"use_sliding_window": True}, "sliding_window"),
        ("qwen3", {"layer_types": SLIDING, "sliding_window": 7}, "use_sliding_window"),
        ("llama-llama3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ("llama-llama3", {"rope_parameters": LLAMA3 | {"beta_fast": 3.0}}, "rope_parameters.beta_fast"),
        ("llama-llama3", {"rope_parameters": LLAMA3 | {"new": 3.0}}, "rope_parameters.new"),
        ("llama-llama3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llama-llama3", {"architectures": ["LlamaModel"]}, r"architectures\[0\]"),
        ("deepseek-v3-experts", {"topk_group": 1}, "topk_group"),
        ("deepseek-v3-experts", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek-v3-experts", {"moe_intermediate_size": 12}, "moe_intermediate_size"),
        ("deepseek-v3-experts", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek-v3-dense", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek-v3-dense", {"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ("deepseek-v2-experts", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek-v2-experts", {"model_type": "deepseek_v32"}, "model_type"),
        ("glm4-large-values", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_field(
    case: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    checkpoint(case, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: got"):
        import_model(tmp_path)


def test_layers_of_multi_token_prediction_are_not_read(tmp_path: Path) -> None:
    checkpoint("deepseek-v3-dense", tmp_path)
    edit(tmp_path, num_nextn_predict_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.ones(48, 96)}, tmp_path / "model.safetensors")
    assert import_model(tmp_path).config.depth == 2


@pytest.mark.parametrize("case", ["deepseek-v3-experts", "qwen3"])
def test_weights_that_are_missing_or_unknown_are_named(case: str, tmp_path: Path) -> None:
    checkpoint(case, tmp_path)
    tensors: dict[str, Tensor] = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"(?s)without model.norm.weight;.*unknown model.layers.1.extra;"):
        import_model(tmp_path)


@pytest.mark.parametrize("case", ["llama-linear", "llama-llama3", "llama-yarn-factor", "qwen3", "qwen3-tied"])
def test_an_imported_model_can_be_exported_again(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint(case, tmp_path / "theirs")
    model, tokens_BT = import_model(tmp_path / "theirs"), random_tokens(2, 40)
    folder = save(model, small_tokenizer(), tmp_path / "ours", format=case.split("-")[0])  # type: ignore[arg-type]
    again = import_model(folder)
    assert again.config.canonical() == model.config.canonical()
    assert torch.equal(logits(again, tokens_BT), logits(model, tokens_BT))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert relative_error(theirs(tokens_BT).logits, logits(model, tokens_BT)) < 2e-5


def test_a_family_is_one_class(tmp_path: Path) -> None:
    class Other(Llama):
        class Config(Llama.Config):
            kind: Literal["other"] = "other"  # type: ignore[assignment]

    checkpoint("llama-linear", tmp_path)
    edit(tmp_path, model_type="other")
    families.register(Other)
    try:
        assert import_model(tmp_path).config.mixers["full"]["head_dim"] == 16
    finally:
        families.unregister("other")
