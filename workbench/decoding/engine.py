"""The decoding loop: prefill, then one token per sequence and step. Legend: B prompts, T time, D model width."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Generator, Tensor

from workbench.accounting import account
from workbench.config import ConfigError, require
from workbench.contract import Cache, Component
from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.decoding.policy import CACHE_TYPES, CacheType, Policy, PolicyConfig, new_caches, policies
from workbench.decoding.reads import ReadLog, host_bytes, index_bytes
from workbench.decoding.step import Sampling, Step
from workbench.decoding.stops import StopSearch, before_stop, withheld
from workbench.formatting import size
from workbench.model import LanguageModel

AUTO_TOKENS = 32
"""New tokens from which ``graphs="auto"`` captures steps: a capture takes about as long as ten steps without one."""


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
    """Bytes of all caches on the device, as allocated."""
    host_bytes: int = 0
    """Bytes of all caches on the host, under a policy that offloads."""
    step_bytes: float = 0.0
    """Bytes that the newest step had to move: weights once, as far as its tokens use them, and caches as far as they
    are read. Set at the end."""
    peak_bytes: int = 0
    """Most bytes of the device that tensors took at once, weights included; 0 on a CPU."""
    reads: ReadLog = field(default_factory=ReadLog)
    """What every step read, where the policy reads less than everything."""

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding over all sequences, without prefill; 0 after a single step."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """All numbers as plain data: those above, ``tokens_per_second``, and ``reads``, the means of
        :meth:`workbench.decoding.reads.ReadLog.means` with ``index_bytes``."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        reads = {**self.reads.means(), "index_bytes": self.reads.index_bytes} if self.reads.steps else {}
        return {**numbers, "tokens_per_second": self.tokens_per_second, "reads": reads}

    def summary(self) -> str:
        """Rate, bytes and memory in one line, and what the policy read in another, where it reads less than
        everything."""
        parts = [
            f"{self.tokens_per_second:,.1f} tokens/s after a prefill of {self.prefill_seconds:.2f} s",
            f"a step moves {size(self.step_bytes)}",
            f"caches take {size(self.cache_bytes)}",
        ]
        if self.peak_bytes:
            parts.append(f"peak memory {size(self.peak_bytes)}")
        return "\n".join(filter(None, (", ".join(parts), self.reads.summary(self.cache_bytes))))


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
    """New token ids of every prompt, without the stop token, and with those of a stop string."""
    texts: list[str]
    """The same as text, up to a stop string; empty where the engine has no tokenizer."""
    metrics: Metrics


