"""A corpus is prepared once; torn, killed or concurrent preparation leaves nothing half done."""

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
from tokenizers import Tokenizer, models

from workbench.config import ConfigError
from workbench.data import DataConfig, PreparedData, preparation, prepare
from workbench.data.corpora.files import Files
from workbench.data.disk_strings import DiskStrings
from workbench.data.splits import MEASURED

pytestmark = pytest.mark.process


def config(path: Path, **more: object) -> DataConfig:
    return DataConfig.parse({"corpus": {"kind": "files", "path": str(path)}, "evaluation_documents": 3, **more})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 12)


def times(data: PreparedData) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in data.folder.iterdir()}


def test_prepared_data_is_not_prepared_again(corpus: Path, tmp_path: Path) -> None:
    before = times(prepare(config(corpus), 300, tmp_path))
    assert times(prepare(config(corpus), 300, tmp_path)) == before


def test_another_vocabulary_is_other_data(corpus: Path, tmp_path: Path) -> None:
    a, b = (prepare(config(corpus), vocabulary, tmp_path) for vocabulary in (300, 301))
    assert a.fingerprint != b.fingerprint


@pytest.mark.parametrize("name", ["train.tokens.00000.npy", "tokenizer.json", "card.json"])
def test_a_torn_file_is_prepared_again(corpus: Path, tmp_path: Path, name: str) -> None:
    data = prepare(config(corpus), 300, tmp_path)
    contents = {path: path.read_bytes() for path in data.folder.iterdir()}
    (data.folder / name).write_bytes(contents[data.folder / name][:-9])
    again = prepare(config(corpus), 300, tmp_path)
    assert {path: path.read_bytes() for path in again.folder.iterdir()} == contents


@pytest.mark.parametrize("name", ["train.tokens.00000.npy", "report.offsets.npy", "tokenizer.json"])
def test_a_file_with_a_flipped_bit_is_prepared_again(corpus: Path, tmp_path: Path, name: str) -> None:
    data = prepare(config(corpus), 300, tmp_path)
    content = (data.folder / name).read_bytes()
    (data.folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    prepare(config(corpus), 300, tmp_path)
    assert (data.folder / name).read_bytes() == content


@pytest.mark.parametrize(("name", "thorough"), [("report.tokens.00000.npy", False), ("train.tokens.00000.npy", True)])
def test_data_with_a_flipped_bit_cannot_be_opened(corpus: Path, tmp_path: Path, name: str, thorough: bool) -> None:
    data = prepare(config(corpus), 300, tmp_path)
    content = (data.folder / name).read_bytes()
    (data.folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(ConfigError, match=f"damaged prepared data: {name}"):
        PreparedData.open(tmp_path, data.fingerprint, thorough=thorough)


def test_no_temporary_file_is_left(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus), 300, tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_data_that_was_never_prepared_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no prepared data"):
        PreparedData.open(tmp_path, "0" * 16)


def test_two_processes_prepare_the_same_data_once(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from workbench.data import *;"
        "c = DataConfig.parse({'corpus': {'kind': 'files', 'path': sys.argv[1]}});"
        "p = prepare(c, 300, sys.argv[2], lambda line: print(line, file=sys.stderr));"
        "print(p.fingerprint, int(p.train.tokens.shards[0].sum()))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(corpus), str(tmp_path)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 2)
    ]
    (first, log), (second, other_log) = [worker.communicate(timeout=60) for worker in workers]
    assert first == second != ""
    assert (log + other_log).count("training a byte-level") == 1


def test_an_unchanged_source_is_not_read_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config(corpus), 300, tmp_path)
    monkeypatch.setattr(Files, "documents", lambda self: pytest.fail("the corpus was read again"))
    assert prepare(config(corpus), 300, tmp_path).fingerprint == first.fingerprint


def test_a_changed_source_is_other_data(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 12)
    first = prepare(config(corpus), 300, tmp_path / "cache")
    (corpus / "000.txt").write_text((corpus / "000.txt").read_text() + "more")
    assert prepare(config(corpus), 300, tmp_path / "cache").fingerprint != first.fingerprint


def test_a_new_time_of_change_with_the_same_content_is_the_same_data(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 12)
    first = prepare(config(corpus), 300, tmp_path / "cache")
    os.utime(corpus / "000.txt", (1, 1))
    assert prepare(config(corpus), 300, tmp_path / "cache").fingerprint == first.fingerprint


def test_copies_of_a_measured_document_are_not_trained_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 12)
    for path in sorted(corpus.iterdir()):
        (corpus / f"copy-{path.name}").write_text(path.read_text() + "\nand one more line than the original")
    card = prepare(config(corpus), 300, tmp_path / "cache").card
    measured = sum(card["splits"][name]["documents"] for name in MEASURED)
    assert (card["clusters"], card["near_duplicates_dropped"]) == (12, measured)
    assert card["splits"]["train"]["documents"] == 24 - 2 * measured


