"""N-gram embedding (arXiv 2601.21204, known to us second-hand): the last tokens select rows of hashed tables.

    e_i = 1/M (E_0[t_i] + Σ_{n=2..N} Σ_{k=1..K} W_nk E_nk[H_nk(i)])        H_nk(i) = (Σ_{j<n} t_{i-j} V_0^j) mod V_nk

E_nk (V_nk, D / ((N-1) K)): the number of parameters does not depend on N and K, and neither do the matrix products,
D·D per token. Positions before the first token of a document count as id 0; no n-gram crosses a document boundary.

Ours: the sizes V_nk (:func:`table_sizes`), and tables that start at zero, so that an n-gram never seen in training adds
nothing. (One run each of a tiny model, 250,000 tokens, amplify: sqrt: 1.98 bits per byte; 2.48 with rows that start as
large as E_0.)

Legend: B batch, T time, D model width, V vocabulary, C tables (N-1)·K, P channels of a table, N largest order, R rows
of all tables.
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import Cache, Cost, Range, RescalingPair, Role, embeddings
from workbench.embeddings.token import TokenEmbedding
from workbench.layers import INIT_SCALE, linear_flops

MIN_RATIO_DISTANCE = 0.01
"""Smallest distance of V_nk / V_0 to a fraction with denominator up to 6; otherwise frequent n-grams collide
systematically."""
MIN_RELATIVE_PURITY = 0.95
"""Warn about a table whose row purity is below this fraction of what random hashing gives."""


class TokenCache(Cache):
    """The last N - 1 tokens, (B, N - 1) int64; id 0 before the first."""

    ragged = True

    def __init__(self, batch: int, num_tokens: int, device: torch.device | str):
        self.tokens_BP = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.tokens_BP]

    def store_in(self, dtype: torch.dtype) -> str | None:
        return None

    def extend(self, tokens_BT: Tensor) -> Tensor:
        """Append T tokens. Returns the cached tokens, then the new ones."""
        seen = torch.cat((self.tokens_BP, tokens_BT), dim=1)
        self.tokens_BP.copy_(seen[:, seen.shape[1] - self.tokens_BP.shape[1] :])
        if self.positions_B is None:
            self.length += tokens_BT.shape[1]
        return seen


@embeddings.register
class NgramEmbedding(TokenEmbedding):
    """Rows for the last 2 to N tokens, added to the row of the token."""

    conformance_cases = ({}, {"order": 5, "tables": 1, "size": 2, "average": "orders", "amplify": "norm"})
    roles = {**TokenEmbedding.roles, "tables": Role.EMBEDDING, "mix": Role.HIDDEN}

    class Config(TokenEmbedding.Config):
        """Hashed tables of n-grams, added to the token's vector."""

        kind: Literal["ngram"] = "ngram"  # type: ignore[assignment]
        amplify: Literal["none", "sqrt", "norm"] = "sqrt"
        """Amplification before the first block: none, multiplication by sqrt(D), or RMSNorm with a gain. Without it the
        average leaves the token's own vector M times smaller than a plain embedding does."""
        order: Annotated[int, Field(ge=2)] = 3
        """Largest n-gram N, in tokens."""
        tables: Annotated[int, Field(ge=1)] = 2
        """Tables K of every order."""
        size: float = 10.0
        """Rows of a table, as a multiple of the vocabulary; all tables together have about size · V · D parameters."""
        average: Literal["branches", "orders"] = "branches"
        """The divisor M: branches, 1 + K (N - 1), as in the released model (second-hand); or orders, N."""
        moduli: tuple[int, ...] = ()
        """Rows of every table, order by order. Default: distinct primes from size · V upwards, away from simple
        fractions of V."""
        base: int | None = None
        """V_0 of the hash. Default: the vocabulary."""

        def resolved(self, width: int, vocabulary: int) -> Self:
            base = vocabulary if self.base is None else self.base
            count = (self.order - 1) * self.tables
            require(
                width % count == 0,
                "tables",
                got=f"{count} tables in all",
                expected=f"a divisor of width={width}: they share its channels",
                do="Change order or tables.",
            )
            require(self.size * base >= 2 and base >= 2, "size", got=self.size, expected="tables of at least two rows")
            require(
                self.moduli or self.size < base,
                "size",
                got=f"{self.size:g} with a vocabulary of {base}",
                expected=f"less than {base}: there are no more bigrams",
                do="Choose smaller tables, or a larger vocabulary.",
            )
            require(
                self.moduli or base >= 7,
                "moduli",
                got="none",
                expected="table sizes, for a vocabulary smaller than 7: every size is close to a simple fraction of it",
                do="Or choose a larger vocabulary.",
            )
            moduli = self.moduli or table_sizes(base, self.size, count)
            require(
                len(moduli) == count,
                "moduli",
                got=f"{len(moduli)} sizes",
                expected=f"{count}: tables={self.tables} for each of the orders 2 to {self.order}",
            )
            repeated = next((modulus for modulus in moduli if moduli.count(modulus) > 1), None)
            require(
                repeated is None,
                "moduli",
                got=f"{repeated} twice",
                expected="all different: equal tables of one order are one table",
            )
            orders = [n for n in range(2, self.order + 1) for _ in range(self.tables)]
            for n, modulus in zip(orders, moduli):
                require(
                    2 <= modulus < base**n and base * modulus * n < 2**62,
                    "moduli",
                    got=modulus,
                    expected=f"between 2 and the number of {n}-grams, {base}^{n}, and products below 2^62",
                )
            return self.changed(moduli=moduli, base=base)

    powers_CN: Tensor
    moduli_C: Tensor
    starts_C: Tensor

    def __init__(self, config: Any, width: int, vocabulary: int):
        super().__init__(config, width, vocabulary)
        self.N, self.moduli = config.order, config.moduli
        C = len(config.moduli)
        self.P, self.M = width // C, config.order if config.average == "orders" else 1 + C
        self.tables = nn.Parameter(torch.empty(sum(config.moduli), self.P))
        self.mix = nn.Parameter(torch.empty(width, C * self.P))
        self.orders = [n for n in range(2, self.N + 1) for _ in range(config.tables)]
        powers = [
            [pow(config.base, j, m) if j < n else 0 for j in range(self.N)] for n, m in zip(self.orders, self.moduli)
        ]
        starts = [0, *np.cumsum(self.moduli[:-1]).tolist()]
        # int64 constants: moved with the module, not saved in checkpoints
        self.register_buffer("powers_CN", torch.tensor(powers), persistent=False)
        self.register_buffer("moduli_C", torch.tensor(self.moduli), persistent=False)
        self.register_buffer("starts_C", torch.tensor(starts), persistent=False)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "tables":
            parameter.zero_()
        else:
            fan_in = self.weight.shape[1] if name == "weight" else self.P
            parameter.normal_(0.0, INIT_SCALE / math.sqrt(fan_in), generator=generator)

    def forward(self, tokens_BT: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        rows_BTC = self.rows(self.context(tokens_BT, segments, cache))
        branches_BTE = F.embedding(rows_BTC, self.tables).flatten(-2)
        e_BTD = F.embedding(tokens_BT, self.weight) + F.linear(branches_BTE, self.mix)
        return self.amplified(e_BTD / self.M)

    def context(self, tokens_BT: Tensor, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, N) each token and those before it, the nearest first; id 0 before the start of the document."""
        T, before = tokens_BT.shape[1], self.N - 1
        padded = cache.extend(tokens_BT) if isinstance(cache, TokenCache) else F.pad(tokens_BT, (before, 0))
        context_BTN = padded.unfold(1, T, 1).transpose(1, 2).flip(-1)
        if segments is None:
            return context_BTN
        # no segment has the number -2: the padding belongs to no document
        segments_BTN = F.pad(segments, (before, 0), value=-2).unfold(1, T, 1).transpose(1, 2).flip(-1)
        return context_BTN.where(segments_BTN == segments[..., None], 0)

    def rows(self, context_BTN: Tensor) -> Tensor:
        """(B, T, C) rows of ``tables``."""
        hash_BTC = (context_BTN[:, :, None] * self.powers_CN).sum(-1) % self.moduli_C
        return hash_BTC + self.starts_C

    def new_cache(self, batch: int, device: torch.device | str) -> Cache:
        return TokenCache(batch, self.N - 1, device)

    def width_obstacle(self) -> str | None:
        return "tables of n-grams share the channels of the width"

    def rescaling_pairs(self) -> list[RescalingPair]:
        # one scale per table: one per channel would be exact too, but its index would be as large as the tables
        table_C = torch.arange(len(self.moduli))
        rows = table_C.repeat_interleave(torch.tensor(self.moduli))[:, None]
        columns = table_C.repeat_interleave(self.P)[None]
        return [RescalingPair("tables_mix", {"tables": rows}, {"mix": columns}, table_C)]

    def inspect(self, tokens_BT: Tensor, segments: Tensor) -> dict[str, Any]:
        """Purity of the tables' rows on this sample (:func:`row_purity`), and that of random hashing. Padding does not
        count.

        Warns about tables below :data:`MIN_RELATIVE_PURITY`.
        """
        context_BTN = self.context(tokens_BT, segments)
        is_token_BT = segments >= 0
        context_MN, rows_MC = context_BTN[is_token_BT], self.rows(context_BTN)[is_token_BT]
        tables = []
        for c, (n, modulus) in enumerate(zip(self.orders, self.moduli)):
            grams = context_MN[:, :n].numpy()
            _, first, count = np.unique(grams, axis=0, return_index=True, return_counts=True)
            purity = row_purity(rows_MC[:, c].numpy()[first], count)
            random = row_purity(np.random.default_rng(0).integers(modulus, size=len(count)), count)
            tables.append({"order": n, "rows": modulus, "purity": purity, "random_purity": random})
            if purity < MIN_RELATIVE_PURITY * random:
                warnings.warn(
                    f"n-gram table of order {n} with {modulus} rows: row purity {purity:.2f}, but {random:.2f} with a "
                    "random hash; choose another size or other moduli",
                    stacklevel=2,
                )
        return {"tables": tables}

    @classmethod
    def cost(cls, config: Any, width: int, vocabulary: int) -> Cost:
        plain, C = TokenEmbedding.cost(config, width, vocabulary), len(config.moduli)
        mix = width * (width // C * C)
        return Cost(
            parameters=plain.parameters + sum(config.moduli) * (width // C) + mix,
            active_parameters=plain.active_parameters + mix,
            flops=linear_flops((width // C * C, width)),
            cache_bytes=(config.order - 1) * 8,
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {
            "size": Range(values=(config.size / 2, config.size)),
            "amplify": Range(values=("none", "sqrt", "norm")),
        }


def table_sizes(base: int, size: float, count: int) -> tuple[int, ...]:
    """The first ``count`` primes from ``size · base`` upwards whose ratio to ``base`` is at least
    :data:`MIN_RATIO_DISTANCE` away from every fraction with a denominator up to 6.

    Exact multiples put every n-gram with the same last token into few rows, and in vocabularies sorted by frequency
    sizes close to a simple fraction collide more often too (our measurement on Zipf-distributed bigrams).
    """
    sizes: list[int] = []
    candidate = math.ceil(size * base)
    while len(sizes) < count:
        ratio = candidate / base
        distance = min(abs(ratio * q - round(ratio * q)) / q for q in range(1, 7))
        if distance >= MIN_RATIO_DISTANCE and all(candidate % d for d in range(2, math.isqrt(candidate) + 1)):
            sizes.append(candidate)
        candidate += 1
    return tuple(sizes)


def row_purity(row_G: np.ndarray, count_G: np.ndarray) -> float:
    """Fraction of a row's uses that come from the token's own n-gram, averaged over tokens; 1 without collisions.

    Args:
        row_G: row of each distinct n-gram.
        count_G: occurrences of each distinct n-gram.
    """
    _, index_G = np.unique(row_G, return_inverse=True)
    uses_G = np.bincount(index_G, weights=count_G)[index_G]
    return float((count_G * (count_G / uses_G)).sum() / count_G.sum())
