"""Shipped sweeps decode_long_source and decode_long at toy size: policies on needles, RULER's tasks and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import confirm

import workbench as wb
from workbench import dashboards
from workbench.config import read_yaml
from workbench.data import tasks
from workbench.results.scores import READS

pytestmark = pytest.mark.process

SWEEPS = Path(__file__).parents[2] / "sweeps"
SEEDS = [0, 1, 2, 3]
MODEL = {
    "width": 32,
    "depth": 2,
    "vocabulary": 300,
    "pattern": "gdn full",
    "mixers": {"gdn": {"heads": 2, "chunk": 8}, "full": {"heads": 2, "kv_heads": 1}},
}
NEEDLE = {"lengths": [112, 160], "measured_lengths": [112, 160], "depths": [0, 0.5], "examples": 8}
RULER = {"tasks": ["niah_single_1"], "lengths": [400]}
QUEST = {"kind": "quest", "tokens": 16, "block": 4, "sink": 1, "local": 4}


def shrunk(name: str, corpus: Path, folder: Path) -> dict[str, Any]:
    """A shipped sweep with a small model, few tokens and few documents."""
    fields = read_yaml(SWEEPS / f"{name}.yaml")
    text = {
        "corpus": {"kind": "files", "path": str(corpus)},
        "evaluation_documents": 3,
        "selection_documents": 2,
        "evaluation_bytes": 120,
    }
    base = fields["base"]
    base["model"] = MODEL
    base["training"] |= {"batch_size": 4, "context": 512, "precision": "fp32"}
    fields["confirmation"] = {"seeds": SEEDS}
    fields["launch"] = {"measure": False}
    if name == "decode_long_source":
        needle, *rulers, plain = base["data"]["parts"]
        needle["data"] |= {**NEEDLE, "text": text}
        for ruler in rulers:
            ruler["data"] |= {**RULER, "further": 0, "tokens": 2000, "examples": 1, "text": text}
        plain["data"] = text
        base["training"] |= {"tokens": 4 * 4 * 512, "evaluations": 1}
        return fields
    base["start"]["folder"] = str(folder / "decode_long_source")
    base["data"] |= {**NEEDLE, "text": text}
    for suite in base["evaluation"]:
        if suite["kind"] == "loss":
            suite["data"] = text
        if suite["kind"] == "ruler":
            suite |= {**RULER, "documents": 2, "answer_tokens": 3}
    for score in fields["protocol"]["secondary"]:
        if "length" in score.get("where", {}):
            score["where"] = {"length": 160 if score["suite"] == "needle" else 400}
    fields["arms"] = {"dense": fields["arms"]["dense"], "quest": {"decoding.policy": QUEST}}
    return fields


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> wb.AblationRun:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 20)
        for name in ("decode_long_source", "decode_long"):
            launched = wb.Ablation.parse(shrunk(name, corpus, folder), folder).create()
            confirm(launched, SEEDS)
    return launched


def test_every_metric_has_a_verdict_over_paired_seeds(run: wb.AblationRun) -> None:
    verdict = run.verdict()
    assert verdict is not None
    rows = [row for part in (verdict, *verdict.secondary) for row in part.rows if row.arm == "quest"]
    assert len(rows) == 1 + 4
    assert [(row.seeds, row.difference is not None) for row in rows] == [(4, True)] * 5


def test_text_is_decoded_through_the_policy(run: wb.AblationRun) -> None:
    text = run.scores().filter(
        pl.col("suite") == "text", pl.col("metric") == "bits per byte", pl.col("document").is_null()
    )
    by_arm = {arm: part.sort("seed")["value"].to_list() for (arm,), part in text.group_by("arm")}
    assert len(by_arm["dense"]) == len(SEEDS)
    assert all(dense != quest for dense, quest in zip(by_arm["dense"], by_arm["quest"]))


def test_needles_are_measured_by_length_and_depth(run: wb.AblationRun) -> None:
    rows = run.scores().filter(pl.col("suite") == "needle", pl.col("document").is_not_null())
    assert set(rows.select("length", "depth").unique().rows()) == {(112, 0.0), (112, 50.0), (160, 0.0), (160, 50.0)}
    assert set(dashboards.table(run, "recall_map")["arm"]) == {"dense", "quest"}


def test_ruler_is_answered_through_the_policy(run: wb.AblationRun) -> None:
    rows = run.scores().filter(pl.col("suite") == "ruler", pl.col("document").is_null())
    assert rows.select("arm", "seed").unique().height == 2 * len(SEEDS)
    assert READS in run.scores()["suite"]


def test_it_is_reported(run: wb.AblationRun) -> None:
    assert "bits per byte" in str(run.verdict()) and dashboards.write_report(run, run.folder / "report.html").is_file()
