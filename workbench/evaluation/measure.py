"""What a model makes of every document of a split: its loss and, where targets are answers, how many are wrong.

Legend: B rows, T tokens in a row, D documents, A answers.
"""

from __future__ import annotations

import numpy as np
import torch

from workbench.data import Split, evaluation_batches
from workbench.data.tasks import answer_starts
from workbench.model import LanguageModel


@torch.inference_mode()
def evaluate(
    model: LanguageModel, documents: Split, *, batch_size: int, context: int, precision: str = "fp32"
) -> dict[str, np.ndarray]:
    """Measure ``model`` on every document; each starts a fresh context of at most ``context`` tokens.

    Consumes no random numbers and leaves the model's mode as it was.

    Returns:
        (D,) arrays by column: ``nll_nats``, the loss of the document's targets in nats; where the split is answered,
        ``errors``, its answers that have a token which is not the most likely one (with the tokens before it given, so a
        right answer is one that greedy decoding gives); then the split's own columns (sizes, labels). A
        :class:`workbench.metric.Metric` makes one number of them.
    """
    device = model.embedding.weight.device
    answered = "answers" in documents.columns
    was_training = model.training
    model.eval()
    nll_D = torch.zeros(len(documents), dtype=torch.float64)
    errors_D = torch.zeros(len(documents), dtype=torch.int64)
    for batch in evaluation_batches(documents, batch_size=batch_size, context=context):
        tokens, targets, segments = (t.to(device) for t in (batch.tokens_BT, batch.targets_BT, batch.segments_BT))
        counted_BT = batch.targets_BT >= 0
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            if answered:
                losses_BT, wrong_BT = model.answer_losses(tokens, targets, segments=segments)
                starts_BT = torch.from_numpy(answer_starts(batch.targets_BT.numpy(), batch.documents_BT.numpy()))
                number_N = starts_BT[counted_BT].cumsum(0) - 1  # of the answer that a target belongs to
                wrong_A = number_N[wrong_BT.cpu()[counted_BT]].unique()
                errors_D += batch.documents_BT[starts_BT][wrong_A].bincount(minlength=len(documents))
            else:
                losses_BT = model.token_losses(tokens, targets, segments=segments)
        nll_D.index_add_(0, batch.documents_BT[counted_BT], losses_BT.cpu().double()[counted_BT])
    model.train(was_training)
    errors = {"errors": errors_D.numpy()} if answered else {}
    return {"nll_nats": nll_D.numpy(), **errors, **documents.columns}