class Engine:
    """Generates with one model and one policy.

    Prompts may differ in length: each is prefilled by itself or with those of equal length, and then all are decoded
    together, every sequence at its own position. That is exact for every mixer. Sequences of which one would take more
    than twice the memory of another are decoded in separate batches, and so are sequences of different lengths where
    the cache of a layer cannot have them (:attr:`workbench.contract.Cache.ragged`).

    Args:
        model: in evaluation mode, on any device.
        tokenizer: for prompts and results as text. Without one, prompts are token ids.
        policy: a registered policy, by name, as its configuration, as a mapping with its ``kind``, or built; it decides
            what a step reads.
        stop_tokens: ids that end a sequence. Default: the tokenizer's document symbol and the model's ``stop_tokens``.
        graphs: whether steps are replayed from a CUDA graph: on, off, or auto, where possible and for at least
            :data:`AUTO_TOKENS` new tokens.
        compiled: whether the blocks are compiled for their steps, which takes a minute at the first use on a device and
            makes fewer, larger kernels.
        cache_dtype: type of what is cached: that of the model (model), bf16, or eight bits with a step size for every
            token and head (int8, fp8). In eight bits are keys and values, and latents without their rotated keys; the
            states of the delta-rule family stay as they are.
        prefill_tokens: tokens of all sequences in one pass over prompts, at most, but two of every sequence; bounds the
            memory of a prefill.

    Raises:
        ConfigError: when the model cannot decode with caches, the policy refuses one of its mixers, ``graphs`` is on
            where no step can be captured, or a layer cannot cache in ``cache_dtype``.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        policy: Policy | PolicyConfig | Mapping[str, Any] | str = "dense",
        stop_tokens: Collection[int] | None = None,
        *,
        graphs: Literal["auto", "on", "off"] = "auto",
        compiled: bool = False,
        cache_dtype: CacheType = "model",
        prefill_tokens: int = 2**15,
    ):
        without = model.config.lacking("decode")
        require(not without, "model", got=", ".join(without), expected="components that decode with a cache")
        require(graphs in ("auto", "on", "off"), "graphs", got=graphs, expected="auto, on or off")
        require(prefill_tokens >= 1, "prefill_tokens", got=prefill_tokens, expected="at least 1")
        if not isinstance(policy, Policy):
            config: PolicyConfig = policies.parse(policy)
            policy = policies[config.kind](config)
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        self.policy.prepare(model)
        self.graphs, self.compiled, self.prefill_tokens = graphs, compiled, prefill_tokens
        require(cache_dtype in CACHE_TYPES, "cache_dtype", got=cache_dtype, expected=" or ".join(CACHE_TYPES))
        self.cache_dtype = cache_dtype
        self.new_caches(1, 1)
        obstacle = self.graph_obstacle()
        require(graphs != "on" or obstacle is None, "graphs", got="on", expected=f"off or auto: {obstacle}")
        self.document_symbol: int | None = None if tokenizer is None else tokenizer.token_to_id(DOCUMENT_SYMBOL)
        if stop_tokens is None:
            symbols = () if self.document_symbol is None else (self.document_symbol,)
            stop_tokens = model.stop_tokens.union(symbols)
        self.stop_tokens = frozenset(stop_tokens)

    def new_caches(self, batch: int, length: int) -> list[Cache]:
        """Empty caches for ``batch`` sequences of at most ``length`` tokens.

        Raises:
            ConfigError: as :func:`workbench.decoding.policy.new_caches`.
        """
        return new_caches(self.model, self.policy, batch, length, self.cache_dtype)

    def graph_obstacle(self) -> str | None:
        """Why no step can be captured in a CUDA graph; None where one can."""
        if self.model.embedding.weight.device.type != "cuda":
            return f"the model is on {self.model.embedding.weight.device.type!r}, and graphs are those of CUDA"
        if (reason := self.policy.graph_obstacle()) is not None:
            return reason
        for name, module in self.model.named_modules():
            if isinstance(module, Component) and (reason := module.graph_obstacle()) is not None:
                return f"{name}: {reason}"
        if not self._ragged():
            return "the cache of a layer counts its tokens on the host"
        return None

    @torch.inference_mode()
    def _ragged(self) -> bool:
        """Whether every cache takes its positions from the device."""
        return all(cache.ragged for cache in self.new_caches(1, 1))

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
            ConfigError: for prompts without tokens, and for texts or stop strings without a tokenizer.
        """
        ids, sampling = self._token_ids(prompts), sampling or Sampling()
        stream = self.stream(ids, sampling)
        tokens: list[list[int]] = [[] for _ in ids]
        for step in stream:
            for new, token in zip(tokens, step, strict=True):
                if token is not None:
                    new.append(token)
        texts = [] if self.tokenizer is None else [self.decode(prompt, new) for prompt, new in zip(ids, tokens)]
        return Generation(tokens, [before_stop(text, sampling.stop) for text in texts], stream.metrics)

    def complete(self, prompt: str, sampling: Sampling | None = None) -> TextStream:
        """The text after ``prompt``, in pieces as they are generated. Joined, they are what :meth:`generate` returns.

        Raises:
            ConfigError: as :meth:`generate`.
        """
        (ids,) = self._token_ids([prompt])
        sampling = sampling or Sampling()
        stream = self.stream([ids], sampling)
        return TextStream(self._pieces(ids, stream, sampling.stop), stream.metrics)

    def _pieces(self, prompt: list[int], stream: Stream, stop: Sequence[str]) -> Iterator[str]:
        new: list[int] = []
        length = 0
        for (token,) in stream:
            if token is not None:
                new.append(token)
                text = before_stop(self.decode(prompt, new), stop)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                    end = max(length, len(text) - withheld(text, stop))
                    yield text[length:end]
                    length = end
        yield before_stop(self.decode(prompt, new), stop)[length:]

    def stream(self, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: Sampling | None = None) -> Stream:
        """The new tokens of all prompts, step by step. Arguments and errors as of :meth:`generate`."""
        ids, sampling = self._token_ids(prompts), sampling or Sampling()
        require(
            not sampling.stop or self.tokenizer is not None,
            "stop",
            got=sampling.stop,
            expected="no stop strings, as the engine has no tokenizer",
            do="Give stop_tokens.",
        )
        metrics = Metrics(prompt_tokens=sum(map(len, ids)))
        return Stream(self._steps(ids, sampling, metrics), metrics)

    def _token_ids(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        require(not isinstance(prompts, str), "prompts", got=prompts, expected="a list of prompts")
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        require(ids, "prompts", got=prompts, expected="at least one prompt")
        for prompt, tokens in zip(prompts, ids):
            require(tokens, "prompt", got=prompt, expected="at least one token")
        return ids

    @torch.inference_mode()
    def _steps(self, prompts: list[list[int]], sampling: Sampling, metrics: Metrics) -> Iterator[list[int | None]]:
        device = self.model.embedding.weight.device
        generator = Generator(device).manual_seed(sampling.seed)
        ragged, use_graphs = self._ragged(), self._use_graphs(sampling)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        groups = self._groups([len(prompt) for prompt in prompts], sampling.max_tokens, ragged)
        batches = []
        for group in groups:
            caches, hidden_BD = self._prefill([prompts[i] for i in group], sampling.max_tokens, ragged)
            metrics.reads.record(0, len(group), caches)
            lengths = [len(prompts[i]) for i in group]
            settings: dict[str, Any] = {"ragged": ragged, "graphs": use_graphs, "compiled": self.compiled}
            batches.append(Step(self.model, caches, hidden_BD, lengths, sampling, generator, **settings))
        order = [position for group in groups for position in group]
        active = [True] * len(prompts)
        searches = [self._stop_search(prompt, sampling.stop) for prompt in prompts]
        for step, tokens in enumerate(self._run_ahead(batches, sampling.max_tokens, metrics)):
            new: list[int | None] = [None] * len(prompts)
            for position, token in zip(order, tokens):
                active[position] = active[position] and token not in self.stop_tokens
                new[position] = token if active[position] else None
            seconds, count = time.perf_counter() - start, sum(active)
            for position, (newest, search) in enumerate(zip(new, searches)):
                if newest is not None and search is not None and search.completed_by(newest):
                    active[position] = False
            has_ended = not any(active) or step == sampling.max_tokens - 1
            metrics.new_tokens += count
            if step == 0:
                caches = [cache for batch in batches for cache in batch.caches]
                metrics.prefill_seconds = seconds
                metrics.host_bytes = host_bytes(caches)
                allocated = {t.data_ptr(): t.nbytes for cache in caches for t in cache.tensors()}  # layers share some
                metrics.cache_bytes = sum(allocated.values()) - metrics.host_bytes
                metrics.reads.index_bytes = index_bytes(caches)
            else:
                metrics.decode_seconds += seconds
                metrics.decode_tokens += count
            if device.type == "cuda":
                metrics.peak_bytes = torch.cuda.max_memory_allocated(device)
            if has_ended:
                metrics.step_bytes = self._step_bytes(batches, [len(prompts[i]) + step for i in order])
            if count:
                yield new
            if has_ended:
                return
            start = time.perf_counter()

    def _stop_search(self, prompt: list[int], stop: Sequence[str]) -> StopSearch | None:
        if not stop:
            return None
        assert self.tokenizer is not None
        return StopSearch(self.tokenizer, prompt, stop, partial(self.decode, prompt))

    def _step_bytes(self, batches: list[Step], lengths: list[int]) -> float:
        """Bytes that a step of all batches moves."""
        config, element = self.model.config, self.model.embedding.weight.itemsize
        assert config.width and config.vocabulary
        cost, total, first = account(config, 1, element), 0.0, 0
        for batch in batches:
            count = len(batch.tokens_B1)
            used = min(cost.non_embedding, count * cost.active) + config.width * config.vocabulary
            part, first = lengths[first : first + count], first + count
            total += element * used + sum(cache.step_bytes(part) for cache in batch.caches)
        return total

    def _use_graphs(self, sampling: Sampling) -> bool:
        if self.graphs == "auto":
            return sampling.max_tokens >= AUTO_TOKENS and self.graph_obstacle() is None
        return self.graphs == "on"

    def _run_ahead(self, batches: list[Step], steps: int, metrics: Metrics) -> Iterator[list[int]]:
        """The tokens of all batches after the prefill and after each further step. On a GPU the next step is under way
        before the host waits for the tokens of one."""
        pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        for step in range(steps):
            for batch in batches if step else ():
                batch.run()
                metrics.reads.record(step, len(batch.tokens_B1), batch.caches)
            tokens_B = torch.cat([batch.tokens_B1 for batch in batches])[:, 0]
            event = None
            if tokens_B.is_cuda:
                tokens_B = torch.empty(tokens_B.shape, dtype=tokens_B.dtype, pin_memory=True).copy_(
                    tokens_B, non_blocking=True
                )
                event = torch.cuda.Event()
                event.record()
            pending.append((tokens_B, event))
            while pending and (event is None or len(pending) > 1 or step == steps - 1):
                newest_B, copied = pending.popleft()
                if copied is not None:
                    copied.synchronize()
                yield newest_B.tolist()

    def _groups(self, lengths: Sequence[int], new_tokens: int, ragged: bool) -> list[list[int]]:
        """Numbers of the prompts of every batch, the longest first."""
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            longest = lengths[groups[-1][0]] if groups else 0
            fits = longest + new_tokens <= 2 * (lengths[number] + new_tokens) if ragged else longest == lengths[number]
            if groups and fits:
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    def _prefill(self, prompts: list[list[int]], new_tokens: int, ragged: bool) -> tuple[list[Cache], Tensor]:
        """Caches with the prompts, sorted by length, and (B, D) their last hidden states.

        A pass has prompts of one length. As few as possible come in pieces: a prompt that is passed at once meets no
        cache, which attention kernels are fastest at.
        """
        device = self.model.embedding.weight.device
        caches = self.new_caches(len(prompts), len(prompts[0]) + new_tokens)
        hidden = []
        first = 0
        while first < len(prompts):
            length = len(prompts[first])
            count = sum(len(prompt) == length for prompt in prompts)
            rows = max(1, self.prefill_tokens // length) if ragged else count
            last = min(first + rows, first + count, len(prompts))
            last = next((i for i in range(first, last) if len(prompts[i]) != length), last)
            parts = caches if last - first == len(prompts) else [cache.part(first, last) for cache in caches]
            tokens_BT = torch.tensor(prompts[first:last], device=device)
            pieces = -(-tokens_BT.numel() // self.prefill_tokens)
            # a pass over one token is a step, of which a policy decides what it reads
            for piece in tokens_BT.tensor_split(min(pieces, max(1, length // 2)), dim=1):
                hidden_BTD = self.model(piece, caches=parts)
            hidden.append(hidden_BTD[:, -1])
            first = last
        return caches, torch.cat(hidden)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of ``prompt`` as the beginning of a document."""
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    if symbol is None:  # other tokenizers mark the beginning of a text in their own way
        return tokenizer.encode(prompt).ids
    # in training the symbol precedes every document
    return [symbol, *tokenizer.encode(prompt, add_special_tokens=False).ids]
