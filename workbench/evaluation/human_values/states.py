"""Token ids of texts, and the hidden states of every block of a model on them.

Legend: N texts, B batch, T time, L blocks, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.evaluation.suites import Settings, inference
from workbench.model import LanguageModel
from workbench.model.block import Block

POOLS = ("mean", "last")
"""Over the tokens of a text, and of its last token."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
    """Token ids of texts as beginnings of documents (:func:`workbench.decoding.encode_prompt`), cut at ``longest``
    tokens."""
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    lead = [] if symbol is None else [symbol]
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=symbol is None)
    return [(lead + encoding.ids)[:longest] for encoding in encoded]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) token ids, 0 where padded, and segments, -1 where padded."""
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int64)
    segments = np.full((len(rows), longest), -1, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], segments[index, : len(row)] = row, 0
    return torch.from_numpy(tokens).to(device), torch.from_numpy(segments).to(device)


def batches(rows: Sequence[Sequence[int]], settings: Settings) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, the longest first, each of at most batch_size · context tokens."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    first = 0
    while first < len(order):
        count = settings.rows(len(rows[order[first]]))
        yield order[first : first + count]
        first += count


def hidden_states(model: LanguageModel, rows: Sequence[Sequence[int]], settings: Settings) -> Tensor:
    """(L + 1, 2, N, D) fp32 on the CPU: the embedding and every block's output, pooled by the ways of :data:`POOLS`."""
    device = model.embedding.weight.device
    caught: list[Tensor] = []

    def catch(module: Any, inputs: Any, output: Any) -> None:
        caught.append(module.stream(output) if isinstance(module, Block) else output)

    depth, width = len(model.blocks), model.config.width or 0
    states = torch.empty(depth + 1, len(POOLS), len(rows), width)
    hooks = [module.register_forward_hook(catch) for module in (model.embedding, *model.blocks)]
    try:
        with inference(model, settings):
            for indices in batches(rows, settings):
                caught.clear()
                tokens_BT, segments_BT = padded([rows[i] for i in indices], device)
                model(tokens_BT, segments=segments_BT)
                is_token_BT1 = (segments_BT >= 0)[..., None]
                counts_B1 = is_token_BT1.sum(1)
                at = torch.arange(len(indices), device=device)
                for layer, x_BTD in enumerate(caught):
                    x_BTD = x_BTD.float()
                    states[layer, 0, indices] = (torch.where(is_token_BT1, x_BTD, 0.0).sum(1) / counts_B1).cpu()
                    states[layer, 1, indices] = x_BTD[at, counts_B1[:, 0] - 1].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return states
