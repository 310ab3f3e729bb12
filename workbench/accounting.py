"""What a model costs: sums of the parameters, FLOPs and cache bytes of its components.

FLOPs are matrix products only, one multiply-add = 2 FLOPs, causal attention counted at the visible keys, routed
experts only, without recomputation. Training costs three times the forward pass (backward = 2 forward).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from workbench.contract import embeddings, feedforwards, mixers, residuals
from workbench.layers import linear_flops
from workbench.model import LanguageModel, ModelConfig
from workbench.model.config import Layer
from workbench.model.readout import SummaryReadout

__all__ = ["ModelCost", "account", "layer_flops", "packed_flops"]


@dataclass(frozen=True)
class ModelCost:
    """Accounting of a whole model at one sequence length."""

    parameters: int
    """All stored parameters."""
    embedding: int
    """Parameters that are looked up: token embedding, tables of n-grams."""
    non_embedding: int
    """Without these and an untied head."""
    active: int
    """Non-embedding parameters that take part for one token."""
    forward_flops: float
    """Per token, mean over positions 1 to the sequence length."""
    cache_bytes: int
    """Decode state of one sequence at the sequence length."""
    unevicted_bytes: int
    """The same if windows evicted nothing."""
    auxiliary: int = 0
    """Parameters used in training only (the multi-token head); stored, in neither ``non_embedding`` nor ``active``."""
    auxiliary_flops: float = 0.0
    """Forward FLOPs per token of training only, averaged over a training in which the multi-token head starts later."""
    adapters: int = 0
    """Parameters of low-rank adapters, which an export merges into others; counted in ``parameters`` alone."""

    @property
    def trainable(self) -> int:
        """Parameters that are trained: all, or the adapters."""
        return self.adapters or self.parameters

    @property
    def training_flops(self) -> float:
        """FLOPs per trained token."""
        return 3 * (self.forward_flops + self.auxiliary_flops)


def account(config: ModelConfig, length: int, element_bytes: int = 4) -> ModelCost:
    """Cost of ``config`` at ``length`` tokens, activations and caches in elements of ``element_bytes`` bytes."""
    assert config.width and config.vocabulary
    costs = [cls.cost(variant, config.width, length, element_bytes) for cls, variant in config.variants()]
    residual = config.residual_config
    between = residuals[residual.kind].cost(residual, config.width, config.depth)
    norms = config.width * (2 * len(config.layers) + 1) + between.parameters
    embedding = config.embedding_config
    entry = embeddings[embedding.kind].cost(embedding, config.width, config.vocabulary)
    head, looked_up = config.width * config.vocabulary, entry.parameters - entry.active_parameters
    readout, readout_flops = SummaryReadout.cost(config.width) if config.readout else (0, 0)
    non_embedding = sum(cost.parameters for cost in costs) + norms + readout + entry.active_parameters
    auxiliary, auxiliary_flops = _multi_token_head(config, length)
    adapters = _adapters(config)
    return ModelCost(
        parameters=non_embedding + auxiliary + adapters + looked_up + (0 if config.tied else head),
        embedding=looked_up,
        non_embedding=non_embedding,
        active=sum(cost.active_parameters for cost in costs) + norms + readout + entry.active_parameters,
        forward_flops=sum(cost.flops for cost in costs) + between.flops + readout_flops + entry.flops + 2 * head,
        cache_bytes=sum(cost.cache_bytes for cost in (*costs, entry)),
        unevicted_bytes=sum(
            cost.cache_bytes if cost.unevicted_bytes is None else cost.unevicted_bytes for cost in (*costs, entry)
        ),
        auxiliary=auxiliary,
        auxiliary_flops=auxiliary_flops,
        adapters=adapters,
    )


def _adapters(config: ModelConfig) -> int:
    if config.lora is None:
        return 0
    with torch.device("meta"):
        model = LanguageModel(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _multi_token_head(config: ModelConfig, length: int) -> tuple[int, float]:
    """Parameters, and forward FLOPs per token of the training."""
    if config.mtp is None or config.mtp_layer is None:
        return 0, 0.0
    assert config.width and config.vocabulary
    D, layer = config.width, config.mtp_layer
    parts = ((mixers[layer.mixer.kind], layer.mixer), (feedforwards[layer.feedforward.kind], layer.feedforward))
    costs = [cls.cost(variant, D, length) for cls, variant in parts]
    flops = sum(cost.flops for cost in costs) + linear_flops((2 * D, D), (D, config.vocabulary))
    return sum(cost.parameters for cost in costs) + 2 * D * D + 5 * D, (1 - config.mtp.start) * flops


def layer_flops(layer: Layer, width: int, length: int, blocks: int | None = None) -> float:
    """Training FLOPs of the mixer and the feed-forward of one layer, of one document.

    Args:
        layer: the layer.
        width: of the model.
        length: tokens of the document.
        blocks: per query. Default: the configured number. Ignored by a mixer that selects none.
    """
    per_query = mixers[layer.mixer.kind].blocks_per_query(layer.mixer)
    mixer = layer.mixer
    if per_query is not None and blocks is not None:
        mixer = mixer.changed(**{per_query.field: blocks}).resolved(width)
    mixing = mixers[mixer.kind].cost(mixer, width, length)
    feedforward = feedforwards[layer.feedforward.kind].cost(layer.feedforward, width, length)
    return 3 * (mixing.flops + feedforward.flops) * length


def packed_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Training FLOPs per token of rows packed from pieces of documents of these lengths.

    :func:`account` at the row's length counts as if every row were one document; a model FLOP utilisation
    (MFU) must use this one if attention does not cross documents.
    """
    counts = Counter(lengths)
    total = sum(account(config, length).training_flops * length * count for length, count in counts.items())
    return total / sum(length * count for length, count in counts.items())
