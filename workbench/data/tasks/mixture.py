"""Several sources in one run: text and tasks, say, in fixed shares of the rows.

    data:
      kind: mixture
      parts:
        - {share: 0.6, data: {corpus: {kind: packages}}}
        - {share: 0.4, data: {kind: in_context_recall}}

A row is of one source. Of every hundred rows each source has its share, in an order that a seed draws; so a row is a
function of its number, as in every stream. Runs are judged on the first source, whose metric, splits and tokenizer are
those of the mixture; suites under ``evaluation`` measure the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.config import Config, ConfigError, require
from workbench.data.sources import Source, SourceConfig, digest, is_intact, prepare, sources, write_card
from workbench.data.streams import RowStream, Split
from workbench.files import locked, replacing_folder
from workbench.metric import Metric
from workbench.seeding import counter_generator, derived_seed

FORMAT = 1
"""Part of the fingerprint; raised when the files or the rules change."""
PERIOD = 100
"""Rows in which every source has its share exactly."""


class Part(Config):
    """One source of a mixture."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Of the rows: a multiple of 0.01."""
    data: Annotated[SerializeAsAny[SourceConfig], BeforeValidator(lambda data: sources.parse(data, "text"))]
    """The source."""


@sources.register
class Mixture(Source):
    """Text and tasks in fixed shares of the rows."""

    class Config(SourceConfig):
        """Several sources in one run, in fixed shares of the rows."""

        kind: Literal["mixture"] = "mixture"
        parts: Annotated[tuple[Part, ...], Field(min_length=2)]
        """The sources. Runs are judged on the first one."""

        def model_post_init(self, _context: Any) -> None:
            rows = [rows_of(part.share) for part in self.parts]
            require(
                sum(rows) == PERIOD and all(rows),
                "parts",
                got=f"shares {', '.join(str(part.share) for part in self.parts)}",
                expected="multiples of 0.01 whose sum is 1",
            )
            for index, part in enumerate(self.parts):
                require(
                    part.data.readout is None and part.data.kind != self.kind,
                    f"parts[{index}].data.kind",
                    got=part.data.kind,
                    expected="a source of rows that a causal model predicts token by token",
                )

        @property
        def judged(self) -> SourceConfig:
            """The first source."""
            return self.parts[0].data

        @property
        def metric(self) -> Metric:
            return self.judged.metric

        def check(self, vocabulary: int, context: int) -> None:
            for index, part in enumerate(self.parts):
                try:
                    part.data.check(vocabulary, context)
                except ConfigError as error:
                    raise error.under(f"parts[{index}].data") from None

        def target_share(self, context: int) -> float:
            return sum(part.share * part.data.target_share(context) for part in self.parts)

    @classmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> Mixture:
        parts: list[Source] = [prepare(part.data, vocabulary, cache, progress) for part in config.parts]
        _check_tokenizers(parts)
        card = {
            "kind": config.kind,
            "vocabulary": vocabulary,
            "rows": [rows_of(part.share) for part in config.parts],
            "material": {f"part {index}": part.fingerprint for index, part in enumerate(parts)},
            "splits": parts[0].card["splits"],
        }
        folder = cache / digest(FORMAT, card)
        with locked(cache / f"{folder.name}.lock"):
            if not is_intact(folder):
                with replacing_folder(folder) as scratch:
                    write_card(scratch, card)
        return cls(folder)

    @cached_property
    def parts(self) -> Sequence[Source]:
        """The sources, in the order of the configuration."""
        material = self.card["material"]
        return [Source.open(self.folder.parent, material[f"part {index}"]) for index in range(len(material))]

    @property
    def judged(self) -> Source:
        """The first source."""
        return self.parts[0]

    @property
    def text(self) -> Source:
        """The text of the first source."""
        return getattr(self.judged, "text", self.judged)

    @property
    def tokenizer(self) -> Any:
        return self.judged.tokenizer

    @property
    def selection(self) -> Split:  # type: ignore[override]
        return self.judged.selection

    @property
    def report(self) -> Split:  # type: ignore[override]
        return self.judged.report

    @property
    def pilot(self) -> Split:  # type: ignore[override]
        return self.judged.pilot

    def digests(self, split: str) -> list[str]:
        return self.judged.digests(split)

    def stream(self, *, context: int, seed: int, buckets: Sequence[int] = ()) -> MixtureStream:
        seeds = (derived_seed(seed, "mixture", str(index)) for index in range(len(self.parts)))
        streams = [part.stream(context=context, seed=seed, buckets=buckets) for part, seed in zip(self.parts, seeds)]
        return MixtureStream(streams, self.card["rows"], seed=seed)


class MixtureStream(RowStream):
    """Rows of several streams.

    Args:
        streams: of the sources.
        counts: rows of each in every :data:`PERIOD`, whose sum that is.
        seed: seed of their order.
    """

    def __init__(self, streams: Sequence[RowStream], counts: Sequence[int], *, seed: int):
        self.streams, self.counts, self.seed = streams, counts, seed

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        stream, number = self._place(r)
        return stream.row(number)

    def row_length(self, r: int) -> int:
        stream, number = self._place(r)
        return stream.row_length(number)

    def segment_lengths(self, r: int) -> np.ndarray:
        stream, number = self._place(r)
        return stream.segment_lengths(number)

    def _place(self, r: int) -> tuple[RowStream, int]:
        """The stream of the r-th row, and its number there."""
        period, place = divmod(r, PERIOD)
        order = counter_generator(self.seed, period).permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        part = int(order[place])
        return self.streams[part], period * self.counts[part] + int((order[:place] == part).sum())

    def epochs(self, rows: int) -> float | None:
        """How often ``rows`` rows read the first source."""
        return self.streams[0].epochs(rows * self.counts[0] // PERIOD)


def rows_of(share: float) -> int:
    """Rows of a source in every :data:`PERIOD`; 0 for a share that is no multiple of 0.01."""
    rows = round(share * PERIOD)
    return rows if abs(share * PERIOD - rows) < 1e-9 else 0


def _check_tokenizers(parts: Sequence[Source]) -> None:
    """Check that all parts made of text have the same tokens."""
    written = {index: part.tokenizer.to_str() for index, part in enumerate(parts) if part.tokenizer is not None}
    for index, tokenizer in written.items():
        require(
            tokenizer == next(iter(written.values())),
            f"data.parts[{index}].data",
            got="another tokenizer than the part before it",
            expected="one tokenizer",
            do="Give both the same corpus and splits, or name one file in tokenizer_file.",
        )
