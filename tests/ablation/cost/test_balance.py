"""The balance of a plan on the cost card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from workbench.ablation.arms import resolve
from workbench.ablation.cost.balance import latency_tables, seconds_imbalance, token_imbalance
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError, deep_merge
from workbench.data import BatchPlanConfig, RowStream, batch_plans
from workbench.data.batching import BatchPlan, GlobalBatch
from workbench.latency import LatencyTable, LayerLatency
from workbench.training.config import RunConfig
from workbench.training.latency import layer_key


class Alternating(RowStream):
    """Rows of 80 and of 16 tokens, in turns."""

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.zeros((16, 80)[r % 2 == 0], np.int64)
        return tokens, tokens, tokens.astype(np.int32), tokens

    def row_length(self, r: int) -> int:
        return len(self.row(r)[0])


class Data:
    """A source of these rows."""

    def stream(self, **_: Any) -> RowStream:
        return Alternating()


class Longer(Data):
    """A source of rows that are longer than those of the table."""

    def stream(self, **_: Any) -> RowStream:
        class Rows(Alternating):
            def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
                tokens = np.zeros(96, np.int64)
                return tokens, tokens, tokens.astype(np.int32), tokens

        return Rows()


@pytest.mark.parametrize(("plan", "expected"), [("contiguous", 160 / 96), ("length_balanced", 1.0)])
def test_the_imbalance_is_that_of_the_plan(plan: str, expected: float) -> None:
    training = {"context": 80, "buckets": [16, 80], "batch_size": 2, "accumulate": 2, "tokens": 3 * 320}
    run = RunConfig.parse({"training": {**training, "batch_plan": plan, "ranks": "replicated"}})
    assert token_imbalance(run, Data(), 2) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "expected"), [("replicated", 1.0), ("sharded", 160 / 96)])
def test_ranks_that_share_weights_wait_in_every_micro_batch(ranks: str, expected: float) -> None:
    """Two ranks with a long and a short micro-batch each, in opposite order."""

    @batch_plans.register
    class Opposite(BatchPlan):
        class Config(BatchPlanConfig):
            kind: Literal["opposite"] = "opposite"

        def assign(self, batch: GlobalBatch, world: int) -> list[list[list[int]]]:
            long, short, other_long, other_short = batch.rows
            return [[[long], [short]], [[other_short], [other_long]]]

    try:
        training = {"context": 80, "buckets": [16, 80], "batch_size": 2, "accumulate": 2, "tokens": 3 * 320}
        run = RunConfig.parse({"training": {**training, "batch_plan": "opposite", "ranks": ranks}})
        assert token_imbalance(run, Data(), 2) == pytest.approx(expected)  # type: ignore[arg-type]
    finally:
        batch_plans.unregister("opposite")


def test_predicted_seconds_are_those_of_a_table_of_the_model(tmp_path: Path) -> None:
    """Rows of 80 and 16 tokens in turns: contiguous gives one rank all long ones; a layer takes 3 s and 1 s."""
    moba = {"pattern": "moba", "depth": 2, "width": 32, "mixers": {"moba": {"block": 4, "top_k": 2}}}
    training = {"context": 80, "buckets": [16, 80], "batch_size": 2, "accumulate": 2, "tokens": 3 * 320}
    fields = {"model": moba, "training": {**training, "ranks": "replicated"}}
    key = layer_key(RunConfig.parse(fields).model.layers[0])
    LatencyTable({}, {key: LayerLatency((16, 80), (2, 4), ((1, 2), (3, 4)))}, (key,) * 2).save(tmp_path / "table.json")
    loads = {"kind": "measured", "table": str(tmp_path / "table.json")}
    balanced = deep_merge(fields, {"training": {"batch_plan": {"kind": "length_balanced", "loads": loads}}})
    runs = [RunConfig.parse(fields), RunConfig.parse(balanced)]
    tables = latency_tables([*runs, *runs])
    assert len(tables) == 1
    found = [seconds_imbalance(run, Data(), 2, tables) for run in runs]  # type: ignore[arg-type]
    assert found == [pytest.approx(6 / 4), pytest.approx(1.0)]
    assert seconds_imbalance(RunConfig.parse({"training": training}), Data(), 2, tables) is None  # type: ignore[arg-type]
    longer = RunConfig.parse({"model": moba, "training": {**training, "context": 96, "buckets": [16, 96]}})
    assert seconds_imbalance(longer, Longer(), 2, tables) is None  # type: ignore[arg-type]


def test_counted_costs_name_no_table_and_predict_no_seconds() -> None:
    moba = {"pattern": "moba", "depth": 2, "width": 32, "mixers": {"moba": {"block": 4, "top_k": 2}}}
    run = RunConfig.parse({"model": moba, "training": {"budgets": {"kind": "dst", "table": "flops"}}})
    assert latency_tables([run]) == []
    assert seconds_imbalance(run, Data(), 2, []) is None  # type: ignore[arg-type]


def test_devices_share_the_rows_of_a_micro_batch(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size: got \d+; expected a multiple of launch.devices=7"):
        resolve(AblationConfig.parse({**fields, "launch": {"devices": 7}}))


def test_devices_divide_the_experts(fields: dict[str, Any]) -> None:
    base = {"model": {"feedforward": "moe"}, "training": {"batch_size": 9, "expert_parallel": True}}
    sweep = deep_merge(fields, {"base": base, "launch": {"devices": 3}})
    with pytest.raises(ConfigError, match=r"^arms.*moe.experts: got \d; expected a multiple of the 3 devices"):
        resolve(AblationConfig.parse(sweep))
