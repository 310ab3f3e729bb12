"""The decoding loop: prefill, then one token per sequence and step. Legend: B prompts, T time, V vocabulary."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Generator, Tensor

from workbench.config import Config, ConfigError, require
from workbench.contract import Cache
from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.decoding.policy import Policy, PolicyConfig, policies
from workbench.decoding.reads import ReadLog, index_bytes
from workbench.model import LanguageModel
from workbench.seeding import Seed


class Sampling(Config):
    """How tokens are sampled, and how many."""

    max_tokens: Annotated[int, Field(ge=1)] = 128
    """New tokens at most; a sequence ends earlier at a stop token."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature of the softmax that tokens are sampled from; 0 takes the most likely one."""
    top_k: Annotated[int | None, Field(ge=1)] = None
    """Sample from the k most likely tokens only. Default: from all."""
    seed: Seed = 0
    """Same seed, model, prompts and device: same tokens."""


@dataclass
class Metrics:
    """Counts and times of one generation, up to its newest step."""

    prompt_tokens: int = 0
    """Tokens of all prompts."""
    new_tokens: int = 0
    """Generated tokens of all sequences, stop tokens not counted."""
    prefill_seconds: float = 0.0
    """Time to the first token of every sequence."""
    decode_seconds: float = 0.0
    """Time of all further steps."""
    decode_tokens: int = 0
    """Generated tokens of these steps."""
    cache_bytes: int = 0
    """Bytes of all caches, as allocated."""
    reads: ReadLog = field(default_factory=ReadLog)
    """What every step read, where the policy reads less than everything."""

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding over all sequences, without prefill; 0 after a single step."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Stream:
    """Tokens as they are generated: one list per step, with one entry per prompt, None where a sequence has ended."""

    steps: Iterator[list[int | None]]
    metrics: Metrics
    """Updated at every step."""

    def __iter__(self) -> Iterator[list[int | None]]:
        return self.steps


@dataclass
class TextStream:
    """The text after one prompt, in pieces as they are generated."""

    pieces: Iterator[str]
    metrics: Metrics
    """Updated at every step."""

    def __iter__(self) -> Iterator[str]:
        return self.pieces


@dataclass
class Generation:
    """The outcome of :meth:`Engine.generate`."""

    tokens: list[list[int]]
    """New token ids of every prompt, without the stop token."""
    texts: list[str]
    """The same as text; empty where the engine has no tokenizer."""
    metrics: Metrics


@dataclass
class _Batch:
    """Prompts that share caches: all sequences begin together, and are at the same position at every step."""

    positions: list[int]
    """Indices of the prompts."""
    prompts_BT: Tensor
    """The prompts, -1 behind the end of each."""
    tokens_B1: Tensor
    """The newest token of each sequence."""
    caches: list[Cache] = field(repr=False)


