"""A language model as tasks of text see it: log-likelihoods of continuations, and text by greedy decoding.

Legend: B rows, T tokens in a row, N targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from workbench.config import require
from workbench.data.streams import IGNORE_INDEX
from workbench.decoding import Engine, Sampling, encode_prompt
from workbench.evaluation.suites import Settings, inference
from workbench.model import LanguageModel

__all__ = ["Likelihood", "TextModel"]

PADDED_TO = 64
"""Rows are padded to a multiple of this: fewer shapes for compiled kernels."""
SCORES_TOGETHER = 2**27
"""Scores of targets that are in memory at once."""


class Likelihood(NamedTuple):
    """Of one continuation."""

    logprob: float
    """Natural logarithm of its probability."""
    is_greedy: bool
    """Whether greedy decoding gives it."""


class TextModel:
    """A model with its tokenizer.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: of the data that it was trained on.
        settings: rows of a batch and precision of likelihoods. Generation computes in the type of the weights.
        max_length: tokens of a context and its continuation. Default: those of training.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, settings: Settings, max_length: int | None = None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.max_length = max_length or settings.context
        self._passes_segments = bool(model.config.lacking("causal"))  # others never see the padding at the end

    @cached_property
    def engine(self) -> Engine:
        """Generates text.

        Raises:
            ConfigError: when the model cannot decode with caches.
        """
        decoder = self.settings.decoder
        if decoder is None:
            return Engine(self.model, self.tokenizer)
        policy = decoder.policy(self.model)
        return Engine(self.model, self.tokenizer, policy, cache_dtype=decoder.config.cache_dtype)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as the beginning of a document, after at least one token that it is predicted from: the
        document symbol or another one that the tokenizer puts first, or else a token that ends texts."""
        if encode_prompt(self.tokenizer, ""):
            return encode_prompt(self.tokenizer, text)
        return [min(self.model.stop_tokens, default=0), *encode_prompt(self.tokenizer, text)]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of what follows it, which is encoded together with it. White space at the end of
        the context belongs to the continuation, as tokenizers put it before a word (lm-evaluation-harness); a token
        over the boundary does as well, where there is no other."""
        stripped = context.rstrip()
        whole, before = self.encode(context + continuation), len(self.encode(stripped))
        if context + continuation != stripped:
            before = min(before, len(whole) - 1)
        return whole[:before], whole[before:]

    # -- likelihoods -------------------------------------------------------------------------------------------------

    def likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Likelihood]]:
        """Log-likelihoods of continuations, longest first.

        A context that is too long loses tokens at its beginning. Continuations of one token after one context share a
        row.

        Args:
            requests: token ids of a context, at least one, and of its continuation, at least one.

        Yields:
            Number of the request, its likelihood.

        Raises:
            ConfigError: for a continuation longer than ``max_length``, and with a decoding policy.
        """
        require(
            self.settings.decoder is None,
            "decoding",
            got="likelihoods of continuations, which are read in one pass",
            expected="a suite of generated answers, loss or answers, whose tokens a policy reads one by one",
        )
        rows: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for number, (context, continuation) in enumerate(requests):
            require(
                0 < len(continuation) <= self.max_length,
                "max_length",
                got=f"a continuation of {len(continuation)} tokens",
                expected=f"1 to {self.max_length} tokens",
            )
            # the last token is only a target
            tokens = (*context, *continuation)[-(self.max_length + 1) : -1]
            rows.setdefault(tokens, []).append((number, tuple(continuation)))
        ordered = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
        first = 0
        while first < len(ordered):
            length = -(-len(ordered[first]) // PADDED_TO) * PADDED_TO
            batch = ordered[first : first + self.settings.rows(length)]
            first += len(batch)
            yield from self._batch(batch, [rows[tokens] for tokens in batch], length)

    def _batch(
        self, rows: Sequence[tuple[int, ...]], targets: Sequence[list[tuple[int, tuple[int, ...]]]], length: int
    ) -> Iterator[tuple[int, Likelihood]]:
        device = self.model.embedding.weight.device
        tokens_BT = torch.zeros(len(rows), length, dtype=torch.int64)
        segments_BT = torch.full((len(rows), length), -1, dtype=torch.int32)
        for row, tokens in enumerate(rows):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
            segments_BT[row, : len(tokens)] = 0
        numbers: list[int] = []
        sizes: list[int] = []
        at_N: list[int] = []
        target_N: list[int] = []
        for row, (tokens, continuations) in enumerate(zip(rows, targets)):
            for number, continuation in continuations:
                numbers.append(number)
                sizes.append(len(continuation))
                end = row * length + len(tokens)
                at_N += range(end - len(continuation), end)
                target_N += continuation
        segments = segments_BT.to(device) if self._passes_segments else None
        losses, wrong = [], []
        with inference(self.model, self.settings):
            hidden_ND = self.model(tokens_BT.to(device), segments=segments).flatten(0, 1)[torch.tensor(at_N).to(device)]
            target = torch.tensor(target_N).to(device)
            together = max(1, SCORES_TOGETHER // self.model.head_weight.shape[0])
            for part_ND, part_N in zip(hidden_ND.split(together), target.split(together)):
                scores_NV = self.model.logits(part_ND).float()
                losses.append(nn.functional.cross_entropy(scores_NV, part_N, reduction="none"))
                wrong.append(scores_NV.argmax(-1) != part_N)
        loss_parts = torch.cat(losses).double().cpu().split(sizes)
        wrong_parts = torch.cat(wrong).cpu().split(sizes)
        for number, loss, is_wrong in zip(numbers, loss_parts, wrong_parts):
            yield number, Likelihood(-float(loss.sum()), not bool(is_wrong.any()))

    def rolling(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, float]]:
        """Log-likelihoods of whole texts.

        A text longer than ``max_length`` is cut into windows of that length; the last one begins earlier, so that every
        target has as much context as there is, and every target counts once (as lm-evaluation-harness).

        Args:
            texts: token ids, the first of which is only context.

        Yields:
            Number of the text, natural logarithm of its probability.
        """
        windows = [(number, window) for number, text in enumerate(texts) for window in self._windows(len(text) - 1)]
        windows.sort(key=lambda item: item[1][0] - item[1][2])  # longest first
        left = [sum(1 for n, _ in windows if n == number) for number in range(len(texts))]
        totals = [0.0] * len(texts)
        first = 0
        while first < len(windows):
            start, _, end = windows[first][1]
            length = -(-(end - start) // PADDED_TO) * PADDED_TO
            batch = windows[first : first + self.settings.rows(length)]
            first += len(batch)
            for (number, _), loss in zip(batch, self._window_losses(texts, batch, length)):
                totals[number] -= loss
                left[number] -= 1
                if not left[number]:
                    yield number, totals[number]
        yield from ((number, 0.0) for number, text in enumerate(texts) if len(text) < 2)

    def _windows(self, targets: int) -> list[tuple[int, int, int]]:
        """First input, first counted target and end of every window, as positions of targets."""
        limit = self.max_length
        return [(max(0, min(at, targets - limit)), at, min(at + limit, targets)) for at in range(0, targets, limit)]

    def _window_losses(
        self, texts: Sequence[Sequence[int]], batch: Sequence[tuple[int, tuple[int, int, int]]], length: int
    ) -> list[float]:
        device = self.model.embedding.weight.device
        tokens_BT = torch.zeros(len(batch), length, dtype=torch.int64)
        targets_BT = torch.full((len(batch), length), IGNORE_INDEX)
        segments_BT = torch.full((len(batch), length), -1, dtype=torch.int32)
        for row, (number, (start, counted, end)) in enumerate(batch):
            text = torch.tensor(texts[number][start : end + 1])
            tokens_BT[row, : end - start] = text[:-1]
            targets_BT[row, counted - start : end - start] = text[1 + counted - start :]
            segments_BT[row, : end - start] = 0
        segments = segments_BT.to(device) if self._passes_segments else None
        with inference(self.model, self.settings):
            losses_BT: Tensor = self.model.token_losses(tokens_BT.to(device), targets_BT.to(device), segments=segments)
        return losses_BT.double().sum(1).tolist()

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, str]]:
        """What the model writes after each prompt, up to a stop string or the end of its document.

        Prompts of similar lengths are decoded together.

        Args:
            prompts: token ids; a prompt that leaves no room for ``max_tokens`` loses tokens at its beginning.
            max_tokens: new tokens at most.
            until: strings that end a text; they are not part of it.
            sampling: default greedy.

        Yields:
            Number of the prompt, its text.

        Raises:
            ConfigError: when there is no room for a prompt beside ``max_tokens``.
        """
        room = self.max_length - max_tokens
        require(
            room > 0,
            "max_length",
            got=f"{self.max_length} tokens, {max_tokens} of them for the answer",
            expected="room for a prompt",
        )
        sampling = (sampling or Sampling(temperature=0)).changed(max_tokens=max_tokens, stop=tuple(until))
        cut = [list(prompt[-room:]) for prompt in prompts]
        order = sorted(range(len(cut)), key=lambda number: -len(cut[number]))
        first = 0
        while first < len(order):
            numbers = order[first : first + self.settings.rows(len(cut[order[first]]) + max_tokens)]
            first += len(numbers)
            texts = self.engine.generate([cut[number] for number in numbers], sampling).texts
            yield from zip(numbers, texts)
