"""Every batch plan takes each row of a global batch once; the loader runs it and resumes exactly."""

from __future__ import annotations

import itertools
import json
import tempfile
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.data import RowStream, RunFacts, StepLoader, batch_plans
from workbench.data.batching import Assignment, BatchPlan, GlobalBatch
from workbench.data.batching.balanced import documents_of, pack
from workbench.data.loads import load_models
from workbench.latency import LatencyTable, LayerLatency
from workbench.registry import plug_in
from workbench.training import RunConfig

SHAPES = [(4, 1, 1), (4, 1, 4), (8, 3, 2), (6, 5, 3)]
"""Rows of a micro-batch, micro-batches, ranks."""


def global_batch(step: int, batch_size: int, accumulate: int) -> GlobalBatch:
    count = batch_size * accumulate
    lengths = [np.random.default_rng(row).integers(1, 9, size=3) for row in range(count * (step + 1))]
    rows = range(step * count, (step + 1) * count)
    return GlobalBatch(step, rows, accumulate, lambda row: int(lengths[row].sum()), lengths.__getitem__)


FACTS = RunFacts(flops=lambda length: float(length * length), budgets=(8, None))


@cache
def measured() -> dict[str, str]:
    """Loads by a latency table of two layers: 1 µs per token and block, and 1 µs per token."""
    path = Path(tempfile.mkdtemp()) / "table.json"
    of_budgets = LayerLatency((1, 64), (1, 8), ((1e-6, 8e-6), (64e-6, 512e-6)))
    LatencyTable({}, {"a": of_budgets, "b": LayerLatency((1, 64), (), ((1e-6,), (64e-6,)))}, ("a", "b")).save(path)
    return {"kind": "measured", "table": str(path)}


def plan(kind: str, **fields: Any) -> BatchPlan:
    if kind == "sparsity_aware":
        fields = {"loads": measured(), **fields}
    return batch_plans[kind](batch_plans.parse({"kind": kind, **fields}), FACTS)


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


def rows_of_lengths(lengths: list[int], accumulate: int, state: Any = None) -> GlobalBatch:
    """A global batch of rows with one document each, without padding."""
    rows = range(len(lengths))
    return GlobalBatch(0, rows, accumulate, lengths.__getitem__, lambda row: np.array([lengths[row]]), state)


def totals(assignment: Assignment, lengths: list[int]) -> list[int]:
    return [sum(lengths[row] for rows in of_rank for row in rows) for of_rank in assignment]


def test_length_balanced_ranks_have_equal_tokens() -> None:
    lengths = [16, 1, 1, 2, 2, 14, 3, 3]
    assert totals(plan("contiguous").assign(rows_of_lengths(lengths, 4), 2), lengths) == [22, 20]
    assert totals(plan("length_balanced").assign(rows_of_lengths(lengths, 4), 2), lengths) == [21, 21]


def test_micro_batches_run_in_order_of_falling_load() -> None:
    lengths = [16, 1, 1, 2, 2, 14, 3, 3]
    for of_rank in plan("length_balanced").assign(rows_of_lengths(lengths, 4), 2):
        of_micro_batches = [lengths[row] for (row,) in of_rank]
        assert of_micro_batches == sorted(of_micro_batches, reverse=True)


def test_rows_of_a_micro_batch_are_alike() -> None:
    lengths = [30, 2, 29, 3, 8, 9, 1, 10]
    dealt = plan("length_balanced").assign(rows_of_lengths(lengths, 2), 2)
    pairs = {tuple(sorted(lengths[row] for row in rows)) for of_rank in dealt for rows in of_rank}
    assert pairs == {(29, 30), (9, 10), (3, 8), (1, 2)}


def test_packing_is_near_the_best_split() -> None:
    # against the best of all splits
    for seed in range(20):
        loads = np.random.default_rng(seed).integers(1, 40, size=8).tolist()
        best = min(max(sum(c), sum(loads) - sum(c)) for c in itertools.combinations(loads, 4))
        packed = max(sum(loads[index] for index in of_rank) for of_rank in pack(loads, 2, "step"))
        assert best <= packed <= 1.05 * best


def test_ranks_that_wait_in_every_micro_batch_run_alike_ones_at_a_time() -> None:
    loads = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0]
    first, second = pack(loads, 2, "micro_batch")
    assert [{loads[i], loads[j]} for i, j in zip(first, second)] == [{9, 8}, {7, 3}, {2, 1}]


def test_loads_in_flops_are_the_formula_of_the_model() -> None:
    lengths = [5, 4, 3, 3]  # squares 25, 16, 9, 9
    assert plan("length_balanced", loads="flops").assign(rows_of_lengths(lengths, 2), 2) == [[[0], [3]], [[1], [2]]]


def test_padding_counts_as_a_document() -> None:
    batch = GlobalBatch(0, range(2), 1, lambda row: 8, lambda row: np.array([[3, 2], [8]][row]))
    assert documents_of(batch, [0, 1]).tolist() == [3, 2, 3, 8]


