"""In-context recall, plain, noisy and fuzzy: three of MAD's six tasks (arXiv 2403.17844, section 3.1 and appendix B).

An example is a list of key–value pairs whose map from keys to values is drawn for the example. A key that occurs again
has the same value, which the model must predict; the last pair always repeats an earlier key:

    tokens    a 7  c 3  b 5  a 7  c 3        targets   – –  – –  – –  7 –  3 –

Keys come from the first half of the symbols, values from the second half. **Noisy**: pairs are replaced by two symbols
of a third set with probability ``noise``. **Fuzzy**: a key is a motif of one to ``key_tokens`` different symbols, a
value one of up to ``value_tokens``; in evaluation keys have the full size. A motif's size is not marked: a key ends
where a value begins. What is left of the length is padding, a symbol of its own, at the beginning.

In training every token is a target, in evaluation the repeated values alone, as published; ``loss_on: answers`` trains
on these as well.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.config import require
from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources

MAD_TRAINING = (
    "12,800 rows of one example, 200 epochs, batch 128, AdamW, cosine to 1e-6; the best of learning rates 1e-4, 5e-4, "
    "1e-3 and weight decays 0, 0.1"
)
MAD_ROWS = (6400, 3200, 1600, 800)


class RecallConfig(SyntheticConfig):
    """Recall of key–value pairs."""

    lengths: Annotated[Lengths, Field(min_length=1)] = (128,)
    vocabulary: Annotated[int, Field(ge=4)] = 16
    """Symbols: keys, values, noise and, for motifs, padding."""
    key_tokens: Annotated[int, Field(ge=1)] = 1
    """Largest number of tokens of a key."""
    value_tokens: Annotated[int, Field(ge=1)] = 1
    """Largest number of tokens of a value."""
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the pairs that are noise."""
    noise_symbols: Annotated[int, Field(ge=0)] = 0
    """Symbols of the noise, part of ``vocabulary``."""
    loss_on: Literal["tokens", "answers"] = "tokens"
    """Targets in training: every token that follows, or repeated values alone."""

    def symbols(self) -> int:
        return self.vocabulary

    @property
    def halves(self) -> tuple[int, int]:
        """Numbers of key symbols and of value symbols."""
        plain = self.vocabulary - self.noise_symbols - (1 if self.fuzzy else 0)
        return plain // 2, plain - plain // 2

    @property
    def fuzzy(self) -> bool:
        """Whether a key or a value may have several tokens."""
        return self.key_tokens > 1 or self.value_tokens > 1

    def model_post_init(self, _context: object) -> None:
        require(
            bool(self.noise) == bool(self.noise_symbols),
            "noise_symbols",
            got=f"{self.noise_symbols} with noise={self.noise}",
            expected="some where there is noise, 0 where there is none",
        )
        keys, values = self.halves
        require(
            keys >= self.key_tokens and values >= self.value_tokens,
            "vocabulary",
            got=f"{self.vocabulary}: {max(0, keys)} keys and {max(0, values)} values",
            expected="as many symbols as the longest motif has",
        )
        smallest = 2 * (self.key_tokens + self.value_tokens)
        self.require_lengths(lambda length: length >= smallest, f"at least {smallest} tokens: two pairs")
        if not self.fuzzy:
            self.require_lengths(lambda length: length % 2 == 0, "an even number: pairs of two tokens")

    def chance(self, vocabulary: int) -> float:
        return 1 - 1 / self.halves[1]

    def target_share(self, context: int) -> float:
        return 1.0 if self.loss_on == "tokens" else 0.5


