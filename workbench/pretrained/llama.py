"""Llama checkpoints (arXiv 2302.13971, 2307.09288) in the layout of transformers' ``LlamaForCausalLM``, both ways.

This workbench fuses projections that read the same input: ``qkv`` stacks the rows of q, k and v, ``up`` those of gate
and up. The rest is renamed. Both rotate the pairs (c, c + K/2) of head channels, and query head h reads key–value head
h // (H/G).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from workbench.config import Config, ConfigError, Problem, require
from workbench.layers import RMSNorm
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained.tensors import check_tensors

EPSILON: float = RMSNorm(1).eps  # type: ignore[assignment]
"""Epsilon of every norm of this workbench."""

Count = Annotated[int, Field(ge=1)]


class RopeParameters(Config):
    """Rotary positions as transformers ≥ 5 writes them. Further fields belong to scaled kinds and are refused."""

    rope_type: Literal["default"] = "default"
    """Only unscaled positions."""
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    """Base of the frequencies."""


class LlamaConfig(Config):
    """The fields of a Llama ``config.json`` that determine what the model computes. Others are ignored."""

    model_config = ConfigDict(extra="ignore")

    architectures: tuple[str, ...] | None = ("LlamaForCausalLM",)
    """Class in transformers."""
    model_type: Literal["llama"] = "llama"
    """Other families differ in details that this reader does not check."""
    vocab_size: Count
    """Token ids."""
    hidden_size: Count
    """Model width D."""
    intermediate_size: Count
    """Hidden width of the feed-forward."""
    num_hidden_layers: Count
    """Blocks."""
    num_attention_heads: Count
    """Query heads H."""
    num_key_value_heads: Count | None = None
    """Key–value heads G. Default: H."""
    head_dim: Count | None = None
    """Head channels K. Default, and the only possible value: D / H."""
    hidden_act: Literal["silu"] = "silu"
    """Only SwiGLU."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of the norms."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary frequencies; that of ``rope_parameters`` takes precedence."""
    rope_parameters: RopeParameters | None = None
    """Rotary positions as transformers ≥ 5 writes them."""
    rope_scaling: RopeParameters | None = None
    """Only unscaled rotary positions."""
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Only rotation of every channel of a head."""
    attention_bias: Literal[False] = False
    """Only projections without bias."""
    mlp_bias: Literal[False] = False
    """Only projections without bias."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the embedding."""
    quantization_config: None = None
    """Only plain floating-point weights are read."""

    def model_post_init(self, _context: Any) -> None:
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        require(
            self.hidden_size == head_dim * self.num_attention_heads,
            "head_dim",
            got=self.head_dim,
            expected=f"hidden_size / num_attention_heads = {self.hidden_size} / {self.num_attention_heads}",
            do="The heads of this workbench fill the width exactly.",
        )

    def to_model(self) -> ModelConfig:
        """The same architecture as a ModelConfig.

        Raises:
            ConfigError: when this workbench cannot express it.
        """
        rope = self.rope_parameters or RopeParameters()
        heads = self.num_attention_heads
        mixer = {
            "heads": heads,
            "kv_heads": self.num_key_value_heads or heads,
            "head_dim": self.hidden_size // heads,
            "rotary": True,
            "rotary_theta": rope.rope_theta or self.rope_theta,
            "qk_norm": False,
        }
        return ModelConfig.parse(
            {
                "width": self.hidden_size,
                "depth": self.num_hidden_layers,
                "vocabulary": self.vocab_size,
                "tied": self.tie_word_embeddings,
                "pattern": "full",
                "mixers": {"full": mixer},
                "feedforward": "swiglu",
                "feedforwards": {"swiglu": {"hidden": self.intermediate_size}},
            }
        )

    @classmethod
    def from_model(cls, config: ModelConfig) -> LlamaConfig:
        """``config`` as a Llama configuration.

        Raises:
            ConfigError: naming every setting that Llama cannot express.
        """
        _refuse_other_layers(config, {"mixer": {"kind": "full"}, "feedforward": {"kind": "swiglu"}})
        first: Any = config.layers[0]
        llama = cls.parse(
            {
                "vocab_size": config.vocabulary,
                "hidden_size": config.width,
                "num_hidden_layers": config.depth,
                "intermediate_size": first.feedforward.hidden,
                "num_attention_heads": first.mixer.heads,
                "num_key_value_heads": first.mixer.kv_heads,
                "head_dim": first.mixer.head_dim,
                "rope_theta": first.mixer.rotary_theta,
                "rms_norm_eps": EPSILON,
                "tie_word_embeddings": config.tied,
            }
        )
        # Llama can express exactly what reading it back gives, so that settings added later are refused as well
        expressible = llama.to_model()
        layer = expressible.layers[0]
        _refuse_other_layers(config, {"mixer": layer.mixer.plain(), "feedforward": layer.feedforward.plain()})
        settings, expected = config.canonical(), expressible.canonical()
        problems = [
            _inexpressible(name, repr(value), repr(expected.get(name)))
            for name, value in settings.items()
            if name != "layers" and value != expected.get(name)
        ]
        if problems:
            raise ConfigError(problems)
        return llama


