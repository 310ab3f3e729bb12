"""The conclusion of an ablation: one row per arm, as plain data, as tables and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import polars as pl

from workbench import notebook
from workbench.ablation.verdict import wording
from workbench.ablation.verdict.statistics import NoiseFloor
from workbench.ablation.verdict.subject import Subject
from workbench.metric import BITS_PER_BYTE

__all__ = ["WORDS", "ArmVerdict", "PairVerdict", "Verdict"]

WORDS = ("baseline", "better", "worse", "equivalent", "undecided", "failed")
"""Every verdict that a row can have."""


CLAIMS = ("better", "worse", "equivalent")
IN_ORDER = (
    "Lower is better in every row. The metrics of an arm are tested in the declared order: a difference is claimed "
    "only after one in every metric before it, an equivalence likewise. Over all of them, any false difference has a "
    "probability of at most alpha, and so has any false equivalence, apart from the primary metric."
)
"""How claims about secondary metrics are made."""


@dataclass(frozen=True, kw_only=True)
class ArmVerdict:
    """One row of a verdict, in the unit of the metric; None if a number does not apply or cannot be known."""

    arm: str
    verdict: str
    """One of ``WORDS``."""
    value: float | None = None
    """Mean over the finished report seeds."""
    value_sd: float | None = None
    """Standard deviation over them; from two seeds on."""
    difference: float | None = None
    """Mean difference, arm − baseline, over the seeds that both finished."""
    low: float | None = None
    """Interval of it at level 1 − alpha, not corrected for the number of arms: paired t for a metric without an upper
    bound; from sign flips for an error rate, inside its range."""
    high: float | None = None
    bootstrap_low: float | None = None
    """Crossed bootstrap over seeds and clusters of documents, at the same level; from two seeds on."""
    bootstrap_high: float | None = None
    simultaneous_low: float | None = None
    """Interval that agrees with the word: all arms' intervals hold together at level 1 − alpha
    (:func:`workbench.ablation.verdict.hypotheses.compatible_bounds`). One that ends at 0 belongs to an arm that is
    certainly on the other side, by an amount that the adjustment leaves open."""
    simultaneous_high: float | None = None
    p: float | None = None
    """Two-sided p-value of the test that decides; 1 where it can decide nothing."""
    p_holm: float | None = None
    """The same, adjusted over the looks of a sequential design and over the family. Where it is at most alpha, the
    arm is better or worse, unless it is equivalent."""
    seeds: int
    """Report seeds that finished."""
    failed: int
    """Report seeds that did not."""
    rho: float | None = None
    """Correlation with the baseline over paired seeds; from three seeds on."""
    detectable: float | None = None
    """The true difference that t shows with 80 % power at alpha / family, given the sd of the differences; None if that
    is unknown or outside the metric's range."""
    sentence: str
    """The row in words."""
    reservations: tuple[str, ...] = ()
    """What limits the claim, in sentences: "the optimum lies at the edge of the grid"."""
    p_equivalence: float | None = None
    """p-value of equivalence within the margin, adjusted over the family by Holm: equivalent where it is at most
    alpha."""
    least_p: float | None = None
    """The least p-value that this number of seeds can reach."""
    skewness: float | None = None
    """Sample skewness of the differences; from three seeds on."""
    imputed_low: float | None = None
    """Difference over all declared seeds with missing runs at their best or worst (ours); None if none is missing. For
    an error rate these are 0 and its upper bound, otherwise the best and the worst value that any arm measured."""
    imputed_high: float | None = None
    survival_p: float | None = None
    """Fisher's exact test of the number of finished runs, against the baseline's; None if as many finished."""
    solved: int | None = None
    """Seeds that solve the task: an error rate of at most a tenth (ours); None for other metrics."""
    repeated_low: float | None = None
    """Interval of a sequential design at this look: repeated confidence interval or confidence sequence, at level
    1 − alpha over all looks, not corrected for the number of arms; None for a fixed design, and where it is
    infinite."""
    repeated_high: float | None = None
    level: float | None = None
    """Level of the paired t-test at this look that keeps alpha over all looks, for one arm; None for a fixed design."""


@dataclass(frozen=True)
class PairVerdict:
    """Two arms compared, in the unit of the metric; fields as in :class:`ArmVerdict`."""

    arm: str
    reference: str
    verdict: str
    """The word about ``arm``, compared with ``reference``."""
    difference: float | None
    low: float | None
    high: float | None
    simultaneous_low: float | None
    simultaneous_high: float | None
    p: float
    p_holm: float
    p_equivalence: float | None
    seeds: int
    """Seeds that both finished."""
    sentence: str


