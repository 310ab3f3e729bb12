"""Prompting: one question per argument and value, scored by log p(" yes") − log p(" no").

Legend: N arguments, J values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from workbench.evaluation.human_values.arguments import VALUES, Value
from workbench.evaluation.human_values.states import batches, encode, padded
from workbench.evaluation.suites import Settings, inference
from workbench.model import LanguageModel

ANSWERS = (" yes", " no")


def prompt(text: str, value: Value) -> str:
    """The question whether an argument rests on a value; our wording.

    >>> print(prompt("We should ban whaling, supporting, whales are rare", VALUES[17]))
    Argument: We should ban whaling, supporting, whales are rare
    Question: Does this argument rest on protecting the natural environment (Universalism: nature)?
    Answer:
    """
    question = f"Does this argument rest on {value.description} ({value.name})?"
    return f"Argument: {text}\nQuestion: {question}\nAnswer:"


def prompt_scores(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], settings: Settings) -> np.ndarray:
    """(N, J) log p(" yes") − log p(" no"), each summed over the tokens of the answer.

    A prompt longer than the context loses its beginning, never the question.
    """
    prompts = encode(tokenizer, [prompt(text, value) for text in texts for value in VALUES], 1 << 30)
    answers = [tokenizer.encode(answer, add_special_tokens=False).ids for answer in ANSWERS]
    room = settings.context - max(map(len, answers))
    prompts = [row[-room:] for row in prompts]
    if max(map(len, answers)) == 1:
        scores = _by_next_token(model, prompts, [ids[0] for ids in answers], settings)
    else:
        yes, no = (_by_continuation(model, prompts, ids, settings) for ids in answers)
        scores = yes - no
    return scores.reshape(len(texts), len(VALUES))


def _by_next_token(
    model: LanguageModel, prompts: Sequence[list[int]], answers: Sequence[int], settings: Settings
) -> np.ndarray:
    """Difference of the two answers' scores before softmax, which is that of their log-probabilities."""
    device, result = model.embedding.weight.device, np.empty(len(prompts))
    with inference(model, settings):
        for indices in batches(prompts, settings):
            rows = [prompts[i] for i in indices]
            tokens_BT, segments_BT = padded(rows, device)
            hidden_BTD = model(tokens_BT, segments=segments_BT)
            last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
            scores_BV = model.logits(hidden_BTD[torch.arange(len(rows), device=device), last_B]).float()
            result[indices] = (scores_BV[:, answers[0]] - scores_BV[:, answers[1]]).cpu().numpy()
    return result


def _by_continuation(
    model: LanguageModel, prompts: Sequence[list[int]], answer: list[int], settings: Settings
) -> np.ndarray:
    """Log-probability of an answer of several tokens after every prompt."""
    device, result = model.embedding.weight.device, np.empty(len(prompts))
    rows = [row + answer for row in prompts]
    with inference(model, settings):
        for indices in batches(rows, settings):
            tokens_BT, segments_BT = padded([rows[i] for i in indices], device)
            targets_BT = torch.full_like(tokens_BT, -100)
            for place, index in enumerate(indices):
                end = len(rows[index])
                asked = slice(end - len(answer) - 1, end - 1)
                targets_BT[place, asked] = torch.tensor(answer, device=device)
            losses_BT = model.token_losses(tokens_BT, targets_BT, segments=segments_BT)
            result[indices] = -losses_BT.sum(1).cpu().double().numpy()
    return result
