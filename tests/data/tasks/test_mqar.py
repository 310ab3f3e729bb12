"""Multi-query associative recall: the published definition, and rows that depend on their number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch

from workbench.config import ConfigError
from workbench.data import IGNORE_INDEX, Batch, Source, prepare, sources, tasks
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


class Drawn(NamedTuple):
    """A training example and what it should say."""

    pairs: int
    tokens: np.ndarray
    targets: np.ndarray
    labels: Any

    @property
    def keys(self) -> list[int]:
        return self.tokens[0 : 2 * self.pairs : 2].tolist()

    @property
    def values(self) -> list[int]:
        return self.tokens[1 : 2 * self.pairs : 2].tolist()

    @property
    def queries(self) -> np.ndarray:
        """Positions with a target."""
        return np.nonzero(self.targets >= 0)[0]


@pytest.fixture(scope="module")
def examples(task: MultiQueryRecall) -> list[Drawn]:
    return [
        Drawn(mix.pairs, *task.example(mix, "train", numbered(n, "train", n)))
        for n in range(200)
        for mix in task.config.mixes
    ]


def test_each_key_is_queried_once(examples: list[Drawn]) -> None:
    assert all(sorted(e.tokens[e.queries].tolist()) == sorted(e.keys) for e in examples)


def test_queries_are_at_even_positions_behind_the_pairs(examples: list[Drawn]) -> None:
    assert all((e.queries >= 2 * e.pairs).all() and (e.queries % 2 == 0).all() for e in examples)


def test_the_target_of_a_query_is_the_value_of_its_key(examples: list[Drawn]) -> None:
    for e in examples:
        value_of = dict(zip(e.keys, e.values))
        assert [value_of[key] for key in e.tokens[e.queries].tolist()] == e.targets[e.queries].tolist()


def test_keys_and_values_of_an_example_are_all_different(examples: list[Drawn]) -> None:
    assert all(len({*e.keys, *e.values}) == 2 * e.pairs for e in examples)


def test_keys_come_from_the_lower_half_of_the_vocabulary(examples: list[Drawn]) -> None:
    assert {key for e in examples for key in e.keys} == set(range(1, V // 2))


def test_values_come_from_the_upper_half_of_the_vocabulary(examples: list[Drawn]) -> None:
    assert {value for e in examples for value in e.values} == set(range(V // 2, V))


def test_an_example_has_the_length_of_its_label(examples: list[Drawn]) -> None:
    assert all(len(e.tokens) == len(e.targets) == e.labels["length"] for e in examples)


def test_positions_without_an_answer_have_no_target(examples: list[Drawn]) -> None:
    assert {target for e in examples for target in e.targets.tolist() if target < 0} == {IGNORE_INDEX}


def fillers(example: Drawn) -> set[int]:
    start = 2 * example.pairs
    return set(example.tokens[start:][example.targets[start:] < 0].tolist())


def test_no_filler_is_a_key_or_value_of_its_example(examples: list[Drawn]) -> None:
    assert not any(fillers(e) & {*e.keys, *e.values} for e in examples)


def test_every_other_token_may_be_a_filler(examples: list[Drawn]) -> None:
    assert set().union(*map(fillers, examples)) == set(range(V))


def test_gaps_follow_the_power_law(task: MultiQueryRecall) -> None:
    """One pair: the gap's frequencies are a i^(a − 1), normalised."""
    mix, gaps = Mix(length=20, pairs=1), np.zeros(9)
    for n in range(4_000):
        targets = task.example(mix, "train", numbered(7, "train", n)).targets
        gaps[(int(np.nonzero(targets >= 0)[0][0]) - 2) // 2] += 1
    wanted = np.arange(1, 10) ** (task.config.power - 1.0)
    assert np.abs(gaps / 4_000 - wanted / wanted.sum()).max() < 0.025


def test_the_only_unused_tokens_are_the_fillers(tmp_path: Path) -> None:
    """6 of 8 tokens are keys and values."""
    tight = prepare(config(mixes=[{"length": 16, "pairs": 3}], examples=4), 8, tmp_path)
    for n in range(50):
        example = Drawn(3, *tight.example(tight.config.mixes[0], "train", numbered(0, "train", n)))
        assert fillers(example) <= set(range(8)) - {*example.keys, *example.values}


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63])
def test_rows_are_a_function_of_their_number(task: MultiQueryRecall, seed: int) -> None:
    one, other = (task.stream(context=100, seed=seed) for _ in range(2))
    in_order = [one.row(r) for r in range(9)]
    assert all(same(other.row(r), in_order[r]) for r in random.Random(0).sample(range(9), 9))