def test_sparsity_aware_loads_follow_the_moving_average_of_budgets() -> None:
    used = plan("sparsity_aware", decay=0.75)
    chosen = {"lengths": [[[40], [40]], [[40], [6]]], "budgets": [[[2, None], [4, None]], [[6, None], [8, None]]]}
    state = used.learn(None, chosen)
    assert state == {"6": [0.75 * 8 + 0.25 * 4, None], "3": [8.0, None]}
    again = used.learn(state, chosen)
    assert again["6"] == [0.75 * 7 + 0.25 * 4, None]
    assert used.load(np.array([40]), again) == pytest.approx(40e-6 * (6.25 + 1))  # type: ignore[attr-defined]
    assert used.load(np.array([30]), again) == pytest.approx(30e-6 * (8 + 1))  # type: ignore[attr-defined]


def test_sparsity_aware_batching_puts_learned_sparse_rows_together() -> None:
    lengths = [40, 40, 20, 20]
    used = plan("sparsity_aware")
    dense = used.assign(rows_of_lengths(lengths, 2), 2)
    assert totals(dense, lengths) == [60, 60]
    # long rows attend one block: 40 · 2 = 80 µs each, short ones 20 · 9 = 180 µs
    sparse = used.assign(rows_of_lengths(lengths, 2, {"6": [1.0, None]}), 2)
    assert [[rows[0] >= 2 for rows in of_rank] for of_rank in sparse] == [[True, False]] * 2


def test_what_it_learns_is_plain_data() -> None:
    used = plan("sparsity_aware", bins=[10, 20])
    state = used.learn(None, {"lengths": [[[15]], [[25]]], "budgets": [[[2, None]], [[4, None]]]})
    assert json.loads(json.dumps(state)) == state
    assert sorted(state) == ["1", "2"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "sparsity_aware", "loads": "tokens"},
            r"batch_plan.loads: got 'tokens'; expected a load that depends",
        ),
        ({"kind": "sparsity_aware"}, r"batch_plan.loads"),
        ({"kind": "length_balanced", "loads": "seconds"}, r"batch_plan.loads.kind: got 'seconds'"),
        ({"kind": "sparsity_aware", "loads": {"kind": "measured", "table": "t"}, "bins": [4, 2]}, r"batch_plan.bins"),
    ],
)
def test_a_wrong_plan_gives_one_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.parse({"training": {"batch_plan": fields}})


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
    used = loader(Learning(None, FACTS), accumulate=accumulate, steps=8)
    rows = recorded(used)
    assert rows != rows_of(loader(plan("contiguous"), accumulate=accumulate, steps=8))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("stop", [1, 5, 6, 8])
def test_a_plan_that_learns_resumes_exactly(accumulate: int, stop: int) -> None:
    expected = recorded(loader(Learning(None, FACTS), accumulate=accumulate, steps=8))
    first = loader(Learning(None, FACTS), accumulate=accumulate, steps=8)
    started = recorded(first, stop=stop * accumulate)
    second = loader(Learning(None, FACTS), accumulate=accumulate, steps=8)
    second.load_state_dict(first.state_dict())
    assert started + recorded(second, stop * accumulate) == expected


@pytest.mark.parametrize("stop", [3, 4, 7, 11])
def test_it_resumes_exactly_in_the_middle_of_a_step(stop: int) -> None:
    expected = recorded(loader(Learning(None, FACTS), accumulate=3, steps=8))
    first = loader(Learning(None, FACTS), accumulate=3, steps=8)
    started = recorded(first, stop=stop)
    second = loader(Learning(None, FACTS), accumulate=3, steps=8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert started + recorded(second, stop) == expected


def test_only_states_that_a_plan_may_still_read_are_kept() -> None:
    used = loader(Learning(None, FACTS), accumulate=1, steps=20)
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
        rows = rows_of(loader(batch_plans[config.kind](config, FACTS), accumulate=1, steps=2))
        assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]
        test_every_row_of_a_global_batch_is_used_once("longest_first", 8, 3, 2)
    finally:
        batch_plans.unregister("longest_first")


LOAD = '''
"""Documents, whatever their lengths."""

from typing import Literal

from workbench.data.loads import LoadConfig, LoadModel, load_models


@load_models.register
class Documents(LoadModel):
    """Number of documents."""

    class Config(LoadConfig):
        """Number of documents."""

        kind: Literal["documents"] = "documents"

    def load(self, documents, budgets):
        return float(len(documents))
'''


def test_a_load_model_outside_the_package_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_PLUGINS", "")
    (tmp_path / "documents_load.py").write_text(textwrap.dedent(LOAD))
    plug_in(tmp_path / "documents_load.py")
    try:
        used = RunConfig.parse(
            {"training": {"batch_plan": {"kind": "length_balanced", "loads": "documents"}}}
        ).batch_plan
        assert used.load(np.array([5, 3]), None) == 2  # type: ignore[attr-defined]
    finally:
        load_models.unregister("documents")


def test_an_unknown_plan_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_plan.kind: got 'contigous'.*'contiguous'"):
        RunConfig.parse({"training": {"batch_plan": "contigous"}})


def test_the_default_plan_changes_no_identity() -> None:
    assert "batch_plan" not in RunConfig().canonical()["training"]
