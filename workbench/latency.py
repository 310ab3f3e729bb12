"""Measured time of a layer by document length and number of blocks per query, T(length, blocks).

A table belongs to one device and to the layers that it lists. Times are made monotone (:func:`monotone`) and
interpolated linearly between measured points; a document shorter than the shortest measured one costs in proportion to
its tokens, since in a row of several documents it shares the fixed costs (ours). Measured by
`workbench latency-table`.

Legend: X lengths, K numbers of blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.optimize import isotonic_regression

from workbench.config import Config, ConfigError, require
from workbench.distribution import shipped
from workbench.files import write_json

__all__ = ["LatencyTable", "LayerLatency", "TableConfig", "monotone"]

FORMAT = 1
"""Version of the file."""


def monotone(values_XK: np.ndarray, tolerance: float = 1e-12) -> np.ndarray:
    """The matrix closest to ``values_XK`` in the sum of squares that falls along neither axis.

    Dykstra's algorithm (Boyle and Dykstra, 1986) over isotonic regressions of rows and of columns: the projection onto
    the intersection of both sets, where alternating projections would only reach some point of it.
    """
    x = values_XK.astype(float)
    of_rows, of_columns = np.zeros(x.shape), np.zeros(x.shape)
    for _ in range(10_000):
        before = x
        y = np.apply_along_axis(lambda row: isotonic_regression(row).x, 1, x + of_rows)
        of_rows = x + of_rows - y
        x = np.apply_along_axis(lambda column: isotonic_regression(column).x, 0, y + of_columns)
        of_columns = y + of_columns - x
        if np.abs(x - before).max() <= tolerance * np.abs(values_XK).max():
            break
    # the last projection was along columns, whose rounding may leave a fall along rows
    risen: np.ndarray = np.maximum.accumulate(np.maximum.accumulate(x, axis=1), axis=0)
    return risen


@dataclass(frozen=True)
class LayerLatency:
    """Times of one layer: its forward and backward pass over one document that fills a row."""

    lengths: tuple[int, ...]
    """(X,) tokens, ascending."""
    budgets: tuple[int, ...]
    """(K,) blocks per query, ascending; empty for a layer that selects no blocks."""
    seconds: tuple[tuple[float, ...], ...]
    """(X, K) median seconds as measured; K is 1 for a layer without budgets."""
    layer: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the layer, without its number of blocks."""

    @cached_property
    def monotone_XK(self) -> np.ndarray:
        """``seconds``, made monotone."""
        return monotone(np.array(self.seconds))

    def seconds_of(self, lengths: np.ndarray, blocks: float | None) -> float:
        """Seconds of a micro-batch: the sum over its documents.

        Args:
            lengths: (documents,) tokens of each, padding as a document of its own.
            blocks: per query; between measured numbers interpolated. Ignored by a layer that selects none.

        Raises:
            ConfigError: for a document or number outside of the table.
        """
        return float(self.at(lengths, blocks).sum())

    def at(self, lengths: np.ndarray, blocks: float | None) -> np.ndarray:
        """(documents,) seconds of every document. Arguments as of :meth:`seconds_of`."""
        lengths = np.asarray(lengths, dtype=float)
        require(
            not lengths.size or lengths.max() <= self.lengths[-1],
            "table",
            got=f"a document of {int(lengths.max(initial=0))} tokens",
            expected=f"documents of at most {self.lengths[-1]} tokens, the longest measured",
            do="Measure a table with longer --lengths.",
        )
        if self.budgets:
            assert blocks is not None, "a layer with budgets needs their number"
            require(
                self.budgets[0] <= blocks <= self.budgets[-1],
                "table",
                got=f"{blocks:g} blocks per query",
                expected=f"{self.budgets[0]} to {self.budgets[-1]}, the measured numbers",
                do="Measure a table with these --budgets.",
            )
            above = min(int(np.searchsorted(self.budgets, blocks)), len(self.budgets) - 1)
            below = max(0, above - 1)
            width = self.budgets[above] - self.budgets[below]
            share = (blocks - self.budgets[below]) / width if width else 0.0
            times_X = (1 - share) * self.monotone_XK[:, below] + share * self.monotone_XK[:, above]
        else:
            times_X = self.monotone_XK[:, 0]
        return np.interp(lengths, (0, *self.lengths), (0.0, *times_X))


