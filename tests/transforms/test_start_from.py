"""Uptraining: what is copied from trained weights, what keeps its initial values, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits, random_tokens, small_model, small_tokenizer

from workbench.config import ConfigError
from workbench.model import LanguageModel
from workbench.pretrained import save
from workbench.transforms import apply_transforms, initialise_from
from workbench.transforms.start_from import StartFrom

LLAMA: dict[str, Any] = {
    "mixers": {"full": {"heads": 4, "kv_heads": 2, "rotary_theta": 5e5}},
    "feedforwards": {"swiglu": {"hidden": 72}},
}
SHORTCUT: dict[str, Any] = {"shortcut": "experts", "feedforwards": {"experts": {"kind": "moe", "top_k": 1}}}
HASHED: dict[str, Any] = {"embedding": {"kind": "ngram", "order": 2, "size": 2}}


def start(model: LanguageModel, source: LanguageModel, *allowed: str) -> list[str]:
    """Names that keep their initial values when ``model`` starts from ``source``."""
    transform = StartFrom(StartFrom.Config(allowed_differences=allowed))
    weights, _ = apply_transforms([transform], source.state_dict(), None, source.config, model.config)
    missing, _ = model.load_state_dict(weights, strict=False)
    return list(missing)


def test_the_same_architecture_is_copied_whole(tmp_path: Path) -> None:
    source, model, tokens_BT = small_model(**LLAMA, tied=False), small_model(**LLAMA, tied=False), random_tokens(2, 21)
    assert initialise_from(model, save(source, small_tokenizer(), tmp_path / "export")) == []
    assert torch.equal(logits(model, tokens_BT), logits(source, tokens_BT))


def test_a_larger_vocabulary_keeps_the_scores_of_the_smaller_one() -> None:
    source, larger = small_model(**LLAMA, tied=False), small_model(**LLAMA, tied=False, vocabulary=304)
    assert start(larger, source) == []
    tokens_BT = random_tokens(2, 21)
    torch.testing.assert_close(logits(larger, tokens_BT)[..., :300], logits(source, tokens_BT))


def test_new_rows_of_the_vocabulary_are_the_mean_row() -> None:
    source, larger = small_model(), small_model(vocabulary=304)
    start(larger, source)
    torch.testing.assert_close(larger.embedding.weight[300:], source.embedding.weight.mean(0).expand(4, 64))


def test_new_rows_of_the_vocabulary_have_zero_moments() -> None:
    source, larger = small_model(), small_model(vocabulary=304)
    state = {"embedding.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(300, 64)}}
    transform = StartFrom(StartFrom.Config())
    _, new_state = apply_transforms([transform], source.state_dict(), state, source.config, larger.config)
    assert new_state is not None
    assert torch.equal(new_state["embedding.weight"]["exp_avg"].sum(1), torch.tensor([64.0] * 300 + [0.0] * 4))


def test_only_compatible_layers_are_copied() -> None:
    """Sliding attention has the weights of full attention; GDN's qkv has the same shape and another meaning."""
    source = small_model(mixers={"full": {"heads": 4}})
    settings = {"sliding": {"window": 5, "heads": 4}, "gdn": {"heads": 4, "head_dim": 16}}
    model = small_model(pattern="gdn sliding", mixers=settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qkv = "blocks.0.mixer.qkv.weight"
    assert before[qkv].shape == source.state_dict()[qkv].shape
    missing = start(model, source)
    assert missing == [name for name in before if name.startswith("blocks.0.mixer.")]
    expected = {**source.state_dict(), **{name: before[name] for name in missing}}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_the_state_of_layers_that_are_not_copied_is_fresh() -> None:
    source, model = small_model(), small_model(pattern="gdn full")
    state = {name: {"step": torch.tensor(3.0)} for name, _ in source.named_parameters()}
    _, new_state = apply_transforms(
        [StartFrom(StartFrom.Config())], source.state_dict(), state, source.config, model.config
    )
    assert new_state is not None
    assert new_state.keys() == {name for name in state if not name.startswith("blocks.0.mixer.")}


def test_a_dense_model_starts_one_with_shortcuts() -> None:
    model = small_model(**SHORTCUT)
    shortcuts = [name for name, _ in model.named_parameters() if name.startswith("shortcuts.")]
    assert start(model, small_model()) == shortcuts


def test_shortcuts_that_read_elsewhere_are_refused() -> None:
    source = small_model(**SHORTCUT, shortcut_from="second")
    with pytest.raises(ConfigError, match=r"model.shortcut_from: got 'first'; expected 'second'"):
        start(small_model(**SHORTCUT), source)


def test_shortcuts_that_read_elsewhere_can_be_allowed() -> None:
    source = small_model(**SHORTCUT, shortcut_from="second")
    assert start(small_model(**SHORTCUT), source, "shortcut_from") == []


def test_settings_of_shortcuts_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"model.shortcut.top_k: got 2 in pair 0; expected 1"):
        start(small_model(shortcut="moe"), small_model(**SHORTCUT))


def test_a_token_embedding_starts_an_ngram_embedding() -> None:
    assert start(small_model(**HASHED), small_model(), "amplify") == ["embedding.tables", "embedding.mix"]


def test_an_ngram_embedding_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)embedding.base: got 304.*embedding.moduli: got"):
        start(small_model(vocabulary=304, **HASHED), small_model(**HASHED))


def test_models_of_another_shape_are_refused_with_every_reason() -> None:
    with pytest.raises(ConfigError, match=r"(?s)model.depth: got 4.*model.tied: got False.*model.vocabulary: got 299"):
        start(small_model(depth=4, tied=False, vocabulary=299), small_model())


def test_other_settings_of_a_layer_are_refused_by_name() -> None:
    other = small_model(mixers={"full": {"heads": 2, "rotary_theta": 5e5}})
    reasons = r"(?s)model.mixer.head_dim: got 32.*mixer.heads: got 2.*rotary_theta: got 500000"
    with pytest.raises(ConfigError, match=reasons):
        start(other, small_model(mixers={"full": {"heads": 4}}))


def test_allowed_differences_are_accepted() -> None:
    longer = small_model(mixers={"full": {"heads": 4, "rotary_theta": 5e5}})
    assert start(longer, small_model(mixers={"full": {"heads": 4}}), "rotary_theta") == []
