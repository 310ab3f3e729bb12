"""What families share: common fields, reading a checkpoint by them, and the epsilon of the norms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from workbench.config import Config, require
from workbench.layers import RMSNorm
from workbench.model import LanguageModel, ModelConfig
from workbench.model.roles import parameter_roles
from workbench.pretrained.families.rope import RopeParameters
from workbench.pretrained.tensors import check_tensors
from workbench.registry import Registry

EPSILON: float = RMSNorm(1).eps  # type: ignore[assignment]
"""Epsilon of every norm of this workbench."""

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Stored:
    """Of which tensors of a checkpoint a parameter of ours is made."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor by its name."""
    build: Callable[[list[Tensor]], Tensor] = torch.cat
    """The parameter from these tensors, in order, but for a reshape. Default: their rows, stacked."""


class FamilyConfig(Config):
    """The fields of a ``config.json`` that determine what the model computes. Others are ignored."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    """Registered name, the ``model_type``."""
    vocab_size: Count
    """Token ids."""
    hidden_size: Annotated[int, Field(ge=8)]
    """Model width D."""
    intermediate_size: Count
    """Hidden width of the feed-forward."""
    num_hidden_layers: Count
    """Blocks."""
    num_attention_heads: Count
    """Query heads H."""
    hidden_act: Literal["silu"] = "silu"
    """Only SwiGLU."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of the norms of the residual stream."""
    max_position_embeddings: Count | None = None
    """Context; it determines the function only as the context before a scaling that does not state its own."""
    original_max_position_embeddings: None = None
    """Only as a field of ``rope_parameters`` or ``rope_scaling``."""
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    """Base of the rotary frequencies; that of ``rope_parameters`` takes precedence. Default: 10,000."""
    rope_parameters: RopeParameters | None = None
    """Rotary positions as transformers ≥ 5 writes them."""
    rope_scaling: RopeParameters | None = None
    """Scaling of rotary positions as transformers < 5 writes it."""
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    """Only rotation of every rotary channel."""
    attention_bias: Literal[False] = False
    """Only projections without bias."""
    mlp_bias: Literal[False] = False
    """Only projections without bias."""
    tie_word_embeddings: bool = False
    """Whether the output head shares the embedding."""
    quantization_config: None = None
    """Only plain floating-point weights are read."""

    def model_post_init(self, _context: Any) -> None:
        require(
            None in (self.rope_scaling, self.rope_parameters) or self.rope_scaling == self.rope_parameters,
            "rope_scaling",
            got=self.rope_scaling and self.rope_scaling.model_dump(exclude_none=True),
            expected="nothing beside rope_parameters, or the same",
            do="Remove the one that does not belong to the weights.",
        )
        field = "rope_scaling" if self.rope_scaling else "rope_parameters"
        scaled = self.rope.kind in ("llama3", "yarn") and not self.rope.original_max_position_embeddings
        require(
            not scaled or self.max_position_embeddings,
            f"{field}.original_max_position_embeddings",
            got="nothing",
            expected=f"the context before scaling, here or as max_position_embeddings, for {self.rope.kind}",
        )

    @property
    def rope(self) -> RopeParameters:
        """Rotary positions in either spelling."""
        return self.rope_scaling or self.rope_parameters or RopeParameters()

    def rotary(self) -> dict[str, Any]:
        """Settings of rotary positions."""
        return {
            "rotary_theta": self.rope.rope_theta or self.rope_theta or 10_000.0,
            "rotary_scaling": self.rope.scaling(self.max_position_embeddings),
        }


