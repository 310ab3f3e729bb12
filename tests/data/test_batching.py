"""Every batch plan takes each row of a global batch once; the loader runs it and resumes exactly."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.data import RowStream, StepLoader, batch_plans
from workbench.data.batching import Assignment, BatchPlan, GlobalBatch
from workbench.registry import plug_in
from workbench.training import RunConfig

SHAPES = [(4, 1, 1), (4, 1, 4), (8, 3, 2), (6, 5, 3)]
"""Rows of a micro-batch, micro-batches, ranks."""


def global_batch(step: int, batch_size: int, accumulate: int) -> GlobalBatch:
    count = batch_size * accumulate
    lengths = [np.random.default_rng(row).integers(1, 9, size=3) for row in range(count * (step + 1))]
    rows = range(step * count, (step + 1) * count)
    return GlobalBatch(step, rows, accumulate, lambda row: int(lengths[row].sum()), lengths.__getitem__)


def plan(kind: str) -> BatchPlan:
    return batch_plans[kind](batch_plans.parse(kind))


def every_rank(kind: str, step: int, batch_size: int, accumulate: int, world: int) -> list[list[list[int]]]:
    return plan(kind).assign(global_batch(step, batch_size, accumulate), world)


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), SHAPES)
@pytest.mark.parametrize("kind", batch_plans)
def test_every_row_of_a_global_batch_is_used_once(kind: str, batch_size: int, accumulate: int, world: int) -> None:
    ranks = every_rank(kind, 2, batch_size, accumulate, world)
    rows = sorted(row for rank in ranks for micro_batch in rank for row in micro_batch)
    assert rows == list(global_batch(2, batch_size, accumulate).rows)


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), SHAPES)
@pytest.mark.parametrize("kind", batch_plans)
def test_micro_batches_of_all_ranks_are_equally_large(kind: str, batch_size: int, accumulate: int, world: int) -> None:
    ranks = every_rank(kind, 0, batch_size, accumulate, world)
    assert [[len(rows) for rows in rank] for rank in ranks] == [[batch_size // world] * accumulate] * world


@pytest.mark.parametrize("kind", batch_plans)
def test_a_plan_is_a_function_of_its_arguments(kind: str) -> None:
    assert every_rank(kind, 3, 6, 5, 3) == every_rank(kind, 3, 6, 5, 3)


def test_contiguous_keeps_the_order_of_the_stream() -> None:
    assert every_rank("contiguous", 1, 4, 2, 2) == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


class Numbers(RowStream):
    """Rows that hold their own number, and row number + 1 segments."""

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.full(4, r)
        return tokens, tokens, np.minimum(np.arange(4), r).astype(np.int32), tokens


def loader(used: BatchPlan, **changes: Any) -> StepLoader:
    return StepLoader(Numbers(), used, **{"batch_size": 4, "accumulate": 2, "steps": 5, **changes})


def rows_of(batches: Any) -> list[list[int]]:
    return [batch.tokens_BT[:, 0].tolist() for batch in batches]


def test_the_loader_hands_out_the_rows_of_the_plan() -> None:
    ranks = [rows_of(loader(plan("contiguous"), rank=rank, world=2)) for rank in range(2)]
    assert ranks[1] == [[4 * k + 2, 4 * k + 3] for k in range(10)]


class Learning(BatchPlan):
    """Rotates a global batch by what earlier steps measured."""

    learns = True

    def assign(self, batch: GlobalBatch, world: int) -> Assignment:
        rows = np.roll(np.array(batch.rows), batch.state or 0)
        return rows.reshape(batch.accumulate, world, -1).swapaxes(0, 1).tolist()

    def learn(self, state: Any, measurements: Mapping[str, Any]) -> Any:
        return (state or 0) + measurements["shift"]


def recorded(used: StepLoader, first: int = 0, stop: int | None = None) -> list[list[int]]:
    """Rows of the micro-batches when every step records a measurement, up to micro-batch ``stop``."""
    rows = []
    for number, batch in enumerate(used, start=first):
        rows += rows_of([batch])
        if (number + 1) % used.accumulate == 0:
            step = number // used.accumulate
            used.record(step, {"shift": step + 1})
        if number + 1 == stop:
            break
    return rows


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_measurements_of_earlier_steps_reach_the_plan(accumulate: int) -> None:
    used = loader(Learning(None), accumulate=accumulate, steps=8)
    rows = recorded(used)
    assert rows != rows_of(loader(plan("contiguous"), accumulate=accumulate, steps=8))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("stop", [1, 5, 6, 8])
def test_a_plan_that_learns_resumes_exactly(accumulate: int, stop: int) -> None:
    expected = recorded(loader(Learning(None), accumulate=accumulate, steps=8))
    first = loader(Learning(None), accumulate=accumulate, steps=8)
    started = recorded(first, stop=stop * accumulate)
    second = loader(Learning(None), accumulate=accumulate, steps=8)
    second.load_state_dict(first.state_dict())
    assert started + recorded(second, stop * accumulate) == expected


@pytest.mark.parametrize("stop", [3, 4, 7, 11])
def test_it_resumes_exactly_in_the_middle_of_a_step(stop: int) -> None:
    expected = recorded(loader(Learning(None), accumulate=3, steps=8))
    first = loader(Learning(None), accumulate=3, steps=8)
    started = recorded(first, stop=stop)
    second = loader(Learning(None), accumulate=3, steps=8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert started + recorded(second, stop) == expected


def test_only_states_that_a_plan_may_still_read_are_kept() -> None:
    used = loader(Learning(None), accumulate=1, steps=20)
    recorded(used)
    assert len(used.states) <= 4


def test_lengths_of_a_step_count_padding_as_documents() -> None:
    class Padded(Numbers):
        def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
            tokens = np.full(6, r)
            return tokens, tokens, np.array([0, 0, 1, 1, 1, -1 if r % 2 else 2], np.int32), tokens

    used = StepLoader(Padded(), plan("contiguous"), batch_size=4, accumulate=1, steps=2, world=2)
    assert [[lengths.tolist() for lengths in rank] for rank in used.lengths(1)] == [[[2, 3, 1, 2, 3, 1]]] * 2


PLUGIN = '''
"""Longest rows first."""

from typing import Literal

import numpy as np

from workbench.data.batching import BatchPlan, BatchPlanConfig, batch_plans


@batch_plans.register
class LongestFirst(BatchPlan):
    """Deals rows out by the length of their first segment."""

    class Config(BatchPlanConfig):
        """Longest rows first."""

        kind: Literal["longest_first"] = "longest_first"

    def assign(self, batch, world):
        order = sorted(batch.rows, key=lambda row: -batch.segment_lengths(row)[0])
        return np.array(order).reshape(batch.accumulate, -1, world).transpose(2, 0, 1).tolist()
'''


def test_a_plan_outside_the_package_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_PLUGINS", "")
    (tmp_path / "longest_first_plan.py").write_text(textwrap.dedent(PLUGIN))
    plug_in(tmp_path / "longest_first_plan.py")
    try:
        config = RunConfig.parse({"training": {"batch_plan": "longest_first"}}).training.batch_plan
        rows = rows_of(loader(batch_plans[config.kind](config), accumulate=1, steps=2))
        assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]
        test_every_row_of_a_global_batch_is_used_once("longest_first", 8, 3, 2)
    finally:
        batch_plans.unregister("longest_first")


def test_an_unknown_plan_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_plan.kind: got 'contigous'.*'contiguous'"):
        RunConfig.parse({"training": {"batch_plan": "contigous"}})


def test_the_default_plan_changes_no_identity() -> None:
    assert "batch_plan" not in RunConfig().canonical()["training"]
