"""Low-rank adapters, LoRA (arXiv 2106.09685): trained weights stay, and a product of two small matrices is learned.

    W' = W + (alpha / rank) B A,     A (rank, in) random, B (out, rank) zero at the start

Every projection of the chosen roles has one. All other parameters are frozen: they have no gradient, no optimiser state
and no weight decay. What is saved is memory; the products of a step are those of full training. Adapters belong to the
model, so that checkpoints, growth, rescaling and accounting know them; an export has W' in place of W.

A and B are an exact rescaling pair, "lora": scaling one and dividing the other leaves B A, channel by channel of the
rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import Config, ConfigError
from workbench.contract import RescalingPair, Role
from workbench.layers import Linear
from workbench.layers.initial_values import INIT_SCALE

A, B = "lora_a", "lora_b"
"""Names of the two matrices in a projection."""


class LoraConfig(Config):
    """Low-rank adapters; everything else is frozen."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of the learned product."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product is multiplied by alpha / rank."""
    roles: Annotated[tuple[Literal["hidden", "latent_down", "latent_up"], ...], Field(min_length=1)] = (
        "hidden",
        "latent_down",
        "latent_up",
    )
    """Roles of the projections that are adapted. Experts, which are no projections, are frozen."""


class AdaptedLinear(Linear):
    """A projection whose weight is W + (alpha / rank) B A wherever it is read; its parameter ``weight`` is W."""

    adapter_factor: float
    """alpha / rank."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W', (out, in), in the precision of the parameters."""
        frozen, a, b = self._parameters["weight"], self._parameters[A], self._parameters[B]
        assert frozen is not None and a is not None and b is not None
        with torch.autocast(frozen.device.type, enabled=False):
            return torch.addmm(frozen, b, a, alpha=self.adapter_factor)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == B:
            parameter.zero_()
        elif name == A:
            parameter.normal_(0.0, INIT_SCALE / math.sqrt(self.in_features), generator=generator)
        else:
            super().init_parameter(name, parameter, generator)

    def adapter_pair(self) -> RescalingPair:
        """The rescaling of A against B, one scale for each channel of the rank."""
        rank = len(self.get_parameter(A))
        scale_r = torch.arange(rank)
        return RescalingPair("lora", {A: scale_r[:, None]}, {B: scale_r[None]}, torch.zeros(rank, dtype=torch.int64))


def adapt(model: nn.Module, config: LoraConfig, roles: Mapping[str, Any]) -> None:
    """Give every projection of the chosen roles an adapter, and freeze everything else.

    Args:
        model: not initialised yet.
        config: rank, factor, roles.
        roles: of its parameters, from :func:`workbench.model.roles.parameter_roles`.

    Raises:
        ConfigError: when the model has no such projection.
    """
    adapted = False
    for path, module in list(model.named_modules()):
        if not isinstance(module, Linear) or roles[f"{path}.weight"].role not in config.roles:
            continue
        weight = module.weight
        module.roles = {
            **module.roles,
            A: replace(module.roles["weight"], role=Role.HIDDEN, writes_residual=False, parts=()),
            B: replace(module.roles["weight"], role=Role.HIDDEN),
        }
        module.register_parameter(A, nn.Parameter(weight.new_empty(config.rank, module.in_features)))
        module.register_parameter(B, nn.Parameter(weight.new_empty(module.out_features, config.rank)))
        module.__class__ = AdaptedLinear
        assert isinstance(module, AdaptedLinear)
        module.adapter_factor = config.alpha / config.rank
        adapted = True
    if not adapted:
        got, expected = ", ".join(config.roles), "roles of a projection of this model"
        raise ConfigError.at("model.lora.roles", got=got, expected=expected)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((f".{A}", f".{B}")))


def merged(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The same function without adapters: every adapted weight is W', rounded once."""
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith((f".{A}", f".{B}"))}
    for name, b in tensors.items():
        if name.endswith(f".{B}"):
            stem = name.removesuffix(B)
            frozen, a = tensors[f"{stem}weight"], tensors[f"{stem}{A}"]
            product = b.double() @ a.double() * (config.alpha / config.rank)
            result[f"{stem}weight"] = (frozen.double() + product).to(frozen.dtype)
    return result


def adapter_factor(name: str, factor: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """What multiplies the adapter of a weight that ``factor`` multiplies, so that W' is multiplied too; empty where the
    weight has none.

    Args:
        name: of the weight.
        factor: (out, 1) or (1, in).
        names: of all parameters.
    """
    stem = name.removesuffix("weight")
    if f"{stem}{B}" not in names or not name.endswith("weight"):
        return {}
    return {f"{stem}{B}" if factor.shape[-1] == 1 else f"{stem}{A}": factor}
