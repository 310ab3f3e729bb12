"""The benchmark of the delta rule, on a CPU with clocks that do not measure."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
delta_rule = importlib.import_module("delta_rule")  # in benchmarks/


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.ops.delta_rule import peers

    monkeypatch.setattr(delta_rule, "DEVICE", "cpu")
    monkeypatch.setattr(delta_rule, "do_bench", lambda call, **_: [call(), 1.0][1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(delta_rule, "graph_ms", lambda call: [call(), 2.0][1])
    monkeypatch.setattr(peers, "obstacle", lambda peer, call: None if call.decay != "channel" else "not covered")


def measured(implementation: str, monkeypatch: pytest.MonkeyPatch, call: Any, **more: Any) -> list[dict[str, Any]]:
    plain = {"variants": ["deltanet", "gdn", "kda"], "shapes": ["1x32x2x16"], "decays": ["gentle", "strong"], **more}
    monkeypatch.setattr(delta_rule, "theirs", lambda name: call)
    return delta_rule.measure(implementation, argparse.Namespace(**plain))


def exact(x: dict[str, Any]) -> torch.Tensor:
    return delta_rule.ours(x, "torch")


def test_every_covered_case_is_compared_and_timed(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured("flash_qla", monkeypatch, exact)
    assert [(row["variant"], row["decay"]) for row in rows] == [
        ("deltanet", "gentle"),
        ("gdn", "gentle"),
        ("gdn", "strong"),
    ]
    assert all(row["relative_error"] < delta_rule.ALLOWED for row in rows)
    assert all(row["forward_backward_ms"] == 1.0 and row["forward_backward_graph_ms"] == 2.0 for row in rows)


def test_what_differs_is_not_timed(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured("flash_qla", monkeypatch, lambda x: 1.1 * exact(x), variants=["gdn"], decays=["moderate"])
    (row,) = rows
    assert row["error"].startswith("RuntimeError: relative error 1.0e-01 of ")
    assert "forward_ms" not in row


def test_the_first_failed_graph_is_the_last(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: Any) -> float:
        raise RuntimeError("capture")

    monkeypatch.setattr(delta_rule, "graph_ms", fails)
    rows = measured("flash_qla", monkeypatch, exact)
    assert [row.get("graph_error") for row in rows] == ["RuntimeError: capture", None, None]