class Recall(SyntheticTask):
    """Generator of the three tasks."""

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        config: RecallConfig = self.config
        keys, values = config.halves
        K, V, drawn = config.key_tokens, config.value_tokens, length // 2
        key_motifs = _motifs(generator, drawn, keys, K, 1 if split == "train" else K)
        codes = (key_motifs + 1) @ (keys + 1) ** np.arange(K)
        _, first, key = np.unique(codes, return_index=True, return_inverse=True)
        value_motifs = _motifs(generator, len(first), values, V, 1)
        value_motifs[value_motifs >= 0] += keys
        pairs = np.concatenate((key_motifs, value_motifs[key]), axis=1)

        # the pairs that leave room for one more of any size; the last one repeats an earlier key, each as likely
        shown = int((np.cumsum((pairs >= 0).sum(1)) <= length - K - V).sum())
        is_noise = generator.random(shown) < config.noise
        is_noise[int(generator.integers(shown))] = False
        present = np.unique(key[:shown][~is_noise])
        asked = int(present[int(generator.integers(len(present)))])
        order = np.append(np.arange(shown), first[asked])
        pairs, key, is_noise = pairs[order], key[order], np.append(is_noise, False)
        if config.noise_symbols:
            symbols = generator.integers(keys + values, keys + values + config.noise_symbols, pairs.shape)
            pairs = np.where(is_noise[:, None] & (pairs >= 0), symbols, pairs)

        plain = np.flatnonzero(~is_noise)
        repeats = np.zeros(len(pairs), dtype=bool)
        repeats[plain] = True
        repeats[plain[np.unique(key[plain], return_index=True)[1]]] = False  # shown for the first time
        is_answer = np.zeros(pairs.shape, dtype=bool)
        is_answer[:, K:] = repeats[:, None]
        used = pairs >= 0
        padding = length - int(used.sum())
        tokens = np.concatenate((np.full(padding, config.vocabulary - 1), pairs[used])).astype(np.int64)
        wanted = np.zeros(length, dtype=bool)
        wanted[padding:] = is_answer[used] | (split == "train" and config.loss_on == "tokens")
        positions = np.flatnonzero(wanted[1:])
        return Example(
            tokens,
            targets_at(length, positions, tokens[positions + 1]),
            {"length": length, "vocabulary": config.vocabulary},
        )


def _motifs(generator: np.random.Generator, count: int, symbols: int, largest: int, smallest: int) -> np.ndarray:
    """(count, largest) motifs of different symbols, −1 behind their end; sizes are uniform."""
    if largest == 1:
        return generator.integers(symbols, size=(count, 1))
    drawn = np.argsort(generator.random((count, symbols)), axis=1)[:, :largest]
    sizes = generator.integers(smallest, largest + 1, count)
    return np.where(np.arange(largest) < sizes[:, None], drawn, -1)


@sources.register
class InContextRecall(Recall):
    """In-context recall of single-token values by single-token keys."""

    class Config(RecallConfig):
        """In-context recall."""

        kind: Literal["in_context_recall"] = "in_context_recall"

        published = Published(
            "MAD, arXiv 2403.17844, appendix B.1",
            {"lengths": (128,), "vocabulary": 16},
            {"vocabulary": (32, 64, 128), "lengths": (256, 512, 1024), "training_rows": MAD_ROWS},
            MAD_TRAINING,
        )


@sources.register
class NoisyRecall(Recall):
    """In-context recall among pairs of noise."""

    class Config(RecallConfig):
        """Noisy in-context recall."""

        kind: Literal["noisy_in_context_recall"] = "noisy_in_context_recall"
        vocabulary: Annotated[int, Field(ge=4)] = 32
        noise: Annotated[float, Field(ge=0, lt=1)] = 0.2
        noise_symbols: Annotated[int, Field(ge=0)] = 16

        published = Published(
            "MAD, arXiv 2403.17844, appendix B.1",
            {"lengths": (128,), "vocabulary": 32, "noise": 0.2, "noise_symbols": 16},
            {
                "vocabulary": (48, 80, 144),
                "lengths": (256, 512, 1024),
                "noise": (0.4, 0.6, 0.8),
                "training_rows": MAD_ROWS,
            },
            MAD_TRAINING,
        )


@sources.register
class FuzzyRecall(Recall):
    """In-context recall of motifs by motifs."""

    class Config(RecallConfig):
        """Fuzzy in-context recall."""

        kind: Literal["fuzzy_in_context_recall"] = "fuzzy_in_context_recall"
        key_tokens: Annotated[int, Field(ge=1)] = 3
        value_tokens: Annotated[int, Field(ge=1)] = 3

        published = Published(
            "MAD, arXiv 2403.17844, appendix B.1",
            {"lengths": (128,), "vocabulary": 16, "key_tokens": 3, "value_tokens": 3},
            {"vocabulary": (32, 64, 128), "lengths": (256, 512, 1024), "training_rows": MAD_ROWS},
            MAD_TRAINING,
        )
