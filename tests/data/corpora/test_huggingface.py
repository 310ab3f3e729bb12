"""The hub without the library, and without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from workbench.config import ConfigError
from workbench.data import DataConfig, prepare

HUB = DataConfig.parse({"corpus": {"kind": "huggingface", "name": "owner/name"}})


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
