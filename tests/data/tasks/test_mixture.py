"""Several sources in one run: shares, order, what runs are judged on, and sources that do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data import Source, prepare, sources, tasks
from workbench.data.tasks.mixture import PERIOD, Mixture, rows_of
from workbench.metric import BITS_PER_BYTE
from workbench.training import RunConfig


@pytest.fixture(autouse=True)
def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "OVERLAP_ROWS", 20)


def text(folder: Path, **changes: Any) -> dict[str, Any]:
    corpus = {"kind": "files", "path": str(folder / "corpus")}
    return {"kind": "text", "corpus": corpus, "evaluation_documents": 3, "evaluation_bytes": 400, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    write_corpus(folder / "corpus", 30)
    return folder


def config(folder: Path, *shares: float, second: dict[str, Any] | None = None) -> Any:
    data = [text(folder), second or {"kind": "in_context_recall", "examples": 4}, {"kind": "parity", "examples": 4}]
    return sources.parse({"kind": "mixture", "parts": [{"share": s, "data": d} for s, d in zip(shares, data)]})


def made(folder: Path, *shares: float, **options: Any) -> Mixture:
    mixture: Mixture = prepare(config(folder, *shares, **options), 300, folder / "cache")
    return mixture


def test_every_source_has_its_share_of_every_hundred_rows(folder: Path) -> None:
    mixture = made(folder, 0.5, 0.37, 0.13)
    stream = mixture.stream(context=64, seed=5)
    asked: list[tuple[int, int]] = []
    for part, inner in enumerate(stream.streams):
        inner.row = lambda r, part=part: asked.append((part, r))  # type: ignore[method-assign, misc, assignment, return-value]
    for r in range(2 * PERIOD):
        stream.row(r)
    for part, count in enumerate((50, 37, 13)):
        assert [row for source, row in asked if source == part] == list(range(2 * count))
    assert asked[:PERIOD] != asked[PERIOD:]


def test_a_row_depends_on_its_number_alone(folder: Path) -> None:
    once, again = (made(folder, 0.6, 0.4).stream(context=128, seed=1) for _ in range(2))
    rows = [once.row(r) for r in range(12)]
    for r in (7, 0, 11):
        for part, other in zip(rows[r], again.row(r)):
            np.testing.assert_array_equal(part, other)


def test_rows_are_those_of_the_source(folder: Path) -> None:
    mixture = made(folder, 0.6, 0.4)
    stream = mixture.stream(context=128, seed=1)
    for r in range(5):
        tokens, *_ = stream.row(r)
        inner = [part.row(k)[0] for part in stream.streams for k in range(5)]
        assert any(np.array_equal(tokens, row) for row in inner)


def test_runs_are_judged_on_the_first_source(folder: Path) -> None:
    mixture = made(folder, 0.6, 0.4)
    judged = prepare(sources.parse(text(folder)), 300, folder / "cache")
    assert mixture.judged.fingerprint == judged.fingerprint
    assert config(folder, 0.6, 0.4).metric == BITS_PER_BYTE
    assert mixture.digests("report") == judged.digests("report")
    assert len(mixture.report) == len(judged.report) == 3
    assert mixture.tokenizer.to_str() == judged.tokenizer.to_str()
    assert mixture.card["splits"] == judged.card["splits"]


def test_epochs_are_those_of_the_first_source(folder: Path) -> None:
    mixture = made(folder, 0.5, 0.5)
    stream = mixture.stream(context=64, seed=0)
    rows = mixture.judged.stream(context=64, seed=0).rows_in_epoch
    assert rows and stream.epochs(4 * rows) == pytest.approx(2, rel=0.05)


def test_a_prepared_mixture_opens_with_its_sources(folder: Path) -> None:
    mixture = made(folder, 0.6, 0.4)
    assert [part.card["kind"] for part in Source.open(folder / "cache", mixture.fingerprint).parts] == [
        "text",
        "in_context_recall",
    ]


def test_the_order_of_sources_is_part_of_the_identity(folder: Path) -> None:
    parts = [{"share": 0.5, "data": text(folder)}, {"share": 0.5, "data": "parity"}]
    runs = [
        RunConfig.parse(
            {"model": {"vocabulary": 300}, "data": {"kind": "mixture", "parts": p}, "training": {"context": 64}}
        )
        for p in (parts, parts[::-1])
    ]
    assert runs[0].identity != runs[1].identity


@pytest.mark.parametrize(("share", "rows"), [(0.04, 4), (0.29, 29), (0.005, 0), (0.333, 0)])
def test_shares_are_whole_rows(share: float, rows: int) -> None:
    assert rows_of(share) == rows


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.5, 0.495, 0.005)])
def test_shares_must_add_up(folder: Path, shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"parts: got .shares .*multiples of 0\.01 whose sum is 1"):
        config(folder, *shares)


@pytest.mark.parametrize("kind", ["compression", "mixture"])
def test_sources_without_rows_of_next_tokens_are_refused(folder: Path, kind: str) -> None:
    inner = {"kind": kind}
    if kind == "mixture":
        inner["parts"] = [{"share": 0.5, "data": "parity"}, {"share": 0.5, "data": "copying"}]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=rf"parts\[1\]\.data\.kind: got '{kind}'"):
        config(folder, 0.5, 0.5, second=inner)


def test_a_mistake_inside_a_source_has_its_path(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.parts\[1\]\.data\.lengths"):
        RunConfig.parse(
            {
                "model": {"vocabulary": 300},
                "data": config(folder, 0.5, 0.5, second={"kind": "needle", "lengths": [512], "text": text(folder)}),
                "training": {"context": 64},
            }
        )


def test_another_tokenizer_is_refused(folder: Path) -> None:
    other = {"kind": "needle", "lengths": [120], "examples": 5, "text": text(folder, tokenizer_bytes=500)}
    with pytest.raises(ConfigError, match=r"data\.parts\[1\]\.data: got 'another tokenizer"):
        made(folder, 0.5, 0.5, second=other)


def test_rows_of_one_document_have_the_lengths_of_their_source(folder: Path) -> None:
    mixture = made(folder, 0.6, 0.4)
    stream = mixture.stream(context=512, seed=1, buckets=(128, 256, 512))
    for r in range(8):
        tokens, _, segments, _ = stream.row(r)
        assert len(tokens) == stream.row_length(r) in (128, 256, 512)
        assert stream.segment_lengths(r).tolist() == [int((segments == 0).sum())]
