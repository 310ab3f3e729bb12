"""Suites: one long table, and the documents behind it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers import small_model

from workbench.config import ConfigError
from workbench.evaluation import (
    Conditions,
    Evaluation,
    Measured,
    Results,
    Score,
    Settings,
    measure_suite,
    suites,
)
from workbench.metric import BITS_PER_BYTE
from workbench.registry import plug_in
from workbench.results.scores import read_scores

RESULTS = Results(
    (Evaluation("loss", "text", "bits per byte", 1.5, 2), Evaluation("ruler", "niah", "errors per answer", 0.25, 3)),
    {
        ("loss", "text"): {"nll_nats": np.array([1.0, 2.0]), "bytes": np.array([3, 4])},
        ("ruler", "niah"): {"errors": np.array([1, 0, 0]), "answers": np.array([1, 1, 2])},
    },
)


def test_a_metric_selects_its_row() -> None:
    assert RESULTS.value(BITS_PER_BYTE) == 1.5


def test_a_metric_that_nothing_measured_is_named() -> None:
    with pytest.raises(KeyError, match="loss/text/bits per byte"):
        Results(()).value(BITS_PER_BYTE)


def test_the_report_has_the_documents_of_every_task() -> None:
    keys = RESULTS.report().select("suite", "task", "document").rows()
    assert keys == [("loss", "text", 0), ("loss", "text", 1), *(("ruler", "niah", d) for d in range(3))]


def test_columns_of_other_tasks_are_null_in_the_report() -> None:
    assert RESULTS.report()["bytes"].to_list() == [3, 4, None, None, None]


PLUGIN = '''
"""Number of parameters, as a throw-away suite."""

from typing import Literal

from workbench.evaluation.suites import Measured, Score, Suite, SuiteConfig, suites


@suites.register
class Size(Suite):
    """Counts parameters."""

    class Config(SuiteConfig):
        """Counts parameters."""

        kind: Literal["size"] = "size"

    def tasks(self, conditions):
        return ["parameters"]

    def measure(self, model, task, conditions, journal):
        return Measured([Score("parameters per model", total=float(sum(p.numel() for p in model.parameters())))])
'''

CONDITIONS = Conditions(Settings(1, 8), 300)


def test_a_suite_outside_the_package_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_PLUGINS", "")
    (tmp_path / "size_suite.py").write_text(textwrap.dedent(PLUGIN))
    plug_in(tmp_path / "size_suite.py")
    try:
        model = small_model()
        assert measure_suite(model, suites.parse("size"), CONDITIONS, tmp_path, step=3) == 1
        (row,) = read_scores(tmp_path).select("step", "suite", "task", "document", "value").rows()
        assert row == (3, "size", "parameters", None, sum(p.numel() for p in model.parameters()))
    finally:
        suites.unregister("size")


def test_the_value_of_all_documents_is_their_weighted_mean() -> None:
    frame = Measured([Score("bits per byte", [1.0, 4.0], [3, 1])]).frame()
    assert frame.select("document", "value", "count").rows() == [(None, 1.75, 4.0), (0, 1.0, 3.0), (1, 4.0, 1.0)]


def test_labels_belong_to_documents() -> None:
    documents = pl.DataFrame({"length": [10, 20]})
    frame = Measured([Score("accuracy", [1, 0], higher_is_better=True)], documents).frame()
    assert frame.select("document", "length", "higher_is_better").rows() == [
        (None, None, True),
        (0, 10, True),
        (1, 20, True),
    ]


def test_a_metric_without_documents_has_a_total() -> None:
    frame = Measured([Score("macro F1", total=0.5)], pl.DataFrame({"source": ["a", "b"]})).frame()
    assert frame.select("document", "value", "count").rows() == [(None, 0.5, 2.0)]


def test_a_metric_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="accuracy: no documents"):
        Measured([Score("accuracy", [])]).frame()


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'answer'.*'answers'"):
        suites.parse("answer")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "compression"}, r"data.kind: got 'compression'"),
        (
            {"kind": "word_problem", "group": "S5"},
            r"data.group: got .120 symbols.; expected at most .*=64",
        ),
    ],
)
def test_data_that_the_model_cannot_read_are_refused(data: dict[str, Any], message: str) -> None:
    config = suites.parse({"kind": "answers", "data": data})
    with pytest.raises(ConfigError, match=message):
        config.check(64, 32)


def test_examples_of_a_suite_may_be_longer_than_the_context() -> None:
    suites.parse({"kind": "answers", "data": {"kind": "copying", "lengths": [512]}}).check(64, 32)
