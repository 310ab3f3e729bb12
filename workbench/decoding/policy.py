"""The contract of a decoding policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import torch

from workbench.config import Config, ConfigError, Problem, require
from workbench.contract import Cache, Mixer
from workbench.model import LanguageModel
from workbench.registry import Registry

CacheType: TypeAlias = Literal["model", "bf16", "int8", "fp8"]
"""Name of the type of what is cached."""
CACHE_TYPES: dict[CacheType, torch.dtype | None] = {
    "model": None,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""Name -> the type; None for that of the model."""


class PolicyConfig(Config):
    """Base of a policy's configuration. ``kind`` is the registered name."""

    kind: str


class Policy:
    """Decides what the cache of every layer is, and thereby what a decoding step reads. Built as ``cls(config)``.

    A cache owns the read: mixers of softmax and latent attention compute queries and new rows and call
    ``cache.attend(…)``. A policy therefore returns a subclass of
    :class:`~workbench.mixers.families.softmax.KeyValueCache` or
    :class:`~workbench.mixers.families.latent.LatentCache` whose ``attend`` reads less, or reads from elsewhere. Mixers
    that read their cache themselves (nsa, moba, asa_global, the delta-rule family) keep it under every policy. Those
    with a learned index (dsa, lsa, or these on latents) call ``cache.select(…)``: a policy may decide which tokens are
    scored.

    :class:`workbench.decoding.selective.SelectivePolicy` does so for policies that choose tokens by position, block or
    score. A policy is one file with one decorated class; nothing else lists its name.
    """

    Config: ClassVar[type[PolicyConfig]]
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Settings with which :class:`workbench.testing.PolicyConformance` builds the policy: small budgets."""
    everything: ClassVar[dict[str, Any]] = {}
    """Settings with which a step reads all tokens of a small cache, and so computes what ``dense`` computes."""

    def __init__(self, config: Any):
        self.config = config

    def obstacle(self, mixer: Mixer) -> str | None:
        """Why this policy cannot decode with ``mixer``, for the error message; None where it can. Default: None."""
        return None

    def graph_obstacle(self) -> str | None:
        """Why a step with this policy cannot be captured in a CUDA graph; None where it can. Default: None."""
        return None

    def cache_for(
        self, layer: int, mixer: Mixer, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> Cache:
        """An empty cache for ``mixer``, the one of layer number ``layer``, for ``batch`` sequences of at most
        ``length`` tokens. Default: the mixer's."""
        return mixer.new_cache(batch, length, device, dtype)

    def prepare(self, model: LanguageModel) -> None:
        """Check the model, and read what the policy needs beside it, before any cache is made.

        Raises:
            ConfigError: as :meth:`check`, or when something is missing.
        """
        self.check(model)

    def check(self, model: LanguageModel) -> None:
        """Refuse a model with layers that this policy cannot decode.

        Raises:
            ConfigError: with one problem per kind of mixer and obstacle, naming the layers.
        """
        self.refuse(model, lambda layer, mixer: self.obstacle(mixer))

    def refuse(self, model: LanguageModel, obstacle: Callable[[int, Mixer], str | None]) -> None:
        """Refuse a model for its obstacles, if it has any.

        Args:
            obstacle: from a layer's number and mixer; None where there is none.

        Raises:
            ConfigError: with one problem per kind of mixer and obstacle, naming the layers.
        """
        layers: dict[tuple[str, str], list[str]] = {}
        for index, (layer, block) in enumerate(zip(model.config.layers, model.blocks)):
            reason = obstacle(index, block.get_submodule("mixer"))  # type: ignore[arg-type]
            if reason is not None:
                layers.setdefault((layer.mixer.kind, reason), []).append(str(index))
        problems = [
            Problem("policy", f"{self.config.kind!r} for {kind!r} in layer {', '.join(indices)}", reason)
            for (kind, reason), indices in layers.items()
        ]
        if problems:
            raise ConfigError(problems)


policies: Registry[type[Policy]] = Registry("decoding policy", "workbench.decoding.policies")
"""Decoding policies, one file per policy."""


def new_caches(
    model: LanguageModel, policy: Policy, batch: int, length: int, cache_dtype: CacheType = "model"
) -> list[Cache]:
    """Empty caches of a model under a policy, for ``batch`` sequences of at most ``length`` tokens.

    Args:
        cache_dtype: type of what is cached. In eight bits are keys and values, and latents without their rotated keys.

    Raises:
        ConfigError: naming the layers that cannot cache in ``cache_dtype``.
    """
    dtype = CACHE_TYPES[cache_dtype]
    if dtype is None or dtype.itemsize > 1:
        return model.new_caches(batch, length, policy.cache_for, dtype)
    refused, stored = [], False

    def cache_for(layer: int, mixer: Any, *shape: Any) -> Cache:
        nonlocal stored
        cache = policy.cache_for(layer, mixer, *shape)
        before = [tensor.dtype for tensor in cache.tensors()]
        reason = cache.store_in(dtype)
        stored = stored or before != [tensor.dtype for tensor in cache.tensors()]
        if reason is not None:
            refused.append(Problem("cache_dtype", f"{cache_dtype!r} for layer {layer}", reason))
        return cache

    caches = model.new_caches(batch, length, cache_for)
    if refused:
        raise ConfigError(refused)
    require(stored, "cache_dtype", got=cache_dtype, expected="model: no layer caches keys, values or latents")
    return caches
