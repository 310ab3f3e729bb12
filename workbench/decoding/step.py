"""One step of a batch: the newest tokens in, the next ones out; run eagerly, or replayed from a CUDA graph.

The step is one function in both cases. It reads and writes memory of the device alone: tokens, positions, caches and
the state of the generator. Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from workbench.config import Config
from workbench.contract import Cache
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
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest most likely tokens whose probabilities sum to at least p (arXiv 1904.09751)."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a sequence; its text ends before the first one. They need a tokenizer."""
    seed: Seed = 0
    """Same seed, model, prompts and device: same tokens."""


def sample(scores_BV: Tensor, sampling: Sampling, generator: Generator) -> Tensor:
    """One token per row, without waiting for the device: (B, V) scores -> (B, 1) ids."""
    if sampling.temperature == 0:
        return scores_BV.argmax(-1, keepdim=True)
    if sampling.top_k is not None and sampling.top_k < scores_BV.shape[-1]:
        smallest_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < smallest_B1, -torch.inf)
    weights_BV = (scores_BV / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered_BV, token_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV  # of more likely tokens
        kept_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
        weights_BV = torch.zeros_like(weights_BV).scatter(-1, token_BV, kept_BV)
    # the first of exponential clocks with these rates: what torch.multinomial computes, which checks them on the host
    clocks_BV = torch.empty_like(weights_BV).exponential_(generator=generator)
    return (weights_BV / clocks_BV).argmax(-1, keepdim=True)


class Step:
    """Sequences that are decoded together.

    Args:
        model: in evaluation mode.
        caches: with the prompts.
        hidden_BD: last hidden states of the prompts.
        lengths: tokens of each prompt.
        sampling: as of the engine.
        generator: of the engine.
        ragged: whether the caches take positions from the device; if not, all ``lengths`` are equal.
        graphs: whether steps are captured, from the second one on.
        compiled: whether blocks are compiled, from the second step on.
    """

    def __init__(
        self,
        model: LanguageModel,
        caches: list[Cache],
        hidden_BD: Tensor,
        lengths: Sequence[int],
        sampling: Sampling,
        generator: Generator,
        *,
        ragged: bool,
        graphs: bool = False,
        compiled: bool = False,
    ):
        self.model, self.caches, self.sampling, self.generator = model, caches, sampling, generator
        self.graphs, self.compiled, self.count = graphs, compiled, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tokens_B1 = self._sample(hidden_BD)
        """The newest token of every sequence."""
        self.positions_B = torch.tensor(lengths, device=hidden_BD.device)
        """Its position."""
        if ragged:
            for cache in caches:
                cache.step_from(self.positions_B)

    def run(self) -> None:
        """Read the newest tokens, and replace them by those that follow."""
        if self.graph is not None:
            self.graph.replay()
        # the first step allocates and compiles what a capture cannot; that of compiled blocks is the second
        elif self.graphs and self.count > self.compiled:
            self._capture()
            self.graph.replay()  # type: ignore[attr-defined]
        else:
            self._run()
        self.count += 1

    def _run(self) -> None:
        with self.model.compiled_steps(self.compiled and self.count > 0):
            hidden_B1D = self.model(self.tokens_B1, caches=self.caches)
        self.tokens_B1.copy_(self._sample(hidden_B1D[:, -1]))
        self.positions_B.add_(1)

    def _sample(self, hidden_BD: Tensor) -> Tensor:
        return sample(self.model.logits(hidden_BD).float(), self.sampling, self.generator)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        if self.sampling.temperature > 0:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self._run()
        self.graph = graph
