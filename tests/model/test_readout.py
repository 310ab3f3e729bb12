"""A readout predicts from the last token of a document alone."""

from __future__ import annotations

import pytest
import torch
from helpers import small_model

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.model import LanguageModel, ModelConfig


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return small_model(readout="summary")


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(1))


def test_predictions_depend_on_the_last_state_alone(model: LanguageModel) -> None:
    """Position t is the decoder's output for the last block output of T − 1 and the code of t."""
    x = torch.randn(2, 9, 64)
    changed = x.clone()
    changed[:, :-1] = 0
    assert model.readout is not None
    torch.testing.assert_close(model.readout(x), model.readout(changed))


def test_positions_are_read_differently(model: LanguageModel) -> None:
    read = model(tokens(1, 9))[0]
    assert (read[0] - read[5]).abs().max() > 1e-3


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model: LanguageModel) -> None:
    rows = tokens(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3], dtype=torch.int32)
    packed = model(rows, segments=segments)[0]
    torch.testing.assert_close(packed[:5], model(rows[:, :5])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed[5:9], model(rows[:, 5:9])[0], atol=1e-5, rtol=1e-4)


def test_parameters_are_counted(model: LanguageModel) -> None:
    assert account(model.config, 16).parameters == sum(p.numel() for p in model.parameters())


def test_flops_are_counted() -> None:
    plain, read = (ModelConfig.parse({"width": 64, "depth": 2, **more}) for more in ({}, {"readout": "summary"}))
    assert account(read, 16).forward_flops - account(plain, 16).forward_flops == 2 * 2 * 64 * 64


def test_gradients_reach_the_first_token(model: LanguageModel) -> None:
    rows = tokens(1, 9)
    model.loss(rows, rows).backward()
    assert model.embedding.weight.grad is not None and model.embedding.weight.grad[rows[0, 0]].abs().max() > 0


def test_a_readout_is_neither_causal_nor_decoded() -> None:
    config = ModelConfig.parse({"readout": "summary"})
    assert [config.lacking(name) for name in ("causal", "decode", "segments")] == [["readout summary"]] * 2 + [[]]


def test_a_multi_token_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"readout: got 'summary with width=128 and mtp'"):
        ModelConfig.parse({"readout": "summary", "mtp": {}})


def test_without_one_the_identity_does_not_name_it() -> None:
    assert "readout" not in ModelConfig().canonical()