class Engine:
    """Generates with one model and one policy.

    Prompts may differ in length. Those of equal length are decoded as one batch, with caches of one length for all its
    sequences, which is exact for every mixer; a step decodes all batches. With ``spread``, lengths may differ within a
    batch: the shortest prompt is prefilled in all its sequences, and the rest of the longer ones is read token by
    token, while shorter ones decode.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: for prompts and results as text. Without one, prompts are token ids.
        policy: a registered policy, by name, as its configuration, as a mapping with its ``kind``, or built; it decides
            what a step reads.
        stop_tokens: ids that end a sequence. Default: the tokenizer's document symbol and the model's ``stop_tokens``.

    Raises:
        ConfigError: when the model cannot decode with caches, or the policy refuses one of its mixers.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        policy: Policy | PolicyConfig | Mapping[str, Any] | str = "dense",
        stop_tokens: Collection[int] | None = None,
    ):
        without = model.config.lacking("decode")
        require(not without, "model", got=", ".join(without), expected="components that decode with a cache")
        if not isinstance(policy, Policy):
            config: PolicyConfig = policies.parse(policy)
            policy = policies[config.kind](config)
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self.policy.prepare(model)
        self.document_symbol: int | None = None if tokenizer is None else tokenizer.token_to_id(DOCUMENT_SYMBOL)
        if stop_tokens is None:
            symbols = () if self.document_symbol is None else (self.document_symbol,)
            stop_tokens = model.stop_tokens.union(symbols)
        self.stop_tokens = frozenset(stop_tokens)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` as the beginning of a document.

        Raises:
            ConfigError: when the engine has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError.at("prompt", got=prompt, expected="token ids, as the engine has no tokenizer")
        return encode_prompt(self.tokenizer, prompt)

    def decode(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Text of the ``new`` token ids that follow ``prompt``."""
        assert self.tokenizer is not None
        # the prompt is decoded too: some tokenizers decode the first token of a text differently
        return self.tokenizer.decode([*prompt, *new])[len(self.tokenizer.decode(list(prompt))) :]

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: Sampling | None = None
    ) -> Generation:
        """What the model writes after each prompt.

        Args:
            prompts: texts, or lists of token ids; at least one, none empty.
            sampling: default ``Sampling()``.

        Raises:
            ConfigError: for prompts without tokens, or texts without a tokenizer.
        """
        ids = self._token_ids(prompts)
        stream = self.stream(ids, sampling)
        tokens: list[list[int]] = [[] for _ in ids]
        for step in stream:
            for new, token in zip(tokens, step, strict=True):
                if token is not None:
                    new.append(token)
        texts = [] if self.tokenizer is None else [self.decode(prompt, new) for prompt, new in zip(ids, tokens)]
        return Generation(tokens, texts, stream.metrics)

    def complete(self, prompt: str, sampling: Sampling | None = None) -> TextStream:
        """The text after ``prompt``, in pieces as they are generated. Joined, they are what :meth:`generate` returns.

        Raises:
            ConfigError: as :meth:`generate`.
        """
        (ids,) = self._token_ids([prompt])
        stream = self.stream([ids], sampling)
        return TextStream(self._pieces(ids, stream), stream.metrics)

    def _pieces(self, prompt: list[int], stream: Stream) -> Iterator[str]:
        new: list[int] = []
        length = 0
        for (token,) in stream:
            if token is not None:
                new.append(token)
                text = self.decode(prompt, new)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                    yield text[length:]
                    length = len(text)
        yield self.decode(prompt, new)[length:]

    def stream(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: Sampling | None = None, *, spread: int = 0
    ) -> Stream:
        """The new tokens of all prompts, step by step. Errors as for :meth:`generate`.

        Args:
            prompts, sampling: as for :meth:`generate`.
            spread: tokens by which the prompts of a batch may differ in length. A batch takes that many steps more at
                most, and saves those of the batches that it joins. What is read token by token is read by the policy.
        """
        ids = self._token_ids(prompts)
        metrics = Metrics(prompt_tokens=sum(map(len, ids)))
        return Stream(self._steps(ids, sampling or Sampling(), metrics, spread), metrics)

    def _token_ids(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        require(not isinstance(prompts, str), "prompts", got=prompts, expected="a list of prompts")
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        require(ids, "prompts", got=prompts, expected="at least one prompt")
        for prompt, tokens in zip(prompts, ids):
            require(tokens, "prompt", got=prompt, expected="at least one token")
        return ids

    @torch.inference_mode()
    def _steps(
        self, prompts: list[list[int]], sampling: Sampling, metrics: Metrics, spread: int
    ) -> Iterator[list[int | None]]:
        device = self.model.embedding.weight.device
        generator = Generator(device).manual_seed(sampling.seed)
        batches = self._batches(prompts, sampling.max_tokens, spread)
        order = [position for batch in batches for position in batch.positions]
        active = [True] * len(prompts)
        early: list[deque[int]] = [deque() for _ in prompts]  # tokens of short prompts, sampled before their step
        for step in range(sampling.max_tokens):
            start = time.perf_counter()
            if step == 0:
                hidden = [self._prefill(batch, sampling, generator, early) for batch in batches]
            else:
                hidden = [self.model(batch.tokens_B1, caches=batch.caches)[:, -1] for batch in batches]
            for batch in batches:
                metrics.reads.record(step, len(batch.positions), batch.caches)
            tokens_B1 = sample(self.model.logits(torch.cat(hidden)).float(), sampling, generator)
            for batch, part_B1 in zip(batches, tokens_B1.split([len(batch.positions) for batch in batches])):
                batch.tokens_B1 = part_B1
            new: list[int | None] = [None] * len(prompts)
            for position, newest in zip(order, tokens_B1[:, 0].tolist()):
                early[position].append(newest)
                token = early[position].popleft()
                active[position] = active[position] and token not in self.stop_tokens
                new[position] = token if active[position] else None
            seconds, count = time.perf_counter() - start, sum(active)
            metrics.new_tokens += count
            if step == 0:
                metrics.prefill_seconds = seconds
                metrics.cache_bytes = sum(t.nbytes for b in batches for cache in b.caches for t in cache.tensors())
                metrics.reads.index_bytes = sum(index_bytes(batch.caches) for batch in batches)
            else:
                metrics.decode_seconds += seconds
                metrics.decode_tokens += count
            if count == 0:
                return
            yield new

    def _prefill(self, batch: _Batch, sampling: Sampling, generator: Generator, early: Sequence[deque[int]]) -> Tensor:
        """(B, D) the last hidden state of every sequence, once the longest prompt is read; ``early`` gets what shorter
        prompts have decoded by then."""
        prompts_BT = batch.prompts_BT
        shortest = int((prompts_BT >= 0).sum(1).min())
        hidden_BD = self.model(prompts_BT[:, :shortest], caches=batch.caches)[:, -1]
        decoded: list[Tensor] = []
        for at in range(shortest, prompts_BT.shape[1]):
            given_B1 = prompts_BT[:, at, None]
            sampled_B1 = sample(self.model.logits(hidden_BD).float(), sampling, generator)
            decoded.append(sampled_B1.masked_fill(given_B1 >= 0, -1))
            hidden_BD = self.model(torch.where(given_B1 < 0, sampled_B1, given_B1), caches=batch.caches)[:, -1]
        if decoded:
            for position, tokens in zip(batch.positions, torch.cat(decoded, 1).tolist()):
                early[position].extend(token for token in tokens if token >= 0)
        return hidden_BD

    def _batches(self, prompts: list[list[int]], new_tokens: int, spread: int) -> list[_Batch]:
        longest_of: dict[int, int] = {}  # length of a prompt -> that of the longest in its batch
        longest = -1
        for length in sorted({len(prompt) for prompt in prompts}, reverse=True):
            if longest - length > spread or longest < 0:
                longest = length
            longest_of[length] = longest
        by_longest: dict[int, list[int]] = {}
        for position, prompt in enumerate(prompts):
            by_longest.setdefault(longest_of[len(prompt)], []).append(position)
        device = self.model.embedding.weight.device
        return [
            _Batch(
                positions,
                torch.tensor([prompts[i] + [-1] * (length - len(prompts[i])) for i in positions], device=device),
                torch.empty(0),
                self.model.new_caches(len(positions), length + new_tokens, self.policy.cache_for),
            )
            for length, positions in by_longest.items()
        ]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of ``prompt`` as the beginning of a document."""
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    if symbol is None:  # other tokenizers mark the beginning of a text in their own way
        return tokenizer.encode(prompt).ids
    # in training the symbol precedes every document
    return [symbol, *tokenizer.encode(prompt, add_special_tokens=False).ids]


def sample(scores_BV: Tensor, sampling: Sampling, generator: Generator) -> Tensor:
    """One token per row: (B, V) scores -> (B, 1) ids."""
    if sampling.temperature == 0:
        return scores_BV.argmax(-1, keepdim=True)
    if sampling.top_k is not None and sampling.top_k < scores_BV.shape[-1]:
        smallest_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < smallest_B1, -torch.inf)
    return torch.multinomial((scores_BV / sampling.temperature).softmax(-1), 1, generator=generator)
