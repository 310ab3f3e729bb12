"""Checkpoints with attention over latents: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437), GLM-4 Lite.

    q        [content ; rotated] channels of a head, from the input or from a normalised latent
    down     kv_a_proj_with_mqa: the latent, then the rotated key that all heads share
    up       kv_b_proj: of each head its keys, then its values

Where neighbouring channels (2i, 2i + 1) are a rotary pair, the rows of queries and keys are permuted to our pairs (i,
i + R/2); scores do not depend on the order. Our heads have as many content as value channels: the fewer are padded
with zeros, which changes no score and no output. That, and what multiplies scores, is absorbed by the query matrix.

Experts are ours where all groups of experts are candidates. The layers of multi-token prediction are not read.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.model import ModelConfig
from workbench.pretrained.families.base import Count, Family, FamilyConfig, Stored, families, scaled, stored_swiglu

Even = Annotated[int, Field(ge=2, multiple_of=2)]


class LatentFamilyConfig(FamilyConfig):
    """Fields of the families with attention over latents."""

    num_key_value_heads: Count | None = None
    """Keys have as many heads as queries."""
    q_lora_rank: Count | None
    """Channels of the latent of the queries; null where they are computed from the input."""
    kv_lora_rank: Count
    """Channels dc of the latent of keys and values."""
    qk_nope_head_dim: Count
    """Content channels of a head."""
    qk_rope_head_dim: Even
    """Rotated channels dr that all heads share."""
    v_head_dim: Count
    """Value channels of a head."""
    n_routed_experts: Count | None = None
    """Experts E."""
    num_experts_per_tok: Count | None = None
    """Choices K per token."""
    moe_intermediate_size: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Hidden width of one expert, a multiple of 8: grouped products read rows in pieces of 16 bytes."""
    n_shared_experts: Annotated[int, Field(ge=0)] | None = None
    """Experts that every token uses."""
    routed_scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    """Factor γ of the experts' sum."""
    n_group: Count | None = None
    """Groups of experts."""
    topk_group: Count | None = None
    """Groups that a token chooses its experts from; only all of them."""
    moe_layer_freq: Literal[1] = 1
    """Only experts in every layer behind the dense ones."""
    num_nextn_predict_layers: Annotated[int, Field(ge=0)] = 0
    """Layers of multi-token prediction behind the last one, which are not read."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        heads = self.num_attention_heads
        got = self.num_key_value_heads
        require(got in (None, heads), "num_key_value_heads", got=got, expected=f"num_attention_heads={heads}")
        if all(map(self.is_dense, range(self.num_hidden_layers))):
            return
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
            require(getattr(self, name), name, got=None, expected="a number, as there are layers of experts")
        groups = self.n_group or 1
        require(
            (self.topk_group or groups) == groups,
            "topk_group",
            got=self.topk_group,
            expected=f"n_group={groups}: a token of this workbench chooses among all experts",
            do="Checkpoints whose tokens choose groups of experts first cannot be imported.",
        )
        require(self.hidden_size % 8 == 0, "hidden_size", got=self.hidden_size, expected="a multiple of 8 with experts")

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a SwiGLU instead of experts."""
        raise NotImplementedError

    @property
    def interleaved(self) -> bool:
        """Whether neighbouring channels are a rotary pair."""
        return True

    @property
    def renormalises(self) -> bool:
        """Whether the gate values of a token sum to one."""
        return False


