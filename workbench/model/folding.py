"""Multipliers of a parametrisation and low-rank adapters folded into weights, for software that knows neither."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.layers import ScaledScores
from workbench.model.config import ModelConfig
from workbench.model.language_model import LanguageModel
from workbench.model.lora import merged
from workbench.model.roles import parameter_roles


def folded(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same function without multipliers and adapters: a model of the standard parametrisation and its tensors.

    The branch multiplier goes into the matrices that write the residual stream, that of the logits into the gains of
    the final norms, that of the embedding into its rows. Exact but for one rounding of each weight; where a multiplier
    is a power of two, exact.

    Raises:
        ConfigError: naming what cannot be folded.
    """
    adapters = config.lora
    if adapters is not None:
        config, tensors = config.changed(lora=None), merged(tensors, adapters)
    if config.parametrisation.kind == "standard":
        return config, dict(tensors)
    with torch.device("meta"):
        model = LanguageModel(config)
    factors = model.multipliers
    standard = config.changed(parametrisation={"kind": "standard"})
    for path, module in model.named_modules():
        if isinstance(module, ScaledScores) and module.score_multiplier != 1:
            raise _not_foldable(f"attention scores times {module.score_multiplier:g} in {path}")
    if factors.branch != 1:
        without_weights = [variant for _, variant in config.variants() if getattr(variant, "zero_experts", 0)]
        if without_weights:
            raise _not_foldable(f"{without_weights[0].kind} with zero_experts, which have no weights to scale")
    if factors.input != 1 and config.embedding_config.kind != "token":
        raise _not_foldable(f"input_multiplier={factors.input:g} with embedding {config.embedding_config.kind!r}")
    result = dict(tensors)
    scale = dict.fromkeys(result, 1.0)
    for name, role in parameter_roles(model).items():
        if role.writes_residual:
            scale[name] *= factors.branch
    final_gains = [name for name in ("norm.weight", "mtp.norm.weight") if name in result]
    for name in final_gains:
        scale[name] *= factors.logits
    if "embedding.norm.weight" in result:
        scale["embedding.norm.weight"] *= factors.input
    else:
        scale["embedding.weight"] *= factors.input
        for name in final_gains if config.tied else []:
            scale[name] /= factors.input
    for name, factor in scale.items():
        if factor != 1:
            result[name] = (result[name].double() * factor).to(result[name].dtype)
    return standard, result


def _not_foldable(what: str) -> ConfigError:
    return ConfigError.at(
        "model.parametrisation",
        got=what,
        expected="multipliers that can be folded into weights",
        do="Give the base model the same size of a head, or leave the multiplier out; or keep the run's checkpoint.",
    )
