"""Synthetic tasks: disjoint splits, rows by number, published settings, chance; the same for every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.data import prepare, sources
from workbench.data.splits import MEASURED
from workbench.data.synthetic import SyntheticTask, split_of
from workbench.data.tasks import TaskConfig
from workbench.training import RunConfig

SMALL: dict[str, dict[str, Any]] = {
    "compression": {"lengths": [12]},
    "copying": {"lengths": [12, 16]},
    "fuzzy_in_context_recall": {"lengths": [24]},
    "in_context_recall": {"lengths": [24]},
    "induction_heads": {"lengths": [16]},
    "memorisation": {"lengths": [16], "vocabulary": 16},
    "modular_arithmetic": {"lengths": [8, 12]},
    "noisy_in_context_recall": {"lengths": [24]},
    "parity": {"lengths": [12]},
    "selective_copying": {"lengths": [24], "copied": 4},
    "selective_recall": {"lengths": [40]},
    "word_problem": {"lengths": [12], "group": "S3"},
}
KINDS = sorted(SMALL)
V = 64


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SyntheticTask]:
    """A prepared task of a kind, small unless ``changes`` make it larger."""
    cache = tmp_path_factory.mktemp("cache")

    def made(kind: str, **changes: Any) -> SyntheticTask:
        fields = {"kind": kind, "examples": 6, **SMALL[kind], **changes}
        task: SyntheticTask = prepare(sources.parse(fields), V, cache)
        return task

    return made


def test_every_synthetic_task_is_tested() -> None:
    assert [kind for kind in sources if issubclass(sources[kind], SyntheticTask)] == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_examples_belong_to_their_split(make: Callable[..., SyntheticTask], kind: str) -> None:
    task = make(kind)
    for name in MEASURED:
        examples = getattr(task, name)
        pieces = (examples.piece(d, 0, int(n))[0] for d, n in enumerate(examples.lengths))
        assert {split_of(tokens) for tokens in pieces} == {name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 3])
def test_training_examples_belong_to_training(make: Callable[..., SyntheticTask], kind: str, seed: int) -> None:
    task = make(kind)
    drawn = [example for row in range(20) for example in task.row_examples(seed, row, 48)]
    assert {split_of(example.tokens) for example in drawn} == {"train"}


def test_a_small_task_is_disjoint_too(make: Callable[..., SyntheticTask]) -> None:
    """256 bit strings: 2,000 training examples contain nearly all of theirs, and none of the others."""
    task = make("parity", lengths=[8], examples=20)
    trained = {e.tokens.tobytes() for row in range(500) for e in task.row_examples(0, row, 32)}
    measured = {task.draw(name, number).tokens.tobytes() for name in MEASURED for number in range(20)}
    assert len(trained) > 150 and not trained & measured


def test_a_task_that_is_too_small_is_refused(make: Callable[..., SyntheticTask]) -> None:
    with pytest.raises(ConfigError, match=r"data.lengths: got 'no example of 2 tokens for the \w+ split"):
        make("parity", lengths=[2])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_function_of_their_number(make: Callable[..., SyntheticTask], kind: str) -> None:
    one, other = (make(kind).stream(context=50, seed=3) for _ in range(2))
    in_order = [one.row(r) for r in range(4)]
    for r in (2, 0, 3, 1):
        assert all(np.array_equal(a, b) for a, b in zip(other.row(r), in_order[r]))


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_is_another_row(make: Callable[..., SyntheticTask], kind: str) -> None:
    first, second = (make(kind).stream(context=50, seed=seed).row(0)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_training_rows_are_repeated(make: Callable[..., SyntheticTask]) -> None:
    stream = make("copying", training_rows=3).stream(context=32, seed=0)
    rows = [stream.row(r)[0].tobytes() for r in range(7)]
    assert rows[3:] == [rows[0], rows[1], rows[2], rows[0]] and len(set(rows)) == 3


def test_repeated_rows_are_epochs(make: Callable[..., SyntheticTask]) -> None:
    assert make("copying", training_rows=3).stream(context=32, seed=0).epochs(12) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_that_occur_give_the_level_of_chance(make: Callable[..., SyntheticTask], kind: str) -> None:
    task = make(kind)
    examples = [task.example(task.cases("report")[0], "report", np.random.default_rng(n)) for n in range(100)]
    answers = {target for example in examples for target in example.targets.tolist() if target >= 0}
    chance = task.config.chance(V)
    if kind == "copying":  # an answer is a whole string of six letters
        assert chance == pytest.approx(1 - 26**-6)
    else:
        assert 1 - 1 / len(answers) == pytest.approx(chance)


@pytest.mark.parametrize("kind", ["mqar", "needle"])
def test_chance_of_the_other_tasks(kind: str) -> None:
    """A value of the upper half of 64 symbols; a number of seven digits."""
    wanted = {"mqar": 1 - 1 / 32, "needle": 1 - 1 / 9_000_000}[kind]
    assert sources.parse(kind).chance(V) == wanted


@pytest.mark.parametrize("kind", [k for k in sources if issubclass(sources[k].Config, TaskConfig)])
def test_published_settings_are_configurations(kind: str) -> None:
    published = getattr(sources[kind].Config, "published", None)
    if published is None:
        assert kind == "selective_recall"  # ours
        return
    base = sources.parse({"kind": kind, **published.settings})
    for field, values in published.axes.items():
        for value in values:
            listed = field.endswith("lengths")
            assert base.changed(**{field: (value,) if listed else value}).kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_target_share_is_near_the_share_of_targets(make: Callable[..., SyntheticTask], kind: str) -> None:
    task = make(kind)
    batch = task.stream(context=48, seed=0).batch(range(200))
    share = float((batch.targets_BT >= 0).double().mean())
    assert share == pytest.approx(task.config.target_share(48), rel=0.35)


def run_fields(**changes: Any) -> dict[str, Any]:
    data = {"kind": "copying", "lengths": [16], "measured_lengths": [16, 64], **changes}
    return {"data": data, "model": {"vocabulary": 32}, "training": {"context": 32, "tokens": 1024}}


def test_measured_lengths_may_exceed_the_context_of_training() -> None:
    assert RunConfig.parse(run_fields()).data.measured_lengths == (16, 64)  # type: ignore[attr-defined]


def test_measured_lengths_leave_the_setting_alone() -> None:
    one, other = (RunConfig.parse(run_fields(measured_lengths=lengths)) for lengths in ([16], [16, 128]))
    assert one.setting == other.setting and one.identity != other.identity


def test_the_seed_of_memorised_facts_is_part_of_the_setting() -> None:
    fields = run_fields(kind="memorisation", vocabulary=20)
    one, other = (RunConfig.parse({**fields, "data": {**fields["data"], "seed": seed}}) for seed in (0, 1))
    assert one.setting != other.setting


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lengths": [64]}, r"data.lengths.*64 tokens.*training.context=32"),
        ({"vocabulary": 40}, r"data.vocabulary: got '40 symbols'; expected at most model.vocabulary=32"),
        ({"kind": "word_problem", "group": "S5"}, r"data.group: got '120 symbols'"),
        ({"kind": "word_problem", "group": "Q8"}, r"data.group: got 'Q8'"),
        ({"kind": "word_problem", "group": "S8"}, r"data.group: got 'S8 with 40,320 elements'"),
        ({"kind": "word_problem", "group": "Z6", "elements": "swaps"}, r"data.elements"),
        ({"kind": "parity", "group": "Z3"}, r"data.group"),
        ({"lengths": [15]}, r"data.lengths\[0\]: got '15 tokens'; expected an even number"),
        ({"kind": "in_context_recall", "lengths": [15]}, r"data.lengths\[0\]"),
        ({"kind": "in_context_recall", "noise": 0.2}, r"data.noise_symbols"),
        ({"kind": "fuzzy_in_context_recall", "vocabulary": 6}, r"data.vocabulary: got '6: 2 keys and 3 values'"),
        ({"kind": "selective_copying"}, r"data.lengths\[0\]: got '16 tokens'; expected at least 33"),
        ({"kind": "selective_recall", "pairs": 17}, r"data.vocabulary.*16 keys"),
        ({"kind": "modular_arithmetic", "lengths": [7]}, r"data.lengths\[0\]"),
        (
            {"kind": "compression", "vocabulary": 16},
            r"model.readout: got None; expected summary with.*Set model.readout",
        ),
    ],
)
def test_mistakes(data: dict[str, Any], message: str) -> None:
    fields = run_fields()
    fields["data"] = {"kind": "copying", "lengths": [16], **data}
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse(fields)


@pytest.mark.docs
def test_every_task_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    tasks = [kind for kind in sources if issubclass(sources[kind].Config, TaskConfig)]
    assert [kind for kind in tasks if f"| `{kind}` |" not in text] == []
