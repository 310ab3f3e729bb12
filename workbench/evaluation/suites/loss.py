"""Loss of every token of the documents.

Legend: B rows, T tokens in a row, D documents.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from workbench.data import Split
from workbench.evaluation.suites import DocumentConfig, DocumentSuite, Settings, device_batches, inference, suites
from workbench.metric import BITS_PER_BYTE, NATS_PER_TOKEN
from workbench.model import LanguageModel


@suites.register
class Loss(DocumentSuite):
    """Bits per byte and nats per token of text."""

    class Config(DocumentConfig):
        """Loss of text."""

        kind: Literal["loss"] = "loss"

    metrics = (BITS_PER_BYTE, NATS_PER_TOKEN)

    def columns(self, model: LanguageModel, documents: Split, settings: Settings) -> dict[str, np.ndarray]:
        """Columns ``nll_nats`` (loss in nats, summed over the document), ``targets`` (tokens with a loss), then the
        columns of the split (``bytes``)."""
        nll_D = torch.zeros(len(documents), dtype=torch.float64)
        targets_D = torch.zeros(len(documents), dtype=torch.int64)
        with inference(model, settings):
            reader = settings.reader(model)
            for batch, (tokens_BT, targets_BT, segments_BT) in device_batches(model, documents, settings):
                losses_BT = reader.token_losses(tokens_BT, targets_BT, segments=segments_BT)
                mask_BT = batch.targets_BT >= 0
                document_N = batch.documents_BT[mask_BT]
                nll_D.index_add_(0, document_N, losses_BT.cpu().double()[mask_BT])
                targets_D += document_N.bincount(minlength=len(documents))
        return {"nll_nats": nll_D.numpy(), "targets": targets_D.numpy(), **documents.columns}
