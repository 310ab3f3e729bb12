"""Llama checkpoints (arXiv 2302.13971, 2307.09288) in the layout of transformers' ``LlamaForCausalLM``, both ways.

Ours fuses projections that read the same input: ``qkv`` stacks the rows of q, k and v, ``up`` those of gate and up. The
rest is renamed. Both rotate the pairs (c, c + K/2) of head channels, and query head h reads key–value head h // (H/G).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from workbench.config import Config, ConfigError, Problem
from workbench.layers import RMSNorm
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained.tensors import check_tensors

EPSILON: float = RMSNorm(1).eps  # type: ignore[assignment]
"""Of every norm of ours."""

Count = Annotated[int, Field(ge=1)]


class RopeParameters(Config):
    """Rotary positions as transformers ≥ 5 writes them. Any further field belongs to a scaled kind, and is refused."""

    rope_type: Literal["default"] = "default"
    """Only unscaled positions."""
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    """Base of the frequencies."""


class LlamaConfig(Config):
    """The fields of a Llama ``config.json`` that say what the model computes. Those that do not are ignored."""

    model_config = ConfigDict(extra="ignore")

    architectures: tuple[str, ...] | None = ("LlamaForCausalLM",)
    """Class in transformers."""
    model_type: Literal["llama"] = "llama"
    """Other families differ in details that this reader does not know."""
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
    """Head channels K. Default: D / H; no other is possible, since our heads fill the width."""
    hidden_act: Literal["silu"] = "silu"
    """Our feed-forward is SwiGLU."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of the norms."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary frequencies; ``rope_parameters`` goes before."""
    rope_parameters: RopeParameters | None = None
    """The same as transformers ≥ 5 writes it."""
    rope_scaling: None = None
    """Our rotary positions are not scaled."""
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    """We rotate every channel of a head."""
    attention_bias: Literal[False] = False
    """Our projections have no bias."""
    mlp_bias: Literal[False] = False
    """Our projections have no bias."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding."""
    quantization_config: None = None
    """Only plain floating-point weights are read."""

    def model_post_init(self, _context: Any) -> None:
        if (
            self.hidden_size
            != (self.head_dim or self.hidden_size // self.num_attention_heads) * self.num_attention_heads
        ):
            raise ConfigError.at(
                "head_dim",
                got=self.head_dim,
                expected=f"hidden_size / num_attention_heads = {self.hidden_size} / {self.num_attention_heads}",
                do="Our heads fill the width exactly.",
            )

    def ours(self) -> ModelConfig:
        """The same architecture as a ModelConfig."""
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
    def of(cls, config: ModelConfig) -> LlamaConfig:
        """``config`` as a Llama configuration.

        Raises:
            ConfigError: naming every setting that Llama cannot express.
        """
        _refuse(config, {"mixer": {"kind": "full"}, "feedforward": {"kind": "swiglu"}})
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
        # What Llama can express is what reading it back gives; so a setting that is new tomorrow is refused as well.
        back = llama.ours()
        _refuse(config, {"mixer": back.layers[0].mixer.plain(), "feedforward": back.layers[0].feedforward.plain()})
        mine, its = config.canonical(), back.canonical()
        problems = [
            _inexpressible(name, repr(mine[name]), repr(its.get(name)))
            for name in mine
            if name != "layers" and mine[name] != its.get(name)
        ]
        if problems:
            raise ConfigError(problems)
        return llama


def _refuse(config: ModelConfig, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError where a layer's mixer or feed-forward departs from the wanted settings."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    for index, layer in enumerate(config.layers):
        for part, settings in wanted.items():
            mine = getattr(layer, part).plain()
            for name, value in settings.items():
                if mine[name] != value:
                    layers.setdefault((f"{part}.{name}", repr(mine[name]), repr(value)), []).append(str(index))
    problems = [
        _inexpressible(path, f"{got} in layer {', '.join(indices)}", expected)
        for (path, got, expected), indices in layers.items()
    ]
    if problems:
        raise ConfigError(problems)


def _inexpressible(path: str, got: str, expected: str) -> Problem:
    return Problem(
        f"model.{path}",
        got,
        f"{expected}, in every layer, for a Llama model",
        'Use format="workbench", which holds every variant.',
    )


def _parts(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Our parameter names -> the Llama tensors whose rows it stacks, with how many rows each has."""
    assert config.width and config.vocabulary
    parts = {"embedding.weight": {"model.embed_tokens.weight": config.vocabulary}}
    for index, layer in enumerate(config.layers):
        attention: Any = layer.mixer
        q, kv, hidden = (
            attention.heads * attention.head_dim,
            attention.kv_heads * attention.head_dim,
            layer.feedforward.hidden,  # type: ignore[attr-defined]
        )
        ours, its = f"blocks.{index}", f"model.layers.{index}"
        parts |= {
            f"{ours}.mixer_norm.weight": {f"{its}.input_layernorm.weight": config.width},
            f"{ours}.mixer.qkv.weight": {
                f"{its}.self_attn.q_proj.weight": q,
                f"{its}.self_attn.k_proj.weight": kv,
                f"{its}.self_attn.v_proj.weight": kv,
            },
            f"{ours}.mixer.out.weight": {f"{its}.self_attn.o_proj.weight": config.width},
            f"{ours}.feedforward_norm.weight": {f"{its}.post_attention_layernorm.weight": config.width},
            f"{ours}.feedforward.up.weight": {
                f"{its}.mlp.gate_proj.weight": hidden,
                f"{its}.mlp.up_proj.weight": hidden,
            },
            f"{ours}.feedforward.down.weight": {f"{its}.mlp.down_proj.weight": config.width},
        }
    parts["norm.weight"] = {"model.norm.weight": config.width}
    if not config.tied:
        parts["head.weight"] = {"lm_head.weight": config.vocabulary}
    return parts


def to_llama(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Llama's names, as views. ``config`` is one that :meth:`LlamaConfig.of` accepts."""
    return {
        name: rows
        for ours, parts in _parts(config).items()
        for name, rows in zip(parts, tensors[ours].split(list(parts.values())))
    }


def from_llama(llama: LlamaConfig, tensors: dict[str, Tensor], where: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Llama checkpoint as our configuration and tensors, the latter fp32 (fp64 where they are stored so).

    The model computes the checkpoint's function. Where ``rms_norm_eps`` is not ours, the residual stream is scaled:
    with x' = s x and s² = ε' / ε, x' / sqrt(mean(x'²) + ε') = x / sqrt(mean(x²) + ε), so everything that writes into the
    stream (embedding, o_proj, down_proj) is multiplied by s, and where the head is the embedding, the final gain is
    divided by it. Exact but for rounding; our own device.

    Args:
        tensors: by Llama's names; emptied.
        where: the folder, for messages.

    Raises:
        ConfigError: naming tensors that are missing, too many or of the wrong shape.
    """
    config = llama.ours()
    with torch.device("meta"):
        shapes = {name: tensor.shape[1:] for name, tensor in LanguageModel(config).state_dict().items()}
    parts = _parts(config)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a buffer that old versions stored; it follows from rope_theta
    if config.tied and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise ConfigError.at(
                f"{where}: tie_word_embeddings",
                got=True,
                expected="False, as lm_head.weight is not the embedding",
                do="Correct config.json.",
            )
    wanted = {name: (rows, *shapes[ours]) for ours, its in parts.items() for name, rows in its.items()}
    check_tensors(tensors, wanted, where)
    scale = math.sqrt(EPSILON / llama.rms_norm_eps)
    found = {}
    for ours, its in parts.items():
        stacked = torch.cat([tensors.pop(name) for name in its])
        tensor = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        if ours == "embedding.weight" or ours.endswith((".mixer.out.weight", ".feedforward.down.weight")):
            tensor = _scaled(tensor, scale)
        elif ours == "norm.weight" and config.tied:
            tensor = _scaled(tensor, 1 / scale)
        found[ours] = tensor
    return config, found


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)  # rounded once
