"""Layers and operators against the modeling code of transformers, with its weights.

Parts of it compute in fp32. Legend: B batch, T time, D model width, H heads, K key channels, R rotary channels.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import outside
from ruamel.yaml import YAML
from torch import Tensor, nn

from workbench.contract import residuals
from workbench.model import LanguageModel, ModelConfig
from workbench.ops.delta_rule import delta_rule
from workbench.testing import FeedForwardConformance, MixerConformance, relative_error

pytestmark = pytest.mark.reference
ROOT = Path(__file__).parents[2]
B, T, D = 2, 23, 64
ALLOWED = 5e-6
"""Relative error of what is computed in fp32 in parts."""


def theirs(model: str) -> Any:
    return outside(f"transformers.models.{model}.modeling_{model}", "transformers")


def config(model: str, name: str, **fields: Any) -> Any:
    module = outside(f"transformers.models.{model}.configuration_{model}", "transformers")
    made = getattr(module, name)(**{"hidden_size": D, **fields})
    made._attn_implementation = made._experts_implementation = "eager"
    return made


def with_random_weights(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    return layer.double().eval()


def ours(name: str, **settings: Any) -> Any:
    suite: Any = type("Suite", (MixerConformance,), {"name": name})()
    return suite.build(settings)


def rotation(channels: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, T, R/2) at the base ``theta``."""
    frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency)[None]
    return angle.cos(), angle.sin()


def twice(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)


