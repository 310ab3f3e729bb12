"""The data card in words: what is measured, and how much of it is in the training data.

A card is plain data, written once by :meth:`workbench.data.Source.prepare`; reading it needs no other part of the data
layer. ``splits`` has an entry per split; that of a measured split has ``documents``, ``clusters``, ``overlap`` (share
of it that is also in the training data), and ``bytes`` if it is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench import formatting
from workbench.config import require

__all__ = [
    "CAUTION",
    "LIMIT",
    "MANY_EPOCHS",
    "check_lossless",
    "check_overlap",
    "describe",
    "is_lossy",
    "is_mostly_seen",
    "repetition",
    "times",
    "warnings",
]

MEASURED = ("report", "pilot", "selection")
CAUTION = 0.2
"""Overlap of a measured split above which it comes with a warning."""
MANY_EPOCHS = 4
"""Epochs up to which repeated text is worth about as much as new text (Muennighoff et al., arXiv 2305.16264)."""
LIMIT = 0.5
"""Overlap above which an ablation is refused, unless ``data.allow_overlap`` gives a reason."""


def describe(card: Mapping[str, Any]) -> list[str]:
    """A line per measured split: "report: 312 documents, 312 clusters, 620 kB, 7 % of 13-token shingles also in
    training"."""
    return [f"{name}: {_words(card['splits'][name])}" for name in MEASURED if name in card.get("splits", {})]


def warnings(card: Mapping[str, Any]) -> list[str]:
    """A sentence per measured split that has too much in common with the training data."""
    seen = [
        f"{100 * overlap:.0f} % of the {name} split is also in the training data: its values measure memory as well as "
        "generalisation."
        for name in MEASURED
        if (overlap := _overlap(card, name)) > CAUTION
    ]
    lossy = [
        f"The tokenizer is lossy on {card['splits'][name]['lossy_documents']} documents of the {name} split: its ids "
        "do not decode to the text, so its bits per byte are too low."
        for name in MEASURED
        if is_lossy(card, name)
    ]
    spaces = [
        f"The tokenizer does not keep whether a text begins with a space: {count} documents of the {name} split decode "
        "with one space more or less in front, at most one bit each."
        for name in MEASURED
        if (count := card.get("splits", {}).get(name, {}).get("space_documents"))
    ]
    return seen + lossy + spaces


def repetition(epochs: Mapping[str, float | None]) -> list[str]:
    """How often training reads its text, in sentences; empty where no text is read twice.

    Args:
        epochs: arm -> epochs of a run; None where they are unknown or every row is new.
    """
    arms_of: dict[str, list[str]] = {}
    for arm, number in epochs.items():
        if number is not None:
            arms_of.setdefault(times(number), []).append(arm)
    most = max((number for number in epochs.values() if number is not None), default=0.0)
    if most <= 1:
        return []
    parts = [f"{number} ({', '.join(arms)})" if len(arms_of) > 1 else number for number, arms in arms_of.items()]
    sentences = [f"Training reads its text {', '.join(parts)}."]
    if most > MANY_EPOCHS:
        sentences.append(
            f"That is more than {MANY_EPOCHS} epochs: repeated text teaches less than new text, and arms that memorise "
            "may rank otherwise than on more text."
        )
    return sentences


def times(epochs: float) -> str:
    """ "2.5 times", "34 times"."""
    return f"{epochs:.2g} times" if epochs < 10 else f"{epochs:,.0f} times"


def is_mostly_seen(card: Mapping[str, Any], split: str) -> bool:
    """Whether the training data contain more than half of a measured split."""
    return _overlap(card, split) > LIMIT


def check_overlap(card: Mapping[str, Any], split: str, reason: str | None, path: str) -> None:
    """Refuse data whose measured split is mostly in the training data.

    Args:
        card: the data card.
        split: the split on which arms are compared.
        reason: ``data.allow_overlap``.
        path: of the data configuration.

    Raises:
        ConfigError: more than half of the split is also in the training data, and no reason is given.
    """
    require(
        reason is not None or not is_mostly_seen(card, split),
        path,
        got=f"a {split} split of which {100 * _overlap(card, split):.0f} % is also in the training data",
        expected=f"at most {100 * LIMIT:.0f} %",
        do="Use text with fewer repeats, or give a reason in data.allow_overlap; the verdict is then exploratory.",
    )


def is_lossy(card: Mapping[str, Any], split: str) -> bool:
    """Whether the ids of some measured document do not decode to it."""
    return bool(card.get("splits", {}).get(split, {}).get("lossy_documents"))


def check_lossless(card: Mapping[str, Any], split: str, reason: str | None, path: str) -> None:
    """Refuse a tokenizer that loses measured text: bits per byte would count bytes that it never encoded.

    Args:
        card: the data card.
        split: the split on which arms are compared.
        reason: ``data.allow_lossy``.
        path: of the data configuration.

    Raises:
        ConfigError: decoding does not give some document of the split back, and no reason is given.
    """
    require(
        reason is not None or not is_lossy(card, split),
        path,
        got=f"a tokenizer that is lossy on {card['splits'].get(split, {}).get('lossy_documents')} {split} documents",
        expected="ids that decode to the measured text",
        do="Use a byte-level tokenizer, or give a reason in data.allow_lossy; the verdict is then exploratory.",
    )


def _overlap(card: Mapping[str, Any], split: str) -> float:
    """0 for cards from before overlap was measured."""
    return card.get("splits", {}).get(split, {}).get("overlap") or 0.0


def _words(split: Mapping[str, Any]) -> str:
    is_text = "bytes" in split
    parts = [f"{split.get('documents', split.get('examples', 0)):,} {'documents' if is_text else 'examples'}"]
    if "clusters" in split:
        parts.append(f"{split['clusters']:,} clusters")
    if is_text:
        parts.append(formatting.size(split["bytes"]))
    if "overlap" in split:
        parts.append(
            f"{100 * split['overlap']:.0f} % of {'13-token shingles' if is_text else 'examples'} also in training"
        )
    return ", ".join(parts)
