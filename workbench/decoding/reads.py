"""What decoding steps read: gathered on the device at every step, copied to the host when someone asks.

Legend: L layers, F fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

FIELDS = ("tokens", "units", "overlap", "hit_rate", "bytes", "dense_bytes", "host_bytes")
"""Means over sequences of one layer's step:

- tokens: tokens attended, per group of heads;
- units: what the policy chooses, per group: blocks, or tokens where it chooses no blocks;
- overlap: share of these that were chosen in the step before as well;
- hit_rate: share of these that were in the resident set, where the policy has one;
- bytes: read from the cache, indices included, and dense_bytes: what attention to all tokens reads;
- host_bytes: copied from the host, for this step or for the next one; 0 where the cache is on the device.

Undefined numbers, such as the overlap of a first step, are NaN on the device and null in tables.
"""


def step_bytes(numbers_F: Tensor, sequences: int) -> float:
    """Bytes that a step of so many sequences read from a cache; waits for the device."""
    return sequences * float(numbers_F[FIELDS.index("bytes")])


def index_bytes(caches: Iterable[Any]) -> int:
    """Bytes that a policy adds to the mixers' own caches, as allocated."""
    tensors = (cache.index_tensors() for cache in caches if hasattr(cache, "index_tensors"))
    return sum(tensor.nbytes for listed in tensors for tensor in listed)


def host_bytes(caches: Iterable[Any]) -> int:
    """Bytes of caches on the host, as allocated."""
    tensors = (cache.host_tensors() for cache in caches if hasattr(cache, "host_tensors"))
    return sum(tensor.nbytes for listed in tensors for tensor in listed)


@dataclass
class ReadLog:
    """What every step of a generation read, in the layers that the policy changes."""

    steps: list[tuple[int, int, list[int], Tensor]] = field(default_factory=list)
    """Step, sequences, layers, (L, F) on the device."""
    index_bytes: int = 0
    """Bytes that the policy's indices add to all caches, as allocated."""

    def record(self, step: int, sequences: int, caches: Iterable[Any]) -> None:
        """Keep the numbers of the caches that have them, without waiting for the device."""
        layers, numbers = [], []
        for layer, cache in enumerate(caches):
            if (latest := getattr(cache, "latest_read", None)) is not None:
                layers.append(layer)
                numbers.append(latest)
        if numbers:
            self.steps.append((step, sequences, layers, torch.stack(numbers)))

    def table(self) -> pl.DataFrame:
        """One row per step, group of sequences that were decoded together, and layer: ``step``, ``sequences``,
        ``layer`` and :data:`FIELDS`."""
        schema = {"step": pl.Int64, "sequences": pl.Int64, "layer": pl.Int64, **dict.fromkeys(FIELDS, pl.Float64)}
        rows = [
            (step, sequences, layer, *values)
            for step, sequences, layers, numbers in self.steps
            for layer, values in zip(layers, numbers.tolist())
        ]
        return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)

    def means(self) -> dict[str, float | None]:
        """Means of :data:`FIELDS` over steps, sequences and layers; None where undefined, empty without steps."""
        if not self.steps:
            return {}
        table = self.table()
        weighted = [
            ((pl.col(name) * pl.col("sequences")).sum() / pl.col("sequences").filter(pl.col(name).is_not_null()).sum())
            .fill_nan(None)
            .alias(name)
            for name in FIELDS
        ]
        return table.select(weighted).row(0, named=True)

    def summary(self, cache_bytes: int) -> str:
        """The means in one line; empty without steps.

        Args:
            cache_bytes: of all caches, indices included.
        """
        means = {name: value for name, value in self.means().items() if value is not None}
        if not means:
            return ""
        shares = [f"{name.replace('_', ' ')} {means[name]:.0%}" for name in ("overlap", "hit_rate") if name in means]
        parts = [
            f"a layer's step attends to {means['tokens']:.0f} tokens",
            f"reads {means['bytes'] / means['dense_bytes']:.1%} of the bytes of all tokens",
            *shares,
            f"indices are {self.index_bytes / cache_bytes:.1%} of the caches",
        ]
        return ", ".join(parts)