def test_rows_leave_the_global_generators_alone(task: MultiQueryRecall) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    task.stream(context=100, seed=0).row(3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert random.getstate() == python_state


def test_another_seed_or_number_is_another_row(task: MultiQueryRecall) -> None:
    first, second, other = (task.stream(context=100, seed=seed).row(r) for seed, r in ((0, 0), (0, 1), (1, 0)))
    assert not same(first, second)
    assert not same(first, other)


@pytest.fixture(scope="module")
def batch(task: MultiQueryRecall) -> Batch:
    return task.stream(context=100, seed=0).batch(range(32))


def test_a_row_is_filled_with_examples_of_one_mix(batch: Batch) -> None:
    rows = [torch.unique(row[row >= 0], return_counts=True)[1].tolist() for row in batch.segments_BT]
    assert {tuple(lengths) for lengths in rows} == {(32, 32, 32), (48, 48)}


@pytest.mark.parametrize(("name", "value"), [("tokens_BT", 0), ("targets_BT", IGNORE_INDEX), ("documents_BT", -1)])
def test_the_rest_of_a_row_is_padding(batch: Batch, name: str, value: int) -> None:
    assert (getattr(batch, name)[batch.segments_BT < 0] == value).all()


def test_splits_have_separate_streams(task: MultiQueryRecall) -> None:
    mix, splits = task.config.mixes[0], ("train", "selection", "report", "pilot")
    examples = {task.example(mix, "train", numbered(0, split, 0)).tokens.tobytes() for split in splits}  # type: ignore[arg-type]
    assert len(examples) == 4


def overlap(card: dict[str, Any]) -> tuple[int, list[float]]:
    """Training examples that were compared, and the share of evaluation examples among them, by split."""
    return card["training_examples_compared"], [split["overlap"] for split in card["splits"].values()]


def test_long_examples_are_not_seen_in_training(task: MultiQueryRecall) -> None:
    assert overlap(task.card) == (500, [0, 0, 0])


def test_overlap_with_training_is_measured(tmp_path: Path) -> None:
    """One key, two values, and a filler of two: four different examples in all."""
    small = prepare(config(mixes=[{"length": 4, "pairs": 1}], examples=30), 4, tmp_path)
    assert overlap(small.card) == (4, [1, 1, 1])


def test_a_prepared_task_is_not_prepared_again(task: MultiQueryRecall) -> None:
    times = {path: path.stat().st_mtime_ns for path in task.folder.iterdir()}
    prepare(config(), V, task.folder.parent)
    assert {path: path.stat().st_mtime_ns for path in task.folder.iterdir()} == times


@pytest.fixture
def opened(task: MultiQueryRecall) -> MultiQueryRecall:
    return Source.open(task.folder.parent, task.fingerprint)


def test_an_opened_task_has_its_configuration(task: MultiQueryRecall, opened: MultiQueryRecall) -> None:
    assert opened.config == task.config


@pytest.mark.parametrize("number", [0, 7, 19])
@pytest.mark.parametrize("name", ["selection", "report"])
def test_stored_examples_are_those_drawn(opened: MultiQueryRecall, name: Any, number: int) -> None:
    example = opened.draw(name, number)
    assert same(getattr(opened, name).piece(number, 0, len(example.tokens)), example[:2])


def test_answers_are_counted_per_example(opened: MultiQueryRecall) -> None:
    columns = opened.report.columns
    assert columns["answers"].tolist() == columns["pairs"].tolist()


def test_seed_and_vocabulary_are_part_of_the_fingerprint(task: MultiQueryRecall) -> None:
    cache = task.folder.parent
    others = [prepare(config(seed=1), V, cache), prepare(config(), V + 1, cache)]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_torn_file_is_written_again(tmp_path: Path) -> None:
    task = prepare(config(), V, tmp_path)
    (task.folder / "report.tokens.npy").write_bytes(b"torn")
    assert len(prepare(config(), V, tmp_path).report) == 20


def test_the_cache_is_created(tmp_path: Path) -> None:
    assert len(prepare(config(examples=2), V, tmp_path / "results" / "cache").report) == 2


class Copy(Task):
    """Repeat the first token."""

    class Config(TaskConfig):
        """Copy."""

        kind: Literal["copy"] = "copy"

    def cases(self, split: Any) -> list[int]:
        return [6, 8]

    def example(self, case: int, split: Any, generator: np.random.Generator) -> Example:
        tokens = generator.integers(self.vocabulary, size=case)
        targets = np.full(case, IGNORE_INDEX)
        targets[-1] = tokens[0]
        return Example(tokens, targets, {"length": case})


@pytest.fixture
def copy_run() -> Iterator[RunConfig]:
    sources.register(Copy)
    yield RunConfig.parse({"data": {"kind": "copy", "examples": 6}})
    sources.unregister("copy")


def test_another_task_is_one_class(copy_run: RunConfig, tmp_path: Path) -> None:
    prepared = prepare(copy_run.data, 9, tmp_path)
    assert prepared.card["splits"]["report"]["answers"] == 6
    assert (prepared.stream(context=20, seed=0).batch(range(2)).targets_BT >= 0).sum() >= 4


def test_another_task_is_judged_by_its_errors(copy_run: RunConfig) -> None:
    metric = copy_run.data.metric
    assert (metric.suite, metric.task, metric.unit) == ("answers", "copy", "errors per answer")


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
