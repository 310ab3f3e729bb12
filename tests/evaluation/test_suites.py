"""Suites: one long table, and the documents behind it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.evaluation import Evaluation, Results, Settings, evaluate, suites
from workbench.metric import BITS_PER_BYTE
from workbench.registry import plug_in

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

from workbench.evaluation.suites import Evaluation, Results, Suite, SuiteConfig, suites


@suites.register
class Size(Suite):
    """Counts parameters."""

    class Config(SuiteConfig):
        """Counts parameters."""

        kind: Literal["size"] = "size"

    def run(self, model, data, split, settings):
        return Results((Evaluation("size", split, "parameters per model", float(model.parameters), 1),))
'''


def test_a_suite_outside_the_package_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_PLUGINS", "")
    (tmp_path / "size_suite.py").write_text(textwrap.dedent(PLUGIN))
    plug_in(tmp_path / "size_suite.py")
    try:
        model: Any = SimpleNamespace(parameters=7)
        results = evaluate(model, None, "selection", [suites.parse("size")], Settings(1, 1))  # type: ignore[arg-type]
        assert results.rows == (Evaluation("size", "selection", "parameters per model", 7.0, 1),)
    finally:
        suites.unregister("size")


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'answer'.*'answers'"):
        suites.parse("answer")
