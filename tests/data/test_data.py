"""From text to batches: nothing lost, nothing twice, nothing seen that must not be seen."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from helpers import write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.config import ConfigError
from workbench.data import DataConfig, Documents, PreparedData, StepLoader, TrainingStream, evaluation_batches, prepare
from workbench.data.preparation import _encode, near_duplicates, split_by_cluster


def config(path: Path, field: str = "text", **more: Any) -> DataConfig:
    return DataConfig.parse({"corpus": {"kind": "files", "path": str(path), "field": field}, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 12)


@pytest.fixture(scope="module")
def data(folder: Path) -> PreparedData:
    return prepare(config(folder), 300, folder.parent / "cache")


def stream(data: PreparedData, **changes: Any) -> TrainingStream:
    return TrainingStream(data.train, **{"batch_size": 3, "context": 16, "seed": 7, **changes})


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def counted(number: int) -> Documents:
    """Documents whose tokens are all different, so that a target is known by its value."""
    generator = random.Random(number)
    lengths = [generator.randint(2, 40) for _ in range(30)]
    return Documents(np.arange(sum(lengths)), np.concatenate(([0], np.cumsum(lengths))), np.ones(30, np.int64))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 2])
def test_batches_are_a_function_of_their_number(data: PreparedData, seed: int) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    one = stream(data, seed=seed)
    count = 2 * one.rows_in_epoch // 3 + 2  # across an epoch's boundary
    in_order = [one.batch(k) for k in range(count)]
    other = stream(data, seed=seed)
    order = random.Random(0).sample(range(count), count)
    assert all(same(other.batch(k), in_order[k]) for k in order)
    assert torch.equal(torch_state, torch.get_rng_state()) and random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]


def test_seeds_differ(data: PreparedData) -> None:
    firsts = [stream(data, seed=seed).batch(0).tokens_BT for seed in (-2, -1, 0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[i + 1 :])


@pytest.mark.parametrize("context", [2, 7, 64])
def test_an_epoch_has_every_target_once_and_nothing_leaks(context: int) -> None:
    documents = counted(context)
    one = TrainingStream(documents, batch_size=1, context=context, seed=3)
    for epoch in range(2):
        seen: list[int] = []
        for r in range(epoch * one.rows_in_epoch, (epoch + 1) * one.rows_in_epoch):
            tokens, targets, segments, numbers = one.row(r)
            assert (targets == tokens + 1).all()
            for segment in set(segments.tolist()):
                own, number = tokens[segments == segment], numbers[segments == segment]
                assert (np.diff(own) == 1).all() and len(set(number.tolist())) == 1
                low, high = documents.offsets[number[0]], documents.offsets[number[0] + 1]
                assert low <= own[0] and own[-1] + 1 < high
            seen += targets.tolist()
        total = int((np.diff(documents.offsets) - 1).sum())
        assert len(set(seen)) == len(seen) == total - total % context


@pytest.mark.parametrize(("batch_size", "context"), [(1, 5), (4, 16), (3, 1000)])
def test_evaluation_counts_every_target_once(batch_size: int, context: int) -> None:
    documents = counted(1)
    seen: Counter[int] = Counter()
    for batch in evaluation_batches(documents, batch_size=batch_size, context=context):
        real = batch.targets_BT >= 0
        assert torch.equal(batch.targets_BT[real], batch.tokens_BT[real] + 1)
        assert (batch.documents_BT[~real] == -1).all() and (batch.documents_BT[real] >= 0).all()
        seen.update(batch.targets_BT[real].tolist())
    firsts = set(documents.offsets[:-1].tolist())
    assert seen == Counter(set(range(int(documents.offsets[-1]))) - firsts)


def test_the_loader_resumes(data: PreparedData) -> None:
    whole = list(StepLoader(stream(data), 9))
    first = StepLoader(stream(data), 9)
    iterator = iter(first)
    begun = [next(iterator) for _ in range(4)]
    second = StepLoader(stream(data), 9)
    second.load_state_dict(first.state_dict())
    assert len(whole) == len(second) == 9
    rest = list(second)
    assert len(rest) == 5 and all(same(a, b) for a, b in zip(whole, [*begun, *rest]))


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


def test_a_context_longer_than_the_corpus(data: PreparedData) -> None:
    with pytest.raises(ConfigError, match=r"training.context: got 1000000"):
        stream(data, context=10**6)


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
