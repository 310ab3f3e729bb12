"""A task outside the package is one file: it is configured, trained, measured and drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import ablation_fields

from workbench.ablation.ablation import Ablation
from workbench.ablation.run import AblationRun
from workbench.config import ConfigError
from workbench.dashboards import figure
from workbench.data import sources
from workbench.registry import PLUGIN_FILES, plug_in
from workbench.training.config import RunConfig

pytestmark = pytest.mark.process

SOURCE = '''
"""Copying: a sequence, then the same sequence again."""

from typing import Literal

import numpy as np

from workbench.data.streams import IGNORE_INDEX
from workbench.data.tasks import Example, Task, TaskConfig, check_lengths, sources


@sources.register
class Echo(Task):
    """Copies n tokens."""

    class Config(TaskConfig):
        """Copies n tokens."""

        kind: Literal["echo"] = "echo"
        n: int = 4

        views = {"recall_curves": ("n", "length")}

        def check(self, vocabulary, context):
            check_lengths("n", [2 * self.n], context)

        def target_share(self, context):
            return 0.5

    def cases(self, split):
        return [self.config.n]

    def example(self, case, split, generator):
        tokens = np.tile(generator.integers(self.vocabulary, size=case), 2)
        targets = np.full(2 * case, IGNORE_INDEX)
        targets[case - 1 : -1] = tokens[case:]
        return Example(tokens, targets, {"n": case, "length": 2 * case})
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AblationRun]:
    """A finished ablation on the task."""
    folder = tmp_path_factory.mktemp("echo")
    path = folder / "echo_task.py"
    path.write_text(SOURCE)
    fields = ablation_fields(
        folder,
        arms={"full": {}},
        tuning={"trials": 0},
        confirmation={"seeds": [0]},
        launch={"workers": 1},
    )
    fields["base"]["data"] = {"kind": "echo", "examples": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLUGIN_FILES, "")
        plug_in(path)
        run = Ablation.parse(fields, folder / "results").launch()
        run.wait()
        yield run
    sources.unregister("echo")


def test_it_is_trained_and_measured(run: AblationRun) -> None:
    assert run.runs()["status"].to_list() == ["done"]


def test_its_metric_is_the_primary_one(run: AblationRun) -> None:
    assert run.metric.task == "echo"


def test_its_labels_are_in_the_report(run: AblationRun) -> None:
    (_, _, report) = next(iter(run.reports()))
    assert {"n", "length", "errors", "answers"} <= set(report.columns)


def test_its_view_is_drawn(run: AblationRun) -> None:
    assert figure(run, "recall_curves").data


def test_its_mistakes_are_named(run: AblationRun) -> None:
    with pytest.raises(ConfigError, match=r"data.n: got 'an example of 80 tokens'"):
        RunConfig.parse({"data": {"kind": "echo", "n": 40}, "training": {"context": 32, "tokens": 1024}})