def _refuse_other_layers(config: ModelConfig, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the settings of every layer's mixer and feed-forward.

    Raises:
        ConfigError: with one problem per setting and value, naming the layers.
    """
    layers: dict[tuple[str, str, str], list[str]] = {}
    for index, layer in enumerate(config.layers):
        for part, settings in expected.items():
            actual = getattr(layer, part).plain()
            for name, value in settings.items():
                if actual[name] != value:
                    layers.setdefault((f"{part}.{name}", repr(actual[name]), repr(value)), []).append(str(index))
    problems = [
        _inexpressible(path, f"{got} in layer {', '.join(indices)}", value)
        for (path, got, value), indices in layers.items()
    ]
    if problems:
        raise ConfigError(problems)


def _inexpressible(path: str, got: str, expected: str) -> Problem:
    expected = f"{expected}, in every layer, for a Llama model"
    return Problem(f"model.{path}", got, expected, 'Use format="workbench", which holds every variant.')


def _stacked_rows(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Name of every parameter -> names of the Llama tensors whose rows it stacks, with the rows of each."""
    assert config.width and config.vocabulary
    stacked = {"embedding.weight": {"model.embed_tokens.weight": config.vocabulary}}
    for index, layer in enumerate(config.layers):
        attention: Any = layer.mixer
        feedforward: Any = layer.feedforward
        q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        block, llama = f"blocks.{index}", f"model.layers.{index}"
        stacked |= {
            f"{block}.mixer_norm.weight": {f"{llama}.input_layernorm.weight": config.width},
            f"{block}.mixer.qkv.weight": {
                f"{llama}.self_attn.q_proj.weight": q,
                f"{llama}.self_attn.k_proj.weight": kv,
                f"{llama}.self_attn.v_proj.weight": kv,
            },
            f"{block}.mixer.out.weight": {f"{llama}.self_attn.o_proj.weight": config.width},
            f"{block}.feedforward_norm.weight": {f"{llama}.post_attention_layernorm.weight": config.width},
            f"{block}.feedforward.up.weight": {
                f"{llama}.mlp.gate_proj.weight": feedforward.hidden,
                f"{llama}.mlp.up_proj.weight": feedforward.hidden,
            },
            f"{block}.feedforward.down.weight": {f"{llama}.mlp.down_proj.weight": config.width},
        }
    stacked["norm.weight"] = {"model.norm.weight": config.width}
    if not config.tied:
        stacked["head.weight"] = {"lm_head.weight": config.vocabulary}
    return stacked


def to_llama(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under Llama's names, as views. ``config`` is one that :meth:`LlamaConfig.from_model` accepts."""
    return {
        llama_name: rows
        for name, parts in _stacked_rows(config).items()
        for llama_name, rows in zip(parts, tensors[name].split(list(parts.values())))
    }


def from_llama(llama: LlamaConfig, tensors: dict[str, Tensor], source: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Llama checkpoint as a ModelConfig and its tensors, the latter fp32 (fp64 where they are stored so).

    The model computes the checkpoint's function. Another ``rms_norm_eps`` ε than our ε' is absorbed by scaling the
    residual stream: with x' = s x and s² = ε' / ε, x' / sqrt(mean(x'²) + ε') = x / sqrt(mean(x²) + ε). So everything
    that writes into the stream (embedding, o_proj, down_proj) is multiplied by s, and where the head is the embedding,
    the final gain is divided by it. Exact but for rounding; our choice.

    Args:
        tensors: by Llama's names; emptied, so that no weight is in memory twice.
        source: the folder, for messages.

    Raises:
        ConfigError: naming tensors that are missing, unknown or of another shape.
    """
    config = llama.to_model()
    with torch.device("meta"):
        row_shapes = {name: tensor.shape[1:] for name, tensor in LanguageModel(config).state_dict().items()}
    stacked = _stacked_rows(config)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a buffer that old versions stored; it follows from rope_theta
    if config.tied and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        require(
            embedding is None or torch.equal(head, embedding),
            f"{source}: tie_word_embeddings",
            got=True,
            expected="False, as lm_head.weight is not the embedding",
            do="Correct config.json.",
        )
    shapes = {
        llama_name: (rows, *row_shapes[name]) for name, parts in stacked.items() for llama_name, rows in parts.items()
    }
    check_tensors(tensors, shapes, source)
    scale = math.sqrt(EPSILON / llama.rms_norm_eps)
    weights = {}
    for name, parts in stacked.items():
        rows = torch.cat([tensors.pop(llama_name) for llama_name in parts])
        weight = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if name == "embedding.weight" or name.endswith((".mixer.out.weight", ".feedforward.down.weight")):
            weight = _scaled(weight, scale)
        elif name == "norm.weight" and config.tied:
            weight = _scaled(weight, 1 / scale)
        weights[name] = weight
    return config, weights


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)  # rounded once
