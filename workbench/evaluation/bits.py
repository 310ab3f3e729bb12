"""Bits per byte: the quality measure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.data import evaluation_batches
from workbench.model import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    """Loss of every document of a split: ``nll_D`` in nats, ``bytes_D`` in bytes of UTF-8 text."""

    nll_D: np.ndarray
    bytes_D: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Σ nats / (ln 2 · Σ bytes) over documents: a ratio of sums, so long documents weigh more."""
        return float(self.nll_D.sum() / (math.log(2) * self.bytes_D.sum()))


@torch.inference_mode()
def evaluate(
    model: LanguageModel, documents: Any, *, batch_size: int, context: int, precision: str = "fp32"
) -> Evaluation:
    """Measure ``model`` on every document; each starts a fresh context of at most ``context`` tokens.

    Consumes no random numbers and leaves the model's mode as it was.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    nll_D = torch.zeros(len(documents), dtype=torch.float64)
    for batch in evaluation_batches(documents, batch_size=batch_size, context=context):
        tokens, targets, segments = (t.to(device) for t in (batch.tokens_BT, batch.targets_BT, batch.segments_BT))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses_BT = model.token_losses(tokens, targets, segments=segments)
        counted = batch.targets_BT >= 0
        nll_D.index_add_(0, batch.documents_BT[counted], losses_BT.cpu().double()[counted])
    model.train(was_training)
    return Evaluation(nll_D.numpy(), np.asarray(documents.byte_counts, dtype=np.int64))
