"""Capabilities are asked where they matter: training on packed rows, decoding, and the label of the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import HYBRID, run_fields

from workbench.config import ConfigError
from workbench.contract import Capabilities, embeddings, feedforwards, mixers
from workbench.model import LanguageModel, ModelConfig
from workbench.training import RunConfig

LIMITED = {**HYBRID, "pattern": "gdn limited"}
LIMITED_HEAD = {**HYBRID, "mtp": {"mixer": {"kind": "limited"}}}
"""A model whose multi-token head alone has the limited mixer."""


@pytest.fixture(autouse=True)
def limited_mixer() -> Iterator[None]:
    """A throw-away mixer without any capability."""
    full: Any = mixers["full"]

    @mixers.register
    class Limited(full):  # type: ignore[misc]
        capabilities = Capabilities(causal=False, segments=False, decode=False)

        class Config(full.Config):  # type: ignore[misc, name-defined]
            kind: Literal["limited"] = "limited"

    yield
    mixers.unregister("limited")


@pytest.mark.parametrize("capability", ["causal", "segments", "decode"])
def test_a_layer_without_a_capability_is_listed(capability: Any) -> None:
    assert ModelConfig.parse(LIMITED).lacking(capability) == ["limited"]


@pytest.mark.parametrize("capability", ["causal", "segments"])
def test_the_multi_token_head_counts_in_training(capability: Any) -> None:
    assert ModelConfig.parse(LIMITED_HEAD).lacking(capability) == ["limited"]


def test_the_multi_token_head_does_not_count_in_decoding() -> None:
    assert ModelConfig.parse(LIMITED_HEAD).lacking("decode") == []


def test_an_embedding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings["token"], "capabilities", Capabilities(segments=False))
    assert ModelConfig.parse(HYBRID).lacking("segments") == ["token"]


@pytest.mark.parametrize("model", [LIMITED, LIMITED_HEAD], ids=["layer", "multi-token head"])
def test_packed_rows_refuse_components_that_mix_documents(model: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: got 'limited'; expected components that separate"):
        RunConfig.parse({**run_fields(tmp_path), "model": model})


def test_document_leaks_can_be_allowed(tmp_path: Path) -> None:
    config = RunConfig.parse({**run_fields(tmp_path), "model": LIMITED, "allow_document_leaks": True})
    assert config.allow_document_leaks


def test_leaks_that_are_not_allowed_change_no_identity(tmp_path: Path) -> None:
    fields = {**run_fields(tmp_path), "model": HYBRID}
    config = RunConfig.parse(fields)
    assert "allow_document_leaks" not in config.canonical()
    assert config.identity == RunConfig.parse({**fields, "allow_document_leaks": False}).identity


def test_decoding_is_refused() -> None:
    model = LanguageModel(ModelConfig.parse(LIMITED), seed=0)
    with pytest.raises(ConfigError, match="got 'limited'; expected components that decode with a cache"):
        model.new_caches(1, 8)


def test_every_capability_is_asked_by_the_model_or_by_the_conformance_suite() -> None:
    asked = {"causal", "segments", "decode", "flops_check"}
    assert {field.name for field in fields(Capabilities)} == asked


def test_registered_variants_decode_unless_they_say_otherwise() -> None:
    without = [
        name for registry in (mixers, feedforwards) for name in registry if not registry[name].capabilities.decode
    ]
    assert sorted(without) == ["limited", "moe_expert_choice"]
