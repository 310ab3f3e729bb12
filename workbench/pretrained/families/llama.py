"""Llama checkpoints (arXiv 2302.13971, 2307.09288, 2407.21783), transformers' ``LlamaForCausalLM``, both ways.

This workbench fuses projections that read the same input: ``qkv`` stacks the rows of q, k and v, ``up`` those of gate
and up. The rest is renamed. Both rotate the pairs (c, c + K/2) of head channels, and query head h reads key–value head
h // (H/G).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from workbench.config import ConfigError, Problem, require
from workbench.model import ModelConfig
from workbench.pretrained.families.base import (
    EPSILON,
    Count,
    Family,
    FamilyConfig,
    Stored,
    families,
    stored_swiglu,
)
from workbench.pretrained.families.rope import RopeParameters


class HeadsFamilyConfig(FamilyConfig):
    """Fields of attention with plain heads."""

    num_key_value_heads: Count | None = None
    """Key–value heads G. Default: H."""
    head_dim: Count | None = None
    """Head channels K. Default: D / H."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        width, heads = self.hidden_size, self.num_attention_heads
        require(
            self.head_dim or width % heads == 0,
            "num_attention_heads",
            got=heads,
            expected=f"a divisor of hidden_size={width}, or head_dim given",
        )
        require(self.channels % 2 == 0, "head_dim", got=self.channels, expected="an even number (rotary pairs)")
        groups = self.num_key_value_heads or heads
        require(heads % groups == 0, "num_key_value_heads", got=groups, expected=f"a divisor of {heads} query heads")

    @property
    def channels(self) -> int:
        """Head channels K."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@families.register
class Llama(Family):
    """Softmax attention with plain heads, and SwiGLU."""

    class Config(HeadsFamilyConfig):
        """The fields of a Llama ``config.json`` that determine what the model computes."""

        kind: Literal["llama"] = "llama"
        architectures: tuple[Literal["LlamaForCausalLM"], ...] | None = ("LlamaForCausalLM",)
        """Class in transformers."""

    default_end: ClassVar[int | None] = 2
    qk_norm = False
    """Whether queries and keys are normalised per head."""

    def mixer(self) -> dict[str, Any]:
        """Settings of full attention."""
        config = self.config
        return {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads or config.num_attention_heads,
            "head_dim": config.channels,
            "qk_norm": self.qk_norm,
            "rotary": True,
            **config.rotary(),
        }

    def model(self) -> ModelConfig:
        return self.settings(
            pattern="full",
            mixers={"full": self.mixer()},
            feedforward="swiglu",
            feedforwards={"swiglu": {"hidden": self.config.intermediate_size}},
        )

    def stored_layer(self, model: ModelConfig, index: int) -> dict[str, Stored]:
        mixer: Any = model.layers[index].mixer
        width, q, kv = model.width, mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        rows = {"q": q, "k": kv, "v": kv}
        return {
            "mixer.qkv.weight": Stored({f"self_attn.{name}_proj.weight": (rows[name], width) for name in rows}),
            "mixer.out.weight": Stored({"self_attn.o_proj.weight": (width, q)}),
            **stored_swiglu(width, self.config.intermediate_size, "feedforward", "mlp"),
        }

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """The family that writes ``model``, with the epsilon of this workbench.

        Raises:
            ConfigError: naming every setting that the family cannot express.
        """
        noun: str = cls.Config.model_fields["kind"].default
        _refuse_other_layers(noun, model, {"mixer": {"kind": "full"}, "feedforward": {"kind": "swiglu"}})
        first: Any = model.layers[0]
        scaling = first.mixer.rotary_scaling
        family = cls(
            cls.Config.parse(
                {
                    "vocab_size": model.vocabulary,
                    "hidden_size": model.width,
                    "num_hidden_layers": model.depth,
                    "intermediate_size": first.feedforward.hidden,
                    "num_attention_heads": first.mixer.heads,
                    "num_key_value_heads": first.mixer.kv_heads,
                    "head_dim": first.mixer.head_dim,
                    "rope_theta": first.mixer.rotary_theta,
                    "rope_scaling": RopeParameters.of_scaling(scaling and scaling.plain()),
                    "rms_norm_eps": EPSILON,
                    "tie_word_embeddings": model.tied,
                }
            )
        )
        # a family can express exactly what reading it back gives, so that settings added later are refused as well
        expressible = family.model()
        layer = expressible.layers[0]
        _refuse_other_layers(noun, model, {"mixer": layer.mixer.plain(), "feedforward": layer.feedforward.plain()})
        settings, expected = model.canonical(), expressible.canonical()
        problems = [
            _inexpressible(noun, name, repr(value), repr(expected.get(name)))
            for name, value in settings.items()
            if name != "layers" and value != expected.get(name)
        ]
        if problems:
            raise ConfigError(problems)
        return family

    def fields(self) -> dict[str, Any]:
        """Fields of a ``config.json``."""
        fields: dict[str, Any] = self.config.model_dump(mode="json", exclude_none=True)
        return {"model_type": fields.pop("kind"), **fields}

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of ours under the family's names, as views. The configuration is of :meth:`of`."""
        written: dict[str, Tensor] = {}
        for name, part in self.stored(self.model()).items():
            assert part.build is torch.cat
            rows = [shape[0] for shape in part.shapes.values()]
            written |= dict(zip(part.shapes, tensors[name].split(rows)))
        return written


def _refuse_other_layers(noun: str, model: ModelConfig, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the settings of every layer's mixer and feed-forward.

    Raises:
        ConfigError: with one problem per setting and value, naming the layers.
    """
    layers: dict[tuple[str, str, str], list[str]] = {}
    for index, layer in enumerate(model.layers):
        for part, settings in expected.items():
            actual = getattr(layer, part).plain()
            for name, value in settings.items():
                if actual[name] != value:
                    layers.setdefault((f"{part}.{name}", repr(actual[name]), repr(value)), []).append(str(index))
    problems = [
        _inexpressible(noun, path, f"{got} in layer {', '.join(indices)}", value)
        for (path, got, value), indices in layers.items()
    ]
    if problems:
        raise ConfigError(problems)


def _inexpressible(noun: str, path: str, got: str, expected: str) -> Problem:
    expected = f"{expected}, in every layer, for a {noun} model"
    return Problem(f"model.{path}", got, expected, 'Use format="workbench", which holds every variant.')