class Family(ABC):
    """One family of checkpoints.

    Args:
        config: of a checkpoint.
    """

    Config: ClassVar[type[FamilyConfig]]
    default_end: ClassVar[int | None] = None
    """``eos_token_id`` of transformers' configuration where config.json names none."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def model(self) -> ModelConfig:
        """The same architecture.

        Raises:
            ConfigError: naming the fields that this workbench cannot express.
        """

    @abstractmethod
    def stored_layer(self, model: ModelConfig, index: int) -> dict[str, Stored]:
        """Parameters of a block by their name in the block, without its two norms; tensors by their name in the
        layer."""

    def unused(self, name: str) -> bool:
        """Whether a tensor has no part in the function."""
        return name.endswith("rotary_emb.inv_freq")  # stored by old versions; it follows from rope_theta

    def settings(self, **settings: Any) -> ModelConfig:
        """A ModelConfig of the common fields and ``settings``."""
        config = self.config
        return ModelConfig.parse(
            {
                "width": config.hidden_size,
                "depth": config.num_hidden_layers,
                "vocabulary": config.vocab_size,
                "tied": config.tie_word_embeddings,
                **settings,
            }
        )

    def stored(self, model: ModelConfig) -> dict[str, Stored]:
        """Name of every parameter -> the tensors that it is made of."""
        width, vocabulary = model.width, model.vocabulary
        stored = {"embedding.weight": Stored({"model.embed_tokens.weight": (vocabulary, width)})}
        for index in range(model.depth):
            block, layer = f"blocks.{index}.", f"model.layers.{index}."
            parameters = {
                "mixer_norm.weight": Stored({"input_layernorm.weight": (width,)}),
                "feedforward_norm.weight": Stored({"post_attention_layernorm.weight": (width,)}),
                **self.stored_layer(model, index),
            }
            for name, part in parameters.items():
                shapes = {layer + tensor: shape for tensor, shape in part.shapes.items()}
                stored[block + name] = Stored(shapes, part.build)
        stored["norm.weight"] = Stored({"model.norm.weight": (width,)})
        if not model.tied:
            stored["head.weight"] = Stored({"lm_head.weight": (vocabulary, width)})
        return stored


families: Registry[type[Family]] = Registry("checkpoint family", "workbench.pretrained.families")


def stored_swiglu(width: int, hidden: int, ours: str, theirs: str) -> dict[str, Stored]:
    """A SwiGLU by the names of its module."""
    gate_and_up = {f"{theirs}.gate_proj.weight": (hidden, width), f"{theirs}.up_proj.weight": (hidden, width)}
    return {
        f"{ours}.up.weight": Stored(gate_and_up),
        f"{ours}.down.weight": Stored({f"{theirs}.down_proj.weight": (width, hidden)}),
    }


def read_checkpoint(family: Family, tensors: dict[str, Tensor], source: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A checkpoint as a ModelConfig and its tensors, the latter fp32 (fp64 where they are stored so).

    The model computes the checkpoint's function. Another ``rms_norm_eps`` ε than our ε' is absorbed by scaling the
    residual stream: with x' = s x and s² = ε' / ε, x' / sqrt(mean(x'²) + ε') = x / sqrt(mean(x²) + ε). So everything
    that writes into the stream is multiplied by s, and where the head is the embedding, the final gain is divided by
    it. Exact but for rounding; our choice.

    Args:
        tensors: by the family's names; emptied, so that no weight is in memory twice.
        source: the folder, for messages.

    Raises:
        ConfigError: naming tensors that are missing, unknown or of another shape.
    """
    config = family.model()
    stored = family.stored(config)
    for name in [name for name in tensors if family.unused(name)]:
        del tensors[name]
    if config.tied and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        require(
            embedding is None or torch.equal(head, embedding),
            f"{source}: tie_word_embeddings",
            got=True,
            expected="False, as lm_head.weight is not the embedding",
            do="Correct config.json.",
        )
    check_tensors(tensors, {name: shape for part in stored.values() for name, shape in part.shapes.items()}, source)
    with torch.device("meta"):
        model = LanguageModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    scale = math.sqrt(EPSILON / family.config.rms_norm_eps)
    factors = {name: scale for name, role in parameter_roles(model).items() if role.writes_residual}
    factors |= {"embedding.weight": scale, "norm.weight": 1 / scale if config.tied else 1.0}
    weights = {}
    for name, part in stored.items():
        parts = [tensors.pop(tensor) for tensor in part.shapes]
        weight = part.build([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in parts])
        weights[name] = scaled(weight.reshape(shapes[name]), factors.get(name, 1.0))
    return config, weights


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The product, rounded once."""
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)