@dataclass(frozen=True)
class LatencyTable:
    """Times of the layers of a model on one device."""

    conditions: Mapping[str, Any]
    """What the times depend on beside the layer: device, width, precision, compilation, recomputation
    (:func:`workbench.training.latency.timing_conditions`)."""
    layers: Mapping[str, LayerLatency]
    """Layer key -> its times (:func:`workbench.training.latency.layer_key`)."""
    order: tuple[str, ...]
    """Keys of the layers of the measured model, from the first to the last."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Code, libraries, date."""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of everything but the provenance: what budgets depend on."""
        plain = {name: value for name, value in self._plain().items() if name != "provenance"}
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def seconds(self, lengths: np.ndarray, blocks: Sequence[float | None]) -> float:
        """Seconds of a micro-batch in all layers of the measured model: forward and backward.

        Args:
            lengths: (documents,) tokens of each, padding as a document of its own.
            blocks: per query, one number for every layer of ``order``.

        Raises:
            ConfigError: for another number of layers, and as :meth:`LayerLatency.seconds_of`.
        """
        require(
            len(blocks) == len(self.order),
            "table",
            got=f"a table of a model with {len(self.order)} layers",
            expected=f"one of this model, which has {len(blocks)}",
            do="Measure one: workbench latency-table CONFIG --output FILE.",
        )
        counted = Counter(zip(self.order, blocks))  # most layers are alike
        return sum(number * self.layers[key].seconds_of(lengths, k) for (key, k), number in counted.items())

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), self._plain())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a table.

        Raises:
            ConfigError: when the file is missing, or is no latency table.
        """
        try:
            plain = json.loads(shipped(path).read_text(encoding="utf-8"))
            require(plain["format"] == FORMAT, "table", got=f"format {plain['format']}", expected=f"format {FORMAT}")
            layers = {
                key: LayerLatency(
                    tuple(layer["lengths"]),
                    tuple(layer["budgets"]),
                    tuple(map(tuple, layer["seconds"])),
                    layer["layer"],
                )
                for key, layer in plain["layers"].items()
            }
            return cls(plain["conditions"], layers, tuple(plain["order"]), plain["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError.at(
                "table",
                got=f"{path}, which cannot be read as one ({type(error).__name__}: {error})",
                expected="a latency table",
                do="Measure one on this device: workbench latency-table CONFIG --output FILE.",
            ) from None

    def _plain(self) -> dict[str, Any]:
        layers = {
            key: {
                "layer": dict(layer.layer),
                "lengths": list(layer.lengths),
                "budgets": list(layer.budgets),
                "seconds": [list(row) for row in layer.seconds],
            }
            for key, layer in self.layers.items()
        }
        return {
            "format": FORMAT,
            "conditions": dict(self.conditions),
            "order": list(self.order),
            "layers": layers,
            "provenance": dict(self.provenance),
        }


class TableConfig(Config):
    """Base of configurations that name a latency table. Their identity is that of its times."""

    table: str
    """File of the latency table of this model on this device (`workbench latency-table`)."""
    fingerprint: str | None = None
    """Of the table (:attr:`LatencyTable.fingerprint`). Default: read from it once; a launch and the record of a run
    keep it."""

    @property
    def names_file(self) -> bool:
        """Whether ``table`` is a file."""
        return True

    def canonical(self) -> dict[str, Any]:
        """The content of the table instead of its location."""
        plain = self.plain()
        del plain["fingerprint"]
        if not self.names_file:
            return plain
        return {**plain, "table": self.fingerprint or LatencyTable.load(self.table).fingerprint}

    def pinned(self) -> Self:
        """With the fingerprint of the table, so that its identity needs no file."""
        if self.fingerprint or not self.names_file:
            return self
        return self.changed(fingerprint=LatencyTable.load(self.table).fingerprint)

    def read(self) -> LatencyTable:
        """The table.

        Raises:
            ConfigError: when the file cannot be read, or its times have changed since they were pinned.
        """
        table = LatencyTable.load(self.table)
        require(
            self.fingerprint in (None, table.fingerprint),
            "table",
            got=f"{self.table}, which contains other times now ({table.fingerprint})",
            expected=f"those of the first start ({self.fingerprint})",
            do="Restore the file: the same command resumes. Other times are another run.",
        )
        return table
