"""Probe, fine-tuning and prompting on small models and on problems whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import small_model
from scipy.optimize import minimize
from tokenizers import Tokenizer, models, pre_tokenizers

from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.evaluation.human_values.arguments import VALUES
from workbench.evaluation.human_values.fine_tuning import HEADS, Recipe, fine_tune, parameter_groups
from workbench.evaluation.human_values.probe import fit, probe
from workbench.evaluation.human_values.prompting import prompt, prompt_scores
from workbench.evaluation.human_values.states import encode, hidden_states
from workbench.evaluation.suites import Settings
from workbench.model import LanguageModel

SETTINGS = Settings(batch_size=4, context=16)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return small_model(pattern="full gdn", mixers={"gdn": {"chunk": 8}}).requires_grad_(False)


def rows(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(300, size=int(n)).tolist() for n in generator.integers(2, longest, count)]


# -- states


def test_states_are_those_of_single_texts(model: LanguageModel) -> None:
    """Pooled over each text alone, whatever else is in its batch."""
    texts = rows(7)
    states = hidden_states(model, texts, SETTINGS)
    assert states.shape == (3, 2, 7, 64)
    for index, row in enumerate(texts):
        tokens = torch.tensor([row])
        with torch.no_grad():
            x = model.embedding(tokens)
            outputs = [x]
            for block in model.blocks:
                outputs.append(x := block(x))
        for layer, out in enumerate(outputs):
            torch.testing.assert_close(states[layer, 0, index], out[0].mean(0), atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(states[layer, 1, index], out[0, -1], atol=2e-5, rtol=1e-4)


def test_hooks_are_removed(model: LanguageModel) -> None:
    hidden_states(model, rows(2), SETTINGS)
    assert not any(module._forward_hooks for module in model.modules())


# -- probe


def objective(weights: np.ndarray, x: np.ndarray, y: np.ndarray, penalty: float) -> float:
    logits = x @ weights[:-1] + weights[-1]
    return float((np.logaddexp(0, logits) - y * logits).mean() + penalty / 2 * (weights[:-1] ** 2).sum())


def test_regressions_agree_with_scipy() -> None:
    generator = np.random.default_rng(0)
    x, penalty = generator.normal(size=(80, 5)), 0.05
    y = (x @ generator.normal(size=(5, 3)) + generator.normal(size=(80, 3)) > 0.5).astype(float)
    weights = fit(torch.from_numpy(x), torch.from_numpy(y), penalty).numpy()
    for j in range(3):
        solved = minimize(objective, np.zeros(6), (x, y[:, j], penalty), options={"gtol": 1e-8})
        assert np.abs(weights[:, j] - solved.x).max() < 2e-3


def test_the_informative_block_and_pooling_are_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [(torch.rand(n, 4, generator=generator) < 0.4).numpy() for n in (200, 100, 50)]
    states = [torch.randn(3, 2, len(part), 8, generator=generator) for part in labels]
    for part, truth in zip(states, labels):
        part[2, 1, :, :4] += 6 * torch.from_numpy(truth).float()
    found = probe(states, labels[:2], [1e-2, 1.0])
    assert (found.block, found.pool, found.penalty) == (2, "last", 1e-2)
    assert ((found.values[1] > 0) == labels[2]).mean() > 0.95


# -- fine-tuning


def task(count: int, seed: int) -> tuple[list[list[int]], np.ndarray]:
    """Texts whose labels are the presence of tokens 1 and 2."""
    generator = np.random.default_rng(seed)
    labels = generator.random((count, 2)) < 0.5
    texts = []
    for row in labels:
        text = generator.integers(10, 300, 5).tolist() + [token for token, has in zip((1, 2), row) if has]
        texts.append([text[i] for i in generator.permutation(len(text))])
    return texts, labels


@pytest.mark.parametrize("head", sorted(HEADS))
def test_fine_tuning_learns(model: LanguageModel, head: str) -> None:
    parts = [task(n, seed) for seed, n in enumerate((384, 96))]
    recipe = Recipe(head=head, learning_rates=(3e-3,), epochs=8)  # type: ignore[arg-type]
    tuned = fine_tune(model, [texts for texts, _ in parts], [labels for _, labels in parts], recipe, SETTINGS)
    assert tuned.validation_loss < 0.6  # ln 2 without knowledge


def test_the_model_is_left_as_it_is(model: LanguageModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts, labels = task(8, 0)
    fine_tune(model, [texts, texts], [labels, labels], Recipe(learning_rates=(1e-2,), epochs=1), SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_learning_rate_of_least_validation_loss_is_chosen(model: LanguageModel) -> None:
    parts = [task(n, seed) for seed, n in enumerate((64, 32))]
    texts, labels = [part[0] for part in parts], [part[1] for part in parts]
    found = fine_tune(model, texts, labels, Recipe(learning_rates=(1e-12, 1e-3), epochs=4), SETTINGS)
    single = fine_tune(model, texts, labels, Recipe(learning_rates=(1e-3,), epochs=4), SETTINGS)
    assert found.learning_rate == 1e-3 and found.validation_loss == single.validation_loss


def test_learning_rates_fall_with_the_depth(model: LanguageModel) -> None:
    head = HEADS["linear"](64, 20, 0)
    groups = parameter_groups(model, head, Recipe(layer_decay=0.5), 1.0)
    rate = {id(group["params"][0]): group["lr"] for group in groups}
    wanted = [(head, 1.0), (model.norm, 1.0), (model.blocks[1], 1.0), (model.blocks[0], 0.5), (model.embedding, 0.25)]
    for module, factor in wanted:
        assert {rate[id(parameter)] for parameter in module.parameters()} == {factor}


# -- prompting


def word_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Every word with its space is a token."""
    splitter = pre_tokenizers.Split(" ", "merged_with_next")
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(sorted(words))}))
    tokenizer.pre_tokenizer = splitter
    return tokenizer


TEXTS = ["a, supporting, b", "b, against, a a"]


@pytest.mark.parametrize("answers", [(" yes", " no"), (" yes it", " no")])
def test_prompt_scores_are_differences_of_log_probabilities(
    model: LanguageModel, answers: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.evaluation.human_values.prompting.ANSWERS", answers)
    tokenizer = word_tokenizer(
        [prompt(text, value) + answer for text in TEXTS for value in VALUES for answer in answers]
    )
    found = prompt_scores(model, tokenizer, TEXTS, Settings(4, 128))
    for n, j in ((0, 0), (1, 7), (1, 19)):
        row = tokenizer.encode(prompt(TEXTS[n], VALUES[j])).ids
        scores = []
        for answer in answers:
            ids = tokenizer.encode(answer).ids
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([row + ids])))[0].log_softmax(-1)
            scores.append(sum(float(logits[len(row) - 1 + i, token]) for i, token in enumerate(ids)))
        assert found[n, j] == pytest.approx(scores[0] - scores[1], abs=1e-4)


def test_the_document_symbol_comes_first() -> None:
    tokenizer = word_tokenizer(["a b"])
    assert encode(tokenizer, ["a b"], 9) == [tokenizer.encode("a b").ids]
    tokenizer.add_special_tokens([DOCUMENT_SYMBOL])
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    assert encode(tokenizer, ["a b"], 2)[0][0] == symbol and len(encode(tokenizer, ["a b"], 2)[0]) == 2