class LatentFamily(Family):
    """Attention over latents; SwiGLU or experts."""

    config: Any
    score: ClassVar[Literal["softmax", "sigmoid"]]
    """Scores of the router; sigmoids have a bias on the selection."""

    def model(self) -> ModelConfig:
        config = self.config
        dense = [config.is_dense(i) for i in range(config.num_hidden_layers)]
        mixer = {
            "heads": config.num_attention_heads,
            "head_dim": self.content,
            "latents": 1,
            "latent_dim": config.kv_lora_rank,
            "rotary_dim": config.qk_rope_head_dim,
            "query_latent": config.q_lora_rank,
            "latent_scale": False,
            **config.rotary(),
        }
        feedforwards: dict[str, Any] = {}
        if any(dense):
            feedforwards["swiglu"] = {"hidden": config.intermediate_size}
        if not all(dense):
            biased = self.score == "sigmoid"
            feedforwards["moe"] = {
                "experts": config.n_routed_experts,
                "top_k": config.num_experts_per_tok,
                "hidden": config.moe_intermediate_size,
                "shared": config.n_shared_experts or 0,
                "score": self.score,
                "renormalise": config.renormalises,
                "gamma": config.routed_scaling_factor,
                # training only: balanced by the bias where there is one
                **({"bias": "sign", "balance_weight": 0.0} if biased else {}),
            }
        return self.settings(
            pattern="mla",
            mixers={"mla": mixer},
            feedforward=" ".join("swiglu" if layer else "moe" for layer in dense),
            feedforwards=feedforwards,
        )

    @property
    def content(self) -> int:
        """Content and value channels N of a head of ours."""
        return max(self.config.qk_nope_head_dim, self.config.v_head_dim)

    def unused(self, name: str) -> bool:
        depth = self.config.num_hidden_layers
        extra = range(depth, depth + self.config.num_nextn_predict_layers)
        return super().unused(name) or any(name.startswith(f"model.layers.{i}.") for i in extra)

    def stored_layer(self, model: ModelConfig, index: int) -> dict[str, Stored]:
        config, width = self.config, model.width
        H, C, V = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
        N, R, Q = config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank
        stored = {
            "mixer.project.down.weight": Stored({"self_attn.kv_a_proj_with_mqa.weight": (C + R, width)}, self._down),
            "mixer.project.norm.weight": Stored({"self_attn.kv_a_layernorm.weight": (C,)}),
            "mixer.project.up.weight": Stored({"self_attn.kv_b_proj.weight": (H * (N + V), C)}, self._up),
            "mixer.out.weight": Stored({"self_attn.o_proj.weight": (width, H * V)}, self._out),
        }
        q_shape = (H * (N + R), Q or width)
        if Q is None:
            stored["mixer.project.q.weight"] = Stored({"self_attn.q_proj.weight": q_shape}, self._queries)
        else:
            stored |= {
                "mixer.project.q_down.weight": Stored({"self_attn.q_a_proj.weight": (Q, width)}),
                "mixer.project.q_norm.weight": Stored({"self_attn.q_a_layernorm.weight": (Q,)}),
                "mixer.project.q.weight": Stored({"self_attn.q_b_proj.weight": q_shape}, self._queries),
            }
        if config.is_dense(index):
            return stored | stored_swiglu(width, config.intermediate_size, "feedforward", "mlp")
        return stored | self._experts(width)

    # -- matrices of attention ---------------------------------------------------------------------------------------

    def _pairs(self) -> Tensor:
        """(R,) the stored channel of each rotated channel of ours."""
        channels = torch.arange(self.config.qk_rope_head_dim)
        return torch.cat((channels[::2], channels[1::2])) if self.config.interleaved else channels

    def _down(self, parts: list[Tensor]) -> Tensor:
        latent, rotated = parts[0].split((self.config.kv_lora_rank, self.config.qk_rope_head_dim))
        return torch.cat((latent, rotated[self._pairs()]))

    def _queries(self, parts: list[Tensor]) -> Tensor:
        config, N = self.config, self.content
        sizes = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        content, rotated = parts[0].unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        q = torch.cat((_padded(content, N), rotated[:, self._pairs()]), dim=1).flatten(0, 1)
        # our scores are divided by the root of our channels
        factor = config.rope.score_magnitude**2 * math.sqrt((N + sizes[1]) / sum(sizes))
        return scaled(q, factor)

    def _up(self, parts: list[Tensor]) -> Tensor:
        sizes = (self.config.qk_nope_head_dim, self.config.v_head_dim)
        keys_and_values = parts[0].unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        return torch.cat([_padded(part, self.content) for part in keys_and_values], dim=1).flatten(0, 1)

    def _out(self, parts: list[Tensor]) -> Tensor:
        columns = parts[0].unflatten(1, (-1, self.config.v_head_dim))
        return F.pad(columns, (0, self.content - self.config.v_head_dim)).flatten(1)

    # -- experts -----------------------------------------------------------------------------------------------------

    def _experts(self, width: int) -> dict[str, Stored]:
        config = self.config
        E, hidden = config.n_routed_experts, config.moe_intermediate_size

        def of_experts(names: tuple[str, ...], shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
            return {f"mlp.experts.{e}.{name}_proj.weight": shape for e in range(E) for name in names}

        def transposed(parts: list[Tensor]) -> Tensor:
            """(E, inputs, outputs), the outputs of several matrices side by side."""
            return torch.stack(parts).unflatten(0, (E, -1)).flatten(1, 2).transpose(1, 2).contiguous()

        stored = {
            "feedforward.router.weight": Stored({"mlp.gate.weight": (E, width)}),
            "feedforward.up": Stored(of_experts(("gate", "up"), (hidden, width)), transposed),
            "feedforward.down": Stored(of_experts(("down",), (width, hidden)), transposed),
        }
        if self.score == "sigmoid":
            stored["feedforward.router.bias"] = Stored({"mlp.gate.e_score_correction_bias": (E,)})
        if config.n_shared_experts:
            shared = config.n_shared_experts * hidden
            stored |= stored_swiglu(width, shared, "feedforward.shared", "mlp.shared_experts")
        return stored


@families.register
class DeepSeekV2(LatentFamily):
    """Gate values are softmax probabilities, as transformers computes them: not renormalised."""

    class Config(LatentFamilyConfig):
        """The fields of a DeepSeek-V2 ``config.json`` that determine what the model computes."""

        kind: Literal["deepseek_v2"] = "deepseek_v2"
        architectures: tuple[Literal["DeepseekV2ForCausalLM"], ...] | None = ("DeepseekV2ForCausalLM",)
        """Class in transformers."""
        first_k_dense_replace: Annotated[int, Field(ge=0)]
        """Layers without experts, the first ones."""
        norm_topk_prob: Literal[False] = False
        """Only gate values as they are: published code and transformers disagree about others."""
        scoring_func: Literal["softmax"] = "softmax"
        """Scores of the router."""
        topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
        """How experts are chosen; with groups only where all of them are candidates."""

        def is_dense(self, layer: int) -> bool:
            return layer < self.first_k_dense_replace

    default_end = 2
    score = "softmax"


@families.register
class DeepSeekV3(LatentFamily):
    """Gate values are sigmoids; a bias takes part in the selection."""

    class Config(LatentFamilyConfig):
        """The fields of a DeepSeek-V3 ``config.json`` that determine what the model computes."""

        kind: Literal["deepseek_v3"] = "deepseek_v3"
        architectures: tuple[Literal["DeepseekV3ForCausalLM"], ...] | None = ("DeepseekV3ForCausalLM",)
        """Class in transformers."""
        first_k_dense_replace: Annotated[int, Field(ge=0)]
        """Layers without experts, the first ones."""
        norm_topk_prob: bool = True
        """Whether the gate values of a token sum to one, before γ."""
        scoring_func: Literal["sigmoid"] = "sigmoid"
        """Scores of the router."""
        topk_method: Literal["noaux_tc"] = "noaux_tc"
        """How experts are chosen: by scores and biases."""
        rope_interleave: bool = True
        """Whether neighbouring channels are a rotary pair."""

        def is_dense(self, layer: int) -> bool:
            return layer < self.first_k_dense_replace

        @property
        def interleaved(self) -> bool:
            return self.rope_interleave

        @property
        def renormalises(self) -> bool:
            return self.norm_topk_prob

    default_end = 1
    score = "sigmoid"


@families.register
class Glm4MoeLite(DeepSeekV3):
    """As DeepSeek-V3; which layers have experts is a list."""

    class Config(DeepSeekV3.Config):
        """The fields of a GLM-4 Lite ``config.json`` that determine what the model computes."""

        kind: Literal["glm4_moe_lite"] = "glm4_moe_lite"  # type: ignore[assignment]
        architectures: tuple[Literal["Glm4MoeLiteForCausalLM"], ...] | None = (  # type: ignore[assignment]
            "Glm4MoeLiteForCausalLM",
        )
        """Class in transformers."""
        first_k_dense_replace: Literal[1] = 1
        """Only the value that the default of ``mlp_layer_types`` has."""
        mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
        """Feed-forward of each layer. Default: experts in all but the first."""

        def model_post_init(self, context: Any) -> None:
            types, depth = self.mlp_layer_types, self.num_hidden_layers
            require(
                types is None or len(types) == depth,
                "mlp_layer_types",
                got=types,
                expected=f"one of each of num_hidden_layers={depth}",
            )
            super().model_post_init(context)

        def is_dense(self, layer: int) -> bool:
            return layer == 0 if self.mlp_layer_types is None else self.mlp_layer_types[layer] == "dense"

    default_end = 1


def _padded(rows: Tensor, size: int) -> Tensor:
    """(H, n, inputs) with zeros behind the rows of every head, up to ``size``."""
    return F.pad(rows, (0, 0, 0, size - rows.shape[1]))
