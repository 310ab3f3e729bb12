"""Answers of a synthetic task: their loss, and how many are wrong.

Legend: B rows, T tokens in a row, D documents, N targets of a batch, A answers of a batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from workbench.data import Split
from workbench.data.tasks import answer_starts
from workbench.evaluation.suites import DocumentConfig, DocumentSuite, Settings, device_batches, inference, suites
from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS
from workbench.model import LanguageModel


@suites.register
class Answers(DocumentSuite):
    """Errors and bits per answer, over all examples and for every combination of the labels that the task's views name.

    An answer is wrong when one of its tokens is not the most likely one, given the correct tokens before it. A right
    answer is therefore the one that greedy decoding gives.
    """

    class Config(DocumentConfig):
        """Answers of a synthetic task."""

        kind: Literal["answers"] = "answers"

    metrics = (ANSWER_ERRORS, ANSWER_LOSS)

    def columns(self, model: LanguageModel, documents: Split, settings: Settings) -> dict[str, np.ndarray]:
        """Columns ``nll_nats`` (loss of the answers in nats), ``errors`` (wrong answers), then the columns of the split
        (``answers`` and labels)."""
        nll_D = torch.zeros(len(documents), dtype=torch.float64)
        errors_D = torch.zeros(len(documents), dtype=torch.int64)
        separate = getattr(documents, "separate_answers", False)
        with inference(model, settings):
            reader = settings.reader(model)
            for batch, (tokens_BT, targets_BT, segments_BT) in device_batches(model, documents, settings):
                losses_BT, wrong_BT = reader.answer_losses(tokens_BT, targets_BT, segments=segments_BT)
                mask_BT = batch.targets_BT >= 0
                starts_BT = torch.from_numpy(
                    answer_starts(batch.targets_BT.numpy(), batch.documents_BT.numpy(), separate=separate)
                )
                answer_N = starts_BT[mask_BT].cumsum(0) - 1  # the answer that each target belongs to
                wrong_A = answer_N[wrong_BT.cpu()[mask_BT]].unique()
                errors_D += batch.documents_BT[starts_BT][wrong_A].bincount(minlength=len(documents))
                nll_D.index_add_(0, batch.documents_BT[mask_BT], losses_BT.cpu().double()[mask_BT])
        return {"nll_nats": nll_D.numpy(), "errors": errors_D.numpy(), **documents.columns}
