"""Likelihoods are the model's own token losses, whatever the batch and the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import case_models, decoding_models, small_model, small_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.evaluation import Settings
from workbench.evaluation.text_model import TextModel
from workbench.model import LanguageModel

TEXTS = ["step token", "the state of a window", "gate", "model loss step batch value key query norm layer width", "a"]


def text_model(model: LanguageModel, batch_size: int = 4, context: int = 96, **options: Any) -> TextModel:
    return TextModel(model, small_tokenizer(), Settings(batch_size, context), **options)


def causal_models() -> list[str]:
    return [name for name, fields in case_models().items() if not small_model(**fields).config.lacking("causal")]


def model_of(name: str) -> LanguageModel:
    """In fp64 the model of many layers that choose experts or blocks: rounding would decide between equal ones."""
    model = small_model(**case_models()[name])
    return model.double() if name == "hybrid" else model


@torch.no_grad()
def own_losses(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Loss of every token after the first, by the model alone."""
    tokens_BT = torch.tensor([ids])
    return model.token_losses(tokens_BT[:, :-1], tokens_BT[:, 1:])[0]


@pytest.mark.parametrize("name", causal_models())
def test_likelihoods_are_the_token_losses_of_every_model(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(name)
    subject = text_model(model)
    pairs = [subject.pair(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXTS]
    found = dict(subject.likelihoods(pairs))
    for number, (context, continuation) in enumerate(pairs):
        losses = own_losses(model, [*context, *continuation])[-len(continuation) :]
        assert found[number].logprob == pytest.approx(-float(losses.double().sum()), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["full-0", "gdn-0", "nsa-0", "hybrid"])
def test_batch_and_padding_do_not_matter(name: str) -> None:
    torch.manual_seed(1)
    model = model_of(name)
    pairs = [
        ([0, *torch.randint(1, 300, (n,)).tolist()], torch.randint(1, 300, (m,)).tolist())
        for n, m in [(3, 2), (70, 5), (9, 9), (1, 1)]
    ]
    alone = {n: next(iter(text_model(model, 1).likelihoods([pair])))[1] for n, pair in enumerate(pairs)}
    together = dict(text_model(model, 8).likelihoods(pairs))
    for number, likelihood in alone.items():
        assert together[number].logprob == pytest.approx(likelihood.logprob, rel=1e-5, abs=1e-4)
        assert together[number].is_greedy == likelihood.is_greedy


def test_continuations_of_one_token_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    subject, rows = text_model(model), []
    monkeypatch.setattr(model, "forward", _recording(model, rows))
    found = dict(subject.likelihoods([([0, 5, 6], [token]) for token in (7, 8, 9)]))
    assert rows == [1] and len(found) == 3
    losses = [float(own_losses(model, [0, 5, 6, token])[-1]) for token in (7, 8, 9)]
    assert [-found[n].logprob for n in range(3)] == pytest.approx(losses, rel=1e-5)


def _recording(model: LanguageModel, rows: list[int]) -> Any:
    forward = model.forward

    def call(tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        rows.append(len(tokens_BT))
        return forward(tokens_BT, **options)

    return call


def test_greedy_is_what_the_engine_writes() -> None:
    torch.manual_seed(2)
    model = small_model()
    subject = text_model(model)
    context = subject.encode("step token")
    new = Engine(model, stop_tokens=()).generate([context], Sampling(max_tokens=3, temperature=0)).tokens[0]
    other = [*new[:2], (new[2] + 1) % 300]
    found = dict(subject.likelihoods([(context, new), (context, other)]))
    assert [found[n].is_greedy for n in (0, 1)] == [True, False]


def test_a_long_context_loses_its_beginning() -> None:
    model = small_model()
    context = torch.randint(1, 300, (40,)).tolist()
    ((_, cut),) = text_model(model, max_length=8).likelihoods([(context, [3, 4])])
    ((_, short),) = text_model(model).likelihoods([(context[-7:], [3, 4])])
    assert cut.logprob == pytest.approx(short.logprob, rel=1e-5)


@pytest.mark.parametrize("size", [0, 9])
def test_a_continuation_must_fit(size: int) -> None:
    with pytest.raises(ConfigError, match=r"max_length: .*1 to 8 tokens"):
        list(text_model(small_model(), max_length=8).likelihoods([([0], [1] * size)]))


@pytest.mark.parametrize("length", [2, 9, 17, 30])
def test_a_rolling_likelihood_counts_every_token_once_with_most_context(length: int) -> None:
    torch.manual_seed(3)
    model = small_model()
    text = torch.randint(1, 300, (length,)).tolist()
    ((_, logprob),) = text_model(model, max_length=8).rolling([text])
    expected, counted = 0.0, 0
    for first in range(0, length - 1, 8):
        end = min(first + 8, length - 1)
        start = max(0, min(first, length - 1 - 8))
        losses = own_losses(model, text[start : end + 1])
        expected -= float(losses[first - start :].sum())
        counted += end - first
    assert counted == length - 1
    assert logprob == pytest.approx(expected, rel=1e-5)


def test_rolling_keeps_the_texts_apart() -> None:
    model = small_model()
    texts = [[0], [0, 5], [0, *range(10, 40)], [0, 7, 8]]
    found = dict(text_model(model, 2).rolling(texts))
    assert [found[n] for n in range(4)] == pytest.approx(
        [-float(own_losses(model, t).sum()) if len(t) > 1 else 0 for t in texts], rel=1e-5
    )


def test_the_boundary_belongs_to_the_continuation() -> None:
    subject = text_model(small_model())
    context, continuation = subject.pair("state window ", "gate")
    assert subject.tokenizer.decode(context) == "state window"
    assert subject.tokenizer.decode(continuation) == " gate"


def test_a_token_over_the_boundary_belongs_to_the_continuation() -> None:
    subject = text_model(small_model())
    assert len(subject.encode("gate")) == 2  # the document symbol and one token
    assert subject.pair("ga", "te") == ([0], subject.encode("gate")[1:])


def test_nothing_follows_an_empty_continuation() -> None:
    assert text_model(small_model()).pair("gate", "")[1] == []


def test_an_empty_context_is_the_document_symbol() -> None:
    context, continuation = text_model(small_model()).pair("", "gate")
    assert context == [0] and len(continuation) >= 1


def test_a_tokenizer_that_marks_no_beginning_gets_a_stop_token_before_the_text() -> None:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.add_tokens(["a", "b"])
    model = small_model()
    model.stop_tokens = frozenset({2})
    subject = TextModel(model, plain, Settings(1, 8))
    assert subject.encode("ab")[0] == 2 and subject.pair("", "ab")[0] == [2]


@pytest.mark.parametrize("name", sorted({"full-0", "hybrid"} & set(decoding_models())))
def test_text_ends_before_a_stop_string(name: str) -> None:
    torch.manual_seed(4)
    model = small_model(**case_models()[name])
    subject = text_model(model)
    prompts = [subject.encode(text) for text in TEXTS[:2]]
    whole = dict(subject.generate(prompts, 9))
    stop = whole[0][4:6]
    until = dict(subject.generate(prompts, 9, [stop]))
    assert until == {n: text.split(stop)[0] for n, text in whole.items()}


def test_generation_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(5)
    model = small_model()
    prompts = [text_model(model).encode(text) for text in TEXTS]
    assert dict(text_model(model, 1).generate(prompts, 5)) == dict(text_model(model, 8).generate(prompts, 5))


def test_a_prompt_leaves_room_for_its_answer() -> None:
    model, prompt = small_model(), torch.randint(1, 300, (40,)).tolist()
    ((_, text),) = text_model(model, max_length=12).generate([prompt], 4)
    ((_, short),) = text_model(model, max_length=12).generate([prompt[-8:]], 4)
    assert text == short
    with pytest.raises(ConfigError, match="room for a prompt"):
        list(text_model(model, max_length=4).generate([prompt], 4))