@dataclass(frozen=True, repr=False)
class Verdict:
    """The conclusion of an ablation. Two verdicts with the same content are equal."""

    baseline: str
    rows: tuple[ArmVerdict, ...]
    """The baseline first, then the arms in the order given."""
    noise_floor: NoiseFloor | None
    """Standard deviation of the baseline over seeds with its 95 % interval; from two seeds on."""
    alpha: float
    """Bound of two error rates, each over the whole family: the probability of any false ``better`` or ``worse`` (a
    wrong sign counts), and that of any false ``equivalent``."""
    margin: float | None
    """Equivalence margin, if one was declared."""
    exploratory: str | None
    """Why the ablation is exploratory, if it is."""
    unit: str = BITS_PER_BYTE.unit
    """Unit of the metric, of every number here."""
    declared: tuple[str, ...] = ()
    """What was declared before launch, and what was changed since, in sentences."""
    subject: Subject | None = None
    """What was compared, on which documents; None for archives of earlier versions."""
    pairs: tuple[PairVerdict, ...] = ()
    """Every pair of arms, if all pairs are compared; they and the rows are one family."""
    label: str = ""
    """The metric, where it is one of several: of a secondary metric."""
    secondary: tuple[Verdict, ...] = ()
    """The verdicts by secondary metrics in the declared order, a family of their own
    (:func:`workbench.ablation.verdict.judge.claims_in_order`). One without rows was not measured."""

    def table(self) -> pl.DataFrame:
        """One row per arm; the columns are the fields of :class:`ArmVerdict`."""
        return _frame(self.rows, ArmVerdict)

    def pair_table(self) -> pl.DataFrame:
        """One row per pair of arms; the columns are the fields of :class:`PairVerdict`."""
        return _frame(self.pairs, PairVerdict)

    def secondary_table(self) -> pl.DataFrame:
        """One row per secondary metric and arm: ``metric`` and ``unit``, then the fields of :class:`ArmVerdict`."""
        frames = [
            verdict.table().select(pl.lit(verdict.label).alias("metric"), pl.lit(verdict.unit).alias("unit"), pl.all())
            for verdict in (Verdict(self.baseline, (), None, self.alpha, None, None), *self.secondary)
        ]
        return pl.concat(frames)

    def plain(self) -> dict[str, Any]:
        """The verdict as plain data, fit for JSON: finite numbers, strings, lists and None."""
        floor = self.noise_floor
        return {
            **asdict(self),
            "rows": [asdict(row) | {"reservations": list(row.reservations)} for row in self.rows],
            "pairs": [asdict(pair) for pair in self.pairs],
            "secondary": [verdict.plain() for verdict in self.secondary],
            "declared": list(self.declared),
            "noise_floor": None if floor is None else list(floor),
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """The verdict whose :meth:`plain` is ``data``; numbers that an earlier version did not compute are None."""
        floor, subject = data["noise_floor"], data.get("subject")
        rows = tuple(ArmVerdict(**{**row, "reservations": tuple(row.get("reservations", ()))}) for row in data["rows"])
        changes = {
            "rows": rows,
            "pairs": tuple(PairVerdict(**pair) for pair in data.get("pairs", ())),
            "secondary": tuple(cls.from_plain(verdict) for verdict in data.get("secondary", ())),
            "declared": tuple(data.get("declared", ())),
            "noise_floor": None if floor is None else NoiseFloor(*floor),
            "subject": None if subject is None else Subject(**subject),
        }
        return cls(**{**data, **changes})

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        if not self.rows:
            return f"Verdict({self.baseline!r}: nothing measured)"
        about = [f"{row.arm} {row.verdict} {_cells(row)[3]}".rstrip() for row in self.rows[1:]]
        return f"Verdict({self.baseline!r}: {', '.join(about) or 'no other arm'})"

    def _repr_html_(self) -> str:
        """A table of the arms; sentences, and what was declared, to unfold."""
        if not self.rows:
            return notebook.paragraph("Nothing was measured.")
        titles = ["arm", "verdict", self.unit, "difference", f"{wording.percent(1 - self.alpha)} interval", "p (Holm)"]
        table = notebook.table([*titles, "seeds"], map(_cells, self.rows), numeric=(2, 3, 5))
        caution = f"Exploratory: {self.exploratory}." if self.exploratory else ""
        subject = self.subject.sentence() if self.subject is not None else ""
        declared = [line for line in (*self.declared, subject) if line]
        others = [row for part in self.secondary for row in _secondary_rows(part)]
        return "".join(
            [
                table,
                notebook.paragraph(caution) if caution else "",
                notebook.table(["metric", *titles[:2], "value", *titles[3:], "seeds"], others) if others else "",
                notebook.details("Every arm in words", [row.sentence for row in self.rows]),
                notebook.details("What was declared", declared),
            ]
        )


def _secondary_rows(part: Verdict) -> list[list[str]]:
    return [[part.label, *_cells(row)] for row in part.rows]


def _frame(rows: Sequence[Any], kind: type) -> pl.DataFrame:
    kinds: dict[str, Any] = {
        "str": pl.String,
        "int": pl.Int64,
        "int | None": pl.Int64,
        "float": pl.Float64,
        "float | None": pl.Float64,
        "tuple[str, ...]": pl.List(pl.String),
    }
    schema = {item.name: kinds[str(item.type)] for item in fields(kind)}
    return pl.DataFrame([asdict(row) for row in rows], schema=schema, orient="row")


def _text(verdict: Verdict) -> str:
    """A whole verdict as text: what was declared and measured, the noise floor, the tables, the sentences."""
    if not verdict.rows:
        return ""
    head = list(verdict.declared)
    head += [verdict.subject.sentence()] if verdict.subject is not None and verdict.subject.sentence() else []
    floor, *sentences = (row.sentence for row in verdict.rows)  # the noise floor is read before any difference
    unit, interval = verdict.unit.replace(" per ", "/"), f"{wording.percent(1 - verdict.alpha)} interval"
    titles = ["arm", "verdict", unit, "difference", interval, "p (Holm)", "seeds"]
    lines = [*head, ""] if head else []
    lines += [floor, "", *_aligned([titles, *map(_cells, verdict.rows)])]
    lines += ["", *sentences] if sentences else []
    others = [pair for pair in verdict.pairs if pair.reference != verdict.baseline]
    if others:
        titles = ["arm", "against", "verdict", "difference", interval, "p (Holm)"]
        lines += ["", "All pairs:", "", *_aligned([titles, *map(_pair_cells, verdict.pairs)])]
        lines += ["", *(pair.sentence for pair in others)]
    lines += _secondary_lines(verdict, interval)
    return "\n".join(lines)


def _secondary_lines(verdict: Verdict, interval: str) -> list[str]:
    """The secondary metrics: a table of them all, then a sentence about every claim."""
    if not verdict.secondary:
        return []
    lines = ["", f"Secondary metrics. {IN_ORDER}"]
    if any(row.reservations for row in verdict.rows):
        lines.append("The reservations about an arm hold for its secondary metrics as well.")
    cells = [
        [part.label if row is part.rows[0] else "", *_cells(row)] for part in verdict.secondary for row in part.rows
    ]
    if cells:
        titles = ["metric", "arm", "verdict", "value", "difference", interval, "p (adjusted)", "seeds"]
        lines += ["", *_aligned([titles, *cells])]
    lines += ["", *(f"{part.label} was not measured." for part in verdict.secondary if not part.rows)]
    for part in verdict.secondary:
        lines += [f"{part.label}: {row.sentence}" for row in part.rows if row.verdict in CLAIMS]
    return lines if lines[-1] else lines[:-1]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title, *rest = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return [title, "  ".join("-" * width for width in widths), *rest]


def _cells(row: ArmVerdict) -> list[str]:
    half = _half(row)
    places = wording.decimals(row.value_sd) if row.difference is None else wording.decimals(half, row.difference)
    # that of a sequential design is the one over all its looks
    low, high = (row.low, row.high) if row.level is None else (row.repeated_low, row.repeated_high)
    return [
        row.arm,
        row.verdict,
        "" if row.value is None else f"{row.value:.{places}f}",
        "" if row.difference is None else f"{row.difference:+z.{places}f}",
        "" if low is None or high is None else wording.interval_text(low, high, places),
        "" if row.p_holm is None or row.difference is None else wording.p_value(row.p_holm),
        f"{row.seeds} of {row.seeds + row.failed}",
    ]


def _pair_cells(pair: PairVerdict) -> list[str]:
    places = wording.decimals(_half(pair), pair.difference)
    return [
        pair.arm,
        pair.reference,
        pair.verdict,
        "" if pair.difference is None else f"{pair.difference:+z.{places}f}",
        "" if pair.low is None or pair.high is None else wording.interval_text(pair.low, pair.high, places),
        wording.p_value(pair.p_holm),
    ]


def _half(row: ArmVerdict | PairVerdict) -> float | None:
    return None if row.low is None or row.high is None else (row.high - row.low) / 2
