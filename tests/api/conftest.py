"""One small finished ablation that tests of answers share, and the command line as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import ablation_fields, write_corpus
from typer.testing import CliRunner

from workbench.ablation.ablation import Ablation
from workbench.ablation.run import AblationRun
from workbench.cli import app

WAIT = 500
"""Seconds to wait for real processes."""
Call = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="session")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fields of an ablation of two arms and four runs."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return ablation_fields(corpus, tuning={"trials": 0, "space": {}}, confirmation={"seeds": [0, 1]})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> Iterator[AblationRun]:
    """An ablation that has ended. Read only."""
    run = Ablation.parse(fields, tmp_path_factory.mktemp("finished")).launch()
    assert run.wait(WAIT), (run.folder / "workers" / "log.txt").read_text()
    yield run


@pytest.fixture
def call() -> Call:
    """A command with ``--json``: its exit code and what it wrote, which must be one JSON object."""

    def invoke(*arguments: object) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.stdout.count("\n") == 1, done.stdout
        return done.exit_code, json.loads(done.stdout)

    return invoke
