"""Multi-query associative recall: the published definition, and rows that depend on their number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from workbench.config import ConfigError
from workbench.data import Source, prepare, sources, tasks
from workbench.data.tasks import STREAMS, Example, SplitName, Task, TaskConfig
from workbench.data.tasks.mqar import Mix, MultiQueryRecall
from workbench.seeding import counter_generator
from workbench.training import RunConfig

V = 64


def config(**changes: Any) -> MultiQueryRecall.Config:
    mixes = [{"length": 32, "pairs": 4}, {"length": 48, "pairs": 12}]
    return MultiQueryRecall.Config.parse({"mixes": mixes, "examples": 20, **changes})


@pytest.fixture(autouse=True, scope="module")
def _fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 500)
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> MultiQueryRecall:
    return prepare(config(), V, tmp_path_factory.mktemp("cache"))


def numbered(seed: int, split: SplitName, number: int) -> np.random.Generator:
    return counter_generator(seed, STREAMS[split], number)


def drawn(task: MultiQueryRecall, count: int = 200) -> list[tuple[int, Example]]:
    return [
        (mix.pairs, task.example(mix, "train", numbered(n, "train", n)))
        for n in range(count)
        for mix in task.config.mixes
    ]


def test_every_answer_is_determined_by_the_context(task: MultiQueryRecall) -> None:
    for P, (tokens, targets, labels) in drawn(task):
        keys, values = tokens[0 : 2 * P : 2], tokens[1 : 2 * P : 2]
        (asked,) = np.nonzero(targets >= 0)
        assert len(asked) == P and sorted(tokens[asked]) == sorted(keys), "each key is queried once"
        assert (asked >= 2 * P).all() and (asked % 2 == 0).all() and len(tokens) == labels["length"]
        meant = dict(zip(keys.tolist(), values.tolist()))
        assert [meant[key] for key in tokens[asked].tolist()] == targets[asked].tolist()
        assert len({*keys.tolist(), *values.tolist()}) == 2 * P
        assert (keys >= 1).all() and (keys < V // 2).all() and (values >= V // 2).all() and (values < V).all()
        assert (targets[targets < 0] == -100).all()


def test_fillers_collide_with_no_key_and_no_value(task: MultiQueryRecall) -> None:
    seen = set()
    for P, (tokens, targets, _) in drawn(task):
        fillers = tokens[2 * P :][targets[2 * P :] < 0]
        assert not set(fillers.tolist()) & set(tokens[: 2 * P].tolist())
        seen.update(fillers.tolist())
    assert seen == set(range(V)), "every id that an example does not use may be a filler"


def test_gaps_follow_the_power_law(task: MultiQueryRecall) -> None:
    """One pair: the gap's frequencies are a i^(a − 1), normalised."""
    mix, gaps = Mix(length=20, pairs=1), np.zeros(9)
    for n in range(4_000):
        targets = task.example(mix, "train", numbered(7, "train", n)).targets
        gaps[(int(np.nonzero(targets >= 0)[0][0]) - 2) // 2] += 1
    wanted = np.arange(1, 10) ** (task.config.power - 1.0)
    assert np.abs(gaps / 4_000 - wanted / wanted.sum()).max() < 0.025


def test_the_range_of_fillers_is_exact_when_nothing_is_left_over(tmp_path: Path) -> None:
    tight = prepare(config(mixes=[{"length": 16, "pairs": 3}], examples=4), 8, tmp_path)
    for n in range(50):
        tokens, targets, _ = tight.example(tight.config.mixes[0], "train", numbered(0, "train", n))
        assert len(set(tokens[:6].tolist())) == 6 and set(tokens[6:][targets[6:] < 0].tolist()) <= set(range(8))


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63])
def test_rows_are_a_function_of_their_number(task: MultiQueryRecall, seed: int) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    one, other = (task.stream(context=100, seed=seed) for _ in range(2))
    in_order = [one.row(r) for r in range(9)]
    assert all(same(other.row(r), in_order[r]) for r in random.Random(0).sample(range(9), 9))
    assert torch.equal(torch_state, torch.get_rng_state()) and random.getstate() == python_state
    assert not same(task.stream(context=100, seed=seed + 1).row(0), in_order[0])
    assert not same(in_order[0], in_order[1])


def test_rows_are_filled_with_whole_examples(task: MultiQueryRecall) -> None:
    batch = task.stream(context=100, seed=0).batch(range(32))
    for tokens, targets, segments, documents in zip(*batch):
        sizes = [int((segments == s).sum()) for s in range(int(segments.max()) + 1)]
        assert sizes in ([32, 32, 32], [48, 48])
        padded = segments < 0
        assert (targets[padded] == -100).all() and (documents[padded] == -1).all() and (tokens[padded] == 0).all()
    lengths = {int((row == 0).sum()) for row in batch.segments_BT}
    assert lengths == {32, 48}, "each row draws its mix"