def test_documents_that_contain_a_measured_one_are_not_trained_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", 12)
    everything = "\n".join(path.read_text() for path in sorted(corpus.iterdir()))
    (corpus / "all.txt").write_text(everything)
    data = prepare(config(corpus, evaluation_bytes=100_000), 300, tmp_path / "cache")
    assert (data.card["clusters"], data.card["containing_dropped"]) == (13, 1)
    assert [data.card["splits"][name]["overlap"] for name in MEASURED] == [0, 0, 0]


def test_overlap_is_the_share_of_shingles_in_training(tmp_path: Path) -> None:
    """Half of every document is one of four texts of 600 words, so that nobody is a near-duplicate."""
    words = [f"w{i}" for i in range(60_000)]
    shared = [" ".join(words[600 * i : 600 * i + 400]) for i in range(4)]
    for i in range(60):
        other = " ".join(words[5_000 + 600 * i : 5_000 + 600 * (i + 1)])
        (tmp_path / f"{i:02d}.txt").write_text(f"{shared[i % 4]} {other}")
    data = prepare(config(tmp_path, evaluation_bytes=100_000), 300, tmp_path / "cache")
    assert data.card["clusters"] == 60
    for name in MEASURED:
        assert data.card["splits"][name]["overlap"] == pytest.approx((400 - 12) / (1000 - 12), abs=1e-6)


def test_documents_of_a_split_have_their_clusters(tmp_path: Path) -> None:
    data = prepare(config(write_corpus(tmp_path / "corpus", 12)), 300, tmp_path / "cache")
    clusters = np.concatenate([data.train.clusters, *(getattr(data, name).clusters for name in MEASURED)])
    assert sorted(clusters.tolist()) == list(range(12))
    assert data.report.columns["cluster"].tolist() == data.report.clusters.tolist()


def test_a_reason_to_allow_overlap_is_no_other_data(corpus: Path, tmp_path: Path) -> None:
    first, second = (prepare(config(corpus, allow_overlap=reason), 300, tmp_path) for reason in (None, "a test"))
    assert first.fingerprint == second.fingerprint


def test_documents_that_a_tokenizer_loses_are_counted(corpus: Path, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "words.json"))
    data = prepare(config(corpus, tokenizer_file=str(tmp_path / "words.json")), 300, tmp_path / "cache")
    assert data.card["splits"]["report"]["lossy_documents"] == len(data.report)


def test_documents_without_text_are_counted(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": " "}\n')
    paths = {"kind": "files", "path": [str(corpus), str(tmp_path / "a.jsonl")]}
    card = prepare(DataConfig.parse({"corpus": paths}), 300, tmp_path / "cache").card
    assert (card["documents_read"], card["empty_dropped"]) == (12, 2)


def test_a_trained_tokenizer_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    assert prepare(config(corpus), 300, tmp_path).card["splits"]["report"]["lossy_documents"] == 0


def test_nothing_half_prepared_is_left_by_a_killed_process(tmp_path: Path) -> None:
    corpus, cache = write_corpus(tmp_path / "corpus", documents=400), tmp_path / "cache"
    fields = {"corpus": {"kind": "files", "path": str(corpus)}, "evaluation_documents": 3}
    code = f"from workbench.data import *; prepare(DataConfig.parse({fields!r}), 900, {str(cache)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(cache.glob(".*.texts")):
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert prepare(config(corpus), 900, cache).card["documents_read"] == 400
    assert list(cache.glob(".*.tmp")) + list(cache.glob(".*.texts")) == []


def test_a_corpus_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(ConfigError, match="no text at all"):
        prepare(config(tmp_path / "a.txt"), 300, tmp_path / "cache")


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "{i} \\ud800 {i * i}"}}' for i in range(5)))
    assert prepare(config(tmp_path / "a.jsonl"), 300, tmp_path / "cache").card["documents_read"] == 5


def test_batches_of_documents_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "ENCODED_TOGETHER", 10)
    with DiskStrings(tmp_path / "texts") as texts:
        for text in ("one", "two", "three", "a longer text", "four"):
            texts.add(text)
        batches = [["one", "two", "three"], ["a longer text"], ["four"]]
        assert list(preparation._batches(texts, range(5))) == batches