def causal_mask(window: int = T) -> Tensor:
    """(1, 1, T, T), added to scores."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return torch.zeros(T, T, dtype=torch.float64).masked_fill((distance < 0) | (distance >= window), -torch.inf)[
        None, None
    ]


def load(module: nn.Module, **tensors: Tensor) -> None:
    """Parameters by name, with "__" for the dot."""
    state = {name.replace("__", "."): tensor.detach() for name, tensor in tensors.items()}
    module.load_state_dict({**module.state_dict(), **{k: v.view_as(module.state_dict()[k]) for k, v in state.items()}})


def stacked(layer: Any) -> Tensor:
    return torch.cat((layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight))


def test_sinks_in_a_window_are_those_of_gpt_oss() -> None:
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}
    settings = config("gpt_oss", "GptOssConfig", num_hidden_layers=1, sliding_window=7, **fields)
    layer, x_BTD = with_random_weights(theirs("gpt_oss").GptOssAttention(settings, 0)), torch.randn(B, T, D).double()
    expected, _ = layer(x_BTD, rotation(16), causal_mask(7))
    module = ours("sliding", heads=4, kv_heads=2, head_dim=16, window=7, sink=True)
    load(module, qkv__weight=stacked(layer), out__weight=layer.o_proj.weight, sink=layer.sinks)
    assert relative_error(module(x_BTD), expected) < 1e-12


def test_the_soft_cap_is_that_of_gemma_2() -> None:
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}
    settings = config(
        "gemma2", "Gemma2Config", num_hidden_layers=1, attn_logit_softcapping=3.0, query_pre_attn_scalar=16, **fields
    )
    layer, x_BTD = with_random_weights(theirs("gemma2").Gemma2Attention(settings, 0)), torch.randn(B, T, D).double()
    expected, _ = layer(x_BTD, tuple(map(twice, rotation(16))), causal_mask())
    module = ours("full", heads=4, kv_heads=2, head_dim=16, softcap=3.0)
    load(module, qkv__weight=stacked(layer), out__weight=layer.o_proj.weight)
    assert relative_error(module(x_BTD), expected) < ALLOWED  # its softmax is in fp32


def test_queries_and_keys_are_normalised_as_in_qwen3() -> None:
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": False}
    settings = config("qwen3", "Qwen3Config", num_hidden_layers=1, rms_norm_eps=1e-6, **fields)
    layer, x_BTD = with_random_weights(theirs("qwen3").Qwen3Attention(settings, 0)), torch.randn(B, T, D).double()
    expected, _ = layer(x_BTD, tuple(map(twice, rotation(16))), causal_mask())
    module = ours("full", heads=4, kv_heads=2, head_dim=16, qk_norm=True)
    load(
        module,
        qkv__weight=stacked(layer),
        out__weight=layer.o_proj.weight,
        q_norm__weight=layer.q_norm.weight,
        k_norm__weight=layer.k_norm.weight,
    )
    assert relative_error(module(x_BTD), expected) < ALLOWED


def test_the_output_gate_is_that_of_qwen3_next() -> None:
    """Which projects a query and a gate for every head, and whose norms add one to their gain."""
    H, K = 4, 16
    fields = {"num_attention_heads": H, "num_key_value_heads": 2, "head_dim": K, "attention_bias": False}
    settings = config("qwen3_next", "Qwen3NextConfig", num_hidden_layers=1, rms_norm_eps=1e-6, **fields)
    layer, x_BTD = with_random_weights(theirs("qwen3_next").Qwen3NextAttention(settings, 0)), torch.randn(B, T, D)
    expected, _ = layer(x_BTD.double(), tuple(map(twice, rotation(K))), causal_mask())
    module = ours("full", heads=H, kv_heads=2, head_dim=K, qk_norm=True, output_gate="channel")
    q, gate = layer.q_proj.weight.view(H, 2, K, D).unbind(1)
    load(
        module,
        qkv__weight=torch.cat((q.flatten(0, 1), layer.k_proj.weight, layer.v_proj.weight)),
        gate__weight=gate.flatten(0, 1),
        out__weight=layer.o_proj.weight,
        q_norm__weight=1 + layer.q_norm.weight,
        k_norm__weight=1 + layer.k_norm.weight,
    )
    assert relative_error(module(x_BTD.double()), expected) < ALLOWED


@pytest.mark.parametrize(("H", "G"), [(4, 4), (8, 4)])
def test_differential_attention_is_that_of_diff_llama(H: int, G: int) -> None:
    """The two softmaxes of which have the first and the second half of the heads, ours have neighbours."""
    K, number = 16, 2
    fields = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": K, "attention_bias": False}
    settings = config("diffllama", "DiffLlamaConfig", num_hidden_layers=1, rms_norm_eps=1e-6, **fields)
    layer, x_BTD = with_random_weights(theirs("diffllama").DiffLlamaAttention(settings, number)), torch.randn(B, T, D)
    expected, _ = layer(x_BTD.double(), tuple(map(twice, rotation(K))), causal_mask())
    module = ours("differential", heads=H, kv_heads=G, head_dim=K, lambda_init=layer.lambda_init)
    pairs_G = torch.arange(G).view(2, -1).T.flatten()

    def paired(weight: Tensor) -> Tensor:  # (heads K, D), of one or several heads for every key
        return weight.view(G, -1, D)[pairs_G].flatten(0, 1)

    load(
        module,
        qkv__weight=torch.cat([paired(part.weight) for part in (layer.q_proj, layer.k_proj, layer.v_proj)]),
        out__weight=layer.o_proj.weight,
        vectors=torch.stack((layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2)),
        head_norm__weight=torch.ones(2 * K),
    )
    assert relative_error(module(x_BTD.double()), expected) < ALLOWED


def test_the_kimi_delta_attention_layer_is_that_of_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """With convolutions, gates of low rank and the gated norm; its convolution takes the latest token last, and its
    output gate has no bias."""
    for name in ("chunk_kimi_delta_attention", "causal_conv1d_fn"):  # not the kernels of flash-linear-attention
        monkeypatch.setattr(theirs("kimi_linear"), name, inspect.unwrap(getattr(theirs("kimi_linear"), name)))
    H, K = 4, 16
    types = {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    settings = config("kimi_linear", "KimiLinearConfig", rms_norm_eps=1e-6, **types)
    settings.linear_num_heads, settings.linear_head_dim, settings.linear_conv_kernel_dim = H, K, 4
    layer, x_BTD = (
        with_random_weights(theirs("kimi_linear").KimiLinearDeltaAttention(settings, 0)),
        torch.randn(B, T, D),
    )
    expected, forget = layer(x_BTD.double()), layer.forget_gate
    module = ours("kda", heads=H, head_dim=K)
    assert list(module.gates.first.sizes) == ["decay", "edit", "output"]
    load(
        module,
        qkv__weight=stacked(layer),
        conv__weight=layer.conv1d.weight[:, 0].flip(-1),
        gates__first__weight=torch.cat((forget.f_a_proj.weight, layer.b_proj.weight, layer.g_a_proj.weight)),
        gates__second__decay__weight=forget.f_b_proj.weight,
        gates__second__output__weight=layer.g_b_proj.weight,
        gates__second__output__bias=torch.zeros(H * K),
        A_log=forget.A_log,
        dt_bias=forget.dt_bias,
        norm__weight=layer.o_norm.weight,
        out__weight=layer.o_proj.weight,
    )
    assert relative_error(module(x_BTD.double()), expected) < ALLOWED


def test_hyper_connections_are_those_of_deepseek_v4() -> None:
    """Which mixes the streams by the transposed matrix, and adds a small number to sums that we leave out."""
    n = 4
    settings = config("deepseek_v4", "DeepseekV4Config", hc_mult=n, hc_sinkhorn_iters=20, hc_eps=0.0, rms_norm_eps=1e-6)
    layer = with_random_weights(theirs("deepseek_v4").DeepseekV4HyperConnection(settings))
    state, y_BTD = torch.randn(B, T, n, D).double(), torch.randn(B, T, D).double()
    write_BTn, mix_BTnn, read_BTD = layer(state)
    expected = mix_BTnn.mT.double() @ state + write_BTn[..., None] * y_BTD[..., None, :]
    module = residuals["hyper_connections"](residuals["hyper_connections"].Config(streams=n, iterations=20), D, 0)
    order_M = torch.cat((torch.arange(2 * n), 2 * n + torch.arange(n * n).view(n, n).T.flatten()))
    module = module.double()
    load(module, weight=layer.fn[order_M], bias=layer.base[order_M], factors=layer.scale)
    read: list[Tensor] = []

    def branch(x_BTD: Tensor) -> Tensor:
        read.append(x_BTD)
        return y_BTD

    assert relative_error(module(state, branch), expected) < ALLOWED
    assert relative_error(read[0], read_BTD) < ALLOWED


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_latent_attention_is_that_of_longcat_flash(form: str) -> None:
    """With its factors on the latents; it rotates neighbouring channels, we rotate channels half a head apart."""
    H, K, R, C, Q = 4, 16, 8, 24, 20
    settings = config(
        "longcat_flash",
        "LongcatFlashConfig",
        num_layers=1,
        num_attention_heads=H,
        q_lora_rank=Q,
        kv_lora_rank=C,
        qk_nope_head_dim=K,
        qk_rope_head_dim=R,
        v_head_dim=K,
    )
    layer = with_random_weights(theirs("longcat_flash").LongcatFlashMLA(settings, 0))
    x_BTD = torch.randn(B, T, D).double()
    expected, _ = layer(x_BTD, tuple(map(twice, rotation(R))), causal_mask())
    sizes = {"heads": H, "head_dim": K, "rotary_dim": R, "latent_dim": C, "query_latent": Q}
    module = ours("mla", form=form, latent_scale=True, **sizes)
    load(module, **latent_attention(layer, H, K, R, C))
    assert relative_error(module(x_BTD), expected) < ALLOWED


def latent_attention(layer: Any, H: int, K: int, R: int, C: int, prefix: str = "") -> dict[str, Tensor]:
    """Weights of LongcatFlashMLA by our names."""
    halves = torch.cat((torch.arange(0, R, 2), torch.arange(1, R, 2)))
    down = layer.kv_a_proj_with_mqa.weight
    q = layer.q_b_proj.weight.view(H, K + R, -1)
    mapped = {
        "project__down__weight": torch.cat((down[:C], down[C:][halves])),
        "project__norm__weight": layer.kv_a_layernorm.weight,
        "project__up__weight": layer.kv_b_proj.weight,
        "project__q_down__weight": layer.q_a_proj.weight,
        "project__q_norm__weight": layer.q_a_layernorm.weight,
        "project__q__weight": torch.cat((q[:, :K], q[:, K:][:, halves]), dim=1),
        "out__weight": layer.o_proj.weight,
    }
    return {prefix + name: tensor for name, tensor in mapped.items()}


def test_a_pair_of_layers_is_the_block_of_longcat_flash() -> None:
    """Wiring of two latent attentions, two dense feed-forwards and the mixture beside them: zero-computation experts,
    a bias on the selection, gates that are not renormalised, the factor on the sum."""
    preset = YAML(typ="safe").load(ROOT / "sweeps/runs/longcat_tiny.yaml")["model"]
    width, mla, moe = preset["width"], preset["mixers"]["mla"], preset["feedforwards"]["moe"]
    H, K, R, C = mla["heads"], mla["head_dim"], mla["rotary_dim"], mla["latent_dim"]
    settings = config(
        "longcat_flash",
        "LongcatFlashConfig",
        hidden_size=width,
        num_layers=1,
        num_attention_heads=H,
        q_lora_rank=mla["query_latent"],
        kv_lora_rank=C,
        qk_nope_head_dim=K,
        qk_rope_head_dim=R,
        v_head_dim=K,
        ffn_hidden_size=preset["feedforwards"]["swiglu"]["hidden"],
        expert_ffn_hidden_size=moe["hidden"],
        n_routed_experts=moe["experts"],
        zero_expert_num=moe["zero_experts"],
        moe_topk=moe["top_k"],
        routed_scaling_factor=moe["gamma"],
        rms_norm_eps=1e-6,
    )
    layer = with_random_weights(theirs("longcat_flash").LongcatFlashDecoderLayer(settings, 0))
    layer.mlp.router.e_score_correction_bias.uniform_(0, 0.2)
    model = LanguageModel(ModelConfig.parse({**preset, "depth": 2, "vocabulary": 50}), seed=0).double().eval()
    mapped = {
        "embedding__weight": torch.randn(50, width),
        "norm__weight": torch.ones(width),
        "shortcuts__0__router__weight": layer.mlp.router.classifier.weight,
        "shortcuts__0__router__bias": layer.mlp.router.e_score_correction_bias,
        "shortcuts__0__up": layer.mlp.experts.gate_up_proj[: moe["experts"]].transpose(1, 2).contiguous(),
        "shortcuts__0__down": layer.mlp.experts.down_proj.transpose(1, 2).contiguous(),
    }
    for i in (0, 1):
        dense, before = layer.mlps[i], f"blocks__{i}__"
        mapped |= latent_attention(layer.self_attn[i], H, K, R, C, f"{before}mixer__")
        mapped[f"{before}mixer_norm__weight"] = layer.input_layernorm[i].weight
        mapped[f"{before}feedforward_norm__weight"] = layer.post_attention_layernorm[i].weight
        mapped[f"{before}feedforward__up__weight"] = torch.cat((dense.gate_proj.weight, dense.up_proj.weight))
        mapped[f"{before}feedforward__down__weight"] = dense.down_proj.weight
    load(model, **mapped)
    tokens_BT = torch.randint(50, (B, T))
    x_BTD = model.embedding(tokens_BT)
    theta = mla["rotary_theta"]
    expected = layer(x_BTD, causal_mask(), position_embeddings=tuple(map(twice, rotation(R, theta))))
    scale = (expected.square().mean(-1, keepdim=True) + model.norm.eps).rsqrt()
    assert relative_error(model(tokens_BT), expected * scale) < ALLOWED


def index_of(indexer: Any) -> dict[str, Tensor]:
    """Weights of an index."""
    return {
        "index__q__weight": indexer.wq_b.weight,
        "index__k__weight": indexer.wk.weight,
        "index__k_norm__weight": indexer.k_norm.weight,
        "index__k_norm__bias": indexer.k_norm.bias,
        "index__weights__weight": indexer.weights_proj.weight,
    }


@pytest.mark.parametrize("top_k", [5, T])
def test_selected_tokens_and_attention_are_those_of_deepseek_v32(top_k: int) -> None:
    """The index with its weights, and its attention function with our heads in the place of latent attention.

    So many index heads that no token gets a product from none of them: of equal scores theirs selects any.
    """
    J, X, R, H, G, K = 24, 12, 8, 4, 2, 16
    settings = config(
        "deepseek_v32",
        "DeepseekV32Config",
        index_n_heads=J,
        index_head_dim=X,
        index_topk=top_k,
        qk_rope_head_dim=R,
        q_lora_rank=D,
    )
    outside_index = with_random_weights(theirs("deepseek_v32").DeepseekV32Indexer(settings, 0))
    module = ours("dsa", top_k=top_k, index_heads=J, index_dim=X, index_rotary_dim=R, kv_heads=G)
    load(module, **index_of(outside_index))
    x_BTD, mask = torch.randn(B, T, D).double(), causal_mask()
    chosen = outside_index(x_BTD, x_BTD, tuple(map(twice, rotation(R))), mask[0], None).long()
    sparse = mask.expand(B, 1, T, T).masked_fill(
        torch.ones(B, T, T, dtype=torch.bool).scatter(-1, chosen, False)[:, None], -torch.inf
    )
    q, k, v = (part.transpose(1, 2) for part in module._project(x_BTD))
    groups = nn.Module()
    groups.num_key_value_groups = H // G  # type: ignore[assignment]
    attend = theirs("deepseek_v32").eager_attention_forward
    o_BTHK, _ = attend(groups, q, k, v, sparse, K**-0.5)
    assert relative_error(module(x_BTD), module.out(o_BTHK.flatten(2))) < ALLOWED


@pytest.mark.parametrize("top_k", [5, T])
def test_attention_to_selected_latents_is_that_of_deepseek_v32(top_k: int) -> None:
    """The whole layer: the index reads the latent of the queries. As many index heads as above."""
    J, X, R, H, K, C, Q = 24, 12, 8, 4, 16, 20, 28
    settings = config(
        "deepseek_v32",
        "DeepseekV32Config",
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=Q,
        kv_lora_rank=C,
        qk_nope_head_dim=K,
        qk_rope_head_dim=R,
        v_head_dim=K,
        index_n_heads=J,
        index_head_dim=X,
        index_topk=top_k,
    )
    layer = with_random_weights(theirs("deepseek_v32").DeepseekV32Attention(settings, 0))
    sizes = {"heads": H, "head_dim": K, "latent_dim": C, "query_latent": Q, "rotary_dim": R}
    module = ours("dsa_latent", top_k=top_k, index_heads=J, index_dim=X, index_rotary_dim=R, **sizes)
    load(module, **latent_attention(layer, H, K, R, C), **index_of(layer.indexer))
    x_BTD, positions = torch.randn(B, T, D).double(), tuple(map(twice, rotation(R)))
    expected, _ = layer(x_BTD, positions, causal_mask().expand(B, 1, T, T))
    assert relative_error(module(x_BTD), expected) < ALLOWED


def test_experts_are_those_of_mixtral() -> None:
    settings = config(
        "mixtral",
        "MixtralConfig",
        intermediate_size=40,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=1,
    )
    layer = with_random_weights(theirs("mixtral").MixtralSparseMoeBlock(settings))
    suite: Any = type("Suite", (FeedForwardConformance,), {"name": "moe"})()
    module, x_BTD = suite.build({"experts": 6, "top_k": 2, "hidden": 40}), torch.randn(B, T, D).double()
    load(
        module,
        router__weight=layer.gate.weight,
        up=layer.experts.gate_up_proj.transpose(1, 2).contiguous(),
        down=layer.experts.down_proj.transpose(1, 2).contiguous(),
    )
    assert relative_error(module(x_BTD), layer(x_BTD)) < ALLOWED


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("tokens", [5, 130])
def test_the_delta_rule_is_that_of_qwen3_next(tokens: int, name: str) -> None:
    H, K, V = 3, 16, 24
    q, k, v = (torch.randn(B, tokens, H, channels) for channels in (K, K, V))
    k, beta, g = nn.functional.normalize(k, dim=-1), torch.rand(B, tokens, H), -torch.rand(B, tokens, H)
    state = torch.randn(B, H, K, V)
    # unwrapped: where flash-linear-attention is installed, its kernels would be called instead; it scales q itself
    function = inspect.unwrap(getattr(theirs("qwen3_next"), name))
    expected = function(query=q * K**0.5, key=k, value=v, g=g, beta=beta, initial_state=state, output_final_state=True)
    for a, b in zip(delta_rule(q, k, v, g, beta_BTH=beta, state_BHKV=state), expected, strict=True):
        assert relative_error(a, b) < ALLOWED