def test_splits_have_streams_of_their_own_and_overlap_is_measured(task: MultiQueryRecall, tmp_path: Path) -> None:
    mix = task.config.mixes[0]
    three = [task.example(mix, "train", numbered(0, split, 0)).tokens for split in ("train", "selection", "report")]
    assert not any(np.array_equal(a, b) for i, a in enumerate(three) for b in three[i + 1 :])
    assert [split["seen_in_training"] for split in task.card["splits"].values()] == [0, 0]
    assert task.card["training_examples_compared"] == 500
    small = prepare(config(mixes=[{"length": 4, "pairs": 1}], examples=30), 4, tmp_path)
    # 1 key, 2 values, the filler one of 2: four different examples in all
    assert small.card["training_examples_compared"] == 4
    assert [split["seen_in_training"] for split in small.card["splits"].values()] == [30, 30]


def test_prepared_once_and_opened_again(task: MultiQueryRecall) -> None:
    cache = task.folder.parent
    times = {path: path.stat().st_mtime_ns for path in task.folder.iterdir()}
    assert prepare(config(), V, cache).fingerprint == task.fingerprint
    assert {path: path.stat().st_mtime_ns for path in task.folder.iterdir()} == times
    again = Source.open(cache, task.fingerprint)
    assert type(again) is MultiQueryRecall and again.config == task.config
    for name in ("selection", "report"):
        held = getattr(again, name)
        for number in (0, 7, 19):
            example = task.draw(name, number)
            tokens, targets = held.piece(number, 0, len(example.tokens))
            assert np.array_equal(tokens, example.tokens) and np.array_equal(targets, example.targets)
            assert held.columns["pairs"][number] == held.columns["answers"][number] == example.labels["pairs"]
    others = [prepare(config(seed=1), V, cache), prepare(config(), V + 1, cache)]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 3
    (task.folder / "report.tokens.npy").write_bytes(b"torn")
    assert len(prepare(config(), V, cache).report) == 20


def test_a_task_without_material_is_prepared_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert len(prepare(config(examples=2), V, tmp_path / "results" / "cache").report) == 2


def test_a_third_task_is_one_class(tmp_path: Path) -> None:
    class Copy(Task):
        """Say the first token again."""

        class Config(TaskConfig):
            """Copy."""

            kind: Literal["copy"] = "copy"

        def cases(self, split: Any) -> list[int]:
            return [6, 8]

        def example(self, case: int, split: Any, generator: np.random.Generator) -> Example:
            tokens = generator.integers(self.vocabulary, size=case)
            targets = np.full(case, -100)
            targets[-1] = tokens[0]
            return Example(tokens, targets, {"length": case})

    sources.register(Copy)
    try:
        run = RunConfig.parse({"data": {"kind": "copy", "examples": 6}})
        prepared = prepare(run.data, 9, tmp_path)
        assert prepared.card["splits"]["report"]["answers"] == 6 and run.data.metric.unit == "errors per answer"
        assert (prepared.stream(context=20, seed=0).batch(range(2)).targets_BT >= 0).sum() >= 4
    finally:
        sources.unregister("copy")


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (
            {"mixes": [{"length": 32, "pairs": 9}]},
            {},
            r"data.mixes\[0\].pairs: got '9 pairs in 32 tokens'.*at most 8 pairs",
        ),
        (
            {"mixes": [{"length": 64, "pairs": 16}]},
            {"vocabulary": 33},
            r"data.vocabulary: got 33; expected at least 34",
        ),
        ({"vocabulary": 512}, {"vocabulary": 300}, r"data.vocabulary: got 512; expected at most model.vocabulary=300"),
        ({"mixes": [{"length": 512, "pairs": 4}]}, {}, r"data.mixes\[0\].length.*512 tokens.*training.context=256"),
        ({"measured": [{"length": 300, "pairs": 4}]}, {}, r"data.measured\[0\].length.*Set training.context=300"),
        ({"power": 0}, {}, "data.power"),
        ({"pears": 3}, {}, "data.pears.*unknown field"),
        ({"mixes": []}, {}, "data.mixes"),
        ({"measure": "accuracy"}, {}, "data.measure"),
    ],
)
def test_mistakes(data: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse({"data": {"kind": "mqar", **data}, "model": model, "training": {"context": 256}})


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data.kind: got 'mqr'.*'mqar'"):
        RunConfig.parse({"data": {"kind": "mqr"}})
