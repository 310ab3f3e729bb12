"""Runs that train nothing: they measure trained weights, through a decoding policy or in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.data import tasks
from workbench.results import RunFolder
from workbench.status import Status
from workbench.training import RunConfig
from workbench.training.trial import new_run, train
from workbench.transforms import StartConfig

pytestmark = pytest.mark.process

MODEL = {"width": 32, "depth": 1, "vocabulary": 24}
DATA = {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}, {"length": 16, "pairs": 3}], "examples": 8}
TRAINING = {"tokens": 4 * 2 * 16, "batch_size": 2, "context": 16, "evaluations": 1, "compile": False}
QUEST = {"kind": "quest", "tokens": 8, "block": 2, "sink": 1, "local": 2}


def fields(source: Path, **changes: Any) -> dict[str, Any]:
    """A run that measures the runs of the arm ``full`` below ``source``."""
    start = {"folder": str(source), "arm": "full"}
    return {"model": MODEL, "data": DATA, "training": {**TRAINING, "tokens": 0}, "start": start, **changes}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two finished runs of one arm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 10)
        folder = tmp_path_factory.mktemp("source")
        for seed in (0, 1):
            config = RunConfig.parse({"model": MODEL, "data": DATA, "training": TRAINING, "seed": seed})
            run = new_run(folder / "runs" / f"seed-{seed}", folder / "cache", config, arm="full")
            assert train(run.path, folder / "cache")["status"] == Status.DONE
        yield folder


def measured(source: Path, name: str, **changes: Any) -> RunFolder:
    run = new_run(source / "measured" / name, source / "cache", RunConfig.parse(fields(source, **changes)))
    assert train(run.path, source / "cache")["status"] == Status.DONE
    return run


def report(run: RunFolder) -> list[float]:
    return run.report(run.record().metric)["nll_nats"].to_list()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_measures_the_run_of_its_seed(source: Path, seed: int) -> None:
    run = measured(source, f"dense-{seed}", decoding={"policy": "dense"}, seed=seed)
    assert report(run) == pytest.approx(report(RunFolder(source / "runs" / f"seed-{seed}")), rel=1e-5)


def test_without_a_policy_documents_are_read_in_one_pass(source: Path) -> None:
    assert report(measured(source, "plain")) == report(RunFolder(source / "runs" / "seed-0"))


def test_nothing_is_trained_or_kept(source: Path) -> None:
    run = measured(source, "plain")
    assert run.record().tokens == 0 and RunConfig.parse(run.record().config).training_flops == 0
    assert not (run.path / "checkpoint").exists()


def test_what_was_read_is_a_table_of_the_run(source: Path) -> None:
    scores = measured(source, "quest", decoding={"policy": QUEST}).scores()
    tokens = scores.filter((pl.col("suite") == "reads") & (pl.col("metric") == "tokens"))
    assert set(tokens["split"]) == {"selection", "report"} and tokens["value"].max() <= 8


def test_policies_make_different_runs_of_one_source(source: Path) -> None:
    dense, quest = (RunConfig.parse(fields(source, decoding={"policy": policy})) for policy in ("dense", QUEST))
    assert dense.identity != quest.identity and dense.setting != quest.setting


def test_seeds_share_a_setting(source: Path) -> None:
    first, second = (RunConfig.parse(fields(source, seed=seed)) for seed in (0, 1))
    assert first.setting == second.setting and first.identity != second.identity


def test_a_seed_without_source_is_named(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"start\.arm.*seed 7.*0, 1"):
        RunConfig.parse(fields(source)).start.folder_of(7)  # type: ignore[union-attr]


def test_an_arm_without_runs_is_named(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"start\.folder.*sliding"):
        StartConfig.parse({"folder": str(source), "arm": "sliding"}).read_fingerprint()


def test_a_pattern_names_a_folder_for_every_seed(source: Path) -> None:
    start = StartConfig.parse({"folder": f"{source}/runs/seed-{{seed}}"})
    assert start.folders() == {seed: source / "runs" / f"seed-{seed}" for seed in (0, 1)}


def test_a_run_may_start_training_from_a_run(source: Path) -> None:
    start = {"folder": str(source / "runs" / "seed-1")}
    run = measured(source, "trained", training=TRAINING, start=start)
    assert run.metrics()[-1]["step"] == 4


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"start": None}, "training.tokens"),
        ({"training": TRAINING, "decoding": {}}, "decoding"),
        ({"decoding": {"policy": QUEST}, "model": {**MODEL, "pattern": "gdn"}}, "decoding.policy"),
        ({"training": {**TRAINING, "tokens": 0, "ema": {"decay": 0.9}}}, "training.tokens"),
    ],
)
def test_what_does_not_fit_is_refused(source: Path, changes: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        RunConfig.parse(fields(source, **changes))


def test_weights_that_are_missing_are_not_measured(source: Path) -> None:
    changes = {"model": {**MODEL, "mixers": {"full": {"qk_norm": True}}}}
    start = {
        "folder": str(source / "runs" / "seed-0"),
        "transforms": [{"kind": "start_from", "allowed_differences": ["qk_norm"]}],
    }
    run = new_run(
        source / "measured" / "missing", source / "cache", RunConfig.parse(fields(source, start=start, **changes))
    )
    assert "weights of every parameter" in train(run.path, source / "cache")["reason"]


def test_a_run_stops_while_it_decodes_and_starts_again(source: Path) -> None:
    config = RunConfig.parse(fields(source, decoding={"policy": QUEST}))
    run = new_run(source / "measured" / "stopped", source / "cache", config)
    asked = iter([False])
    result = train(run.path, source / "cache", should_stop=lambda: next(asked, True))
    assert (result["status"], result["reason"]) == (Status.INTERRUPTED, "asked to stop while decoding documents")
    assert train(run.path, source / "cache")["status"] == Status.DONE
    assert report(run) == report(measured(source, "quest", decoding={"policy": QUEST}))
