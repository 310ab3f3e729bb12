"""The hub: nulls, errors of its library, without the library, and without a network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from workbench.config import ConfigError
from workbench.data import DataConfig, prepare
from workbench.data.corpora.huggingface import HuggingFace

HUB = DataConfig.parse({"corpus": {"kind": "huggingface", "name": "owner/name"}})


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Reads the documents of a data set, or what its library raises."""

    def read(rows: list[dict[str, Any]] | Exception) -> list[str]:
        def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
            if isinstance(rows, Exception):
                raise rows
            return rows

        library = ModuleType("datasets")
        library.load_dataset = load_dataset  # type: ignore[attr-defined]
        hub = ModuleType("huggingface_hub")
        hub.constants = ModuleType("constants")  # type: ignore[attr-defined]
        hub.constants.ENDPOINT = "https://nowhere"
        monkeypatch.setitem(sys.modules, "datasets", library)
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setattr(HuggingFace, "_check_network", lambda self, endpoint: None)
        return list(HuggingFace(HuggingFace.Config(name="owner/name")).documents())

    return read


def test_a_null_is_an_empty_text(streamed: Callable[..., list[str]]) -> None:
    assert streamed([{"text": "one"}, {"text": None}, {"text": "two"}]) == ["one", "", "two"]


@pytest.mark.parametrize("value", [7, ["a"], {"a": "b"}, b"a"])
def test_a_column_that_is_no_text(streamed: Callable[..., list[str]], value: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.corpus.field: got .*'text', which row 2 does not have as text"):
        streamed([{"text": "one"}, {"text": value}])


@pytest.mark.parametrize("error", [ValueError("no such split"), OSError("connection reset"), KeyError("x"), EOFError()])
def test_errors_of_the_library_are_clear(streamed: Callable[..., list[str]], error: Exception) -> None:
    with pytest.raises(ConfigError, match=rf"data.corpus.name: got .owner/name \({type(error).__name__}"):
        streamed(error)


def test_a_path_is_no_data_set_of_the_hub(
    streamed: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data.corpus.name: got .owner/name, which is also a path here"):
        streamed([])


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="the library `datasets`"):
        prepare(HUB, 300, tmp_path)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", sys)  # anything that imports: it is not reached
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        prepare(HUB, 300, tmp_path)
