"""Preparation in a stream: shards, the spool, what is found again without reading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from workbench.data import DataConfig, TrainingStream, preparation, prepare
from workbench.data.corpora.files import Files
from workbench.data.corpora.packages import Packages
from workbench.data.spool import Spool


def config(folder: Path, **more: object) -> DataConfig:
    return DataConfig.parse({"corpus": {"kind": "files", "path": str(folder)}, "evaluation_documents": 3, **more})


def test_many_shards_hold_what_one_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    whole = prepare(config(corpus), 300, tmp_path / "one")
    largest = int(np.diff(whole.train.offsets).max())
    for size in (1, largest - 1, 3 * largest):
        monkeypatch.setattr(preparation, "SHARD_TOKENS", size)
        cut = prepare(config(corpus), 300, tmp_path / f"many{size}")
        shards = cut.train.tokens.shards
        assert len(shards) > 3 and len(cut.train.tokens) == len(whole.train.tokens)
        assert np.array_equal(np.concatenate(shards), whole.train.tokens.shards[0])
        assert all(len(shard) <= max(size, largest) for shard in shards) and shards[0].dtype == np.uint16
        a, b = (TrainingStream(data.train, context=50, seed=1) for data in (whole, cut))
        for r in range(15):
            assert all(np.array_equal(x, y) for x, y in zip(a.row(r), b.row(r)))


def test_the_spool_gives_back_every_text_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    texts = ["äöü\n", "plain", "  plain  ", "日本語 text", "plain", "half \ud800 surrogate"]
    for text in texts:
        spool.add(text)
    assert list(spool) == ["äöü\n", "plain", "日本語 text", "half ? surrogate"] and spool.read == 6
    assert [spool.size(i) for i in range(4)] == [len(text.encode()) for text in spool]
    again = Spool(tmp_path / "again")
    for text in reversed(texts):
        again.add(text)
    assert again.digest != spool.digest


def test_what_was_prepared_is_found_without_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    first = prepare(config(corpus), 300, tmp_path / "cache")
    documents = Files.documents
    monkeypatch.setattr(Files, "documents", lambda self: pytest.fail("the corpus was read again"))
    assert prepare(config(corpus), 300, tmp_path / "cache").fingerprint == first.fingerprint
    monkeypatch.setattr(Files, "documents", documents)
    file = corpus / "000.txt"
    text = file.read_text()
    file.write_text(text + "more")
    second = prepare(config(corpus), 300, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint
    file.write_text(text)  # another time of change, the old content: read again, prepared as before
    assert prepare(config(corpus), 300, tmp_path / "cache").fingerprint == first.fingerprint


def test_near_duplicates_are_looked_for_only_when_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(preparation, "near_duplicates", lambda texts: pytest.fail("they were looked for"))
    data = prepare(config(corpus, near_duplicates=False), 300, tmp_path / "cache")
    assert data.card["clusters"] == 40


def test_killed_while_preparing_nothing_half_is_left(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=400)
    fields = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3}
    code = f"from workbench.data import *; prepare(DataConfig.parse({fields!r}), 900, {str(tmp_path / 'cache')!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list((tmp_path / "cache").glob(".*.tmp/spool")):
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    data = prepare(config(corpus), 900, tmp_path / "cache")
    assert data.card["documents_read"] == 400 and not list((tmp_path / "cache").glob(".*.tmp"))


def test_installed_packages_are_a_corpus() -> None:
    corpus = Packages(Packages.Config(limit_bytes=300_000))
    texts = list(corpus.documents())
    assert 300_000 <= sum(len(text.encode()) for text in texts) < 1_300_001
    assert texts == list(corpus.documents()) and corpus.stamp() == corpus.stamp()
