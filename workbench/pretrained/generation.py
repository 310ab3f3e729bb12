"""Text from a model."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from workbench.config import ConfigError
from workbench.data.preparation import DOCUMENT_SYMBOL
from workbench.model import LanguageModel


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
) -> str:
    """What the model writes after ``prompt``, taken as the beginning of a document; prefill, then decode with caches.

    Args:
        tokens: new tokens at most; the text ends earlier where the model ends the document.
        temperature: of the softmax that tokens are drawn from; 0 takes the most likely one.
        seed: same seed, model, prompt and device: same text.

    Raises:
        ConfigError: for a number out of range, a prompt without tokens, or a model that cannot decode with caches.
    """
    if tokens < 1:
        raise ConfigError.at("tokens", got=tokens, expected="at least 1")
    if not temperature >= 0:
        raise ConfigError.at("temperature", got=temperature, expected="at least 0")
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    # the symbol stands before every document in training; a tokenizer from elsewhere has its own way to begin
    ids = tokenizer.encode(prompt, add_special_tokens=symbol is None).ids
    ids = ids if symbol is None else [symbol, *ids]
    if not ids:
        raise ConfigError.at("prompt", got=prompt, expected="at least one token")
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    prompt_1T = torch.tensor([ids], device=device)
    new = model.generate(prompt_1T, tokens, temperature=temperature, generator=generator)[0].tolist()
    if symbol in new:
        new = new[: new.index(symbol)]
    # the prompt is decoded too: some tokenizers write the first token of a text differently
    return tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]
