"""What tests of training share: a corpus, prepared once, and runs on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import make_run, run_fields, write_corpus

from workbench.results import RunFolder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of prepared data."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def new(corpus: Path, cache: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """Creates the folder of a small run: ``new(name, stage=…, seed=…, **changes of fields)``."""

    def create(name: str = "run", *, stage: str = "confirmation", seed: int = 3, **changes: Any) -> RunFolder:
        return make_run(tmp_path / name, cache, run_fields(corpus, **changes), stage=stage, seed=seed)

    return create


@pytest.fixture(scope="session")
def events() -> Callable[[RunFolder, str], list[dict[str, Any]]]:
    """Reads the events of a run that have one name."""

    def read(folder: RunFolder, name: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["event"] == name]

    return read
