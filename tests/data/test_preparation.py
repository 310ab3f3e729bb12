"""A corpus is prepared once; torn, killed or concurrent preparation leaves nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import write_corpus

from workbench.config import ConfigError
from workbench.data import DataConfig, PreparedData, prepare
from workbench.data.corpora.files import Files

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


@pytest.mark.parametrize(("near_duplicates", "clusters"), [(True, 12), (False, 13)])
def test_near_duplicates_are_an_option(tmp_path: Path, near_duplicates: bool, clusters: int) -> None:
    corpus = write_corpus(tmp_path / "corpus", 12)
    (corpus / "copy.txt").write_text((corpus / "000.txt").read_text() + "\nand one more line than the original")
    data = prepare(config(corpus, near_duplicates=near_duplicates), 300, tmp_path / "cache")
    assert data.card["clusters"] == clusters


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
