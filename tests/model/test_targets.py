"""The loss counts targets only."""

from __future__ import annotations

import torch

from workbench.model import LanguageModel, ModelConfig


def test_the_gradient_of_a_row_is_that_of_its_targets() -> None:
    model = LanguageModel(ModelConfig(width=32, depth=1, vocabulary=12), seed=0)
    tokens = torch.randint(12, (2, 8))
    targets = torch.full((2, 8), -100)
    targets[0, 3], targets[1, 5] = 4, 2
    model.loss(tokens, targets).backward()
    weight = model.embedding.weight
    got = weight.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    hidden = model(tokens)
    scores = model.logits(torch.stack((hidden[0, 3], hidden[1, 5])))
    torch.nn.functional.cross_entropy(scores, torch.tensor([4, 2])).backward()
    assert torch.allclose(got, weight.grad, atol=1e-6)  # type: ignore[arg-type]
