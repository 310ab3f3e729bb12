"""Qwen3 checkpoints (arXiv 2505.09388), dense, transformers' ``Qwen3ForCausalLM``, both ways.

Llama with queries and keys normalised per head before the rotation, and head channels that need not fill the width.
Layers with a sliding window become ``sliding``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.config import require
from workbench.model import ModelConfig
from workbench.pretrained.families.base import EPSILON, Count, Stored, families, scaled
from workbench.pretrained.families.llama import HeadsFamilyConfig, Llama


@families.register
class Qwen3(Llama):
    """Softmax attention with normalised queries and keys, and SwiGLU."""

    class Config(HeadsFamilyConfig):
        """The fields of a Qwen3 ``config.json`` that determine what the model computes."""

        kind: Literal["qwen3"] = "qwen3"
        architectures: tuple[Literal["Qwen3ForCausalLM"], ...] | None = ("Qwen3ForCausalLM",)
        """Class in transformers."""
        head_dim: Count = 128
        """Head channels K."""
        use_sliding_window: bool = False
        """Whether ``sliding_window`` applies."""
        sliding_window: Count | None = None
        """Keys w that a query of a sliding layer sees, its own included."""
        max_window_layers: int = 28
        """First sliding layer, where ``layer_types`` is not given."""
        layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
        """Kind of each layer's attention. Default: from ``max_window_layers``."""

        def model_post_init(self, context: Any) -> None:
            super().model_post_init(context)
            depth = self.num_hidden_layers
            require(
                self.layer_types is None or len(self.layer_types) == depth,
                "layer_types",
                got=self.layer_types,
                expected=f"one of each of num_hidden_layers={depth}",
            )
            sliding = "sliding_attention" in (self.layer_types or ())
            require(
                not (sliding or self.use_sliding_window) or self.sliding_window,
                "sliding_window",
                got=None,
                expected="a number of tokens, as layers have a window",
            )
            require(
                self.use_sliding_window or not sliding,
                "use_sliding_window",
                got=False,
                expected="true, as layer_types has sliding layers",
            )

        def is_sliding(self, layer: int) -> bool:
            """Whether a layer has a window."""
            if self.layer_types is not None:
                return self.layer_types[layer] == "sliding_attention"
            return self.use_sliding_window and layer >= self.max_window_layers

    default_end = None
    qk_norm = True

    def model(self) -> ModelConfig:
        config = self.config
        names = ["sliding" if config.is_sliding(i) else "full" for i in range(config.num_hidden_layers)]
        used = set(names)
        settings = {"full": self.mixer(), "sliding": {**self.mixer(), "window": config.sliding_window}}
        return self.settings(
            pattern=" ".join(names) if len(used) > 1 else names[0],
            mixers={name: settings[name] for name in used},
            feedforward="swiglu",
            feedforwards={"swiglu": {"hidden": config.intermediate_size}},
        )

    def stored_layer(self, model: ModelConfig, index: int) -> dict[str, Stored]:
        stored = super().stored_layer(model, index)
        channels = self.config.channels
        for name in ("q_norm", "k_norm"):
            stored[f"mixer.{name}.weight"] = Stored({f"self_attn.{name}.weight": (channels,)})
        factor = math.sqrt(EPSILON / self.config.rms_norm_eps)
        if factor != 1:  # as a norm undoes the scale of its input, one of our epsilon sees the other

            def build(parts: list[Tensor]) -> Tensor:
                q, k, v = parts
                return torch.cat((scaled(q, factor), scaled(k, factor), v))

            qkv = stored["mixer.qkv.weight"]
            stored["mixer.qkv.weight"] = Stored(qkv.shapes, build)
        return stored
