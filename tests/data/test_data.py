"""From text to batches: nothing lost, nothing twice, nothing seen that must not be seen."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from helpers import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.config import ConfigError
from workbench.data import DataConfig, PreparedData, prepare
from workbench.data.preparation import _encode, near_duplicates, split_by_cluster


def config(path: Path, field: str = "text", **more: object) -> DataConfig:
    return DataConfig.parse({"corpus": {"kind": "files", "path": str(path), "field": field}, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 12)


@pytest.fixture(scope="module")
def data(folder: Path) -> PreparedData:
    return prepare(config(folder), 300, folder.parent / "cache")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), where=st.integers(0, 5))
def test_the_tokenizer_loses_nothing(data: PreparedData, text: str, where: int) -> None:
    text = text[:where] + "<|document|>" + text[where:]
    (ids,), (size,) = _encode(data.tokenizer, [text], [True])
    assert ids[0] == ids[-1] == 0 and 0 not in ids[1:-1] and size == len(text.encode())
    assert data.tokenizer.decode(ids[1:-1].tolist(), skip_special_tokens=False) == text


def test_splits_are_disjoint_and_near_duplicates_stay_together() -> None:
    generator = random.Random(0)
    texts = ["\n".join(f"line {generator.random()} of the text number {i}" for _ in range(10)) for i in range(30)]
    copies = [text + "\none more line, which makes it another text" for text in texts[:10]]
    everything = texts + copies
    clusters = near_duplicates(everything)
    assert len(set(clusters)) == 30 and all(clusters[i] == clusters[30 + i] for i in range(10))
    sizes, keys = [len(text) for text in everything], [generator.randbytes(32) for _ in everything]
    splits = split_by_cluster(sizes, keys, clusters, DataConfig(selection_fraction=0.2, report_fraction=0.2))
    assert sorted(i for part in splits.values() for i in part) == list(range(40)) and all(splits.values())
    home = {i: name for name, part in splits.items() for i in part}
    assert all(home[i] == home[30 + i] for i in range(10))


def test_the_cache_is_used_again_and_rebuilt_when_torn(folder: Path, tmp_path: Path) -> None:
    first = prepare(config(folder), 300, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(config(folder), 300, tmp_path).fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times
    assert prepare(config(folder), 301, tmp_path).fingerprint != first.fingerprint
    whole = {path: path.read_bytes() for path in times}
    for name in ("train.tokens.00000.npy", "tokenizer.json", "card.json"):
        (first.folder / name).write_bytes(whole[first.folder / name][:-9])
        again = prepare(config(folder), 300, tmp_path)
        assert {path: path.read_bytes() for path in again.folder.iterdir()} == whole
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(ConfigError, match=r"no prepared data"):
        PreparedData.open(tmp_path, "0" * 16)


def test_two_processes_prepare_at_once(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from workbench.data import *; c = DataConfig.parse({'corpus': {'kind': 'files', 'path': sys.argv[1]}});"
        "p = prepare(c, 300, sys.argv[2], lambda s: print(s, file=sys.stderr)); print(p.fingerprint, int(p.train.tokens.shards[0].sum()))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(tmp_path)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 2)
    ]
    said = [worker.communicate(timeout=60) for worker in workers]
    assert said[0][0] == said[1][0] and said[0][0].strip(), said
    assert sum("training a byte-level" in err for _, err in said) == 1


def test_json_lines_and_parquet_read_alike(tmp_path: Path) -> None:
    texts = [f"text number {i} with \u2028 and \x85 in it, word {i * i}" for i in range(8)]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"body": t}, ensure_ascii=False) for t in texts), encoding="utf-8"
    )
    pl.DataFrame({"body": texts}).write_parquet(tmp_path / "a.parquet")
    a, b = (prepare(config(tmp_path / f"a.{e}", "body"), 300, tmp_path / "c") for e in ("jsonl", "parquet"))
    assert a.fingerprint == b.fingerprint and a.card["documents_read"] == 8


def test_half_surrogates_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} \ud800 {i * i}"}) for i in range(5)))
    assert prepare(config(tmp_path / "a.jsonl"), 300, tmp_path / "c").card["documents_read"] == 5


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    files: dict[str, bytes] = {
        "blank/a.txt": b"  \n",
        "latin.txt": b"caf\xe9",
        "x.jsonl": b'{"txt": "a"}\n',
        "y.jsonl": b"{no\n",
        "bad.parquet": b"xxxx",
        "tok.json": b"{}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pl.DataFrame({"txt": ["a"]}).write_parquet(tmp_path / "z.parquet")
    cases: list[tuple[DataConfig, int, str]] = [
        (config(tmp_path / "blank"), 300, "no text at all"),
        (config(folder / "000.txt"), 300, "at least 3 different documents"),
        (config(tmp_path / "none"), 300, "data.corpus.path: got .*at least one file"),
        (config(tmp_path / "x.jsonl"), 300, "line 1 .*Nearest valid name: 'txt'"),
        (config(tmp_path / "z.parquet"), 300, "data.corpus.field.*Nearest valid name: 'txt'"),
        (config(tmp_path / "y.jsonl"), 300, "line 1: .*one JSON object a line"),
        (config(tmp_path / "bad.parquet"), 300, "a Parquet file"),
        (config(tmp_path / "latin.txt"), 300, "not UTF-8 at byte 3"),
        (config(folder), 256, "model.vocabulary: got 256; expected at least 257"),
        (config(folder, tokenizer_file=str(tmp_path / "tok.json")), 300, "data.tokenizer_file"),
        (config(folder, tokenizer_file=str(tmp_path / "none.json")), 300, "data.tokenizer_file: got .*No such file"),
    ]
    for wrong, vocabulary, text in cases:
        with pytest.raises(ConfigError, match=text):
            prepare(wrong, vocabulary, tmp_path / "cache")
    with pytest.raises(ConfigError, match="'stdlib'"):
        DataConfig.parse({"corpus": "stdlb"})


def test_the_hub_without_library_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = DataConfig.parse({"corpus": {"kind": "huggingface", "name": "owner/name"}})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="the library `datasets`"):
        prepare(hub, 300, tmp_path)
    pytest.importorskip("huggingface_hub")
    monkeypatch.setitem(sys.modules, "datasets", sys)  # anything that imports: it is not reached
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        prepare(hub, 300, tmp_path)
