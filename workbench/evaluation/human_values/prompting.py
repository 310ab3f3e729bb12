"""Prompting: one question per argument and value, scored by log p(" yes") − log p(" no").

Legend: N arguments, J values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from workbench.evaluation.human_values.arguments import VALUES, Value
from workbench.evaluation.human_values.states import encode
from workbench.evaluation.suites import Settings
from workbench.evaluation.text_model import TextModel
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
    prompts = encode(tokenizer, [prompt(text, value) for text in texts for value in VALUES])
    answers = [tokenizer.encode(answer, add_special_tokens=False).ids for answer in ANSWERS]
    requests = [(row, answer) for row in prompts for answer in answers]
    logprobs = np.empty(len(requests))
    for number, likelihood in TextModel(model, tokenizer, settings).likelihoods(requests):
        logprobs[number] = likelihood.logprob
    yes_NJ, no_NJ = logprobs.reshape(len(texts), len(VALUES), len(ANSWERS)).transpose(2, 0, 1)
    return np.asarray(yes_NJ - no_NJ)
